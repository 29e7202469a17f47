"""What commands show on terminals of 80 and 120 columns, compared with what is stored in `screens/`.

`FTLOAD_RENEW_SCREENS=1 pytest tests/cli/test_screens.py` writes them anew: read the difference before it is committed.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ftload.loaders.system.versions import ftload_version

from ..parity.models import write_model
from ..tokenizers import write_llama, write_smollm2
from .runs import without_colours

STORED = Path(__file__).parent / "screens"
PREPARE = "llama --use_qlora --lora_rank 8 --output_dir out"
SCREENS = {
    "prepare": f"prepare {PREPARE}",
    "plan": f"plan {PREPARE}",
    "plan of experts": "plan mixture --use_qlora --output_dir other",
    "verify": "verify out --quick",
    "inspect prepared": "inspect out",
    "inspect adapter": "inspect out/adapter",
    "inspect mixture": "inspect mixture",
    "inspect tensors": "inspect llama --tensors *q_proj*",
    "inspect before after": "inspect llama mixture",
    "doctor": "doctor",
    "help": "--help",
    "help of inspect": "inspect --help",
}
ERRORS = {
    "error of a flag": "prepare llama --use_qlora --lora_target_modules w1 w2 --lora_rnak 8 --output_dir out",
    "error of a place": "prepare llama --output_dir llama --quiet",
}
WIDTHS = (80, 120)
PROGRAM = """
import os
import sys

from ftload.cli.app import run
from ftload.cli.show.output import Output
from ftload.loaders.doctor.diagnosis import Ability, Diagnosis
from ftload.loaders.doctor.finding import Finding
from ftload.loaders.doctor.hub import look_at_hub

problem = "can't reach the hub at `https://huggingface.co`: [Errno -3] Temporary failure in name resolution"
yes, no = Ability(works=True, detail="on the CPU alone"), Ability(works=False, detail="liger-kernel is broken")
diagnosis = Diagnosis(
    findings=(
        Finding(name="processors", state="ok", detail="2 threads"),
        Finding(name="liger-kernel", state="broken", detail="0.1.0: no such symbol", mend="pip install liger-kernel"),
        Finding(name="flash-attn", state="absent", detail="not installed: it runs on a GPU alone"),
        next(look_at_hub({"problem": problem}, offline=False)),
        next(look_at_hub(None, offline=True)),
    ),
    preparing={"standard": yes, "liger": no}, training={"standard": yes, "liger": no}, wanted=(),
)

for words in sys.argv[1:]:
    for columns in ("80", "120"):
        os.environ["COLUMNS"] = columns
        print(f"\\n=== {words}, {columns}", flush=True)
        if words == "doctor":  # of a machine that is everywhere the same
            Output().diagnosis(diagnosis)
        else:
            run(words.split(" "))
        sys.stdout.flush()
"""
"""Command lines one after another in one process, so that libraries are imported once."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the screens are others")


@pytest.fixture(scope="module")
def shown() -> Iterator[dict[str, str]]:
    """By the command line and the width, what was on the terminal, without what differs from run to run."""
    directory = Path(tempfile.mkdtemp(prefix="ftload-screens-", dir="/tmp"))  # its length has a part in what is folded
    try:
        write_model(directory / "llama", "llama_tied", vocab_size=128, dtype="bfloat16")
        write_smollm2(directory / "llama")
        write_model(directory / "mixture", "qwen3_moe", vocab_size=128, dtype="bfloat16")
        write_llama(directory / "mixture")
        text = run(directory, *SCREENS.values()) + run(directory, *ERRORS.values(), with_stderr=True)
        screens = re.split("^=== (.*)\n", normalised(text.replace(str(directory), "/work")), flags=re.MULTILINE)[1:]
        yield dict(zip(screens[::2], screens[1::2], strict=True))
    finally:
        shutil.rmtree(directory)


def run(directory: Path, *command_lines: str, with_stderr: bool = False) -> str:
    """What these show at a terminal, one after another: errors with stderr, which else has the progress."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TERMINAL_WIDTH"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command_lines],
        stdout=theirs, stderr=theirs if with_stderr else subprocess.DEVNULL, cwd=directory, env=environment,
    )  # fmt: skip
    os.close(theirs)
    seen = bytearray()
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
    os.close(ours)
    assert process.wait(60) == 0
    return without_colours(seen.decode()).replace("\r\n", "\n")


def normalised(text: str) -> str:
    """Without blanks at line ends, and with nines for what differs: seconds, memory, estimates."""
    text = "\n".join(line.rstrip() for line in text.split("\n")).replace(ftload_version(), "VERSION")
    text = re.sub(r"^(time  +).*\n(?: .*\n)*", r"\1SECONDS\n", text, flags=re.MULTILINE)
    text = re.sub(r"^(memory +)[\d.]+( .B at)", r"\g<1>9.99\2", text, flags=re.MULTILINE)

    text = re.sub(r"(\d+) files, [\d,]+ bytes", r"\1 files, 999,999 bytes", text)

    def estimates(match: re.Match[str]) -> str:
        lines = match[0].splitlines(keepends=True)
        return "".join(re.sub(r"\d", "9", line) if re.search(r"\d [kMG]?B\b|█| fits", line) else line for line in lines)

    return re.sub(r"^training, (?:.*\n)*?the largest batch", estimates, text, flags=re.MULTILINE)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", [*SCREENS, *ERRORS])
def test_a_screen_is_as_it_was_stored(shown: dict[str, str], name: str, columns: int) -> None:
    words = {**SCREENS, **ERRORS}[name]
    screen = f"$ ftload {words}\n{shown[f'{words}, {columns}'].strip(chr(10))}\n"
    file = STORED / f"{name.replace(' ', '-')}-{columns}.txt"
    if os.environ.get("FTLOAD_RENEW_SCREENS"):
        STORED.mkdir(exist_ok=True)
        file.write_text(screen, encoding="utf-8")
    assert screen == file.read_text(encoding="utf-8"), "FTLOAD_RENEW_SCREENS=1 writes what is shown now"
    assert max(len(line) for line in screen.splitlines()[1:]) <= columns


def test_every_stored_screen_is_compared() -> None:
    names = {f"{name.replace(' ', '-')}-{columns}.txt" for name in (*SCREENS, *ERRORS) for columns in WIDTHS}
    assert {path.name for path in STORED.iterdir()} == names
