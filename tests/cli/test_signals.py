"""Asked to stop, it tidies up: the exit code says by which signal, and nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import ENDLESS, wait_for_file


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_the_middle(tmp_path: Path, name: str, code: int) -> None:
    model = tmp_path / "model"
    write_model(model, "llama", vocab_size=136, dtype="bfloat16")
    write_llama(model, vocab_size=128)
    work = tmp_path / "work"
    work.mkdir()
    words = ["prepare", "--model", model, "--output_dir", work / "out", "--use_lora"]
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_file(work, "adapter_model.safetensors", process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (code, "", "error: interrupted\n")
    assert list(work.iterdir()) == []
