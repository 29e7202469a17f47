"""The trainers that are known, by the names that `--for` takes."""

from __future__ import annotations

from collections.abc import Mapping

from .accelerate_fsdp import AccelerateFsdp
from .axolotl import Axolotl
from .interface import Trainer
from .llamafactory import LlamaFactory
from .open_instruct import OpenInstruct
from .transformers_trainer import TransformersTrainer
from .trl import Trl

TRAINERS: Mapping[str, Trainer] = {
    trainer.name: trainer
    for trainer in (Trl(), TransformersTrainer(), AccelerateFsdp(), Axolotl(), LlamaFactory(), OpenInstruct())
}
