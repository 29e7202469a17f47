"""Every setting of PEFT's `LoraConfig` that ftload takes: what is written is what PEFT makes, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.errors import UsageError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.load import load_prepared
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json

from ..tokenizers import write_llama
from .adapter_reference import run_adapter_reference, threads
from .compare import assert_same_adapter_config, assert_same_json, assert_same_tensors, read_tensors
from .models import write_model
from .reference import REFERENCE_TARGETS

VOCABULARY = 128
"""Of the tokenizer; with the pad token that is added, 129 tokens."""
PLAIN = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
"""Of every adapter here, where its case does not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An architecture, how it is stored here, and what it calls its parts."""

    dtype: str
    rows: int = 144
    shards: bool = False
    targets: tuple[str, ...] = tuple(REFERENCE_TARGETS)
    embedding: str = "embed_tokens"
    norm: str = "norm"
    one: str = "q_proj"
    other: str = "k_proj"
    layers: str = "layers"


MODELS = {
    "llama": Model(dtype="float32", shards=True),
    "qwen3": Model(dtype="bfloat16", rows=128),
    "gpt2": Model(
        dtype="float16", targets=("c_attn", "c_proj", "c_fc"), embedding="wte", norm="ln_f", one="c_attn",
        other="c_fc", layers="h",
    ),
    "llama_tied": Model(dtype="bfloat16", rows=128, shards=True),
}  # fmt: skip
"""128 rows grow to 136."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An adapter: the flags that ask for it, or fields for `--lora_config`, and PEFT's fields of it."""

    flags: Callable[[Model], list[str]] | None = None
    fields: Callable[[Model], dict[str, Any]]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Of an architecture, a strategy, or both, to words of what ftload says, where PEFT fails or what it makes does."""


def flag(*words: str, **fields: Any) -> Case:
    return Case(flags=lambda _: list(words), fields=lambda _: fields)


CASES = {
    "dora": flag("--use_dora", use_dora=True),
    "rslora": flag("--use_rslora", use_rslora=True),
    "gaussian": flag("--init_lora_weights", "gaussian", init_lora_weights="gaussian"),
    "orthogonal": Case(
        flags=lambda _: ["--init_lora_weights", "orthogonal"],
        fields=lambda _: {"init_lora_weights": "orthogonal"},
        refused={"qlora": "`only Tensors of floating point and complex dtype can require gradients`"},
    ),
    "pissa": flag("--init_lora_weights", "pissa", init_lora_weights="pissa"),
    "pissa_niter_4": flag("--init_lora_weights", "pissa_niter_4", init_lora_weights="pissa_niter_4"),
    "pissa_niter_16": flag("--init_lora_weights", "pissa_niter_16", init_lora_weights="pissa_niter_16"),
    "olora": Case(
        flags=lambda _: ["--init_lora_weights", "olora"],
        fields=lambda _: {"init_lora_weights": "olora"},
        # PEFT takes the matrix of a Conv1D for (out, in): a forward pass fails
        refused={"gpt2": "it can't be trained"},
    ),
    "no init": Case(fields=lambda _: {"init_lora_weights": False}),
    "save head": flag("--lora_modules_to_save", "lm_head", modules_to_save=["lm_head"]),
    "save embedding": Case(
        flags=lambda model: ["--lora_modules_to_save", model.embedding],
        fields=lambda model: {"modules_to_save": [model.embedding]},
    ),
    "save norm": Case(
        flags=lambda model: ["--lora_modules_to_save", model.norm],
        fields=lambda model: {"modules_to_save": [model.norm]},
    ),
    "save both": Case(
        flags=lambda model: ["--lora_modules_to_save", model.embedding, "lm_head"],
        fields=lambda model: {"modules_to_save": [model.embedding, "lm_head"]},
    ),
    "save tied": Case(
        fields=lambda model: {"modules_to_save": [model.embedding], "ensure_weight_tying": True},
    ),
    "tokens": flag("--trainable_token_indices", "7", "3", "128", trainable_token_indices=[7, 3, 128]),
    "tokens of both": Case(
        fields=lambda model: {"trainable_token_indices": {model.embedding: [3, 5], "lm_head": [4]}},
    ),
    "ranks": Case(
        fields=lambda model: {
            "rank_pattern": {model.one: 4, rf"1\..*\.{model.other}": 2},
            "alpha_pattern": {model.other: 32},
        },
    ),
    "exclude": Case(fields=lambda model: {"exclude_modules": [model.other]}),
    "exclude by regex": Case(fields=lambda model: {"exclude_modules": rf".*\.0\..*{model.one}"}),
    "layer": Case(fields=lambda _: {"layers_to_transform": [1]}),
    "layers pattern": Case(fields=lambda model: {"layers_to_transform": [0], "layers_pattern": model.layers}),
    "regex": Case(fields=lambda model: {"target_modules": rf".*\.1\..*\.({model.one}|{model.other})"}),
    "bias all": Case(fields=lambda _: {"bias": "all"}),
    "bias lora_only": Case(fields=lambda _: {"bias": "lora_only"}),
    "lora_bias": Case(fields=lambda _: {"lora_bias": True}),
    "dora, rslora": flag("--use_dora", "--use_rslora", use_dora=True, use_rslora=True),
    "pissa, rslora": flag(
        "--use_rslora", "--init_lora_weights", "pissa", use_rslora=True, init_lora_weights="pissa"
    ),
    "olora, ranks": Case(
        fields=lambda model: {"init_lora_weights": "olora", "rank_pattern": {model.one: 4}},
        refused={"gpt2": "it can't be trained"},
    ),
    "dora, pissa": flag("--use_dora", "--init_lora_weights", "pissa", use_dora=True, init_lora_weights="pissa"),
    "dora, head, tokens": Case(
        flags=lambda _: ["--use_dora", "--lora_modules_to_save", "lm_head", "--trainable_token_indices", "3", "5"],
        fields=lambda _: {"use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]},
        # the embedding's rows are the head's as well, and PEFT would wrap it twice
        refused=dict.fromkeys(("gpt2", "llama_tied"), "`TrainableTokensLayer wraps an unknown layer type`"),
    ),
    "dora, gaussian, bias, layer": Case(
        fields=lambda _: {
            "use_dora": True, "init_lora_weights": "gaussian", "bias": "all", "layers_to_transform": [0],
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of the models with their tokenizer, each written once."""
    directory = tmp_path_factory.mktemp("sources")

    def source(name: str) -> Path:
        if not (directory / name).exists():
            model = MODELS[name]
            write_model(directory / name, name, vocab_size=model.rows, dtype=model.dtype, shards=model.shards)
            write_llama(directory / name, vocab_size=VOCABULARY)
        return directory / name

    return source


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_peft_makes(
    tmp_path: Path, sources: Callable[[str], Path], case: str, name: str, strategy: str
) -> None:
    asked, model, out, reference = CASES[case], MODELS[name], tmp_path / "out", tmp_path / "reference"
    words = asked.flags(model) if asked.flags is not None else _lora_config(tmp_path, asked.fields(model))
    fields = {**PLAIN, "target_modules": list(model.targets), **asked.fields(model)}
    refused = next((asked.refused[key] for key in (name, strategy) if key in asked.refused), None)
    if refused is not None:
        with pytest.raises(UsageError) as raised:
            _prepare(sources(name), out, strategy, *words)
        assert refused in raised.value.message
        assert not out.exists()
        return
    report = _prepare(sources(name), out, strategy, *words)
    run_adapter_reference(sources(name), reference, fields, strategy=strategy, tokenizer_size=VOCABULARY + 1)
    changes = str(fields.get("init_lora_weights")).startswith(("pissa", "olora"))
    assert report["adapter"]["changes_base"] == changes
    assert report["embeddings"]["rows_after"] == (136 if model.rows == VOCABULARY else model.rows)
    _assert_same(out, reference, strategy, changes=changes)


PARAMETERS = {
    "plain": {},
    "gaussian, rslora": {"init_lora_weights": "gaussian", "use_rslora": True},
    "ranks": {"rank_pattern": {"gate_up_proj": 4, "q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_of_experts(tmp_path: Path, case: str, architecture: str) -> None:
    source, out, reference = tmp_path / "source", tmp_path / "out", tmp_path / "reference"
    write_model(source, architecture, vocab_size=144, dtype="bfloat16")
    write_llama(source, vocab_size=VOCABULARY)
    fields = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
    fields |= PARAMETERS[case]
    words = ["--lora_target_modules", "q_proj", "v_proj", "--lora_target_parameters", *EXPERTS, "--lora_dropout", "0"]
    _prepare(source, out, "lora", *words, *_lora_config(tmp_path, PARAMETERS[case]))
    run_adapter_reference(source, reference, fields, strategy="lora", tokenizer_size=VOCABULARY + 1)
    _assert_same(out, reference, "lora", changes=False)


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama_tied"])
def test_new_tokens_are_those_that_the_embedding_grew_for(tmp_path: Path, name: str, strategy: str) -> None:
    source, out, reference = _with_three_new_tokens(tmp_path, name), tmp_path / "out", tmp_path / "reference"
    fields = {**PLAIN, "target_modules": list(MODELS[name].targets), "trainable_token_indices": [128, 129, 130]}
    _prepare(source, out, strategy, "--trainable_token_indices", "new")
    run_adapter_reference(source, reference, fields, strategy=strategy, tokenizer_size=131)
    assert_same_tensors(out, reference)
    assert_same_tensors(out / "adapter", reference / "adapter")
    assert_same_adapter_config(out / "adapter", reference / "adapter")


@pytest.mark.parametrize(("name", "strategy"), [("llama", "lora"), ("llama_tied", "lora"), ("llama", "qlora")])
def test_only_new_rows_and_the_adapter_change_in_training(tmp_path: Path, name: str, strategy: str) -> None:
    """Then saved by PEFT, moved, and loaded again."""
    out, moved = tmp_path / "out", tmp_path / "elsewhere" / "moved"
    _prepare(_with_three_new_tokens(tmp_path, name), out, strategy, "--trainable_token_indices", "new")
    model, tokenizer = load_prepared(out)
    assert len(tokenizer) == 131
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {rows}
    assert len(trained) == 1 + 2 * 14
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[1, 128, 5, 129, 9, 130, 2]])
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.replace("lm_head", "model.embed_tokens") for name in changed} == trained
    assert (before[rows] != after[rows]).any(1).tolist() == [True] * 3
    logits = _logits(model, ids)
    model.save_pretrained(out / "adapter")
    moved.parent.mkdir()
    shutil.move(out, moved)
    assert torch.equal(_logits(load_prepared(moved)[0], ids), logits)
    if strategy == "lora":
        assert torch.equal(_logits(_loaded_by_peft(moved), ids), logits)


@pytest.mark.parametrize(
    ("name", "init"),
    [("llama", "pissa"), ("qwen3", "pissa_niter_16"), ("gpt2", "pissa"), ("llama", "olora"), ("llama_tied", "olora")],
)
def test_base_and_adapter_together_are_the_original(
    tmp_path: Path, sources: Callable[[str], Path], name: str, init: str
) -> None:
    """Within 1 % of the largest logit: all that is stored of base and adapter is rounded to bfloat16.

    PEFT's own output is not, where it is loaded on the base that was saved with it: its configuration names the
    initialisation, which changes the base once more. That is why `init_lora_weights` is true in ours.
    """
    from transformers import AutoModelForCausalLM

    source, out, reference = sources(name), tmp_path / "out", tmp_path / "reference"
    _prepare(source, out, "lora", "--init_lora_weights", init)
    fields = {**PLAIN, "target_modules": list(MODELS[name].targets), "init_lora_weights": init}
    run_adapter_reference(source, reference, fields, strategy="lora", tokenizer_size=VOCABULARY + 1)
    ids = torch.tensor([[1, 5, 9, 77, 64, 2, 33]])
    original = _logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), ids)
    alone = _logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16), ids)
    difference = {
        what: float((logits[..., :VOCABULARY] - original[..., :VOCABULARY]).abs().max() / original.abs().max())
        for what, logits in (
            ("ours", _logits(_loaded_by_peft(out), ids)),
            ("base alone", alone),
            ("PEFT's", _logits(_loaded_by_peft(reference), ids)),
        )
    }
    assert difference["ours"] < 0.01 < 0.05 < min(difference["base alone"], difference["PEFT's"]), difference


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_more_threads_change_the_last_bit(tmp_path: Path, init: str) -> None:
    """ftload computes with one thread, whatever torch is set to.

    PEFT with two, whose LAPACK sums in another order, comes to the same but for roundings to bfloat16: in 1 % of a
    matrix's weights a step of it at the largest of them, and 1 % of the largest number of B·A.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    source, out, reference = tmp_path / "source", tmp_path / "out", tmp_path / "reference"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=144, initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    write_llama(source, vocab_size=VOCABULARY)
    with threads(2):
        _prepare(source, out, "lora", "--init_lora_weights", init)
    fields = {**PLAIN, "target_modules": REFERENCE_TARGETS, "init_lora_weights": init}
    run_adapter_reference(source, tmp_path / "one", fields, strategy="lora", tokenizer_size=VOCABULARY + 1)
    _assert_same(out, tmp_path / "one", "lora", changes=True)
    run_adapter_reference(source, reference, fields, strategy="lora", tokenizer_size=VOCABULARY + 1, computed_by=2)
    ours, theirs = read_tensors(out), read_tensors(reference)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = (ours[name].float() - value.float()).abs()
        assert difference.max() <= value.abs().max() * 2**-7, name
        assert (difference > 0).float().mean() <= 0.01, name
    products = []
    for directory in (out, reference):
        adapter = read_tensors(directory / "adapter")
        products.append(
            {name: adapter[name.replace("lora_A", "lora_B")] @ adapter[name] for name in adapter if "lora_A" in name}
        )
    for name, value in products[1].items():
        assert (products[0][name] - value).abs().max() <= 0.01 * value.abs().max(), name


def _with_three_new_tokens(directory: Path, name: str) -> Path:
    """A model of 128 rows, whose tokenizer has 130 tokens and gets a pad token."""
    write_model(directory / "source", name, vocab_size=128, dtype="bfloat16")
    write_llama(directory / "source", vocab_size=130)
    return directory / "source"


def _loaded_by_peft(directory: Path) -> Any:
    """The adapter on its base, by PEFT and transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(base, str(directory / "adapter"))


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def _assert_same(out: Path, reference: Path, strategy: str, *, changes: bool) -> None:
    """Tensors and configurations of adapter and base."""
    assert_same_tensors(out / "adapter", reference / "adapter")
    if changes:
        said = json.loads((reference / "adapter" / "adapter_config.json").read_text())
        assert said["init_lora_weights"] is not True
        said["init_lora_weights"] = True
        if strategy == "qlora":
            said["fan_in_fan_out"] = False  # bitsandbytes' layers are (out, in), PEFT's reference was made on a Conv1D
        (reference / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    assert_same_adapter_config(out / "adapter", reference / "adapter")
    assert_same_tensors(out, reference)
    for name in ("config.json", "generation_config.json"):
        assert_same_json(out / name, reference / name, pad_token_id=VOCABULARY)


def _lora_config(directory: Path, fields: Mapping[str, Any]) -> list[str]:
    path = directory / "lora.yaml"
    path.write_text(json.dumps(fields))
    return ["--lora_config", str(path)]


def _prepare(source: Path, output: Path, strategy: str, *flags: str) -> dict[str, Any]:
    words = ["--model", str(source), "--output_dir", str(output), f"--use_{strategy}", "--min_quantized", "0"]
    words += ["--lora_rank", "8", "--embedding_init", "reference"]
    if strategy == "lora":
        words += ["--base", "copy"]
    outcome = prepare(parse_arguments([*words, *flags]), Silent())
    assert outcome is not None
    return to_json(outcome.report)
