"""`ftload prepare` on checkpoints as they come: tied, resized, oddly named, pickled, changed by flags, on a hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ..conftest import ROWS, Result
from ..hub import LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama, write_qwen
from .runs import headers, prepare

FILE = "model.safetensors"
Ftload = Callable[..., Result]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(directory / FILE)), directory / FILE, metadata={"format": "pt"})


# -- embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old(tmp_path: Path, tied: bool) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, "llama_tied" if tied else "llama", vocab_size=128, dtype="bfloat16")
    write_llama(source)
    report = prepare(source, out)
    assert report["embeddings"] == {
        "tokenizer_size": 129, "rows_before": 128, "rows_after": 136, "resized": True, "tied": tied, "init": "mean",
        "pad_token_id": 128,
    }  # fmt: skip
    before, after = load_file(source / FILE), load_file(out / FILE)
    assert (HEAD in after) == (not tied)
    for name in (EMBEDDING, HEAD)[: 1 if tied else 2]:
        assert torch.equal(after[name][:128], before[name])
        mean = before[name].double().mean(dim=0).float().bfloat16()
        assert torch.equal(after[name][128:], mean.expand(8, 64))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 136
    assert report["parameters"]["total"] == sum(tensor.numel() for tensor in after.values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_mean_is_that_of_the_rows_as_they_are_written(tmp_path: Path, dtype: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, "llama", vocab_size=128, dtype=dtype)
    write_llama(source)
    prepare(source, out)
    before, after = load_file(source / FILE), load_file(out / FILE)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(after[name][:128], before[name].bfloat16())
        mean = before[name].bfloat16().double().mean(dim=0).float().bfloat16()
        assert torch.equal(after[name][128:], mean.expand(8, 64))
        assert not torch.equal(before[name].double().mean(dim=0).float().bfloat16(), mean)


@pytest.mark.parametrize("init", ["mean", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_no_rows_are_made_of_what_is_not_finite(ftload: Ftload, tmp_path: Path, value: float, init: str) -> None:
    source = tmp_path / "source"
    write_model(source, "llama", vocab_size=128, dtype="bfloat16")
    write_llama(source)
    edit_weights(source, lambda t: {**t, HEAD: t[HEAD].index_fill(0, torch.tensor([5]), value)})
    result = ftload("prepare", "--model", source, "--output_dir", tmp_path / "out", "--embedding_init", init)
    assert result.code == 4
    assert result.err.startswith(f"error: tensor `{HEAD}` of `{FILE}` holds NaN or infinity\n")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_in_the_file_is_dropped(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, "llama_tied", vocab_size=ROWS, dtype="bfloat16")
    write_llama(source)
    edit_weights(source, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()})
    report = prepare(source, out)
    assert headers(out).keys() == headers(source).keys() - {HEAD}
    assert report["embeddings"]["tied"] is True
    assert not [warning for warning in report["warnings"] if HEAD in warning]


def test_a_head_that_differs_is_kept_though_the_configuration_ties_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, "llama_tied", vocab_size=ROWS, dtype="bfloat16")
    write_llama(source)
    edit_weights(source, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING] * 2})
    report = prepare(source, out)
    before, after = load_file(source / FILE), load_file(out / FILE)
    assert torch.equal(after[HEAD], before[HEAD])
    assert (report["embeddings"]["tied"], report["parameters"]["total"]) == (
        False, sum(tensor.numel() for tensor in before.values()),
    )  # fmt: skip
    assert [warning for warning in report["warnings"] if "tied" in warning] == [
        f"`{HEAD}` and `{EMBEDDING}` are tied in the configuration but differ in the checkpoint: both are kept, "
        "untied, as transformers does"
    ]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, before[HEAD])
    assert torch.equal(model.model.embed_tokens.weight, before[EMBEDDING])


# -- names and formats


def test_old_rotary_buffers_are_dropped(model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(model, lambda tensors: {**tensors, name: torch.ones(8)})
    report = prepare(model, tmp_path / "out")
    assert headers(tmp_path / "out").keys() == headers(model).keys() - {name}
    assert [warning for warning in report["warnings"] if name in warning] == [
        f"`{name}` is not part of the model and is left out, as transformers does"
    ]


def test_what_is_left_out_is_one_warning(model: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    edit_weights(model, lambda tensors: {**tensors, **{name: torch.ones(8) for name in names}})
    report = prepare(model, tmp_path / "out")
    assert [warning for warning in report["warnings"] if "left out" in warning] == [
        f"`{names[0]}` and 1 more are not part of the model and are left out, as transformers does"
    ]


@pytest.mark.parametrize("flags", [[], ["--use_qlora"]])
def test_a_missing_prefix_is_put_before_the_names(llama: Path, model: Path, tmp_path: Path, flags: list[str]) -> None:
    edit_weights(model, lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
    prepare(model, tmp_path / "out", *flags)
    prepare(llama, tmp_path / "expected", *flags)
    assert headers(tmp_path / "out") == headers(tmp_path / "expected")


def test_of_several_names_for_one_parameter_the_first_counts_as_in_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole, short = "model.norm.weight", "layers.0.self_attn.q_proj.weight"  # what comes first, with and without prefix
    other = {whole: "norm.weight", short: f"model.{short}"}
    edit_weights(
        model, lambda t: {**t, "norm.weight": t[whole] + 1, short: t[f"model.{short}"] + 1}
    )  # fmt: skip
    prepare(model, tmp_path / "out")
    before, after = load_file(model / FILE), load_file(tmp_path / "out" / FILE)
    assert after.keys() == before.keys() - {"norm.weight", short}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    for name, saved in ((whole, whole), (short, f"model.{short}")):
        assert torch.equal(after[saved], before[name])
        assert torch.equal(after[saved], loaded[saved])
        assert not torch.equal(after[saved], before[other[name]])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("flags", [[], ["--use_qlora"]])
def test_pickles(llama: Path, model: Path, tmp_path: Path, flags: list[str], zipped: bool) -> None:
    path = model / "pytorch_model.bin"
    torch.save(load_file(model / FILE), path, _use_new_zipfile_serialization=zipped)
    (model / FILE).unlink()
    report = prepare(model, tmp_path / "out", "--allow_pickle", *flags)
    prepare(llama, tmp_path / "expected", *flags)
    assert headers(tmp_path / "out") == headers(tmp_path / "expected")
    assert "pytorch_model.bin" in {file["path"] for file in report["source"]["files"]}
    if not flags:
        assert prepare(model, tmp_path / "lora", "--allow_pickle", "--use_lora")["base"] == "copy"


# -- the configuration


def test_settings_of_the_configuration(llama: Path, tmp_path: Path) -> None:
    settings = '{"attention_dropout": 0.25, "max_position_embeddings": 32, "nosuch": 1}'
    report = prepare(llama, tmp_path / "out", "--use_lora", "--additional_model_arguments", settings)
    before, after = (json.loads((path / "config.json").read_text()) for path in (llama, tmp_path / "out"))
    assert {name for name in before if before[name] != after.get(name)} == {
        "attention_dropout", "max_position_embeddings", "pad_token_id",
    }  # fmt: skip
    assert (after["attention_dropout"], after["max_position_embeddings"]) == (0.25, 32)
    assert report["base"] == "copy"
    assert report["arguments"]["additional_model_arguments"]["value"] == json.loads(settings)
    assert "`additional_model_arguments`: the configuration has no `nosuch`" in report["warnings"]


def test_the_configuration_of_another_model(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    prepare(llama, tmp_path / "out", "--config_name", tmp_path / "other")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["rms_norm_eps"] == 0.5
    assert headers(tmp_path / "out") == headers(llama)


def test_a_tokenizer_from_elsewhere(llama: Path, tmp_path: Path) -> None:
    write_qwen(tmp_path / "tokenizer")
    report = prepare(llama, tmp_path / "out", "--tokenizer_name_or_path", tmp_path / "tokenizer")
    tokenizer = report["tokenizer"]
    assert (tokenizer["class"], tokenizer["size"], tokenizer["pad_token"], tokenizer["eos_token"]) == (
        "Qwen2Tokenizer", 128, "<|endoftext|>", "<|im_end|>",
    )  # fmt: skip
    assert (tmp_path / "out" / "chat_template.jinja").exists()


# -- the hub


def run_on(hub: LoopbackHub, directory: Path, *words: str) -> dict[str, Any]:
    """Run in a process of its own: huggingface_hub reads its environment when it is imported."""
    command = [sys.executable, "-m", "ftload.cli", "prepare", "--json", "--lora_rank", "8", *words]
    process = subprocess.run(command, env=hub.env(directory / "home"), cwd=directory, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    return json.loads(process.stdout)


def test_the_address_of_a_models_page(llama: Path, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        commit = hub.add("org/model", llama, tags=("v1",))
        page = f"{hub.env(tmp_path)['HF_ENDPOINT']}/org/model"
        report = run_on(hub, tmp_path, "--model", f"{page}/tree/v1", "--output_dir", "out", "--use_lora")
        source = report["source"]
        assert (source["model"], source["revision"], source["commit"]) == ("org/model", "v1", commit)
        assert (report["adapter"]["base"], report["adapter"]["revision"]) == ("org/model", commit)


def test_a_model_on_the_hub(llama: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(llama, repo)
    (repo / "README.md").write_text("# a model")
    (repo / "pytorch_model.bin").write_bytes(b"not needed")
    write_qwen(tmp_path / "tokenizer")
    with LoopbackHub() as hub:
        commit = hub.add("org/model", repo, tags=("v1",))
        hub.add("org/model", {"config.json": b"{}"})  # what the branch holds by now
        other = hub.add("org/tokenizer", tmp_path / "tokenizer")
        words = ["--model", "org/model", "--model_revision", "v1", "--output_dir", "out"]
        report = run_on(hub, tmp_path, *words, "--use_lora")
        weights = [request for request in hub.requests if request.path.endswith(".safetensors")]
        assert {request.range for request in weights} == {"bytes=0-65535"}
        assert hub.sent("*.safetensors") == 65536 < (repo / FILE).stat().st_size
        assert not hub.sent("*.bin")
        assert not hub.sent("*.md")
        source = report["source"]
        assert (source["model"], source["kind"], source["revision"], source["commit"]) == (
            "org/model", "hub", "v1", commit,
        )  # fmt: skip
        assert (report["adapter"]["base"], report["adapter"]["revision"]) == ("org/model", commit)
        adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/model", commit)
        card = (tmp_path / "out" / "README.md").read_text()
        assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/model"
        assert f"`org/model` at commit `{commit}`" in card

        hub.forget()
        words += ["--use_qlora", "--tokenizer_name_or_path", "org/tokenizer", "--tokenizer_revision", "main"]
        report = run_on(hub, tmp_path, *words, "--overwrite")
        assert hub.sent("*.safetensors") == 65536 + (repo / FILE).stat().st_size  # the header alone, then all
        assert [request.path for request in hub.requests if request.path.startswith(f"/org/tokenizer/resolve/{other}")]
        assert report["tokenizer"]["class"] == "Qwen2Tokenizer"
        assert {file["path"]: file["sha256"] is not None for file in report["source"]["files"]}[FILE]
    prepare(llama, tmp_path / "expected", "--use_qlora")
    assert headers(tmp_path / "out") == headers(tmp_path / "expected")
