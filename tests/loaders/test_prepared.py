"""`load_prepared`: what it gives is what the report says, and it trains."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders import load_prepared
from ftload.loaders.errors import CheckpointError, UsageError

from ..cli.runs import FLAGS, prepare
from ..parity.models import write_model
from ..tokenizers import write_llama

TARGETS = {
    "gpt2": {"c_attn": 2, "c_proj": 4, "c_fc": 2},
    "gpt_neox": {"query_key_value": 2, "dense": 2, "dense_h_to_4h": 2, "dense_4h_to_h": 2},
    "phi3": {"qkv_proj": 2, "o_proj": 2, "gate_up_proj": 2, "down_proj": 2},
    "mixtral": {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2},
}


def load(directory: Path) -> tuple[Any, Any, list[str]]:
    """The model, the tokenizer, and what it warned of; of the future it must not warn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = load_prepared(directory)
    assert [str(warning.message) for warning in caught if warning.category is FutureWarning] == []
    return model, tokenizer, [str(warning.message) for warning in caught if warning.category is UserWarning]


def train_one_step(model: Any, tokenizer: Any) -> None:
    """A finite loss, gradients on exactly the trainable parameters, and all of them can change."""
    batch = tokenizer(["one text", "another, longer text"], padding=True, return_tensors="pt").to(model.device)
    assert model.training
    loss = model(**batch, labels=batch["input_ids"]).loss
    assert math.isfinite(loss.item())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            # an adapter's B is zero at first, and with it the gradient of A
            assert parameter.grad.any() != (".lora_A." in name), name


def count(model: Any) -> tuple[dict[str, dict[str, int]], int]:
    """Parameters by dtype, 4-bit ones unpacked, as the report's `in_training`; and how many are trainable.

    The experts of a layer are slices of one tensor, and share its code books.
    """
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    trainable = 0
    seen: set[str | int] = set()
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        row = rows["nf4" if state is not None else str(parameter.dtype).removeprefix("torch.")]
        number = parameter.numel() if state is None else math.prod(state.shape)
        stored = re.sub(r"\.experts\.\d+\.", ".experts.", name) if state is not None else name
        row["tensors"] += stored not in seen
        seen.add(stored)
        row["parameters"] += number
        row["bytes"] += parameter.nbytes
        if state is not None:
            nested = (state.state2.absmax, state.state2.code) if state.nested else ()
            parts = {part.data_ptr(): part.nbytes for part in (state.absmax, state.code, *nested)}
            row["bytes"] += sum(size for place, size in parts.items() if place not in seen)
            seen |= parts.keys()
        trainable += number if parameter.requires_grad else 0
    return {dtype: dict(row) for dtype, row in rows.items()}, trainable


def test_4_bit_weights_stay_as_they_are_on_every_processor(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX512-BF16, a forward pass in eval mode would repack them: gradients are wrong from then on."""
    from bitsandbytes.nn.modules import Linear4bit

    prepare(llama, tmp_path / "out", "--use_qlora")
    # whatever the processor here can do; only whether it is made use of counts
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert Linear4bit(64, 64).support_avx512bf16_for_cpu is True
    model, _, _ = load(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", FLAGS)
def test_each_strategy_trains_after_a_move(llama: Path, tmp_path: Path, strategy: str, checkpointing: bool) -> None:
    flags = [*FLAGS[strategy], *(["--gradient_checkpointing"] if checkpointing else [])]
    report = prepare(llama, tmp_path / "out", *flags)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(tmp_path / "out", moved)
    model, tokenizer, warned = load(moved)
    in_training, trainable = count(model)
    assert in_training == report["parameters"]["in_training"]
    assert trainable == report["parameters"]["trainable"]
    assert sum(row["parameters"] for row in in_training.values()) == report["parameters"]["total"]
    assert model.is_gradient_checkpointing is checkpointing
    assert len(tokenizer) == report["tokenizer"]["size"]
    assert tokenizer.pad_token == "<pad>"
    if strategy == "liger" and not torch.cuda.is_available():
        assert "Liger kernels are not applied: Liger's Triton kernels need a GPU, and there is none" in warned
    if not torch.cuda.is_available():
        assert "attention is sdpa: FlashAttention needs a GPU, and there is none" in warned
    train_one_step(model, tokenizer)


def test_a_base_that_is_gone_is_named(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    prepare(base, tmp_path / "out", "--use_lora", "--base", "reference")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"`{base}`, does not exist"):
        load_prepared(tmp_path / "out")


@pytest.mark.parametrize("flag", ["--use_lora", "--use_qlora"])
@pytest.mark.parametrize("architecture", TARGETS)
def test_adapters_of_other_architectures_train(tmp_path: Path, architecture: str, flag: str) -> None:
    write_model(tmp_path / "source", architecture, vocab_size=144, dtype="bfloat16")
    write_llama(tmp_path / "source")
    report = prepare(tmp_path / "source", tmp_path / "out", flag, "--min_quantized", "0")
    assert report["adapter"]["targets"] == TARGETS[architecture]
    model, tokenizer, _ = load(tmp_path / "out")
    in_training, trainable = count(model)
    assert in_training == report["parameters"]["in_training"]
    assert trainable == report["parameters"]["trainable"] == report["adapter"]["parameters"]
    train_one_step(model, tokenizer)


def test_attention_is_eager_where_it_was_asked_for(llama: Path, tmp_path: Path) -> None:
    report = prepare(llama, tmp_path / "out", "--no_use_flash_attn")
    assert report["attention"] == {"requested": "eager", "effective": "eager", "reason": None}
    assert not [decision for decision in report["decisions"] if decision["what"] == "attention"]
    model, _, warned = load(tmp_path / "out")
    assert model.config._attn_implementation == "eager"
    assert warned == []


def test_a_resized_model_trains_on_its_new_token(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama_tied", vocab_size=128, dtype="float32")
    write_llama(tmp_path / "source")
    report = prepare(tmp_path / "source", tmp_path / "out", "--use_qlora")
    model, tokenizer, _ = load(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape == (136, 64)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert count(model)[0] == report["parameters"]["in_training"]
    train_one_step(model, tokenizer)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
USE_OWN_CODE = """
import sys, warnings
from pathlib import Path
from ftload.loaders import load_prepared
from tests.cli.runs import prepare

prepare(sys.argv[1], Path(sys.argv[2]), "--use_qlora", "--trust_remote_code")
with warnings.catch_warnings(record=True) as caught:
    model, _ = load_prepared(sys.argv[2], trust_remote_code=True)
print(type(model.get_base_model()).__name__, *(str(w.message) for w in caught if "attention" in str(w.message)))
"""


def test_a_model_with_code_of_its_own(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "own"))
    (source / "own.py").write_text(OWN_CODE)
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (source / "config.json").write_text(json.dumps(config))
    # the code is copied to HF_HOME, which is read when huggingface_hub is imported
    root = Path(__file__).parents[2]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", USE_OWN_CODE, str(source), str(tmp_path / "out")]
    process = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    name, _, warned = process.stdout.strip().partition(" ")
    assert name == "OwnForCausalLM"
    if not torch.cuda.is_available():
        assert warned == "attention is sdpa: FlashAttention needs a GPU, and there is none"


def test_what_was_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no `ftload_report\.json`"):
        load_prepared(tmp_path)
    for text in ("{", "[]", json.dumps({"schema_version": "99"})):
        (tmp_path / "ftload_report.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"ftload_report\.json` (can't be read|is not a report of schema)"):
            load_prepared(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_master_weights(llama: Path, tmp_path: Path, dtype: str | torch.dtype) -> None:
    """Those of transformers, of a base that is frozen as well; an adapter is the same."""
    for name, flags in (("full", []), ("lora", ["--use_lora", "--base", "copy"]), ("elsewhere", ["--use_lora"])):
        out = tmp_path / name
        report = prepare(llama, out, *flags)
        model, tokenizer = load_prepared(out, dtype=dtype)
        usual, _ = load_prepared(out)
        for (parameter, value), other in zip(model.named_parameters(), usual.parameters(), strict=True):
            assert (value.dtype, value.requires_grad) == (torch.float32, other.requires_grad), parameter
            assert torch.equal(value, other.float()), parameter
            assert other.dtype == (torch.float32 if ".lora_" in parameter else torch.bfloat16), parameter
        assert model.config.dtype == torch.float32
        assert sum(one.numel() for one in model.parameters() if one.requires_grad) == report["parameters"]["trainable"]
        train_one_step(model, tokenizer)


def test_dtypes_that_a_base_can_not_have(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(llama, out, "--use_qlora")
    with pytest.raises(UsageError, match=f"^the base of `{out}` is 4-bit: there are no weights to hold in float32$"):
        load_prepared(out, dtype="float32")
    for dtype in ("float16", torch.float16, torch.int8, "bf16"):
        with pytest.raises(UsageError, match=r"^`dtype` is `(float16|int8|bf16)`$") as caught:
            load_prepared(out, dtype=dtype)
        assert caught.value.hint == "training starts from bfloat16 or float32"
    load_prepared(out, dtype="bfloat16")


def test_small_steps_are_lost_in_bfloat16(llama: Path, tmp_path: Path) -> None:
    """A step of 2e-5 moves a weight of 0.05, where bfloat16 has a value each 0.0002, in float32 alone."""
    out, changed = tmp_path / "out", {}
    prepare(llama, out)
    for dtype in ("bfloat16", "float32"):
        model, _ = load_prepared(out, dtype=dtype)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
        ids = torch.arange(128).view(4, 32)  # every token: other rows of the embedding have no gradient
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = sum(int((value != before[name]).sum()) for name, value in model.named_parameters())
        changed[dtype] = moved / sum(value.numel() for value in before.values())
    assert 0.01 < changed["bfloat16"] < 0.2
    assert changed["float32"] > 0.98


@pytest.mark.parametrize("compute", ["float16", "float32"])
def test_4_bit_layers_compute_in_the_dtype_that_was_asked_for(llama: Path, tmp_path: Path, compute: str) -> None:
    """Everything else is float32, adapters too, whose first values are rounded to that dtype, as PEFT does it."""
    out = tmp_path / "out"
    prepare(llama, out, "--use_qlora", "--bnb_4bit_compute_dtype", compute)
    model, tokenizer, _ = load(out)
    asked = getattr(torch, compute)
    layers = [
        module for module in model.modules() if hasattr(module, "compute_dtype") and hasattr(module, "in_features")
    ]
    dtypes = {layer.compute_dtype for layer in layers if type(layer.weight).__name__ == "Params4bit"}
    assert dtypes == {asked}
    for name, parameter in model.named_parameters():
        if ".base_layer." not in name:
            assert parameter.dtype == torch.float32, name
        if ".lora_A." in name:
            assert torch.equal(parameter, parameter.to(asked).float()), name
            assert not torch.equal(parameter, parameter.bfloat16().float()), name
    train_one_step(model, tokenizer)
