"""What the simulated step of a trainer saves for the backward pass, of the batch that a watched run began with."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftload.loaders.memory.step.setting import Batch, training_setting
from ftload.loaders.memory.step.simulation import Simulation
from ftload.loaders.memory.training_run import TrainingRun

from tests.loaders.plans import make_plan


def saved_bytes(report: dict[str, Any], trainer: str, attention: str, batch: tuple[int, int]) -> int:
    """Of what the report of a prepared directory says was prepared, on a CPU; `batch` is sequences and tokens."""
    given = {name: one["value"] for name, one in report["arguments"].items() if one["origin"] == "cli"}
    model = Path(given.pop("model_name_or_path"))
    for name in ("output_dir", "quiet"):
        given.pop(name)
    # no FlashAttention runs on a CPU, and axolotl's dtypes depend on it
    words = [f"--{name}={str(value).lower()}" for name, value in {**given, "use_flash_attn": False}.items()]
    with tempfile.TemporaryDirectory() as work:
        plan, flags = make_plan(model, Path(work), *words)
    setting = training_setting(plan, flags, TrainingRun(trainer=trainer))
    simulation = Simulation(plan.skeleton.model, replace(setting, attention=attention, device="cpu"))
    return simulation.run(Batch(size=batch[0], length=batch[1], padded=True)).saved
