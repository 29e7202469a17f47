"""Asked to stop, it tidies up: the exit code says by which signal, and nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..parity.models import write_model
from ..tokenizers import write_llama


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_the_middle(tmp_path: Path, name: str, code: int) -> None:
    model = tmp_path / "model"
    write_model(model, "llama", vocab_size=136, dtype="bfloat16")
    write_llama(model, vocab_size=128)
    work = tmp_path / "work"
    work.mkdir()
    # drawing an adapter of this rank takes longer than the test waits
    words = ["--model", model, "--output_dir", work / "out", "--use_lora", "--lora_rank", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ftload.cli", "prepare", *map(str, words), "--max_memory", "100GB"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(work.rglob("adapter_model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", "error: interrupted\n")
    assert list(work.iterdir()) == []
