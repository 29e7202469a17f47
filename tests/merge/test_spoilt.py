"""Adapters that can't be merged: an exit code, and words that name what is wrong; nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Result
from tests.merge.adapters import write_adapter

Ftload = Callable[..., Result]
Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
NAME = "base_model.model.lm_head.modules_to_save.default.weight"


@pytest.fixture(scope="module")
def sound(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with what can be spoilt; tests copy it."""
    directory = tmp_path_factory.mktemp("sound") / "adapter"
    write_adapter(llama, directory, r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    return directory


def tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        found = load_file(adapter / WEIGHTS)
        change(found)
        save_file(found, adapter / WEIGHTS, metadata={"format": "pt"})

    return spoil


def config(**values: Any) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def without(name: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).unlink()


def truncate(adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-100])


def pickle(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def set_value(name: str, value: float) -> Callable[[Path], None]:
    return tensors(lambda found: found[name].reshape(-1)[3:4].fill_(value))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to spoil an adapter, and what is said of it."""

    spoil: Callable[[Path], None]
    says: str
    code: int = 4


CASES = {
    "B is missing": Case(
        spoil=tensors(lambda found: found.pop(f"{Q}.lora_B.weight")),
        says=f"lacks the tensor `{Q}.lora_B.weight`",
    ),
    "a saved module is missing": Case(
        spoil=tensors(lambda found: found.pop("base_model.model.lm_head.weight")),
        says="lacks the tensor `base_model.model.lm_head.weight`",
    ),
    "another rank": Case(
        spoil=tensors(lambda found: found.update({f"{Q}.lora_A.weight": torch.zeros(5, 64)})),
        says=f"tensor `{Q}.lora_A.weight` of the adapter `ADAPTER` has shape [5, 64], the model asks for [4, 64]",
    ),
    "B has other rows": Case(
        spoil=tensors(lambda found: found.update({f"{Q}.lora_B.weight": torch.zeros(63, 4)})),
        says=f"tensor `{Q}.lora_B.weight` of the adapter `ADAPTER` has shape [63, 4], the model asks for [64, 4]",
    ),
    "a layer that is not there": Case(
        spoil=tensors(lambda found: found.update({Q.replace(".0.", ".9.") + ".lora_A.weight": torch.zeros(4, 64)})),
        says=f"tensor `{Q.replace('.0.', '.9.')}.lora_A.weight` of the adapter `ADAPTER` belongs to no layer",
    ),
    "a tensor of another kind": Case(
        spoil=tensors(lambda found: found.update({f"{Q}.lora_magnitude_vector": torch.ones(64)})),
        says=f"tensor `{Q}.lora_magnitude_vector` of the adapter `ADAPTER` belongs to no layer",
    ),
    "a layer too few": Case(
        spoil=config(target_modules=["q_proj", "v_proj", "k_proj"]),
        says="lacks the tensor `base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight`",
    ),
    "a layer too many": Case(
        spoil=config(target_modules=["q_proj"]),
        says="v_proj.lora_A.weight` of the adapter `ADAPTER` belongs to no layer",
    ),
    "targets that match nothing": Case(spoil=config(target_modules=["nothing"]), says="PEFT can't load the adapter"),
    "NaN in A": Case(
        spoil=set_value(f"{Q}.lora_A.weight", float("nan")),
        says=f"tensor `{Q}.lora_A.weight` of the adapter's `{WEIGHTS}` holds NaN or infinity",
    ),
    "infinity in B": Case(
        spoil=set_value(f"{Q}.lora_B.weight", float("inf")),
        says=f"tensor `{Q}.lora_B.weight` of the adapter's `{WEIGHTS}` holds NaN or infinity",
    ),
    "NaN in a saved module": Case(
        spoil=set_value("base_model.model.lm_head.weight", float("nan")),
        says=f"tensor `lm_head.weight` of `{WEIGHTS}` holds NaN or infinity",
    ),
    "overflow": Case(
        spoil=tensors(lambda found: [value.fill_(1e20) for name, value in found.items() if ".lora_" in name]),
        says="merging the adapter `ADAPTER` into tensor `model.layers.",
    ),
    "an unknown kind": Case(spoil=config(peft_type="WHATEVER"), says="is of the kind `WHATEVER`: ftload merges LoRA"),
    "IA3": Case(spoil=config(peft_type="IA3"), says="is of the kind `IA3`: ftload merges LoRA"),
    "prompt tuning": Case(spoil=config(peft_type="PROMPT_TUNING"), says="is of the kind `PROMPT_TUNING`"),
    "no kind": Case(spoil=config(peft_type=None), says="does not say of which kind it is (`peft_type`)"),
    "an activated LoRA": Case(
        spoil=config(alora_invocation_tokens=[1, 2]), says="has `alora_invocation_tokens` in its `adapter_config.json`"
    ),
    "PiSSA": Case(spoil=config(init_lora_weights="pissa"), says="was initialised by `pissa`"),
    "a setting of a newer PEFT": Case(
        spoil=config(use_better_lora=True), says="has `use_better_lora`, which the installed PEFT does not know"
    ),
    "a rank that is no number": Case(spoil=config(r="four"), says="PEFT can't load the adapter"),
    "a rank of zero": Case(spoil=config(r=0), says="PEFT can't load the adapter"),
    "a pattern that is none": Case(spoil=config(target_modules="(q_proj"), says="PEFT can't load the adapter"),
    "a base that is a number": Case(
        spoil=config(base_model_name_or_path=7), says="`base_model_name_or_path` is not a text"
    ),
    "no base": Case(spoil=config(base_model_name_or_path=None), says="does not name its base"),
    "a base that is gone": Case(
        spoil=config(base_model_name_or_path="/gone/model"),
        says="the base of the adapter `ADAPTER`: `/gone/model` does not exist",
        code=3,
    ),
    "a tensor under two names": Case(
        spoil=tensors(lambda found: found.update({NAME: torch.zeros_like(found["base_model.model.lm_head.weight"])})),
        says=f"tensor `{NAME}` of the adapter `ADAPTER` belongs to no layer",
    ),
    "no configuration": Case(spoil=without("adapter_config.json"), says="holds no `adapter_config.json`"),
    "a configuration that is no JSON": Case(
        spoil=lambda adapter: (adapter / "adapter_config.json").write_text("{") and None,
        says="`adapter_config.json` is not valid JSON",
    ),
    "no weights": Case(spoil=without(WEIGHTS), says=f"holds no `{WEIGHTS}`"),
    "pickled weights": Case(spoil=pickle, says="is pickled (`adapter_model.bin`)"),
    "a truncated file": Case(spoil=truncate, says=f"`{WEIGHTS}` is truncated"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_spoilt_adapter_is_refused(ftload: Ftload, sound: Path, tmp_path: Path, case: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(sound, adapter)
    CASES[case].spoil(adapter)
    result = ftload("merge", adapter, "--output_dir", tmp_path / "out")
    assert result.code == CASES[case].code, result.err
    assert CASES[case].says.replace("ADAPTER", str(adapter)) in result.err
    assert "Traceback" not in result.err
    assert result.err.count("\n") <= 2
    assert not (tmp_path / "out").exists()


def test_the_sound_one_is_taken(ftload: Ftload, sound: Path, tmp_path: Path) -> None:
    assert ftload("merge", sound, "--output_dir", tmp_path / "out").code == 0


def test_what_is_no_adapter_is_refused(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    result = ftload("merge", llama, "--output_dir", tmp_path / "out")
    assert result.code == 4
    assert f"`{llama}` holds no `adapter_config.json`" in result.err


def test_an_adapter_of_another_model_is_refused(ftload: Ftload, sound: Path, tmp_path: Path) -> None:
    from tests.merge.test_merge import write_base

    other = write_base(tmp_path / "other", "gpt2")
    result = ftload("merge", sound, "--model", other, "--output_dir", tmp_path / "out")
    assert result.code == 4
    assert "is it the model that the adapter was trained on?" in result.err
