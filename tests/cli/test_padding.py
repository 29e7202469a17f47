"""The model's padding id is the tokenizer's: in both configurations, or on loading, and never at the cost of eos."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders import load_prepared

from ..conftest import Result
from ..parity.models import write_model
from ..tokenizers import write_gpt2, write_llama, write_smollm2
from .runs import prepare
from .spoilt import edit_json

Ftload = Callable[..., Result]
EOS, PAD = 2, 128


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SmolLM2: pad is eos, in the tokenizer and in both configurations, and `<pad>` needs a new row."""
    directory = tmp_path_factory.mktemp("padding") / "model"
    write_model(directory, "llama_tied", vocab_size=128, dtype="bfloat16")
    write_smollm2(directory)
    for name in ("config.json", "generation_config.json"):
        edit_json(directory / name, pad_token_id=EOS)
    return directory


def stored(directory: Path) -> tuple[Any, Any]:
    """`pad_token_id` of config.json and of generation_config.json."""
    first, second = (json.loads((directory / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    return first["pad_token_id"], second["pad_token_id"]


def said(report: dict[str, Any]) -> list[dict[str, str]]:
    return [
        decision for decision in report["decisions"] if decision["what"] in ("pad_token_id", "pad token of the model")
    ]


@pytest.mark.parametrize("flags", [[], ["--use_qlora"]])
def test_it_follows_the_tokenizer(smollm2: Path, tmp_path: Path, flags: list[str]) -> None:
    # what the CI example of the README asks for: nothing here is otherwise than asked
    report = prepare(smollm2, tmp_path / "out", *flags, "--no_use_flash_attn", "--strict")
    assert stored(tmp_path / "out") == (PAD, PAD)
    assert report["embeddings"]["pad_token_id"] == PAD
    assert said(report) == [
        {
            "what": "pad token of the model", "requested": "2 (the eos token)", "effective": "128",
            "reason": "config.json and generation_config.json follow the tokenizer",
        }
    ]  # fmt: skip
    model, tokenizer = load_prepared(tmp_path / "out")
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (PAD, PAD)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == PAD
    # the eos row learns
    embedding.weight.requires_grad_()
    batch = tokenizer(["one<|im_end|>"], return_tensors="pt").to(model.device)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert embedding.weight.grad[EOS].any()


def test_a_base_that_is_referred_to_keeps_its_files(ftload: Ftload, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    write_model(source, "llama", vocab_size=136, dtype="bfloat16")
    write_smollm2(source)
    edit_json(source / "config.json", pad_token_id=EOS)
    report = prepare(source, out, "--use_lora")
    assert report["base"] == "reference"
    assert json.loads((source / "config.json").read_text())["pad_token_id"] == EOS
    assert json.loads((out / "config.json").read_text()) == {
        **json.loads((source / "config.json").read_text()), "pad_token_id": PAD,
    }  # fmt: skip
    (decision,) = said(report)
    assert (decision["requested"], decision["effective"]) == ("2 (the eos token) and none", "128")
    assert decision["reason"] == (
        "config.json and generation_config.json follow the tokenizer; the base keeps its files, `load_prepared` sets it"
    )
    line = f"- pad token of the model: `2 (the eos token) and none` → `128` – {decision['reason']}"
    assert line in (out / "README.md").read_text().splitlines()
    model, _ = load_prepared(out)
    base = model.get_base_model()
    assert base.get_input_embeddings().padding_idx == PAD
    assert (base.config.pad_token_id, base.generation_config.pad_token_id) == (PAD, PAD)
    assert ftload("verify", out, "--quick").code == 0


def test_a_text_model_within_another(tmp_path: Path) -> None:
    """Gemma 3 as published: the text model's configuration holds the id, and the whole model's has none."""
    from ftload.loaders.plan.vocabulary import set_padding, stored_padding
    from transformers import Gemma3Config, Gemma3TextConfig

    config = Gemma3Config(text_config=Gemma3TextConfig(vocab_size=64).to_dict())
    set_padding(config, 63)
    assert stored_padding(config) == 63
    assert config.to_dict()["text_config"]["pad_token_id"] == 63
    assert "pad_token_id" not in config.to_dict()


def test_eos_is_never_made_the_padding_row(smollm2: Path, tmp_path: Path) -> None:
    """A function that leaves pad at eos: what the configuration says of padding stays, be it nothing."""
    source = Path(shutil.copytree(smollm2, tmp_path / "model"))
    edit_json(source / "config.json", pad_token_id=None)
    report = prepare(source, tmp_path / "out", "--get_tokenizer_fn", "get_tokenizer_simple_v1")
    assert report["tokenizer"]["pad_token_id"] == EOS
    assert (stored(tmp_path / "out"), report["embeddings"]["pad_token_id"], said(report)) == ((None, EOS), None, [])


def test_a_tokenizer_without_pad_changes_nothing(smollm2: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(smollm2, tmp_path / "model"))
    write_llama(source)
    edit_json(source / "config.json", pad_token_id=7)
    report = prepare(source, tmp_path / "out", "--get_tokenizer_fn", "get_tokenizer_simple_v1")
    assert (stored(tmp_path / "out"), said(report)) == ((7, EOS), [])


def test_another_id_that_was_asked_for_is_a_difference(ftload: Ftload, smollm2: Path, tmp_path: Path) -> None:
    words = ["--additional_model_arguments", '{"pad_token_id": 5}', "--no_use_flash_attn"]
    report = prepare(smollm2, tmp_path / "out", *words)
    (decision,) = said(report)
    assert (decision["requested"], decision["effective"], stored(tmp_path / "out")[0]) == ("5", "128", PAD)
    refused = ftload("plan", "--model", smollm2, *words, "--strict")
    assert refused.code == 5
    assert "pad_token_id: 5 → 128" in refused.err


def test_an_id_beyond_the_embedding_is_mended(ftload: Ftload, smollm2: Path, tmp_path: Path) -> None:
    """No model can be built with it: the tokenizer's takes its place, if it has one."""
    source = Path(shutil.copytree(smollm2, tmp_path / "model"))
    edit_json(source / "config.json", pad_token_id=10**12)
    report = prepare(source, tmp_path / "out")
    assert stored(tmp_path / "out") == (PAD, PAD)
    assert said(report)[0]["requested"] == "1000000000000 and 2 (the eos token)"
    refused = ftload("plan", "--model", source, "--get_tokenizer_fn", "get_tokenizer_simple_v1")
    assert refused.code == 4
    assert "transformers can't build `LlamaForCausalLM` from this configuration" in refused.err


def test_settings_that_contradict_each_other_are_kept(smollm2: Path, tmp_path: Path) -> None:
    """transformers reads but won't write them."""
    source = Path(shutil.copytree(smollm2, tmp_path / "model"))
    edit_json(source / "generation_config.json", do_sample=False, temperature=0.5)
    before = json.loads((source / "generation_config.json").read_text())
    prepare(source, tmp_path / "out")
    after = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert after == {**before, "pad_token_id": PAD}


def test_positions_that_are_counted_from_it(tmp_path: Path) -> None:
    """RoBERTa: another id would give every token another position."""
    from transformers import RobertaConfig, RobertaForCausalLM

    config = RobertaConfig(
        vocab_size=144, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, is_decoder=True, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaForCausalLM(config).save_pretrained(tmp_path / "model")
    write_gpt2(tmp_path / "model")
    report = prepare(tmp_path / "model", tmp_path / "out")
    assert stored(tmp_path / "out")[0] == 1
    assert report["embeddings"]["pad_token_id"] is None
    assert (
        "the tokenizer pads with 128, the model's `pad_token_id` stays 1: `roberta.embeddings` depends on it too"
    ) in report["warnings"]
    assert said(report) == []


def test_a_configuration_that_knows_no_padding(ftload: Ftload, tmp_path: Path) -> None:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    config = CodeGenConfig(vocab_size=136, n_positions=64, n_ctx=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    CodeGenForCausalLM(config).save_pretrained(tmp_path / "model")
    write_gpt2(tmp_path / "model")
    prepare(tmp_path / "model", tmp_path / "out")
    assert "pad_token_id" not in json.loads((tmp_path / "out/config.json").read_text())
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["pad_token_id"] == PAD
    assert ftload("verify", tmp_path / "out", "--quick").code == 0


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("config.json", "`pad_token_id` of config.json is 2, the report says 128"),
        ("generation_config.json", "`pad_token_id` of generation_config.json is 2, the report says 128"),
    ],
)
def test_verify_compares(ftload: Ftload, smollm2: Path, tmp_path: Path, file: str, words: str) -> None:
    prepare(smollm2, tmp_path / "out")
    edit_json(tmp_path / "out" / file, pad_token_id=EOS)
    report = json.loads((tmp_path / "out/ftload_report.json").read_text())
    for entry in report["files"]:
        data = (tmp_path / "out" / entry["path"]).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (tmp_path / "out/ftload_report.json").write_text(json.dumps(report))
    result = ftload("verify", tmp_path / "out", "--quick", "--json")
    assert result.code == 7
    checks = {row["name"]: row["problems"] for row in json.loads(result.out)["checks"]}
    assert (checks["files"], checks["tokenizer"]) == ([], [words])
