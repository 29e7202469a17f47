"""`prepare --lora_config FILE`, the whole way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Result

Ftload = Callable[..., Result]

SIMPLE = ("--get_tokenizer_fn", "get_tokenizer_simple_v1", "--json")


def prepared(ftload: Ftload, model: Path, out: Path, *words: object) -> dict[str, Any]:
    result = ftload("prepare", "--model", model, "--output_dir", out, "--use_lora", *SIMPLE, *words)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_an_adapter_is_as_the_file_says(
    ftload: Ftload, llama: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "lora.yaml"
    file.write_text(
        "r: 4\nlora_alpha: 12\nlora_dropout: 0.25\ntarget_modules: [q_proj, v_proj]\nrank_pattern: {v_proj: 2}\n"
        "use_rslora: true\nlayers_to_transform: [1]\n"
    )
    report = prepared(ftload, llama, tmp_path / "out", "--lora_config", file, "--lora_alpha", "32")
    assert [str(one.message) for one in recwarn if "rank_pattern" in str(one.message)] == []
    written = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert {name: written[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")} == {
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.25,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
    }
    assert (written["rank_pattern"], written["layers_to_transform"]) == ({"v_proj": 2}, [1])
    assert report["arguments"]["lora_config"] == {"value": str(file), "origin": "cli"}
    assert report["arguments"]["lora_rank"] == {"value": 64, "origin": "default"}
    assert (report["adapter"]["r"], report["adapter"]["alpha"], report["adapter"]["dropout"]) == (4, 32, 0.25)
    assert [one for one in report["decisions"] if one["what"] == "lora_config"] == [
        {
            "what": "lora_config",
            "requested": "lora_alpha 12",
            "effective": "lora_alpha 32",
            "reason": f"`lora_alpha` is given beside `{file}`, and goes before it",
        }
    ]


def test_the_file_has_a_part_in_the_result(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    """Its contents, whatever it is called."""
    words = ["prepare", "--model", llama, "--output_dir", tmp_path / "out", "--use_lora", *SIMPLE[:2], "--lora_config"]
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text("r: 4\n")
        assert ftload(*words, tmp_path / name).code == 0
    (tmp_path / "two.yaml").write_text("r: 6\n")
    result = ftload(*words, tmp_path / "two.yaml")
    assert (result.code, "exists" in result.err) == (8, True)


def test_what_ftload_writes_can_be_asked_for_again(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    words = ["--use_dora", "--lora_rank", "4", "--lora_target_modules", "q_proj", "o_proj", "--lora_modules_to_save"]
    prepared(ftload, llama, tmp_path / "one", *words, "lm_head")
    first = tmp_path / "one" / "adapter"
    prepared(ftload, llama, tmp_path / "two", "--lora_config", first / "adapter_config.json")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "two" / "adapter" / name).read_bytes() == (first / name).read_bytes()
