"""What lands at the output's place: links where they were asked for, and nothing over what somebody else put there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from ftload.loaders.errors import OutputError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import Outcome, prepare
from ftload.loaders.progress import Progress, Silent


def write(model: Path, out: Path, *flags: str, progress: Progress | None = None) -> Outcome:
    arguments = parse_arguments(["--model", str(model), "--output_dir", str(out), *flags])
    outcome = prepare(arguments, progress or Silent())
    assert outcome is not None
    return outcome


def test_a_linked_base_is_the_same_file(llama: Path, tmp_path: Path) -> None:
    for base, linked in (("link", True), ("copy", False)):
        outcome = write(llama, tmp_path / base, "--base", base)
        assert (tmp_path / base / "model.safetensors").samefile(llama / "model.safetensors") is linked
        assert [decision for decision in outcome.report.decisions if decision.what == "base"] == []


def test_where_no_link_can_be_it_is_copied(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    outcome = write(llama, tmp_path / "out", "--base", "link")
    (decision,) = (decision for decision in outcome.report.decisions if decision.what == "base")
    assert (decision.requested, decision.effective) == ("link", "copy")
    assert decision.reason == "the file system says: Invalid cross-device link"
    written, original = tmp_path / "out" / "model.safetensors", llama / "model.safetensors"
    assert written.read_bytes() == original.read_bytes()
    assert not written.samefile(original)


def test_what_came_to_stand_there_meanwhile_is_not_replaced(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class SomebodyElse(Silent):
        def stage(self, name: str) -> None:
            if name == "save":
                out.mkdir()
                (out / "theirs.txt").write_text("precious")

    with pytest.raises(OutputError, match=r"was not written by ftload: it holds no `ftload_report\.json`"):
        write(llama, out, "--overwrite", progress=SomebodyElse())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "theirs.txt").read_text() == "precious"
