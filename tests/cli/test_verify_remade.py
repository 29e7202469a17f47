# ruff: noqa: E501 -- a fault a line
"""Faults of somebody who makes the report's sizes and hashes fit: `ftload verify --quick` finds them all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import prepare
from .test_verify import ADAPTER, CHAT, Ftload, edit, make_hashes_fit

Change = Callable[[Path], Any]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("remade")
    write_model(root / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(root / "model", vocab_size=128)
    for name, flags in {"standard": [], "qlora": ["--use_qlora"], "lora": ["--use_lora"]}.items():
        prepare(root / "model", root / name, *CHAT, *flags)
    return {name: root / name for name in ("standard", "qlora", "lora")}


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Rewrite a file with other values."""

    def plant(out: Path) -> None:
        values = load_file(out / file)
        change(values)
        save_file(values, out / file, metadata={"format": "pt"})

    return plant


def weights(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors("model.safetensors", lambda t: t.update({Q + suffix: change(t[Q + suffix]).clone()}))


def json_file(name: str, **changes: Any) -> Change:
    return lambda out: edit(out / name, lambda c: c.update(changes))


def make_every_a(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors(ADAPTER, lambda t: t.update({n: change(v) for n, v in t.items() if n.endswith("lora_A.weight")}))


def of_its_shape(value: torch.Tensor) -> torch.Tensor:
    return torch.rand(value.shape, generator=torch.Generator().manual_seed(1))


STATISTICS = f"`{Q}.absmax` and `.nested_absmax` are not of a quantised weight"
SETTINGS = "has other settings than when this was prepared"

FAULTS: dict[str, tuple[str, str, str, Change]] = {
    # what: output, the check that finds it, what it says of it, how it is planted
    "quant_map permuted": ("qlora", "tensors", f"`{Q}.quant_map` is not the code book of NF4", weights(".quant_map", lambda t: t.flip(0))),
    "quant_map a little off": ("qlora", "tensors", f"`{Q}.quant_map` is not the code book of NF4", weights(".quant_map", lambda t: t * (1 + 2**-23))),
    "nested_quant_map permuted": ("qlora", "tensors", f"`{Q}.nested_quant_map` is not bitsandbytes' map", weights(".nested_quant_map", lambda t: t.flip(0))),
    "absmax zeroed": ("qlora", "tensors", f"{STATISTICS}: their mean is not the offset", weights(".absmax", torch.zeros_like)),
    "absmax all the code of 0": ("qlora", "tensors", f"{STATISTICS}: a block does not reach its scale", weights(".absmax", lambda t: torch.full_like(t, 127))),
    "nested absmax zeroed": ("qlora", "tensors", f"{STATISTICS}: a block's scale is 0, and its codes differ", weights(".nested_absmax", torch.zeros_like)),
    "nested absmax ten thousand times as large": ("qlora", "tensors", f"{STATISTICS}: some are negative", weights(".nested_absmax", lambda t: t * 1e4)),
    "nested absmax infinite": ("qlora", "tensors", f"`{Q}.nested_absmax` is not finite, or negative", weights(".nested_absmax", lambda t: t * torch.inf)),
    "nested absmax negative": ("qlora", "tensors", f"`{Q}.nested_absmax` is not finite, or negative", weights(".nested_absmax", lambda t: -t)),
    "eos in config.json": ("standard", "config", f"`config.json` {SETTINGS}", json_file("config.json", eos_token_id=1)),
    "eos in generation_config.json": ("qlora", "config", f"`generation_config.json` {SETTINGS}", json_file("generation_config.json", eos_token_id=1)),
    "generation_config.json gone": ("standard", "config", f"`generation_config.json` {SETTINGS}", lambda o: (o / "generation_config.json").unlink()),
    "rope": ("qlora", "config", f"`config.json` {SETTINGS}", json_file("config.json", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})),
    "activation": ("standard", "config", f"`config.json` {SETTINGS}", json_file("config.json", hidden_act="gelu")),
    "model_max_length": ("lora", "tokenizer", "model_max_length is `16`, the report says `10000", json_file("tokenizer_config.json", model_max_length=16)),
    "padding side": ("standard", "tokenizer", "padding_side is `right`, the report says `left`", json_file("tokenizer_config.json", padding_side="right")),
    "inference_mode": ("lora", "adapter", "`inference_mode` is `False`, not `True`", json_file("adapter/adapter_config.json", inference_mode=False)),
    "inference_mode that equals true in Python": ("lora", "adapter", "`inference_mode` is `1`, not `True`", json_file("adapter/adapter_config.json", inference_mode=1)),
    "all numbers of lora A equal": ("qlora", "adapter", "layers.0.mlp.down_proj.lora_A.weight` was not drawn: its numbers are all the same", make_every_a(lambda t: torch.full_like(t, 0.01))),
    "all lora A equal": ("lora", "adapter", "layers.1.mlp.down_proj.lora_A.weight` was not drawn: it is the same as `base_model.model.model.layers.0.mlp.down_proj", make_every_a(of_its_shape)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path, fault: str) -> None:
    kind, check, words, plant = FAULTS[fault]
    out = tmp_path / "out"
    shutil.copytree(outputs[kind], out)
    plant(out)
    make_hashes_fit(out)
    result = ftload("verify", out, "--json", "--quick")
    assert result.code == 7
    failed = {row["name"]: "\n".join(row["problems"]) for row in json.loads(result.out)["checks"] if not row["ok"]}
    assert "files" not in failed
    assert words in failed.get(check, ""), failed
    assert "hint: prepare it again with --overwrite" in result.err


def test_what_changes_no_setting_passes(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path) -> None:
    """Another order and layout, the version that wrote it, and the older name of the dtype."""
    out = tmp_path / "out"
    shutil.copytree(outputs["standard"], out)
    config = json.loads((out / "config.json").read_text())
    config |= {"transformers_version": "5.99", "_name_or_path": "elsewhere", "torch_dtype": config.pop("dtype")}
    (out / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    make_hashes_fit(out)
    result = ftload("verify", out, "--json", "--quick")
    assert result.code == 0, result.out


def test_a_setting_of_the_base_that_is_referred_to(ftload: Ftload, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    assert prepare(tmp_path / "model", tmp_path / "out", *CHAT, "--use_lora")["base"] == "reference"
    assert ftload("verify", tmp_path / "out", "--quick").code == 0
    text = (tmp_path / "model/config.json").read_text()
    (tmp_path / "model/config.json").write_text(text.replace('"silu"', '"gelu"'))  # as many bytes
    result = ftload("verify", tmp_path / "out", "--quick")
    assert result.code == 7
    assert f"config: `config.json` {SETTINGS}" in result.err


def test_a_report_of_release_0_1(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path) -> None:
    """It knows nothing of what was added since."""
    out = tmp_path / "out"
    shutil.copytree(outputs["standard"], out)

    def age(report: Any) -> None:
        del report["configuration"], report["parameters"]["never_trained"]
        del report["tokenizer"]["padding_side"], report["tokenizer"]["model_max_length"]

    edit(out / "ftload_report.json", age)
    result = ftload("verify", out, "--json")
    assert result.code == 0, result.out
