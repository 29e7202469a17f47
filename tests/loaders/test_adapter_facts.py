"""What is said of adapters that PEFT trained and saved, and of prepared ones: counts by kind, and settings in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ftload import load_prepared
from ftload.loaders.adapter.in_words import in_words
from ftload.loaders.inspect.inspection import inspect
from ftload.loaders.report.model_card import model_card
from ftload.loaders.report.outputs import read_report
from safetensors.torch import load_file

from ..cli.runs import prepare
from ..merge.adapters import write_adapter
from ..parity.models import write_model
from ..tokenizers import write_llama

ROWS = 128


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "llama_tied", "gpt2"):
        write_model(root / name, name, vocab_size=ROWS, dtype="bfloat16")
        write_llama(root / name, vocab_size=ROWS - 1)  # and a pad token
    return {directory.name: directory for directory in root.iterdir()}


TRAINED: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, int]], str]] = {
    # what: model, PEFT's settings, tensors and parameters of each kind, words
    "dora": (
        "llama", {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj"]},
        {"low-rank": (4, 4 * 64 * 8), "magnitude": (2, 2 * 64)}, "DoRA, rsLoRA",
    ),
    "modules": (
        "llama_tied", {"modules_to_save": ["embed_tokens", "norm"], "target_modules": ["q_proj"]},
        {"low-rank": (4, 4 * 64 * 8), "saved module": (6, ROWS * 64 + 5 * 64)}, "embed_tokens norm trained whole",
    ),
    "tokens": (
        "llama", {"trainable_token_indices": [3, 5, 7, 9, 11], "target_modules": ["q_proj"]},
        {"low-rank": (4, 4 * 64 * 8), "token rows": (1, 5 * 64)}, "rows 3 5 7 9 and 1 more trained",
    ),
    "biases": (
        "gpt2", {"bias": "lora_only", "target_modules": ["c_attn"]},
        {"low-rank": (4, 2 * 8 * (64 + 192)), "bias": (2, 2 * 192)}, "biases of its layers trained",
    ),
    "bias of B": (
        "gpt2", {"lora_bias": True, "target_modules": ["c_attn"]},
        {"low-rank": (4, 2 * 8 * (64 + 192)), "bias of B": (2, 2 * 192)}, "B with a bias",
    ),
    "patterns": (
        "llama", {"alpha_pattern": {"v_proj": 3}, "layers_to_transform": [1], "exclude_modules": ["k_proj"],
                  "target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"low-rank": (4, 8 * (64 + 64) + 8 * (64 + 32))}, "alpha 3 on v_proj, not on k_proj, in layers 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINED)
def test_a_trained_adapter_is_counted_by_kind(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    model, settings, kinds, words = TRAINED[case]
    write_adapter(models[model], tmp_path / "adapter", r=8, **settings)
    found = inspect(str(tmp_path / "adapter"))
    assert {kind: (counted.tensors, counted.parameters) for kind, counted in found.adapter_kinds().items()} == kinds
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert found.by("component").keys() == {"adapter"}
    assert found.total.parameters == sum(value.numel() for value in saved.values())
    assert found.embeddings is None
    assert found.adapter is not None
    assert ", ".join(in_words(found.adapter.settings)) == words


def test_a_saved_copy_is_no_head_of_the_base(models: dict[str, Path], tmp_path: Path) -> None:
    saved = ["--lora_modules_to_save", "embed_tokens", "lm_head"]
    prepare(models["llama_tied"], tmp_path / "out", "--use_lora", "--base", "copy", *saved)
    found = inspect(str(tmp_path / "out"))
    assert found.embeddings is not None
    assert not found.embeddings.head_stored
    assert not [note for note in found.notes if "a head is stored" in note]


def test_what_is_no_value_of_a_setting_is_not_shown() -> None:
    assert in_words({"rank_pattern": 3, "use_dora": "yes", "modules_to_save": [[]], "init_lora_weights": 7}) == ()
    assert in_words({"trainable_token_indices": {"lm_head": [1]}, "init_lora_weights": "pissa"}) == (
        "initialised by pissa",
        "row of lm_head 1 trained",
    )


@pytest.mark.parametrize(("initialisation", "changes"), [("pissa", True), ("gaussian", False)])
def test_the_card_says_that_a_changed_base_is_not_the_original(
    models: dict[str, Path], tmp_path: Path, initialisation: str, changes: bool
) -> None:
    report = prepare(models["llama"], tmp_path / "out", "--use_qlora", "--init_lora_weights", initialisation)
    card = model_card(read_report(tmp_path / "out"))
    assert card == (tmp_path / "out/README.md").read_text()
    assert f"(rank 8, alpha 16, dropout 0.1, initialised by {initialisation}) is in `adapter/`" in card
    assert ("The base alone is not the original model any more" in card) is changes
    assert ("`adapter_config.json` says `init_lora_weights: true` on purpose" in card) is changes
    assert any("it alone is not the original model any more" in warning for warning in report["warnings"]) is changes


COUNTED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 4}},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens", "wte"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "wte", "lm_head"]},
    "tied copies": {"modules_to_save": ["embed_tokens", "wte"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [3, 5]},
    "rows and head": {"trainable_token_indices": [3, 5], "modules_to_save": ["lm_head"]},
    "all biases": {"bias": "all"},
    "biases": {"bias": "lora_only"},
    "biases of B": {"lora_bias": True},
}
SKIPPED = {
    ("llama", "tied copies"): "nothing is tied",
    ("llama_tied", "rows and head"): "PEFT's model can't be used",
    ("gpt2", "rows and head"): "PEFT's model can't be used",
}


@pytest.mark.parametrize("strategy", ["--use_lora", "--use_qlora"])
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("case", COUNTED)
def test_parameters_are_counted_as_the_loaded_model_has_them(
    models: dict[str, Path], tmp_path: Path, case: str, architecture: str, strategy: str
) -> None:
    if (architecture, case) in SKIPPED:
        pytest.skip(SKIPPED[architecture, case])
    settings = dict(COUNTED[case])
    other = {"gpt2": "embed_tokens"}.get(architecture, "wte")
    if "modules_to_save" in settings:
        settings["modules_to_save"] = [name for name in settings["modules_to_save"] if name != other]
    (tmp_path / "lora.json").write_text(json.dumps(settings))
    flags = [strategy, "--min_quantized", "0", "--lora_config", str(tmp_path / "lora.json")]
    report = prepare(models[architecture], tmp_path / "out", *flags)
    model, _ = load_prepared(tmp_path / "out")
    counted: dict[str, list[int]] = {}
    trainable = 0
    for parameter in model.parameters():  # each once
        state = getattr(parameter, "quant_state", None)
        number = parameter.numel() if state is None else state.shape.numel()
        trainable += number if parameter.requires_grad else 0
        row = counted.setdefault("nf4" if state is not None else str(parameter.dtype).removeprefix("torch."), [0, 0])
        row[0] += 1
        row[1] += number
    parameters = report["parameters"]
    assert {dtype: [row["tensors"], row["parameters"]] for dtype, row in parameters["in_training"].items()} == counted
    total = sum(number for _, number in counted.values())
    assert (parameters["total"], parameters["trainable"]) == (total, trainable)
    assert parameters["frozen"] == total - trainable
    assert report["adapter"]["parameters"] == trainable
    for by in ("by_dtype", "by_component"):
        assert sum(row["parameters"] for row in parameters[by].values()) == total
    stored = [load_file(file) for file in (tmp_path / "out").rglob("*.safetensors")]
    if report["base"] == "copy":
        assert sum(row["tensors"] for row in parameters["by_dtype"].values()) == sum(
            not any(part in name for part in (".absmax", ".quant_map", ".nested_", ".quant_state"))
            for tensors in stored
            for name in tensors
        )
