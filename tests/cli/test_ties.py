"""Tied in the configuration and both in the checkpoint: whether they are equal is told by the weights alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..conftest import Result
from ..hub import LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama

Ftload = Callable[..., Result]
FILE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS, WIDTH = 70_000, 64
"""Together more elements than are compared at once."""
DIFFERENT = (
    f"`{HEAD}` and `{EMBEDDING}` are tied in the configuration but differ in the checkpoint: both are kept, untied, as "
    "transformers does"
)
UNDECIDED = (
    f"`{HEAD}` and `{EMBEDDING}` are tied in the configuration and both in the checkpoint: taken to be equal, as they "
    "are in 49,152 of 4,480,000 elements; `prepare` compares all of them"
)
CHANGED = {"equal": None, "last": ROWS * WIDTH - 1, "between": 100_000}
"""The element in which the head differs, by the model's name; what a sample holds is the last one alone."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tied models with a head in the file, by name."""
    made = {}
    for name, place in CHANGED.items():
        directory = tmp_path_factory.mktemp("models") / name
        if not made:
            write_model(directory, "llama_tied", vocab_size=ROWS, dtype="bfloat16")
            tensors = load_file(directory / FILE)
        else:
            directory.mkdir()
            (directory / "config.json").write_bytes((made["equal"] / "config.json").read_bytes())
        write_llama(directory)
        head = tensors[EMBEDDING].clone()
        if place is not None:
            head.view(-1)[place] += 1
        save_file({**tensors, HEAD: head}, directory / FILE, metadata={"format": "pt"})
        made[name] = directory
    return made


@pytest.mark.parametrize("name", CHANGED)
def test_here_all_of_both_is_compared(ftload: Ftload, models: dict[str, Path], tmp_path: Path, name: str) -> None:
    result = ftload("plan", "--model", models[name], "--output_dir", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["embeddings"]["tied"] is (name == "equal")
    assert told(plan) == ([] if name == "equal" else [DIFFERENT])


def told(document: dict[str, Any]) -> list[str]:
    return [warning for warning in document["warnings"] if "tied in the configuration" in warning]


def run_all(hub: LoopbackHub, directory: Path, command: str) -> dict[str, dict[str, Any]]:
    """A command for each model, in one process: huggingface_hub reads its environment when it is imported."""
    program = f"""
import contextlib, io, json
from ftload.cli.app import run
documents = {{}}
for name in {list(CHANGED)}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["{command}", "--model", "org/" + name, "--output_dir", name, "--json"]) == 0
    documents[name] = json.loads(out.getvalue())
print(json.dumps(documents))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=hub.env(directory / "home"), cwd=directory, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_of_a_repository_a_plan_reads_a_sample_and_prepare_all(models: dict[str, Path], tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        for name, directory in models.items():
            hub.add(f"org/{name}", directory)
        plans = run_all(hub, tmp_path, "plan")
        header, piece = 65536, 16 * 1024 * 2
        # where one element of the sample differs, the pieces before it have been read, and no more
        assert hub.sent("*.safetensors") == 3 * (header + 6 * piece)
        assert not list(tmp_path.rglob("*.safetensors"))
        reports = run_all(hub, tmp_path, "prepare")
    assert {name: (plan["embeddings"]["tied"], told(plan)) for name, plan in plans.items()} == {
        "equal": (True, [UNDECIDED]), "last": (False, [DIFFERENT]), "between": (True, [UNDECIDED]),
    }  # fmt: skip
    assert {name: (report["embeddings"]["tied"], told(report)) for name, report in reports.items()} == {
        "equal": (True, []), "last": (False, [DIFFERENT]), "between": (False, [DIFFERENT]),
    }  # fmt: skip
    for name, directory in models.items():
        before, after = load_file(directory / FILE), load_file(tmp_path / name / FILE)
        assert after.keys() == before.keys() - ({HEAD} if name == "equal" else set())
        assert all(torch.equal(value, before[tensor]) for tensor, value in after.items())
