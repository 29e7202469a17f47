"""`bash $RECIPE` on a CPU, with Open Instruct's finetune.py in this process, from the checkout $CHECKOUT.

What it imports for several GPUs, for trackers and for reinforcement learning, and what is not installed of it, is empty
here. 4-bit models are loaded to a CPU in place of the first GPU.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from transformers import AutoModelForCausalLM

EMPTY = (
    "absl",
    "beaker",
    "deepspeed",
    "immutabledict",
    "langdetect",
    "nltk",
    "olmo_core",
    "ray",
    "requests",
    "tiktoken",
    "wandb",
)


class Empty(MagicMock):
    """A module in which there is everything."""

    __path__ = ()


class Finder:
    """Finds such a module for each name that is not installed."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, Finder, is_package=True) if name.partition(".")[0] in empty else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> Any:
        return Empty(name=spec.name)

    @staticmethod
    def exec_module(_: Any) -> None:
        pass


folder = Path(os.environ["ROWS"]).parent
shutil.copytree(Path(os.environ["CHECKOUT"]) / "open_instruct", folder / "open_instruct")
# the recipe's own command says what it was given
command = folder / "accelerate"
command.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > words\n')
command.chmod(0o755)
path = f"{folder}:{os.environ['PATH']}"
subprocess.run(["bash", os.environ["RECIPE"]], env={**os.environ, "PATH": path}, cwd=folder, check=True, timeout=60)
words = (folder / "words").read_text().split("\0")[:-1]
assert words[:3] == ["launch", "--mixed_precision", "bf16"]
os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}

empty = {name for name in EMPTY if find_spec(name) is None}
sys.meta_path.insert(0, Finder)
load = AutoModelForCausalLM.from_pretrained


def on_cpu(*arguments: Any, **options: Any) -> Any:
    if "device_map" in options:
        options["device_map"] = {"": "cpu"}
    return load(*arguments, **options)


AutoModelForCausalLM.from_pretrained = on_cpu
sys.path.insert(0, str(folder))
sys.argv = words[3:]
runpy.run_path(str(folder / words[3]), run_name="__main__")
