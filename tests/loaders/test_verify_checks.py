# ruff: noqa: E501 -- a fault a line
"""Every message of `ftload verify`, provoked one at a time: a report that says something else, or a model spoilt in memory."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.checkpoint import open_checkpoint
from ftload.loaders.load import load_prepared
from ftload.loaders.progress import Silent
from ftload.loaders.report.outputs import read_document
from ftload.loaders.source.resolve import resolve_source
from ftload.loaders.verify import training as verify_training
from ftload.loaders.verify.adapter import check_adapter
from ftload.loaders.verify.files import Context, check_config, check_files, check_report, check_tensors
from ftload.loaders.verify.tokenizer import check_chat_template, check_tokenizer
from ftload.loaders.verify.training import check_training
from safetensors.torch import save_file

from ..cli.runs import prepare
from ..parity.models import write_model
from ..tokenizers import write_llama

Q = "model.layers.0.self_attn.q_proj"
LORA = f"base_model.model.{Q}.lora_"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checks")
    for name, rows in (("llama", 136), ("llama_tied", 136), ("small", 128)):
        write_model(root / name, "llama" if name == "small" else name, vocab_size=rows, dtype="bfloat16")
        write_llama(root / name, vocab_size=128)
    kinds = {
        "standard": ("llama", []),
        "tied": ("llama_tied", []),
        "grown": ("small", []),
        "lora": ("llama", ["--use_lora"]),
        "qlora": ("llama", ["--use_qlora"]),
    }
    for name, (model, flags) in kinds.items():
        prepare(root / model, root / name, "--chat_template_name", "tulu", *flags)
    return {name: root / name for name in kinds}


def context_of(directory: Path, change: Callable[[Any], Any] = lambda report: None) -> Context:
    report = read_document(directory)
    change(report)
    return Context(root=directory, document=report, trust_remote_code=False, progress=Silent())


def said(check: Callable[[Context], Iterator[str]], context: Context) -> list[str]:
    """What a check says, until it can't go on with what was spoilt."""
    problems: list[str] = []
    with contextlib.suppress(KeyError, AttributeError, RuntimeError):
        problems += check(context)
    return problems


def put(*keys: str, value: Any) -> Callable[[Any], None]:
    """Set one field of a report."""

    def change(report: Any) -> None:
        *path, last = keys
        for key in path:
            report = report[key]
        report[last] = value

    return change


def more(*keys: str, by: int = 1) -> Callable[[Any], None]:
    """Raise a number of a report."""

    def change(report: Any) -> None:
        *path, last = keys
        for key in path:
            report = report[key]
        report[last] += by

    return change


def entry(name: str, section: Callable[[Any], Any], **values: Any) -> Callable[[Any], None]:
    """Change what a report says of a file."""
    return lambda report: next(file for file in section(report) if file["path"] == name).update(values)


def written(report: Any) -> Any:
    return report["files"]


def original(report: Any) -> Any:
    return report["source"]["files"]


REPORTS: dict[str, tuple[str, Callable[[Context], Iterator[str]], str, Callable[[Any], Any]]] = {
    # what: output, check, the whole message, what the report says otherwise
    "frozen": ("qlora", check_report, "trainable and frozen parameters are not the total", more("parameters", "frozen")),
    "by dtype": ("qlora", check_report, "the parameters of `by_dtype` are not the total", more("parameters", "by_dtype", "nf4", "parameters")),
    "in training": ("qlora", check_report, "the parameters of `in_training` are not the total", more("parameters", "in_training", "float32", "parameters")),
    "by component": ("qlora", check_report, "the parameters of `by_component` are not the total", more("parameters", "by_component", "norm", "parameters")),
    "the adapter's parameters": ("qlora", check_report, "the trainable parameters are not the adapter's", more("adapter", "parameters")),
    "a field": ("qlora", check_report, "`parameters.by_component` is missing", lambda r: r["parameters"].pop("by_component")),
    "a type": ("qlora", check_report, '`adapter.dtype` is `null`, its type is `"string"`', put("adapter", "dtype", value=None)),
    "a value": ("qlora", check_report, '`base` is `"both"`, its enum is `["copy", "reference"]`', put("base", value="both")),
    "a file too many": ("standard", check_files, "`gone.json` is missing", lambda r: r["files"].append({"path": "gone.json", "bytes": 1, "sha256": "0" * 64})),
    "a file's size": ("standard", check_files, "`generation_config.json` has {size} bytes, not 1", entry("generation_config.json", written, bytes=1)),
    "a file's hash": ("standard", check_files, "`config.json` is not what was written: its sha256 differs", entry("config.json", written, sha256="0" * 64)),
    "a file too few": ("standard", check_files, "`config.json` is not in the report", lambda r: r["files"].remove(next(f for f in r["files"] if f["path"] == "config.json"))),
    "tensors": ("standard", check_tensors, "21 tensors of bfloat16, the report says 22", more("parameters", "by_dtype", "bfloat16", "tensors")),
    "4-bit tensors": ("qlora", check_tensors, "14 tensors of nf4, the report says 15", more("parameters", "by_dtype", "nf4", "tensors")),
    "bytes": ("standard", check_tensors, "{bytes:,} bytes of bfloat16, the report says 7", put("parameters", "by_dtype", "bfloat16", "bytes", value=7)),
    "a dtype that is not there": ("standard", check_tensors, "0 tensors of float16, the report says 1", put("parameters", "by_dtype", "float16", value={"tensors": 1, "bytes": 0, "parameters": 0})),
    "rows of a grown vocabulary": ("grown", check_config, "`vocab_size` is 136, the embeddings have 144 rows", more("embeddings", "rows_after", by=8)),
    "rows": ("standard", check_config, "the embeddings have 136 rows, the report says 144", more("embeddings", "rows_after", by=8)),
    "type": ("standard", check_config, "the model is a `llama`, the report says `mistral`", put("source", "model_type", value="mistral")),
    "architecture": ("standard", check_config, "the model is a `LlamaForCausalLM`, the report says `Other`", put("source", "architecture", value="Other")),
    "settings": ("standard", check_config, "`generation_config.json` has other settings than when this was prepared", put("configuration", "generation_config.json", value="0" * 64)),
    "no quantisation": ("qlora", check_config, "`quantization_config` is there, the report knows of none", put("quantization", value=None)),
    "quantisation": ("standard", check_config, "`quantization_config` is missing", put("quantization", value={"quant_type": "nf4"})),
    "quant_type": ("qlora", check_config, "`bnb_4bit_quant_type` is nf4, the report says fp4", put("quantization", "quant_type", value="fp4")),
    "double_quant": ("qlora", check_config, "`bnb_4bit_use_double_quant` is True, the report says False", put("quantization", "double_quant", value=False)),
    "compute_dtype": ("qlora", check_config, "`bnb_4bit_compute_dtype` is bfloat16, the report says float16", put("quantization", "compute_dtype", value="float16")),
    "storage_dtype": ("qlora", check_config, "`bnb_4bit_quant_storage` is uint8, the report says bfloat16", put("quantization", "storage_dtype", value="bfloat16")),
    "tied": ("standard", check_config, "embeddings and head are not tied, the report says otherwise", put("embeddings", "tied", value=True)),
    "not tied": ("tied", check_config, "embeddings and head are tied, the report says otherwise", put("embeddings", "tied", value=False)),
    "never trained": ("standard", check_config, "0 parameters are frozen, the report says 64", more("parameters", "frozen", by=64)),
    "parameters": ("standard", check_config, "{parameters:,} parameters of bfloat16, the report says 7", put("parameters", "by_dtype", "bfloat16", "parameters", value=7)),
    "4-bit parameters": ("qlora", check_config, "{nf4:,} parameters of nf4, the report says 7", put("parameters", "by_dtype", "nf4", "parameters", value=7)),
    "tokens": ("standard", check_tokenizer, "129 tokens, the report says 130", more("tokenizer", "size")),
    "pad": ("standard", check_tokenizer, "pad_token is `<pad>`, the report says `x`", put("tokenizer", "pad_token", value="x")),
    "pad's id": ("standard", check_tokenizer, "pad_token_id is `128`, the report says `129`", more("tokenizer", "pad_token_id")),
    "eos": ("standard", check_tokenizer, "eos_token is `</s>`, the report says `x`", put("tokenizer", "eos_token", value="x")),
    "eos's id": ("standard", check_tokenizer, "eos_token_id is `2`, the report says `3`", more("tokenizer", "eos_token_id")),
    "bos": ("standard", check_tokenizer, "bos_token is `<s>`, the report says `x`", put("tokenizer", "bos_token", value="x")),
    "padding side": ("standard", check_tokenizer, "padding_side is `left`, the report says `right`", put("tokenizer", "padding_side", value="right")),
    "longest input": ("standard", check_tokenizer, f"model_max_length is `{int(1e30)}`, the report says `8`", put("tokenizer", "model_max_length", value=8)),
    "pad of config.json": ("standard", check_tokenizer, "`pad_token_id` of config.json is 128, the report says 129", more("embeddings", "pad_token_id")),
    "pad of generation_config.json": ("standard", check_tokenizer, "`pad_token_id` of generation_config.json is 128, the report says 129", more("embeddings", "pad_token_id")),
    "ids beyond the rows": ("standard", check_tokenizer, "token id 128 does not fit 128 embedding rows", put("embeddings", "rows_after", value=128)),
    "template": ("standard", check_chat_template, "the chat template is not the one in the report", put("tokenizer", "chat_template_sha256", value="0" * 64)),
    "hits": ("qlora", check_adapter, "`q_proj` hits 2 layers, the report says 3", more("adapter", "targets", "q_proj")),
    "rank": ("qlora", check_adapter, "`r` is `8`, not `9`", more("adapter", "r")),
    "shapes by the rank": ("qlora", check_adapter, f"`{LORA}A.weight` has the shape [8, 64], its layer takes [9, 64]", more("adapter", "r")),
    "alpha": ("qlora", check_adapter, "`lora_alpha` is `16`, not `17`", more("adapter", "alpha")),
    "dropout": ("qlora", check_adapter, "`lora_dropout` is `0.1`, not `0.2`", put("adapter", "dropout", value=0.2)),
    "base": ("qlora", check_adapter, "`base_model_name_or_path` is `{root}`, not `other`", put("adapter", "base", value="other")),
    "revision": ("qlora", check_adapter, "`revision` is `None`, not `main`", put("adapter", "revision", value="main")),
    "a target too few": ("qlora", check_adapter, f"`{LORA}A.weight` belongs to no layer that is trained", lambda r: r["adapter"]["targets"].pop("q_proj")),
    "parameters of the adapter": ("qlora", check_adapter, "the adapter does not have the parameters that the report says", more("adapter", "parameters")),
    "a file of the base": ("lora", check_adapter, "the base, `{base}`, lacks `more.safetensors`", lambda r: r["source"]["files"].append({"path": "more.safetensors", "bytes": 1, "sha256": None})),
    "the size of a file of the base": ("lora", check_adapter, "`model.safetensors` of the base has {base_size} bytes, not 1", entry("model.safetensors", original, bytes=1)),
    "trainable, in memory": ("qlora", check_training, "{trainable:,} parameters are trainable, the report says 7", put("parameters", "trainable", value=7)),
    "total, in memory": ("qlora", check_training, "the model has {total:,} parameters, the report says 7", put("parameters", "total", value=7)),
    "dtype, in memory": ("qlora", check_training, "{nf4:,} parameters are nf4, the report says 7", put("parameters", "in_training", "nf4", "parameters", value=7)),
    "rows, in memory": ("standard", check_training, "the embeddings have 136 rows, the report says 144", more("embeddings", "rows_after", by=8)),
    "rows of the head, in memory": ("grown", check_training, "the head have 136 rows, the report says 144", more("embeddings", "rows_after", by=8)),
}  # fmt: skip


@pytest.mark.parametrize("what", REPORTS)
def test_a_report_that_says_otherwise(outputs: dict[str, Path], what: str) -> None:
    kind, check, message, change = REPORTS[what]
    report = read_document(outputs[kind])
    by_dtype = report["parameters"]["by_dtype"]
    base = Path(report["source"]["path"])
    expected = message.format(
        root=outputs[kind],
        base=base,
        base_size=(base / "model.safetensors").stat().st_size,
        bytes=by_dtype["bfloat16"]["bytes"],
        nf4=by_dtype.get("nf4", {}).get("parameters"),
        parameters=by_dtype["bfloat16"]["parameters"],
        size=next((file["bytes"] for file in report["files"] if file["path"] == "generation_config.json"), None),
        total=report["parameters"]["total"],
        trainable=report["parameters"]["trainable"],
    )
    assert expected in said(check, context_of(outputs[kind], change))


def test_honest_outputs_give_no_message(outputs: dict[str, Path]) -> None:
    checks = (
        check_report,
        check_files,
        check_tensors,
        check_config,
        check_tokenizer,
        check_chat_template,
        check_adapter,
    )
    for directory in outputs.values():
        context = context_of(directory)
        for check in (*checks, check_training):
            assert list(check(context)) == [], (directory, check)


def test_a_report_of_a_later_version_passes(outputs: dict[str, Path]) -> None:
    for section in ("source", "parameters", "tokenizer"):
        assert list(check_report(context_of(outputs["standard"], put(section, "more", value=1)))) == []


def test_each_missing_field_is_reported_once(outputs: dict[str, Path]) -> None:
    def change(report: Any) -> None:
        del report["adapter"]["r"], report["adapter"]["alpha"], report["versions"]["python"]

    problems = list(check_report(context_of(outputs["lora"], change)))
    assert problems == ["`adapter.r` is missing", "`adapter.alpha` is missing", "`versions.python` is missing"]


def test_no_chat_template(outputs: dict[str, Path]) -> None:
    context = context_of(outputs["standard"])
    tokenizer: Any = context.tokenizer
    tokenizer.chat_template = None
    assert list(check_chat_template(context)) == ["the chat template is gone"]


def test_an_adapter_setting_that_is_gone(outputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(outputs["lora"], tmp_path / "out")
    path = tmp_path / "out/adapter/adapter_config.json"
    config = json.loads(path.read_text())
    del config["use_dora"]
    path.write_text(json.dumps(config))
    assert list(check_adapter(context_of(tmp_path / "out"))) == ["`use_dora` is missing"]


def test_an_adapter_tensor_that_is_gone(outputs: dict[str, Path]) -> None:
    context = context_of(outputs["lora"])
    gone = context.adapter.pop(f"{LORA}B.weight")
    problems = list(check_adapter(context))
    assert problems == [f"`{gone.name}` is missing", "the adapter does not have the parameters that the report says"]


def test_the_hash_of_a_base_file(outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub states hashes, a directory none: here it is made to."""
    from ftload.loaders.verify import adapter as verify_adapter

    def with_hashes(model: str, revision: str | None) -> Any:
        source = resolve_source(model, revision)
        return replace(source, files=tuple(replace(file, sha256="1" * 64) for file in source.files))

    monkeypatch.setattr(verify_adapter, "resolve_source", with_hashes)
    context = context_of(outputs["lora"], entry("config.json", original, sha256="0" * 64))
    assert list(check_adapter(context)) == ["`config.json` of the base has another sha256"]
    assert list(check_adapter(context_of(outputs["lora"], entry("config.json", original, sha256="1" * 64)))) == []


# the model in memory


def parameter(name: str, change: Callable[[torch.nn.Parameter], Any]) -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        with torch.no_grad():
            change(model.get_parameter(name))

    return spoil


def at_forward(change: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """Change the model, or what it returns, when the step is taken."""
    return lambda model: model.register_forward_hook(lambda _, __, output: change(model, output))


def detach(name: str) -> Callable[[Any], Any]:
    """Cut a module off from the loss."""
    return lambda model: model.get_submodule(name).register_forward_hook(lambda _, __, output: output.detach())


EMBEDDING = "base_model.model.model.embed_tokens.weight"

MODELS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    # what: output, the whole message, how the model is spoilt
    "a loss that is none": ("standard", "the loss is nan", at_forward(lambda _, output: setattr(output, "loss", output.loss * torch.nan))),
    "logits that are none": ("standard", "the logits are not finite", at_forward(lambda _, output: setattr(output, "logits", output.logits * torch.inf))),
    "a frozen one with a gradient": (
        "lora", f"`{EMBEDDING}` is frozen and has a gradient",
        at_forward(lambda model, _: setattr(model.get_parameter(EMBEDDING), "grad", torch.zeros(136, 64, dtype=torch.bfloat16))),
    ),
    "a trainable one without a gradient": ("standard", "`model.layers.0.self_attn.q_proj.weight` is trainable and has no gradient", detach(Q)),
    "an adapter without a gradient": ("qlora", f"`{LORA}B.default.weight` is trainable and has no gradient", detach(f"base_model.model.{Q}.lora_B.default")),
    "a gradient that is none": ("standard", "the gradient of `lm_head.weight` is not finite", lambda model: model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)),
    "lora A of zeros": ("lora", f"`{LORA}B.default.weight` did not move in one optimizer step", parameter(f"{LORA}A.default.weight", lambda p: p.zero_())),
    "an adapter of other values": ("lora", f"`{LORA}A.weight` is not loaded as it is stored", parameter(f"{LORA}A.default.weight", lambda p: p.add_(1))),
    "lora B of ones": ("lora", f"`{LORA}B.default.weight` is not zero before the first step", parameter(f"{LORA}B.default.weight", lambda p: p.fill_(1))),
    "an adapter that is not loaded": ("lora", f"`{LORA}A.weight` is not loaded", lambda model: delattr(model.get_submodule(f"base_model.model.{Q}.lora_A.default"), "weight")),
    "NaN": ("standard", "`model.norm.weight` is not finite", parameter("model.norm.weight", lambda p: p.fill_(torch.nan))),
    "an added row of zeros": ("grown", "row 130 of the embeddings, which was added, is zero", parameter("model.embed_tokens.weight", lambda p: p[130].zero_())),
    "an added row of zeros in the head": ("grown", "row 135 of the head, which was added, is zero", parameter("lm_head.weight", lambda p: p[135].zero_())),
    "one that is frozen": ("standard", "{less:,} parameters are trainable, the report says {trainable:,}", parameter("model.norm.weight", lambda p: p.requires_grad_(False))),
    "one in another dtype": ("standard", "64 parameters are float32, the report says 0", lambda model: model.model.norm.float()),
    "one too many": ("standard", "the model has {more:,} parameters, the report says {trainable:,}", lambda model: model.register_parameter("stray", torch.nn.Parameter(torch.ones(1)))),
}  # fmt: skip


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_is_spoilt(outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    kind, message, spoil = MODELS[what]

    def load(directory: Path, *, trust_remote_code: bool) -> Any:
        model, tokenizer = load_prepared(directory, trust_remote_code=trust_remote_code)
        spoil(model)
        return model, tokenizer

    monkeypatch.setattr(verify_training, "load_prepared", load)
    context = context_of(outputs[kind])
    trainable = context.report.parameters.trainable
    expected = message.format(trainable=trainable, less=trainable - 64, more=trainable + 1)
    assert expected in said(check_training, context)


def test_what_can_not_be_loaded(outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no such thing.")

    monkeypatch.setattr(verify_training, "load_prepared", load)
    context = context_of(outputs["standard"])
    assert list(check_training(context)) == ["it does not load: no such thing"]
    assert context.hint == "look at the original model, and ask `ftload doctor` whether the libraries work here"


# what helps


@pytest.mark.parametrize(
    ("check", "change", "hint"),
    [
        (check_tokenizer, more("tokenizer", "size"), "prepare it again with --overwrite"),
        (
            check_tokenizer, put("embeddings", "rows_after", value=128),
            "prepare it with another --tokenizer_name_or_path, or mend the model's own tokenizer first",
        ),
        (
            check_chat_template, put("tokenizer", "chat_template_sha256", value="0" * 64),
            "prepare it again with --overwrite",
        ),
        (check_training, more("parameters", "total"), "prepare it again with --overwrite"),
        (
            check_training, put("embeddings", "rows_after", value=144),
            "look at the original model, and ask `ftload doctor` whether the libraries work here",
        ),
    ],
)  # fmt: skip
def test_preparing_again_is_the_hint_where_it_helps(
    outputs: dict[str, Path], check: Callable[[Context], Iterator[str]], change: Callable[[Any], Any], hint: str
) -> None:
    """Where the directory is not what the report says; what is wrong in itself would be written once more."""
    context = context_of(outputs["standard"], change)
    next(check(context))
    assert context.hint == hint


# 4-bit weights that somebody else quantised, without double quantisation


def packed(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any], weight: torch.Tensor) -> list[str]:
    """What is said of a weight that bitsandbytes quantised and `change` changed."""
    import bitsandbytes.functional

    codes, state = bitsandbytes.functional.quantize_4bit(weight.bfloat16(), quant_type="nf4", compress_statistics=False)
    tensors = {"W": codes, **{f"W.{name}": value for name, value in state.as_dict(packed=True).items()}}
    change(tensors)
    directory.mkdir(exist_ok=True)
    save_file(deepcopy(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    checkpoint = open_checkpoint(resolve_source(str(directory), None), allow_pickle=False)
    (tensor,) = checkpoint.packed
    return list(tensor.problems(checkpoint.values))


def test_4_bit_without_double_quantisation(tmp_path: Path) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for change, problems in (
        (lambda t: None, []),
        (lambda t: t["W.absmax"].zero_(), ["`W.absmax` is zero, and its codes are not"]),
        (lambda t: t["W.absmax"].neg_(), ["`W.absmax` is not finite, or negative"]),
        (lambda t: t["W.absmax"][3:4].fill_(torch.nan), ["`W.absmax` is not finite, or negative"]),
    ):
        assert packed(tmp_path, change, weight) == problems
    assert packed(tmp_path, lambda t: t["W.absmax"].zero_(), torch.zeros(64, 64)) == []


@pytest.mark.parametrize("kind", ["zeros", "one value", "half zeros", "one block", "an outlier", "a trained layer"])
def test_statistics_of_odd_weights_are_honest(tmp_path: Path, kind: str) -> None:
    from ftload.loaders.nf4 import encode as nf4

    normal = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    weight = {
        "zeros": torch.zeros(512, 128),
        "one value": torch.full((512, 128), 0.3),
        "half zeros": torch.cat([torch.zeros(256, 128), normal[256:]]),
        "one block": normal[:1, :64],
        "an outlier": torch.cat([normal[1:] * 1e-3, normal[:1] * 100]),
        "a trained layer": normal**3,
    }[kind].bfloat16()
    codes, absmax = nf4.encode(weight)
    statistics = nf4.statistics(absmax, tuple(weight.shape), "bfloat16")
    save_file(
        {"W": codes.clone().reshape(-1, 1), **{f"W{suffix}": value for suffix, value in statistics.items()}},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(resolve_source(str(tmp_path), None), allow_pickle=False)
    (tensor,) = checkpoint.packed
    assert list(tensor.problems(checkpoint.values)) == []
