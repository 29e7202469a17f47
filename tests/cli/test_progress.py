"""What a person at a terminal sees while it works: bytes, tensors, a rate and the time left; then the table alone."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from ftload.cli.show.progress import ProgressBar
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.verify.verify import verify
from rich.filesize import decimal

from ..conftest import ROWS
from ..hub import LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import headers, without_colours


def run(
    *words: str | Path, env: Mapping[str, str] = os.environ, on_seen: Callable[[str], None] = lambda text: None
) -> str:
    """What a command that succeeds writes on a terminal of 160 columns, one state after another.

    `on_seen` gets all of it so far, each time that there is more.
    """
    ours, theirs = pty.openpty()
    environment = {**env, "TERM": "xterm-256color", "COLUMNS": "160"}
    command = [sys.executable, "-m", "ftload.cli", *map(str, words)]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
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
        on_seen(without_colours(seen.decode(errors="ignore")))
    os.close(ours)
    text = without_colours(seen.decode())
    assert process.wait(60) == 0, text[-2000:]
    return text


def test_progress_at_a_terminal(llama: Path, tmp_path: Path) -> None:
    text = run("prepare", "--model", llama, "--output_dir", tmp_path / "out", "--use_lora", "--lora_rank", "20000")
    assert re.search(r"write .*\d/\d+(\.\d)? [MG]B .*\d+/28 tensors .*[MG]B/s .*\d:\d\d:\d\d", text), text[:2000]
    assert re.search("write .* 148.5/148.5 MB 28/28 tensors", text)
    assert re.search(r"hash .* (\S+)/\1 kB", text)
    assert "importing torch" in text
    assert "importing transformers" in text
    assert "fetch" not in text
    assert text.rstrip().endswith(f"model, tokenizer = load_prepared({str(tmp_path / 'out')!r})")


def test_what_arrives_is_shown_beside_what_is_written(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model, "llama", vocab_size=ROWS, dtype="bfloat16", shards=True)
    write_llama(model)
    sizes = [path.stat().st_size for path in sorted(model.glob("*.safetensors"))]
    fetched, goes_on = f"fetched {decimal(sum(sizes[:-1]))} of {decimal(sum(sizes))}", threading.Event()
    with LoopbackHub() as hub:
        hub.add("org/model", model)
        # the header comes, the file waits until what came before it is seen
        hub.misbehave(f"*-0000{len(sizes)}-of-*", after=1, hold=goes_on)
        text = run(
            *("prepare", "--model", "org/model", "--output_dir", tmp_path / "out", "--use_qlora"),
            env=hub.env(tmp_path / "home"),
            on_seen=lambda text: goes_on.set() if re.search(rf"tensors · {fetched}", text) else None,
        )
    assert re.search(rf"write [^\r\n]* \d+/\d+ tensors · {fetched} ", text)


def test_the_bar_shows_what_arrives_until_all_has() -> None:
    shown: list[str] = []

    class Bar:
        def add_task(self, description: str, **_: object) -> int:
            return 0

        def update(self, task: int, *, tensors: str | None = None, **_: object) -> None:
            if tensors is not None:
                shown.append(tensors)

        def remove_task(self, task: int) -> None:
            shown.clear()

        def refresh(self) -> None:
            pass

    bar = ProgressBar(Bar())  # pyright: ignore[reportArgumentType]
    bar.stage("write")
    bar.arriving(bytes=0, of=2_500_000)
    bar.expect(bytes=1000, tensors=28)
    bar.advance(bytes=10, tensors=1)
    bar.arriving(bytes=1_250_000, of=2_500_000)
    bar.advance(bytes=10, tensors=1)
    bar.arriving(bytes=2_500_000, of=2_500_000)
    bar.advance(bytes=10, tensors=1)
    assert shown == [
        "1/28 tensors · fetched 0 bytes of 2.5 MB",
        "1/28 tensors · fetched 1.2 MB of 2.5 MB",
        "2/28 tensors · fetched 1.2 MB of 2.5 MB",
        "2/28 tensors",
        "3/28 tensors",
    ]


class Recorded:
    """A `Progress` that keeps, for each stage, what was expected and how far it came, in bytes and tensors."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, list[int], list[int]]] = []

    def stage(self, name: str) -> None:
        self.stages.append((name, [], [0, 0]))

    def expect(self, *, bytes: int, tensors: int) -> None:
        self.stages[-1][1].extend((bytes, tensors))

    def advance(self, *, bytes: int, tensors: int) -> None:
        done = self.stages[-1][2]
        done[0] += bytes
        done[1] += tensors

    def arriving(self, *, bytes: int, of: int) -> None:
        raise AssertionError("nothing comes from anywhere")


def test_what_has_an_end_comes_to_it(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--model", str(llama), "--output_dir", str(out), "--use_qlora", "--lora_rank", "8"]

    def measured(recorded: Recorded) -> dict[str, list[int]]:
        assert all(done == expected for _, expected, done in recorded.stages if expected)
        assert all(done == [0, 0] for _, expected, done in recorded.stages if not expected)
        return {name: expected for name, expected, _ in recorded.stages if expected}

    first = Recorded()
    outcome = prepare(parse_arguments(words), first)
    assert outcome is not None
    files = {file.path: file.bytes for file in outcome.report.files}
    weights = sum(size for path, size in files.items() if path.endswith(".safetensors"))
    card = files["README.md"]
    tensors = len(headers(out)) + len(headers(out / "adapter"))
    assert measured(first) == {"write": [weights, tensors], "hash": [sum(files.values()) - weights - card, 0]}
    assert "fetch" not in {name for name, *_ in first.stages}
    assert "fetch" not in outcome.report.timings

    again = Recorded()
    assert prepare(parse_arguments(words), again) is not None
    assert measured(again) == {"hash": [sum(files.values()), 0]}
    assert [name for name, *_ in again.stages] == ["resolve", "hash"]

    (out / "README.md").write_text("shorter")
    (out / "tokenizer_config.json").unlink()
    checked = Recorded()
    assert not verify(out, quick=True, trust_remote_code=False, progress=checked).ok
    assert measured(checked) == {"files": [sum(files.values()), 0]}


LIBRARY = """
from ftload.cli.show.progress import ProgressBar, imports_shown


class Bar:
    def add_task(self, description, **_):
        print(description)

    def update(self, task, description=None, **_):
        print(description)

    def remove_task(self, task):
        pass

    def refresh(self):
        pass


bar = ProgressBar(Bar())
with imports_shown(bar):
    bar.stage("config")
    import peft
    try:
        import numba
    except ValueError:
        pass
    import peft.later
import peft.last
"""


def test_a_library_is_named_while_it_is_imported(tmp_path: Path) -> None:
    """Parts and what they import in turn too, be it broken; and only while the bar is there."""
    for name, text in (
        ("peft/__init__.py", "import peft.part, torch"),
        ("peft/part.py", ""),
        ("peft/later.py", "import json"),
        ("peft/last.py", ""),
        ("torch/__init__.py", ""),
        ("numba/__init__.py", "raise ValueError"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout.split("\n")[:-1] == [
        "starting", "config",
        "importing peft", "importing torch", "importing peft", "config",
        "importing numba", "config",
        "importing peft", "config",
    ]  # fmt: skip
