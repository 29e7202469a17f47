"""The simulation of TRL's loss against TRL's own, both on `meta`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.memory.step.losses import step_loss

from . import trl_loss_on_meta
from .script_runs import needs, python_of
from .trl_loss_on_meta import BATCH, CASES, LENGTH, measure


@needs("trl")
def test_what_is_allocated_and_saved_is_what_trl_allocates_and_saves() -> None:
    command = [str(python_of("trl")), trl_loss_on_meta.__file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent, check=True)
    theirs = json.loads(run.stdout.splitlines()[-1])

    def loss(model: Any, inputs: dict[str, Any], dtype: torch.dtype | None) -> torch.Tensor:
        return step_loss(model, inputs, "chunks", product_dtype=dtype)[0]

    for case in CASES:
        # beside, TRL holds a number or two a token: masks, log-probabilities, entropies
        assert measure(case, loss) == pytest.approx(theirs[case], abs=5 * BATCH * LENGTH), case
