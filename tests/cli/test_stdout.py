"""What comes out of stdout is ftload's alone, and it is told when it can't be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Result
from .spoilt import edit_json

FTLOAD = [sys.executable, "-m", "ftload.cli"]


def test_libraries_do_not_write_to_it(model: Path, tmp_path: Path) -> None:
    """tokenizers prints keys that it does not know; with `--json` there must be one document all the same."""
    token = {"content": "<unk>", "special": True, "\x1b[31mwhat": 1}
    edit_json(model / "tokenizer_config.json", added_tokens_decoder={"0": token})
    out = tmp_path / "out"
    for words in (
        ["plan", "--model", model],
        ["prepare", "--model", model, "--output_dir", out, "--use_lora", "--lora_rank", "8"],
        ["verify", out],
        ["inspect", out],
    ):
        done = subprocess.run([*FTLOAD, *words, "--json"], capture_output=True, text=True, check=True)
        assert isinstance(json.loads(done.stdout), dict)
        assert done.stderr == ""
        done = subprocess.run([*FTLOAD, *words], capture_output=True, text=True, check=True)
        assert "Ignored unknown" not in done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_full_disk_behind_it(llama: Path, words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [*FTLOAD, "inspect", llama, *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr == "error: can't write to stdout: No space left on device\n"


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_of_several_processes_the_first_alone_shows_results(
    ftload: Callable[..., Result], llama: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for command in (
            ["inspect", llama],
            ["inspect", llama, llama],
            ["doctor", "--quick"],
            ["plan", "--model", llama],
        ):
            result = ftload(*command, *words)
            assert (result.code, result.err) == (0, "")
            assert bool(result.out) == (rank == "0")


FOUND_WRONG = """
import sys
from types import SimpleNamespace
from ftload.cli.show.output import Output
from ftload.loaders.errors import VerificationError
sys.exit(Output(quiet=True).diagnosis(SimpleNamespace(error=VerificationError("x"))))
"""
"""A result that is an error too, as those of `verify` and `doctor` can be."""


@pytest.mark.parametrize(("words", "code"), [(["-m", "ftload.cli", "inspect", "."], 4), (["-c", FOUND_WRONG], 7)])
def test_an_error_that_nobody_reads_has_its_code(tmp_path: Path, words: list[str], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, stderr=writing, stdout=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stdout) == (code, b"")


def test_nobody_reads_it(llama: Path) -> None:
    show = f"inspect {llama} --tensors"
    for command in (
        f"{show} | head -1",
        f"{show} --json | true",
        "prepare --help | true",
        f"{show} >&-",
        f"{show} >&- 2>&-",
    ):
        command = f"set -o pipefail; {sys.executable} -m ftload.cli {command}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
