"""`bash $RECIPE` on a CPU, with LLaMA-Factory in this process.

$ROWS gets the token ids and labels that it trains on. `pure_bf16` is asked of a GPU alone, and torchaudio, which it
imports, has no build for this torch without CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

rows_file = Path(os.environ["ROWS"])
folder = rows_file.parent
sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.hparams import parser  # noqa: E402
from llamafactory.train import tuner  # noqa: E402
from llamafactory.train.sft import workflow  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

settle, read = TrainingArguments.__post_init__, workflow.get_dataset


def on_cpu(arguments: TrainingArguments) -> None:
    arguments.use_cpu = True
    settle(arguments)


def get_dataset(*arguments: Any, **options: Any) -> Any:
    data = read(*arguments, **options)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in data["train_dataset"]]
    rows_file.write_text(json.dumps(rows))
    return data


# the recipe's own command keeps the files that it makes, and says what it was given
command = folder / "llamafactory-cli"
command.write_text(
    '#!/bin/bash\nset -e\ncp -r "$(dirname "$2")" "$FOLDER/files"\nprintf "%s\\0" "$@" > "$FOLDER/words"\n'
)
command.chmod(0o755)
path = f"{folder}:{os.environ['PATH']}"
subprocess.run(
    ["bash", os.environ["RECIPE"]], env={**os.environ, "FOLDER": str(folder), "PATH": path}, check=True, timeout=60
)
train, file, place, end = (folder / "words").read_text().split("\0")
assert (train, place, end) == ("train", f"dataset_dir={Path(file).parent}", "")

parser.is_torch_bf16_gpu_available = lambda: True
TrainingArguments.__post_init__ = on_cpu
workflow.get_dataset = get_dataset
sys.argv = ["llamafactory-cli", f"{folder}/files/train.yaml", f"dataset_dir={folder}/files"]
tuner.run_exp()
