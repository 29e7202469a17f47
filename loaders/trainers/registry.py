"""The trainers that are known, by the names that `--for` takes."""

from __future__ import annotations

from collections.abc import Mapping

from .interface import Trainer
from .open_instruct import OpenInstruct

TRAINERS: Mapping[str, Trainer] = {trainer.name: trainer for trainer in (OpenInstruct(),)}
