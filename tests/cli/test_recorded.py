"""Flags that are only recorded: an output is up to date whatever they are, and its report says what they are now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.system.durable import hash_file
from ftload.loaders.write.staging import staged

from ..conftest import Result
from .runs import prepare

Ftload = Callable[..., Result]
REPORT, CARD = "ftload_report.json", "README.md"
FLAGS = ["--use_lora", "--base", "copy"]
TOLD = ["--hf_entity", "me", "--final_lr_ratio", "0.5", "--lr_scheduler_type", "cosine"]
"""What the flags alone decide, and warn of."""


@pytest.fixture(scope="module")
def out(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("work") / "out"
    prepare(llama, output, *FLAGS)
    return output


@pytest.fixture(autouse=True)
def nothing_else_is_touched(out: Path) -> Iterator[None]:
    before = times(out)
    yield
    after = times(out)
    assert {name: value for name, value in before.items() if after[name] != value}.keys() <= {REPORT, CARD}
    assert after.keys() == before.keys()
    assert list(out.parent.iterdir()) == [out]
    report = read(out)
    assert {file["path"]: file["sha256"] for file in report["files"]}[CARD] == hash_file(out / CARD)


def times(directory: Path) -> dict[str, int]:
    return {
        path.relative_to(directory).as_posix(): path.stat().st_mtime_ns
        for path in directory.rglob("*")
        if path.is_file()
    }


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / REPORT).read_text())


def test_the_report_is_rewritten_once(ftload: Ftload, llama: Path, out: Path) -> None:
    words = ["prepare", "--model", llama, "--output_dir", out, "--lora_rank", "8", *FLAGS]
    before, card = read(out), times(out)[CARD]
    result = ftload(*words, "--learning_rate", "0.5", "--max_memory", "1GB")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0].endswith(" up to date, its report rewritten")
    assert "recorded learning_rate: 2e-05 → 0.5" in result.out.splitlines()
    after = read(out)
    assert after == {
        **before, "arguments": {**before["arguments"], "learning_rate": {"value": 0.5, "origin": "cli"}}
    }  # fmt: skip
    assert times(out)[CARD] == card
    written = times(out)
    again = ftload(*words, "--learning_rate", "0.5")
    assert again.out.splitlines()[0].endswith(" up to date")
    assert "recorded" not in again.out
    assert times(out) == written


def test_what_flags_decide_and_warn_of_comes_and_goes(llama: Path, out: Path, tmp_path: Path) -> None:
    plain = prepare(llama, out, *FLAGS)
    told = prepare(llama, out, *FLAGS, *TOLD)
    assert told == read(out)
    fresh = prepare(llama, tmp_path / "fresh", *FLAGS, *TOLD)
    for section in ("decisions", "warnings"):
        assert sorted(map(str, told[section])) == sorted(map(str, fresh[section]))
        assert len(told[section]) == len(plain[section]) + 1
    line = "- hf_entity: `upload` → `no upload` – ftload never uploads anything"
    assert (out / CARD).read_text().splitlines().count(line) == 1
    back = prepare(llama, out, *FLAGS)
    assert back == plain
    assert "hf_entity" not in (out / CARD).read_text()


def test_a_value_that_json_does_not_have(llama: Path, out: Path) -> None:
    plain = prepare(llama, out, *FLAGS)
    flags = ["--final_lr_ratio", "inf"]
    told = prepare(llama, out, *FLAGS, *flags)
    assert told["arguments"]["final_lr_ratio"] == {"value": "inf", "origin": "cli"}
    assert len(told["warnings"]) == len(plain["warnings"]) + 1
    assert prepare(llama, out, *FLAGS) == plain


def test_a_run_that_was_killed_between_card_and_report_is_carried_to_its_end(llama: Path, out: Path) -> None:
    old = prepare(llama, out, *FLAGS)
    old_text = (out / REPORT).read_bytes()
    new = prepare(llama, out, *FLAGS, *TOLD)
    assert new != old
    with staged(out) as staging:
        directory = staging.directory
    (directory / "replacing").mkdir(parents=True)
    (out / REPORT).rename(directory / "replacing" / REPORT)
    (out / REPORT).write_bytes(old_text)
    assert prepare(llama, out, *FLAGS, *TOLD) == new == read(out)


def test_a_signal_between_card_and_report_waits(llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(BaseException):
        pass

    prepare(llama, out, *FLAGS)
    replace, moved = Path.replace, []

    def stopping(self: Path, target: Path) -> Path:
        moved.append(self.name)
        if len(moved) == 2:
            raise Stopped
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopping)
    with pytest.raises(Stopped):
        prepare(llama, out, *FLAGS, *TOLD)
    assert sorted(moved) == [CARD, CARD, REPORT] or sorted(moved) == [CARD, REPORT, REPORT]
    assert read(out)["arguments"]["hf_entity"]["value"] == "me"


def test_strict_refuses_before_anything_is_rewritten(ftload: Ftload, llama: Path, out: Path) -> None:
    prepare(llama, out, *FLAGS)
    before = times(out)
    words = ["--model", llama, "--output_dir", out, "--lora_rank", "8", *FLAGS, *TOLD]
    refused = ftload("prepare", *words, "--strict")
    assert refused.code == 5
    assert "hf_entity: upload → no upload" in refused.err
    assert times(out) == before
