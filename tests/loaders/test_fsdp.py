"""QLoRA under FSDP2 as accelerate sets it up: two gloo processes on a CPU, `mixed_precision: bf16`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.memory.estimate import estimate_training_memory
from ftload.loaders.memory.sharding import Sharding
from ftload.loaders.memory.training_memory import TrainingMemory
from ftload.loaders.memory.training_run import TrainingRun

from ..cli.runs import prepare
from ..experts.checkpoints import random_model
from ..parity.models import write_model
from ..tokenizers import write_llama
from .plans import make_plan
from .two_fsdp_processes import batch, loaded, optimizer_of, trained

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = {
    "uint8": ("llama", "uint8"),
    "bfloat16": ("llama", "bfloat16"),
    "float16": ("llama", "float16"),
    "qwen3_moe": ("qwen3_moe", "bfloat16"),
    "gpt_oss": ("gpt_oss", "bfloat16"),
    "gpt_oss as uint8": ("gpt_oss", "uint8"),
}
"""Name to the model, and the dtype that its codes are stored under."""
TOLERANCE = 2**-6
"""FSDP computes in bfloat16, where one process has float32: each operation rounds by up to 2^-9, and 0.6 to 0.9 % of
the step were measured."""
Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsdp")
    for name, (model, storage) in CASES.items():
        source = root / f"{model} source"
        if not source.exists():
            if model == "llama":
                write_model(source, model, vocab_size=144, dtype="bfloat16")
            else:
                random_model(model, vocab_size=144).save_pretrained(source)
            write_llama(source, vocab_size=128)
        experts = [] if model == "llama" else ["--lora_experts", "4"]
        prepare(source, root / name, "--use_qlora", "--bnb_4bit_quant_storage", storage, *experts)
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    """One step of two processes, for each case."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.loaders.two_fsdp_processes", str(root), *(str(root / name) for name in CASES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    for count in (14, 8):  # of the uint8 cases alone
        assert f"{count} non-floating frozen Params4bit. Excluding from FSDP2" in done.stderr
    assert done.stderr.count("non-floating frozen") == 2
    return {name: torch.load(root / f"{name}.pt") for name in CASES}


@pytest.fixture(scope="module")
def alone(root: Path) -> Runs:
    """The same steps of one process without FSDP, whose loss is the mean of both sequences'."""
    found = {}
    for name in CASES:
        model = loaded(root / name)
        optimizer, before = optimizer_of(model), trained(model)
        losses = [model(input_ids=ids[None], labels=ids[None]).loss for ids in batch()]
        torch.stack(losses).mean().backward()
        optimizer.step()
        change = {key: value - before[key] for key, value in trained(model).items()}
        found[name] = {"losses": torch.stack(losses).detach(), "change": change}
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all tensors together, as a share of the second."""
    assert one.keys() == other.keys()
    apart = sum((one[name] - value).double().square().sum() for name, value in other.items())
    return float((apart / sum(value.double().square().sum() for value in other.values())) ** 0.5)


@pytest.mark.parametrize("name", ["bfloat16", "qwen3_moe", "gpt_oss"])
def test_every_parameter_is_divided_and_a_step_is_that_of_one_process(runs: Runs, alone: Runs, name: str) -> None:
    run = runs[name]
    assert len(run["quantised"]) >= 14
    assert run["held"].keys() == run["nbytes"].keys() >= set(run["quantised"])
    for parameter, size in run["nbytes"].items():
        assert run["held"][parameter] == size / 2, parameter
    torch.testing.assert_close(run["losses"], alone[name]["losses"], rtol=2**-8, atol=0)
    for parameter, value in alone[name]["change"].items():  # of experts that no token reached, zeros
        assert run["change"][parameter].any() == value.any(), parameter
    assert distance(run["change"], alone[name]["change"]) < TOLERANCE


def test_as_uint8_every_process_holds_the_whole_base(runs: Runs, alone: Runs) -> None:
    """It is left out; training is the same, to the bit."""
    run = runs["uint8"]
    assert len(run["quantised"]) == 14
    assert run["nbytes"].keys() - run["held"].keys() == set(run["quantised"])
    assert distance(run["change"], runs["bfloat16"]["change"]) == 0
    assert distance(run["change"], alone["uint8"]["change"]) < TOLERANCE


def test_the_layer_that_ftload_has_for_some_experts_is_divided_in_any_case(runs: Runs, alone: Runs) -> None:
    run = runs["gpt_oss as uint8"]
    whole = run["nbytes"].keys() - run["held"].keys()
    assert whole == {name for name in run["quantised"] if ".experts." not in name}
    assert len(run["quantised"]) - len(whole) == 16
    assert distance(run["change"], runs["gpt_oss"]["change"]) == 0
    assert distance(run["change"], alone["gpt_oss"]["change"]) < TOLERANCE


def test_codes_under_another_dtype_than_mixed_precision_are_spoilt(runs: Runs, alone: Runs) -> None:
    """FSDP casts floats to bfloat16 before it gathers them: float16 codes are rounded, and nothing says so."""
    assert distance(runs["float16"]["change"], alone["float16"]["change"]) > 0.5
    assert distance(alone["float16"]["change"], alone["bfloat16"]["change"]) == 0


@pytest.mark.parametrize("name", CASES)
def test_a_process_holds_what_is_planned(runs: Runs, root: Path, tmp_path: Path, name: str) -> None:
    run, (model, storage) = runs[name], CASES[name]
    experts = [] if model == "llama" else ["--lora_experts", "4"]
    words = ["--use_qlora", "--lora_rank", "8", "--bnb_4bit_quant_storage", storage, *experts]
    plan, flags = make_plan(root / f"{model} source", tmp_path, *words)
    planned = estimate_training_memory(plan, flags, TrainingRun(sharding=Sharding(method="fsdp", gpus=2)))
    assert isinstance(planned, TrainingMemory)
    held = {parameter: run["held"].get(parameter, size) for parameter, size in run["nbytes"].items()}
    adapter = sum(size for parameter, size in held.items() if ".lora_" in parameter)
    parts = {part.name: part.bytes for part in planned.parts}
    assert parts["adapter"] == adapter
    assert parts["weights"] == sum(held.values()) - adapter + run["statistics"]
