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


SENT_TO_ANOTHER_THREAD = """
import signal, threading, time
from ftload.cli import app
from ftload.cli.errors import Interrupted

others = []
signal.signal(signal.SIGUSR1, lambda number, frame: others.append(number))
signal.signal(signal.SIGINT, app._interrupt)
app._pass_signals_on()
(thread,) = (one for one in threading.enumerate() if one.name == "ftload-signals")
signal.pthread_kill(thread.ident, signal.SIGUSR1)
while not others:
    time.sleep(0.01)
signal.pthread_kill(thread.ident, signal.SIGINT)
try:
    threading.Event().wait(600)
except Interrupted as error:
    thread.join(600)  # what follows, tidying up, is not interrupted a second time
    print(error.code, others.count(signal.SIGUSR1))
"""


def test_only_what_ends_a_run_is_sent_on_and_until_it_is_handled() -> None:
    """Another handler, a library's, is called once for a signal."""
    command = [sys.executable, "-c", SENT_TO_ANOTHER_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "130 1\n", "")
