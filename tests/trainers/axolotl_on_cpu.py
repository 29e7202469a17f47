"""`axolotl train $RECIPE` on a CPU, in this process; $ROWS gets the token ids and labels that it trains on.

axolotl has no key for a CPU, which transformers wants to be told of where a run is in bfloat16.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import axolotl.cli.train
import axolotl.train
from transformers import TrainingArguments

settle = TrainingArguments.__post_init__


def on_cpu(arguments: TrainingArguments) -> None:
    arguments.use_cpu = True
    settle(arguments)


def train(cfg: Any, dataset_meta: Any) -> Any:
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in dataset_meta.train_dataset]
    Path(os.environ["ROWS"]).write_text(json.dumps(rows))
    return axolotl.train.train(cfg=cfg, dataset_meta=dataset_meta)


if __name__ == "__main__":  # processes that read the data begin with this file too
    TrainingArguments.__post_init__ = on_cpu
    axolotl.cli.train.train = train
    sys.argv = sys.argv[:1]  # it parses options of its own
    axolotl.cli.train.do_cli(os.environ["RECIPE"])
