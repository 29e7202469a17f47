"""Whether two directories hold the same: names, dtypes, shapes and bytes of every tensor, configurations as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files of a directory."""
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                assert name not in tensors
                tensors[name] = opened.get_tensor(name)
    return tensors


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Names, dtypes, shapes and bytes."""
    found, expected = read_tensors(ours), read_tensors(theirs)
    assert expected
    assert sorted(found) == sorted(expected), f"only in one of them: {sorted(found.keys() ^ expected.keys())[:3]}"
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), f"dtype or shape of {name}"
        same = found[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))
        assert same, f"bytes of {name}"


def assert_same_output(ours: Path, theirs: Path, strategy: str, *, pad_token_id: int) -> None:
    """All of a directory that was prepared from decoded weights: the padding aside, as the reference writes it."""
    assert_same_tensors(ours, theirs)
    for name in ("config.json", "generation_config.json"):
        assert_same_json(ours / name, theirs / name, pad_token_id=pad_token_id)
    assert ("quantization_config" in json.loads((ours / "config.json").read_text())) == (strategy == "qlora")
    if strategy != "standard":
        assert_same_tensors(ours / "adapter", theirs / "adapter")
        assert_same_adapter_config(ours / "adapter", theirs / "adapter")


def assert_same_json(ours: Path, theirs: Path, **changed: Any) -> None:
    """Equal as JSON, transformers' version aside, but for what ftload changes on purpose."""
    found, expected = json.loads(ours.read_text()), json.loads(theirs.read_text())
    for document in (found, expected):
        document.pop("transformers_version", None)
    _assert_equal(found, {**expected, **changed}, ours.name)


def assert_same_adapter_config(ours: Path, theirs: Path) -> None:
    """Equal as PEFT reads them, the base's path aside."""
    from peft import LoraConfig
    from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION

    found, expected = (LoraConfig.from_pretrained(str(path)).to_dict() for path in (ours, theirs))
    for key in ("base_model_name_or_path", "peft_version"):
        found.pop(key, None)
        expected.pop(key, None)
    # for mixtures of experts PEFT writes an empty list where it otherwise writes nothing, and others in any order
    for config in (found, expected):
        config["target_parameters"] = sorted(config["target_parameters"] or ()) or None
    if (
        not isinstance(found["target_modules"], str)
        and len(found["target_modules"]) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION
    ):
        # PEFT writes shorter names that hit the same modules; the names of the adapter's tensors tell which those are
        expected["target_modules"] = found["target_modules"]
    _assert_equal(found, expected, "adapter config")


def _assert_equal(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    unequal = {
        key: (found.get(key, "none"), expected.get(key, "none"))
        for key in sorted(found.keys() | expected.keys())
        if key not in found or key not in expected or found[key] != expected[key]
    }
    assert not unequal, f"{what}: (ours, theirs) of {unequal}"
