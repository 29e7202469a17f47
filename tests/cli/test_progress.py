"""What a person at a terminal sees while it works: bytes, tensors, a rate and the time left; then the table alone."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path


def test_progress_at_a_terminal(llama: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = ["--model", llama, "--output_dir", tmp_path / "out", "--use_lora", "--lora_rank", "20000"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ftload.cli", "prepare", *map(str, words)],
        stdout=theirs, stderr=theirs, env=environment,
    )  # fmt: skip
    os.close(theirs)
    seen = bytearray()
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert process.wait(60) == 0, text[-2000:]
    assert re.search(r"write .*\d/\d+(\.\d)? [MG]B .*\d+/28 tensors .*[MG]B/s .*\d:\d\d:\d\d", text), text[:2000]
    assert text.rstrip().endswith(f"model, tokenizer = load_prepared({str(tmp_path / 'out')!r})")
