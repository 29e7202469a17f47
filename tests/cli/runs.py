"""Running ftload where fixtures of a wider scope can, or at a terminal; looking at what it wrote without its help."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FLAGS = {"standard": [], "liger": ["--use_liger_kernel"], "lora": ["--use_lora"], "qlora": ["--use_qlora"]}
"""What chooses each strategy."""

ENDLESS = """
import time
from ftload.cli.app import main
from ftload.loaders.write.file_writer import FileWriter

write = FileWriter.write

def writing(self, name, values):
    write(self, name, values)
    while True:
        self._advance(0)
        time.sleep(0.01)

FileWriter.write = writing
main()
"""
"""A program that is the command line, but never comes to the end of the first tensor that it writes."""


def wait_for_file(directory: Path, name: str, process: subprocess.Popen[str]) -> None:
    """Until a process has begun a file somewhere in a directory; it must not end before."""
    while not list(directory.rglob(name)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def prepare(model: str | Path, output: Path, *flags: str | Path) -> dict[str, Any]:
    """Run `ftload prepare --json` in this process, which must succeed; returns the report from stdout."""
    from ftload.cli.app import run

    words = ["--model", model, "--output_dir", output, "--lora_rank", "8", "--json", *flags]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run(["prepare", *map(str, words)])
    assert code == 0, out.getvalue()
    return json.loads(out.getvalue())


def at_a_terminal(command: Sequence[str | Path], directory: Path, *, columns: int) -> str:
    """What a command that succeeds shows on a terminal so wide, colours included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm-256color"}
    done = subprocess.Popen(command, stdout=theirs, cwd=directory, env=environment)
    os.close(theirs)
    seen = bytearray()
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
    os.close(ours)
    assert done.wait(600) == 0
    return seen.decode().replace("\r\n", "\n")


def without_colours(shown: str) -> str:
    """The text alone of what a terminal shows."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def headers(directory: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype, shape and data of every tensor in a directory's safetensors files."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry.pop("data_offsets"))
            tensors[name] = {**entry, "data": data[begin:end]}
    return tensors


def list_files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
