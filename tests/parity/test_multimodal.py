"""Multimodal checkpoints as published: what `AutoModelForCausalLM` makes of them, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import CheckpointError, FtloadError, MissingRequirementError, UsageError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json
from ftload.loaders.verify.verify import Check, verify
from safetensors.torch import load_file, save_file

from ..tokenizers import write_llama
from .compare import assert_same_adapter_config, assert_same_json, assert_same_tensors
from .multimodal import write_published
from .reference import run_reference

STRATEGIES = {"standard": [], "lora": ["--use_lora"], "qlora": ["--use_qlora", "--min_quantized", "0"]}

LEFT_OUT = {
    "qwen3_5": ("Qwen3_5", 21, 143_808, "`model.visual`"),
    "qwen3_5_moe": ("Qwen3_5Moe", 21, 143_808, "`model.visual`"),
    "llama4": ("Llama4", 26, 88_448, "`vision_model`, `multi_modal_projector`"),
    "mllama": ("Mllama", 41, 99_220, "`model.vision_model`, `model.multi_modal_projector`"),
    "dots3_note": ("Dots3Note", 51, 203_656, "`model.vision_tower`, `model.audio_tower`"),
}
"""Beginning of the class names; tensors, bytes and modules that are not the language model's."""

NO_4_BIT = {
    "llama4": "transformers can't load this model in 4 bits: tensor `model.layers.1.feed_forward.experts.gate_up_proj` "
    "belongs to a `Llama4TextExperts`, in whose place it puts other modules when weights are 4-bit",
}
NO_GROWTH = {
    "mllama": "the embeddings have to grow, and nobody could load `MllamaForCausalLM` after that: "
    "`model.embed_tokens.weight` has shape [136, 64], the configuration then asks for [144, 64]",
}

Sources = dict[tuple[str, int], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """With 129 tokens for 120 rows (Mllama has 8 more), without generation_config.json, and for 144, with it."""
    written = {}
    for model_type in (*LEFT_OUT, "gemma3"):
        for rows in (120, 144):
            directory = tmp_path_factory.mktemp(model_type)
            write_published(directory, model_type, vocab_size=rows)
            write_llama(directory, vocab_size=128)
            if rows == 120:
                (directory / "generation_config.json").unlink()
            written[model_type, rows] = directory
    return written


def _prepare(source: Path, output: Path, *flags: str) -> dict[str, Any]:
    words = ["--model", str(source), "--output_dir", str(output), "--lora_rank", "8"]
    outcome = prepare(parse_arguments([*words, "--embedding_init", "reference", *flags]), Silent())
    assert outcome is not None
    return to_json(outcome.report)


def _training_step(directory: Path) -> Check:
    return verify(directory, quick=False, trust_remote_code=False, progress=Silent()).checks[-1]


def _refusal(model_type: str, strategy: str, rows: int) -> tuple[type[FtloadError], str] | None:
    if rows == 120 and model_type in NO_GROWTH:
        return CheckpointError, NO_GROWTH[model_type]
    if strategy == "qlora" and model_type in NO_4_BIT:
        return MissingRequirementError, NO_4_BIT[model_type]
    return None


@pytest.mark.parametrize("rows", [120, 144])
@pytest.mark.parametrize("model_type", [*LEFT_OUT, "gemma3"])
def test_the_output_is_the_reference_s_or_refused(sources: Sources, tmp_path: Path, model_type: str, rows: int) -> None:
    source = sources[model_type, rows]
    for strategy, flags in STRATEGIES.items():
        out, reference = tmp_path / strategy, tmp_path / f"reference-{strategy}"
        refusal = _refusal(model_type, strategy, rows)
        if refusal is not None:
            with pytest.raises(refusal[0]) as raised:
                _prepare(source, out, *flags)
            assert raised.value.message == refusal[1]
            continue
        report = _prepare(source, out, *flags)
        assert report["base"] == "copy" or model_type == "gemma3"
        if report["base"] == "reference":  # Gemma 3's class is the whole model: nothing is left out
            continue
        targets = None
        if strategy != "standard":
            targets = json.loads((out / "adapter/adapter_config.json").read_text())["target_modules"]
        run_reference(source, reference, strategy=strategy, tokenizer_size=129, targets=targets)
        assert_same_tensors(out, reference)
        text = json.loads((reference / "config.json").read_text()).get("text_config")
        padding = {"text_config": {**text, "pad_token_id": 128}} if text else {"pad_token_id": 128}
        assert_same_json(out / "config.json", reference / "config.json", **padding)
        name = "generation_config.json"
        assert_same_json(out / name, reference / name, pad_token_id=128)
        if strategy != "standard":
            assert_same_tensors(out / "adapter", reference / "adapter")
            assert_same_adapter_config(out / "adapter", reference / "adapter")


@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_what_is_left_out_is_a_decision_with_its_bytes(sources: Sources, tmp_path: Path, model_type: str) -> None:
    report = _prepare(sources[model_type, 144], tmp_path / "out", "--use_flash_attn", "false")
    name, tensors, count, modules = LEFT_OUT[model_type]
    assert [decision for decision in report["decisions"] if decision["what"] == "model"] == [
        {
            "what": "model",
            "requested": f"{name}ForConditionalGeneration",
            "effective": f"{name}ForCausalLM",
            "reason": f"AutoModelForCausalLM loads the language model alone: {tensors} tensors ({count:,} bytes) of "
            f"{modules} are left out",
        }
    ]
    with pytest.raises(MissingRequirementError, match=f"`--strict`: not as requested: model: {name}ForConditional"):
        _prepare(sources[model_type, 144], tmp_path / "strict", "--use_flash_attn", "false", "--strict")
    assert not (tmp_path / "strict").exists()


def test_the_original_is_no_base_for_an_adapter_of_the_language_model(sources: Sources, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't serve as the base: it is a `Llama4ForConditionalGeneration`"):
        _prepare(sources["llama4", 144], tmp_path / "out", "--use_lora", "--base", "reference")


@pytest.mark.parametrize(
    ("stray", "like"),
    [
        ("vision_model.stray.weight", "vision_model.layernorm_pre.weight"),
        ("multi_modal_projector.linear_1.bias", "vision_model.layernorm_pre.weight"),
        ("audio_tower.weight", "vision_model.layernorm_pre.weight"),
        ("language_model.model.layers.0.stray.weight", "vision_model.layernorm_pre.weight"),
        ("language_model.model.layers.2.input_layernorm.weight", "vision_model.layernorm_pre.weight"),
    ],
)
def test_a_tensor_that_the_whole_model_does_not_have_is_an_error(
    sources: Sources, tmp_path: Path, stray: str, like: str
) -> None:
    source = _copy(sources["llama4", 144], tmp_path / "source", add={stray: like})
    with pytest.raises(CheckpointError, match="has the unexpected tensor `") as raised:
        _prepare(source, tmp_path / "out")
    assert stray.removeprefix("language_model.") in raised.value.message
    assert "more" not in raised.value.message


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_5"])
def test_a_tensor_that_the_language_model_lacks_is_an_error(sources: Sources, tmp_path: Path, model_type: str) -> None:
    stored = load_file(sources[model_type, 144] / "model.safetensors")
    name = next(name for name in stored if name.endswith("language_model.layers.0.input_layernorm.weight")
                or name.endswith("language_model.model.layers.0.input_layernorm.weight"))  # fmt: skip
    source = _copy(sources[model_type, 144], tmp_path / "source", remove=name)
    with pytest.raises(CheckpointError, match=r"lacks tensor `model\.layers\.0\.input_layernorm\.weight`"):
        _prepare(source, tmp_path / "out")


def _copy(source: Path, target: Path, *, add: dict[str, str] | None = None, remove: str | None = None) -> Path:
    """A copy with copies of tensors under other names, or without a tensor."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, like in (add or {}).items():
        assert name not in tensors
        tensors[name] = tensors[like].clone()
    if remove is not None:
        del tensors[remove]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("model_type", "towers", "found"),
    [
        ("qwen3_5", {}, "28 tensors with gradients, on cpu"),
        ("llama4", {}, "24 tensors with gradients, on cpu"),
        ("mllama", {"model.layers.1": 30_882}, "21 tensors with gradients, 13 of towers that take no text, on cpu"),
        (
            "gemma3",
            {"model.vision_tower": 17_120, "model.multi_modal_projector": 2_080},
            "28 tensors with gradients, 34 of towers that take no text, on cpu",
        ),
    ],
)
def test_what_text_does_not_reach_is_told_and_expected(
    sources: Sources, tmp_path: Path, model_type: str, towers: dict[str, int], found: str
) -> None:
    report = _prepare(sources[model_type, 144], tmp_path / "out")
    assert report["parameters"]["towers"] == towers
    told = [warning for warning in report["warnings"] if warning.startswith("text gives no gradient to ")]
    listed = ", ".join(f"`{module}`" for module in towers)
    assert told == ([f"text gives no gradient to {listed}: training on text leaves them as they are"] if towers else [])
    step = _training_step(tmp_path / "out")
    assert step.problems == ()
    assert step.found.endswith(found)


def test_a_text_parameter_without_a_gradient_is_still_found(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

    _prepare(sources["gemma3", 144], tmp_path / "out")
    forward = Gemma3MLP.forward
    monkeypatch.setattr(Gemma3MLP, "forward", lambda self, x: forward(self, x).detach())
    problems = _training_step(tmp_path / "out").problems
    assert len(problems) == 2 * 4  # of each layer, three matrices and the norm before them
    assert problems[0] == "`model.language_model.layers.0.mlp.gate_proj.weight` is trainable and has no gradient"


def test_what_auto_classes_can_t_load_by_itself_is_told_and_loads(sources: Sources, tmp_path: Path) -> None:
    report = _prepare(sources["mllama", 144], tmp_path / "out", "--use_lora")
    told = "AutoModelForCausalLM can't load a `mllama_text_model` by itself: load what is written with `load_prepared`"
    assert f"{told}, or with `MllamaForCausalLM`" in report["warnings"]
    checked = verify(tmp_path / "out", quick=False, trust_remote_code=False, progress=Silent())
    assert [check.problems for check in checked.checks] == [()] * 8


def test_an_image_model_that_is_not_for_text_is_still_refused(sources: Sources, tmp_path: Path) -> None:
    source = _copy(sources["qwen3_5", 144], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["Qwen3_5ForSequenceClassification"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is a `Qwen3_5ForSequenceClassification`, not a causal language model"):
        _prepare(source, tmp_path / "out")
