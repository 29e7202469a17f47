"""A plan holds all that is written, and changes nothing of what it is made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent

from ..parity.models import write_model
from ..tokenizers import write_llama
from .plans import make_plan


@pytest.mark.parametrize("strategy", ["--use_qlora", "--use_liger_kernel"])
def test_the_configuration_is_decided_before_it_is_written(tmp_path: Path, strategy: str) -> None:
    model = tmp_path / "model"
    write_model(model, "llama", vocab_size=128, dtype="float32")
    write_llama(model)
    plan, _ = make_plan(model, tmp_path, strategy)
    before = plan.skeleton.config
    assert getattr(before, "quantization_config", None) is None
    assert (before.pad_token_id, before.vocab_size) == (None, 136)
    planned = plan.config.to_diff_dict()
    assert (planned["pad_token_id"], planned["vocab_size"]) == (128, 136)
    assert ("quantization_config" in planned) == (strategy == "--use_qlora")
    prepare(parse_arguments(["--model", str(model), "--output_dir", str(tmp_path / "out"), strategy]), Silent())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads(json.dumps(planned)) == written
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_token_id"] == 128
    assert plan.generation_config.pad_token_id == 128
    assert plan.configuration.generation.pad_token_id is None
