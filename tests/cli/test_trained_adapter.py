"""A trained adapter beside the model is not dropped without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ftload.cli.app import run
from ftload.loaders.checkpoint.trained_adapter import find_trained_adapter
from ftload.loaders.source.source import Source
from safetensors.torch import load_file, save_file

from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    write_model(directory / "source", "llama", vocab_size=144, dtype="bfloat16")
    write_llama(directory / "source", vocab_size=128)
    prepare(directory / "source", directory / "prepared", "--use_lora", "--base", "copy")
    return directory / "prepared"


def _train(weights: Path) -> None:
    """Change one number of the last B, as a training step would."""
    tensors = load_file(weights)
    name = sorted(name for name in tensors if ".lora_B." in name)[-1]
    tensors[name][-1, -1] = 1e-3
    save_file(tensors, weights, {"format": "pt"})


def _decisions(report: dict[str, Any]) -> list[dict[str, str]]:
    return [decision for decision in report["decisions"] if decision["what"] == "adapter"]


def test_an_untrained_one_is_nothing_to_tell(prepared: Path, tmp_path: Path) -> None:
    flags = ("--use_lora", "--strict", "--use_flash_attn", "false")
    assert _decisions(prepare(prepared, tmp_path / "again", *flags)) == []


def test_an_adapter_trained_since_is_another_source(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(prepared, tmp_path / "out")
    weights = prepared / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    try:
        _train(weights)
        assert (
            run(["prepare", "--model", str(prepared), "--output_dir", str(tmp_path / "out"), "--lora_rank", "8"]) == 8
        )
        assert "exists and is not empty" in capsys.readouterr().err
    finally:
        weights.write_bytes(before)


def test_the_trained_one_of_two_is_told(prepared: Path, tmp_path: Path) -> None:
    weights = prepared / "adapter" / "adapter_model.safetensors"
    before, beside = weights.read_bytes(), [prepared / path.name for path in (prepared / "adapter").glob("adapter_*")]
    try:
        for path in beside:
            path.write_bytes((prepared / "adapter" / path.name).read_bytes())
        _train(weights)
        (decision,) = _decisions(prepare(prepared, tmp_path / "out"))
        assert decision["reason"].startswith("`adapter/adapter_config.json` belongs to a trained adapter")
    finally:
        weights.write_bytes(before)
        for path in beside:
            path.unlink()


@pytest.mark.parametrize("place", ["adapter", "."])
def test_a_trained_one_is_a_decision(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    weights = prepared / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    moved: list[Path] = []
    try:
        _train(weights)
        if place == ".":
            for path in (prepared / "adapter").glob("adapter_*"):
                moved.append(prepared / path.name)
                (prepared / path.name).write_bytes(path.read_bytes())
            weights.write_bytes(before)
        found = "adapter_config.json" if place == "." else "adapter/adapter_config.json"
        reason = f"`{found}` belongs to a trained adapter, which only --merge_adapter merges"
        for flags, effective in (([], "none"), (["--use_lora"], "a fresh one")):
            words = ["--model", str(prepared), "--output_dir", str(tmp_path / f"out{len(flags)}"), *flags]
            words += ["--use_flash_attn", "false"]
            assert run(["plan", *words, "--strict"]) == 5
            assert f"adapter: the one in `{prepared}` → {effective} ({reason})" in capsys.readouterr().err
            (decision,) = _decisions(prepare(prepared, tmp_path / f"out{len(flags)}", *flags))
            assert decision == {
                "what": "adapter",
                "requested": f"the one in `{prepared}`",
                "effective": effective,
                "reason": reason,
            }
    finally:
        weights.write_bytes(before)
        for path in moved:
            path.unlink()


def test_it_is_looked_for_once_however_many_plans_are_made(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` makes one for each way of training; B of an adapter that is not trained is read to its end."""
    asked = []

    def find(source: Source) -> str | None:
        asked.append(source.model)
        return find_trained_adapter(source)

    monkeypatch.setattr("ftload.loaders.plan.sources.find_trained_adapter", find)
    assert run(["plan", "--model", str(prepared), "--output_dir", str(tmp_path / "out"), "--quiet"]) == 0
    assert asked == [str(prepared)]
