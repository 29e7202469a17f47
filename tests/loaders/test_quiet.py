"""What bitsandbytes says of optional kernels reaches nobody who uses ftload; what is wrong with it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ..cli.runs import prepare

TALKING = """
import logging
import sys


class Talking:
    def find_spec(self, name, *_):
        if name == "bitsandbytes":
            logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
            logger.warning("Failed to load CPU gemm_4bit_forward")
            logger.error("its library is broken")


sys.meta_path.insert(0, Talking())
"""
"""bitsandbytes that warns and complains while it is imported, on whatever processor."""
LOAD = "from ftload.loaders import load_prepared; load_prepared(sys.argv[1])"
ENCODE = (
    "import torch; from ftload.loaders.nf4.encode import encode_with_bitsandbytes; "
    "encode_with_bitsandbytes(torch.ones(64))"
)


@pytest.mark.parametrize(("flags", "program"), [("--use_qlora", LOAD), ("--use_lora", LOAD), (None, ENCODE)])
def test_warnings_of_kernels_are_not_shown_and_errors_are(
    llama: Path, tmp_path: Path, flags: str | None, program: str
) -> None:
    if flags is not None:
        prepare(llama, tmp_path / "out", flags)
    command = [sys.executable, "-W", "ignore", "-c", TALKING + program, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Failed to load CPU gemm" not in done.stderr
    assert "its library is broken" in done.stderr
