"""`ftload merge` and the flag behind it: which model, which adapters, and when an output is up to date."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import Result
from tests.merge.adapters import write_adapter
from tests.merge.test_merge import SIMPLE
from tests.parity.compare import assert_same_tensors

Ftload = Callable[..., Result]


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters on the tiny Llama; tests don't change them."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(llama, root / "one", r=4, target_modules=["q_proj", "v_proj"])
    write_adapter(llama, root / "two", r=4, target_modules=["q_proj", "up_proj"], use_dora=True, seed=2)
    return root / "one", root / "two"


def test_merge_is_short_for_prepare(ftload: Ftload, llama: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = adapters
    words = ["--model", llama, "--merge_adapter", one, two, "--output_dir", tmp_path / "prepared", "--json"]
    assert ftload("prepare", *words).code == 0
    for name, given in {
        "merged": [one, two],
        "repeated": [one, "--merge_adapter", two],
    }.items():
        result = ftload("merge", *given, "--output_dir", tmp_path / name, "--json")
        assert result.code == 0, result.err
        assert_same_tensors(tmp_path / name, tmp_path / "prepared")
        report = json.loads(result.out)
        assert report["strategy"] == "standard"
        assert [merged["adapter"] for merged in report["source"]["merged"]] == [str(one), str(two)]
        assert report["arguments"]["merge_adapter"]["value"] == [str(one), str(two)]
    result = ftload("merge", one, "--output_dir", tmp_path / "other", "--use_qlora", "--lora_rank", "4", "--json")
    assert json.loads(result.out)["strategy"] == "qlora"


def test_merge_needs_an_adapter(ftload: Ftload, tmp_path: Path) -> None:
    result = ftload("merge", "--output_dir", tmp_path / "out", "--json")
    assert result.code == 2
    error = json.loads(result.out)["error"]
    assert (error["message"], error["hint"]) == (
        "no adapter is given",
        "ftload merge ADAPTER --output_dir DIRECTORY",
    )


def test_what_was_merged_is_reported(ftload: Ftload, llama: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    import hashlib

    one, _ = adapters
    result = ftload("merge", one, "--output_dir", tmp_path / "out", "--json")
    file = one / "adapter_model.safetensors"
    assert json.loads(result.out)["source"]["merged"] == [
        {
            "adapter": str(one),
            "path": str(one),
            "commit": None,
            "base": str(llama),
            "base_revision": None,
            "tensors": 4,
            "file": {
                "path": "adapter_model.safetensors",
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            },
        }
    ]
    assert ftload("verify", tmp_path / "out").code == 0


def test_a_plan_reads_the_header_alone(
    ftload: Ftload, adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftload.loaders.checkpoint.plain import PlainReader

    monkeypatch.setattr(PlainReader, "values", None)
    result = ftload("plan", "--merge_adapter", *adapters, "--output_dir", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert [(merged["tensors"], merged["file"]["sha256"]) for merged in plan["source"]["merged"]] == [(4, None)] * 2


def test_another_base_is_a_decision(ftload: Ftload, llama: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    result = ftload("merge", adapters[0], "--model", copy, "--output_dir", tmp_path / "out", "--json")
    (decision,) = [item for item in json.loads(result.out)["decisions"] if item["what"] == "model"]
    assert (decision["requested"], decision["effective"]) == (str(llama), str(copy))
    result = ftload("merge", adapters[0], "--model", llama, "--output_dir", tmp_path / "same", "--json")
    assert not [item for item in json.loads(result.out)["decisions"] if item["what"] == "model"]


def test_a_changed_adapter_makes_a_new_run(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    write_adapter(llama, adapter, r=4, target_modules=["q_proj"])
    words = ["merge", adapter, "--output_dir", out, *SIMPLE]
    assert "up to date" not in ftload(*words).out
    assert "up to date" in ftload(*words).out
    file = adapter / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(1, 1))  # whatever the clock's resolution
    result = ftload(*words)
    assert result.code == 8, result.err
    assert ftload(*words, "--overwrite").code == 0
    assert "up to date" in ftload(*words).out


def test_the_merged_base_is_always_written(ftload: Ftload, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["merge", adapters[0], "--output_dir", tmp_path / "out", "--use_lora", "--lora_rank", "4"]
    result = ftload(*words, "--base", "reference")
    assert result.code == 2
    assert "the original can't serve as the base: an adapter is merged into it" in result.err
    result = ftload(*words, "--json")
    assert json.loads(result.out)["base"] == "copy"


def test_the_output_must_not_hold_the_adapter(ftload: Ftload, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    assert ftload("merge", adapters[0], "--output_dir", out).code == 0
    shutil.copytree(adapters[1], out / "inside")
    result = ftload("merge", out / "inside", "--output_dir", out, "--overwrite")
    assert result.code == 8
    assert f"`{out}` is or holds the adapter `{out / 'inside'}`" in result.err
