"""`ftload verify` of honest outputs of types that are unlike others, and what it says of what is trained there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Result
from ..parity.zoo import write_tiny
from ..tokenizers import write_llama
from .runs import prepare

Ftload = Callable[..., Result]
CHAT = ["--chat_template_name", "tulu"]


def write(directory: Path, model_type: str) -> Path:
    write_tiny(directory, model_type, vocab_size=136)
    write_llama(directory, vocab_size=128)
    return directory


@pytest.mark.parametrize(
    "model_type",
    [
        "bigbird_pegasus",  # ties in its configuration, and has nothing to tie
        "cpmant",  # more rows than the vocabulary: prompts
        "moshi",  # one row more than the vocabulary and the head
        "inkling_text",  # a configuration without `tie_word_embeddings`
    ],
)
def test_an_unusual_vocabulary_passes(ftload: Ftload, tmp_path: Path, model_type: str) -> None:
    prepare(write(tmp_path / "model", model_type), tmp_path / "out", *CHAT)
    result = ftload("verify", tmp_path / "out", "--quick", "--json")
    assert result.code == 0, result.out


def test_a_4_bit_base_without_a_4_bit_layer_passes(ftload: Ftload, tmp_path: Path) -> None:
    flags = ["--use_qlora", "--min_quantized", "0"]
    report = prepare(write(tmp_path / "model", "falcon"), tmp_path / "out", *CHAT, *flags)
    assert report["quantization"]["coverage_percent"] == 0
    result = ftload("verify", tmp_path / "out", "--json")
    assert result.code == 0, result.out


def test_what_claims_to_be_4_bit_and_is_not(ftload: Ftload, tmp_path: Path) -> None:
    """Falcon has no layer that bitsandbytes replaces; a Llama has, and its 16-bit weights can't be loaded so."""
    flags = ["--use_qlora", "--min_quantized", "0"]
    prepare(write(tmp_path / "model", "falcon"), tmp_path / "out", *CHAT, *flags)
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    model = write(tmp_path / "llama", "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    result = ftload("prepare", "--model", model, "--output_dir", tmp_path / "no", "--use_qlora")
    assert result.code == 4
    assert (
        f"config.json of `{model}` says bitsandbytes 4-bit, but no tensor is stored so: "
        "`model.layers.0.mlp.down_proj.weight` is not"
    ) in result.err


@pytest.mark.parametrize(
    ("model_type", "never_trained"),
    [
        ("afmoe", {"model.layers.1.mlp.expert_bias": 4}),
        ("ernie4_5_moe", {"model.layers.1.mlp.gate.moe_statics.e_score_correction_bias": 4}),
        ("hrm_text", {"model.z_L_init": 64}),
    ],
)
def test_what_the_class_never_trains_is_frozen(
    ftload: Ftload, tmp_path: Path, model_type: str, never_trained: dict[str, int]
) -> None:
    from ftload.loaders import load_prepared

    report = prepare(write(tmp_path / "model", model_type), tmp_path / "out", *CHAT)
    parameters = report["parameters"]
    assert parameters["never_trained"] == list(never_trained)
    assert parameters["frozen"] == sum(never_trained.values())
    assert parameters["trainable"] == parameters["total"] - parameters["frozen"]
    model, _ = load_prepared(tmp_path / "out")
    frozen = {name: value.numel() for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == never_trained
    result = ftload("verify", tmp_path / "out", "--json")
    assert result.code == 0, result.out
    # a report that counts them as trained is wrong, and that takes no loading to see
    path = tmp_path / "out/ftload_report.json"
    parameters["trainable"], parameters["frozen"] = parameters["total"], 0
    path.write_text(json.dumps(report))
    result = ftload("verify", tmp_path / "out", "--quick")
    assert result.code == 7
    assert f"config: {sum(never_trained.values())} parameters are frozen, the report says 0" in result.err


def test_they_are_frozen_with_the_rest_under_an_adapter(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "ernie4_5_moe")
    report = prepare(model, tmp_path / "out", *CHAT, "--use_lora", "--lora_target_modules", "q_proj", "v_proj")
    assert report["parameters"]["never_trained"] == []
    assert report["parameters"]["trainable"] == report["adapter"]["parameters"]
