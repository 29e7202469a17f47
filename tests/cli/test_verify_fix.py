"""`ftload verify --fix`: the adapter of a directory that was moved or published names its base again, and nothing else
changes."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders import load_prepared
from ftload.loaders.report.rebased import name_base
from ftload.loaders.system.durable import hash_file
from ftload.loaders.write.staging import staged

from ..conftest import Result
from .runs import list_files, prepare

Ftload = Callable[..., Result]
CONFIG, REPORT, CARD = "adapter/adapter_config.json", "ftload_report.json", "README.md"
FLAGS = ["--use_lora", "--base", "copy"]


@pytest.fixture(scope="module")
def prepared(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(llama, output, *FLAGS)
    return output


@pytest.fixture
def moved(prepared: Path, tmp_path: Path) -> Path:
    """As a directory is that was moved: its adapter names the place where it was prepared."""
    return Path(shutil.copytree(prepared, tmp_path / "a place" / "moved"))


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {
        name: ((directory / name).read_bytes(), (directory / name).stat().st_mtime_ns) for name in list_files(directory)
    }


def changed(before: dict[str, tuple[bytes, int]], directory: Path) -> set[str]:
    after = contents(directory)
    assert after.keys() == before.keys()
    assert list(directory.parent.iterdir()) == [directory]
    return {name for name, value in before.items() if after[name] != value}


def read(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text())


def check(result: Result, name: str) -> dict[str, Any]:
    (found,) = (check for check in json.loads(result.out)["checks"] if check["name"] == name)
    return found


def test_a_stale_base_is_told_and_is_no_failure(ftload: Ftload, prepared: Path, moved: Path) -> None:
    here = ftload("verify", prepared, "--quick", "--json")
    assert (here.code, check(here, "adapter")["notes"]) == (0, [])
    result = ftload("verify", moved, "--quick", "--json")
    assert result.code == 0
    assert json.loads(result.out)["fixed"] is None
    (note,) = check(result, "adapter")["notes"]
    assert f"names `{prepared}` as its base" in note
    command = note.split("`")[-2]
    assert shlex.split(command) == ["ftload", "verify", "--fix", str(moved)]
    shown = ftload("verify", moved, "--quick")
    assert shown.code == 0
    assert f"note {note}" in shown.out
    assert shown.out.splitlines()[-1] == f"{moved} verifies"


def test_a_link_to_the_same_place_is_not_stale(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    prepare(llama, tmp_path / "link" / "out", *FLAGS)
    result = ftload("verify", tmp_path / "real" / "out", "--quick", "--json")
    assert check(result, "adapter")["notes"] == []


def test_the_base_is_rewritten_and_nothing_else(ftload: Ftload, prepared: Path, moved: Path) -> None:
    before = contents(moved)
    old = {name: read(moved, name) for name in (CONFIG, REPORT)}
    result = ftload("verify", moved, "--fix", "--quick")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == f"fixed  the adapter's base: {prepared} → {moved} ({CONFIG}, {REPORT})"
    assert " note " not in result.out
    assert changed(before, moved) == {CONFIG, REPORT}
    assert read(moved, CONFIG) == {**old[CONFIG], "base_model_name_or_path": str(moved), "revision": None}
    text = (moved / CONFIG).read_text()
    assert text == before[CONFIG][0].decode().replace(json.dumps(str(prepared)), json.dumps(str(moved)))
    report = read(moved, REPORT)
    (entry,) = (file for file in report["files"] if file["path"] == CONFIG)
    assert entry == {"path": CONFIG, "bytes": len(text.encode()), "sha256": hash_file(moved / CONFIG)}
    assert report["adapter"] == {**old[REPORT]["adapter"], "base": str(moved)}
    others = [file for file in old[REPORT]["files"] if file["path"] != CONFIG]
    assert [file for file in report["files"] if file["path"] != CONFIG] == others
    assert {**report, "adapter": 0, "files": 0} == {**old[REPORT], "adapter": 0, "files": 0}
    fixed = contents(moved)
    again = ftload("verify", moved, "--fix", "--quick", "--json")
    assert (again.code, json.loads(again.out)["fixed"]) == (0, None)
    assert changed(fixed, moved) == set()


def test_fields_of_a_later_version_stay(ftload: Ftload, moved: Path) -> None:
    report = {**read(moved, REPORT), "invented_later": [1, {"a": 0.5}]}
    (moved / REPORT).write_text(json.dumps(report))
    assert ftload("verify", moved, "--fix", "--quick").code == 0
    assert read(moved, REPORT)["invented_later"] == [1, {"a": 0.5}]


@pytest.mark.parametrize(("given", "revision"), [("me/model", None), ("me/model@0123abc", "0123abc")])
def test_a_base_on_a_hub(ftload: Ftload, llama: Path, moved: Path, given: str, revision: str | None) -> None:
    before = contents(moved)
    result = ftload("verify", moved, "--fix", "--base", given, "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert document["fixed"]["after"] == {"base": "me/model", "revision": revision}
    assert set(document["fixed"]["files"]) == changed(before, moved)
    assert check(result, "adapter")["notes"] == []
    config = read(moved, CONFIG)
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/model", revision)
    assert read(moved, REPORT)["adapter"]["base"] == "me/model"
    model, _ = load_prepared(moved)  # from the directory: there is no such repository
    named = model.peft_config["default"]
    assert (named.base_model_name_or_path, named.revision) == ("me/model", revision)
    back = ftload("verify", moved, "--fix", "--quick")
    assert back.code == 0
    assert (read(moved, CONFIG)["base_model_name_or_path"], read(moved, CONFIG)["revision"]) == (str(moved), None)


def test_preparing_again_leaves_the_base(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    prepare(llama, out, *FLAGS)
    assert ftload("verify", out, "--fix", "--base", "me/model@0123abc", "--quick").code == 0
    fixed = contents(out)
    words = ["prepare", "--model", llama, "--output_dir", out, "--lora_rank", "8", *FLAGS]
    again = ftload(*words)
    assert again.out.splitlines()[0].endswith(" up to date")
    assert any(line.split() == ["base", "me/model", "@", "0123abc"] for line in again.out.splitlines())
    assert changed(fixed, out) == set()
    assert ftload(*words, "--hf_entity", "me").code == 0  # a flag that is only recorded
    assert changed(fixed, out) == {REPORT, CARD}
    assert ftload("verify", out, "--quick").code == 0
    assert ftload("prepare", "--model", out, "--output_dir", tmp_path / "next", "--use_lora", "--quiet").code == 0


WRONG_BASES = [
    "",
    "@abc",
    "model",
    "me/model@",
    "me/model@a b",
    "a/b/c",
    "/abs/path",
    "../up",
    "me/mo del",
    "me/--x",
    "x" * 200,
]


@pytest.mark.parametrize("given", WRONG_BASES)
def test_what_is_no_repository(ftload: Ftload, moved: Path, given: str) -> None:
    before = contents(moved)
    result = ftload("verify", moved, "--fix", "--base", given)
    assert result.code == 2
    assert result.err.startswith("error: `--base`: ")
    assert len(result.err.splitlines()) == 2
    assert changed(before, moved) == set()


def test_a_directory_is_no_repository(ftload: Ftload, moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (moved.parent.parent / "me" / "model").mkdir(parents=True)
    monkeypatch.chdir(moved.parent.parent)
    result = ftload("verify", moved, "--fix", "--base", "me/model")
    assert result.code == 2
    assert "`me/model` is on this machine" in result.err


def test_where_there_is_nothing_to_name(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    for name, flags in {"standard": [], "reference": ["--use_lora"]}.items():
        out = tmp_path / name / "out"
        prepare(llama, out, *flags)
        before = contents(out)
        result = ftload("verify", out, "--fix", "--quick", "--json")
        assert (result.code, json.loads(result.out)["fixed"]) == (0, None)
        refused = ftload("verify", out, "--fix", "--base", "me/model")
        assert refused.code == 2
        what = "has no adapter" if name == "standard" else f"has an adapter of another model, `{llama}`"
        assert f"`--base`: `{out}` {what}" in refused.err
        assert changed(before, out) == set()
    without = ftload("verify", out, "--base", "me/model")
    assert (without.code, without.err.splitlines()[0]) == (2, "error: `--base` is what `--fix` writes")
    missing = ftload("verify", tmp_path / "no" / "where", "--fix")
    assert (missing.code, (tmp_path / "no").exists()) == (3, False)


# -- what was changed by others is not covered up


def test_a_base_that_was_written_by_hand_is_mended(ftload: Ftload, moved: Path) -> None:
    config = read(moved, CONFIG)
    (moved / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "gpt2", "revision": "x"}, indent=1))
    assert ftload("verify", moved, "--quick").code == 7
    assert ftload("verify", moved, "--quick", "--fix").code == 0
    assert read(moved, CONFIG) == {**config, "base_model_name_or_path": str(moved)}


@pytest.mark.parametrize("content", ['{"r": 4}', "{}", "[]", "{", '{"a": "\\ud800"}', "[" * 100_000, None])
def test_other_changes_are_not_covered_up(ftload: Ftload, moved: Path, content: str | None) -> None:
    config = read(moved, CONFIG)
    (moved / CONFIG).write_text(json.dumps({**config, "r": 4}) if content is None else content)
    before = contents(moved)
    result = ftload("verify", moved, "--quick", "--fix")
    assert result.code == 7
    assert result.err.startswith(f"error: `{moved / CONFIG}` ")
    assert changed(before, moved) == set()


def test_a_damaged_weight_still_fails(ftload: Ftload, moved: Path) -> None:
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    result = ftload("verify", moved, "--quick", "--fix")
    assert result.code == 7
    assert "`model.safetensors` is not what was written" in result.err
    assert read(moved, CONFIG)["base_model_name_or_path"] == str(moved)


def test_a_report_that_is_no_text(ftload: Ftload, moved: Path) -> None:
    report = read(moved, REPORT)
    report["source"]["revision"] = "\ud800"
    (moved / REPORT).write_text(json.dumps(report))
    before = contents(moved)
    result = ftload("verify", moved, "--quick", "--fix")
    assert result.code == 7
    assert "Traceback" not in result.err
    assert changed(before, moved) == set()


def test_a_card_that_somebody_wrote_on_stays(ftload: Ftload, moved: Path) -> None:
    text = (moved / CARD).read_text() + "mine\n"
    (moved / CARD).write_text(text)
    assert ftload("verify", moved, "--quick", "--fix", "--base", "me/model").code == 7
    assert (moved / CARD).read_text() == text
    assert read(moved, CONFIG)["base_model_name_or_path"] == "me/model"


# -- all or nothing


def test_a_run_that_is_in_the_way(ftload: Ftload, moved: Path) -> None:
    with staged(moved):
        result = ftload("verify", moved, "--quick", "--fix")
    assert result.code == 8
    assert "output_dir" not in result.err


@pytest.mark.parametrize("killed_after", [0, 1])
def test_killed_at_any_instant_the_next_one_goes_on(
    moved: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    class Killed(BaseException):
        pass

    replace, moves = Path.replace, []

    def dying(self: Path, target: Path) -> Path:
        if len(moves) >= killed_after:
            raise Killed
        moves.append(self.name)
        return replace(self, target)

    before = contents(moved)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        patch.setattr("ftload.loaders.write.staging._remove", lambda _: None)  # the dead don't tidy up
        with pytest.raises(Killed):
            name_base(moved, None)
    assert len(moves) == killed_after
    assert len(list(moved.parent.iterdir())) == 2
    assert name_base(moved, None) is None  # it was carried to its end first
    assert changed(before, moved) == {CONFIG, REPORT}
    assert read(moved, CONFIG)["base_model_name_or_path"] == read(moved, REPORT)["adapter"]["base"] == str(moved)


@pytest.mark.parametrize("written", [{CONFIG}, {REPORT}, {CARD}, {CONFIG, CARD}])
def test_half_of_it_is_made_whole(ftload: Ftload, moved: Path, tmp_path: Path, written: set[str]) -> None:
    """Where what was left of a killed run was deleted, or the directory moved on."""
    whole = Path(shutil.copytree(moved, tmp_path / "whole"))
    name_base(whole, None)
    for name in written:
        shutil.copy(whole / name, moved / name)
    assert ftload("verify", moved, "--quick", "--fix").code == 0
    assert ftload("verify", moved, "--quick").code == 0
    assert read(moved, CONFIG)["base_model_name_or_path"] == str(moved)
