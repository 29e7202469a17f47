"""Credentials that nothing but their place gives away reach neither a message nor a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Result

Ftload = Callable[..., Result]
SECRET = "a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d6e7f8a9b0"
"""As a key of Weights & Biases looks: like a commit."""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--model", f"https://user:{SECRET}@127.0.0.1/a/b/c/d"], 3),
        (["--model", f"s3://bucket/model?X-Amz-Signature={SECRET}"], 3),
        (["--model", f"./{SECRET[:4]}", "--wandb_api_key", SECRET], 2),
        (["--model", "m", f"--wandb_api_key={SECRET}"], 2),
        (["--model", "m", "--learning_rate", f"https://user:{SECRET}@host"], 2),
        (["--model", "m", f"https://host/run.yaml?token={SECRET}"], 2),
        (["run.yaml"], 2),
    ],
)
def test_errors(ftload: Ftload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"model: m\nwandb_api_key: {SECRET}\nseed: https://user:{SECRET}@host\n")
    for more in ([], ["--debug"], ["--json"]):
        result = ftload("prepare", *words, *more)
        assert result.code == code, result.err
        assert SECRET not in result.out + result.err


def test_what_the_environment_holds(tmp_path: Path) -> None:
    environment = {
        **os.environ, "HF_HOME": str(tmp_path), "HF_TOKEN": SECRET, "HF_ENDPOINT": f"http://me:{SECRET}@127.0.0.1:9",
    }  # fmt: skip
    command = [sys.executable, "-m", "ftload.cli", "prepare", "--model", "org/model", "--debug", "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["message"].startswith("can't reach the hub at `http://***@127.0.0.1:9`: ")
    assert SECRET not in done.stdout + done.stderr


def test_reports(ftload: Ftload, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    words = [
        "--hf_repo_url", f"https://me:{SECRET}@hub/me/x", "--gs_bucket_path", f"gs://key:{SECRET}@bucket/x",
        "--dataset_mixer_list", f"https://host/data.jsonl?Signature={SECRET}", "1.0",
    ]  # fmt: skip
    result = ftload("prepare", "--model", llama, "--output_dir", tmp_path / "out", "--use_lora", *words, "--json")
    assert result.code == 0, result.err
    told = {name: row["value"] for name, row in json.loads(result.out)["arguments"].items()}
    assert told["hf_repo_url"] == "https://***@hub/me/x"
    assert told["gs_bucket_path"] == "gs://***@bucket/x"
    assert told["dataset_mixer_list"] == ["https://host/data.jsonl?***", "1.0"]
    assert SECRET not in result.out + result.err
    assert not [path for path in (tmp_path / "out").rglob("*.*") if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("words", [["--nonsense"], ["--model", "m", "--base", "reference"]])
def test_of_several_processes_the_first_alone_prints_a_document(
    ftload: Ftload, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """An error in the flags, and one that is found once they are read."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = ftload("prepare", *words, "--json")
        assert result.code == 2
        assert result.err.startswith("error: ")
        if rank == "0":
            assert json.loads(result.out)["error"]["code"] == 2
        else:
            assert result.out == ""
