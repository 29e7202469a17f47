"""A prepared directory that was moved: what is trained from it names the new place, and PEFT alone loads it."""

from __future__ import annotations

import json
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders import load_prepared
from safetensors.torch import load_file

from ..cli.runs import prepare
from ..conftest import Result
from ..parity.models import write_model
from ..tokenizers import write_llama

TEXT = ["one text", "another, longer text"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        pytest.fail("something is asked of the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def move(directory: Path) -> Path:
    target = directory.parent / "elsewhere" / "moved"
    target.parent.mkdir()
    return Path(shutil.move(directory, target))


def train(directory: Path, to: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Two steps on the prepared adapter, saved; the model, and its adapter as it is in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = load_prepared(directory)
    batch = tokenizer(TEXT, padding=True, return_tensors="pt")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=100.0)
    for _ in range(2):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns where it can't find the base's configuration
        model.save_pretrained(to)
    adapter = {name.replace(".default.", "."): p.detach() for name, p in model.named_parameters() if ".lora_" in name}
    return model, adapter


def named_base(adapter: Path) -> tuple[str, str | None]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], config["revision"]


@pytest.mark.parametrize("rows", [144, 128])  # 128 have to grow
@pytest.mark.parametrize(
    "flags", [pytest.param(["--use_lora", "--base", "copy"], id="bf16"), pytest.param(["--use_qlora"], id="4-bit")]
)
def test_what_is_trained_after_a_move_is_loaded_by_peft_alone(tmp_path: Path, flags: list[str], rows: int) -> None:
    from peft import AutoPeftModelForCausalLM

    write_model(tmp_path / "model", "llama", vocab_size=rows, dtype="bfloat16")
    write_llama(tmp_path / "model")
    prepare(tmp_path / "model", tmp_path / "out", *flags)
    shutil.rmtree(tmp_path / "model")
    moved = move(tmp_path / "out")
    model, adapter = train(moved, tmp_path / "trained")
    assert named_base(tmp_path / "trained") == (str(moved), None)
    stored = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert stored.keys() == adapter.keys()  # and no embeddings, though they have grown
    assert all(torch.equal(stored[name], adapter[name]) for name in stored)
    assert sum(bool(value.count_nonzero()) for name, value in stored.items() if ".lora_B." in name) == 14

    again: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.bfloat16)
    loaded = {n.replace(".default.", "."): p for n, p in again.named_parameters() if ".lora_" in n}
    assert all(torch.equal(loaded[name], adapter[name]) for name in adapter)
    for module in again.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or bitsandbytes repacks the weights for its own kernel
    ids = torch.tensor([[1, 5, 17, 99, 42]])
    with torch.no_grad():
        expected, found = model.eval()(ids).logits.float(), again.eval()(ids).logits.float()
        untrained = load_untrained(moved)(ids).logits.float()
    assert (found - expected).abs().max() < 0.1 * (untrained - expected).abs().max()


def test_peft_takes_the_prepared_adapter_once_it_is_fixed(
    llama: Path, tmp_path: Path, ftload: Callable[..., Result]
) -> None:
    from peft import AutoPeftModelForCausalLM

    prepare(llama, tmp_path / "out", "--use_qlora")
    moved = move(tmp_path / "out")
    with pytest.raises(OSError, match=str(tmp_path / "out")):
        AutoPeftModelForCausalLM.from_pretrained(moved / "adapter")
    assert ftload("verify", moved, "--fix", "--quick").code == 0
    model: Any = AutoPeftModelForCausalLM.from_pretrained(moved / "adapter", is_trainable=True)
    model.save_pretrained(tmp_path / "trained")
    assert named_base(tmp_path / "trained") == (str(moved), None)
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "trained") is not None


def load_untrained(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_prepared(directory)[0].eval()


def test_an_adapter_of_another_base_goes_on_naming_it(llama: Path, tmp_path: Path) -> None:
    prepare(llama, tmp_path / "out", "--use_lora")
    train(move(tmp_path / "out"), tmp_path / "trained")
    assert named_base(tmp_path / "trained") == (str(llama), None)
