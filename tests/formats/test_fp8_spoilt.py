"""FP8 checkpoints that are damaged or contradict themselves, through the real command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ..cli.spoilt import Case, edit_json, edit_weights
from ..cli.test_bad_input import assert_one_line, assert_refused
from ..conftest import Result
from .fp8_models import E4M3, E8M0, Stored, pack

Ftload = Callable[..., Result]
FILE = "model.safetensors"
WEIGHT = "model.layers.1.mlp.up_proj.weight"
SCALES = f"{WEIGHT}_scale_inv"


def put(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    """Put something in the place of the `weight`, or of its `scales`; None for nothing."""
    names = {"weight": WEIGHT, "scales": SCALES}

    def spoil(directory: Path) -> None:
        def change(stored: dict[str, torch.Tensor]) -> None:
            for key, value in tensors.items():
                stored.pop(names[key])
                if value is not None:
                    stored[names[key]] = value

        edit_weights(directory, change)

    return spoil


def scale(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    scales = torch.ones(3, 2)
    scales[1, 1] = value
    return put(scales=scales.to(dtype))


def code(byte: int) -> Callable[[Path], object]:
    """One code of the weight."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        stored[WEIGHT].view(torch.uint8)[40, 50] = byte

    return lambda directory: edit_weights(directory, change)


def section(**values: object) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", quantization_config=values)


def plain(directory: Path) -> None:
    """All weights as bfloat16, without scales."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            if name.endswith("_scale_inv"):
                del stored[name]
            else:
                stored[name] = stored[name].bfloat16()

    edit_weights(directory, change)


ONES = torch.ones(96, 64)
FP8 = {"quant_method": "fp8"}
DAMAGED = "the checkpoint is damaged"
CASES = {
    "no scales": Case(
        spoil=put(scales=None), hint="incomplete",
        culprit=f"tensor `{WEIGHT}` of `{FILE}` holds float8_e4m3fn, and its scales (`{SCALES}`) are missing",
    ),
    "FP4 without scales": Case(
        spoil=put(weight=torch.zeros(96, 32, dtype=torch.int8), scales=None), hint="incomplete",
        culprit=f"tensor `{WEIGHT}` of `{FILE}` holds int8, and its scales (`{SCALES}`) are missing",
    ),
    "scales without a weight": Case(
        spoil=put(weight=None), hint=DAMAGED,
        culprit=f"tensor `{SCALES}` of `{FILE}` holds the scales of `{WEIGHT}`, which is missing",
    ),
    "scales of a plain weight": Case(
        spoil=put(weight=ONES.bfloat16()), hint=DAMAGED,
        culprit=f"tensor `{SCALES}` of `{FILE}` holds the scales of `{WEIGHT}`, which is bfloat16, not FP8",
    ),
    "bytes": Case(
        spoil=put(weight=ONES.to(torch.uint8)), hint=DAMAGED, culprit="which is uint8, not FP8",
    ),
    "too few scales": Case(
        spoil=put(scales=torch.ones(3, 3)), hint="`weight_block_size` of config.json",
        culprit=f"tensor `{SCALES}` of `{FILE}` has shape [3, 3], which divides `{WEIGHT}` of shape [96, 64] into no",
    ),
    "scales of another weight": Case(
        spoil=put(scales=torch.ones(5)), hint="`weight_block_size` of config.json", culprit="has shape [5], which",
    ),
    "no scale at all": Case(
        spoil=put(scales=torch.ones(0, 2)), hint="`weight_block_size`", culprit="has shape [0, 2], which divides",
    ),
    "an empty weight": Case(
        spoil=put(weight=torch.ones(0, 64).to(E4M3)), hint="`weight_block_size`", culprit="of shape [0, 64] into no",
    ),
    "scales of integers": Case(
        spoil=put(scales=torch.ones(3, 2, dtype=torch.int32)), hint=None,
        culprit=f"tensor `{SCALES}` of `{FILE}`, the scales of `{WEIGHT}`, holds int32: neither floats nor E8M0",
    ),
    "blocks without a width": Case(
        spoil=section(**FP8, weight_block_size=[128]), hint=None,
        culprit="`weight_block_size` of config.json is [128], not two positive integers",
    ),
    "blocks of nothing": Case(
        spoil=section(**FP8, weight_block_size=[0, 128]), hint=None, culprit="is [0, 128], not two positive integers"
    ),
    "nothing is FP8": Case(
        spoil=plain, hint="belong together",
        culprit="says FP8, but no tensor is stored so: `model.layers.0.mlp.down_proj.weight` is not",
    ),
    "config.json knows nothing of it": Case(
        spoil=lambda d: edit_json(d / "config.json", quantization_config=None), hint=None,
        culprit="holds FP8 tensors (`model.layers.0.mlp.down_proj.weight`), but its config.json has no",
    ),
    "another method": Case(
        spoil=section(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        hint="belong together",
        culprit="says `bitsandbytes`, but tensor `model.layers.0.mlp.down_proj.weight` is stored as FP8",
    ),
    "a method that nobody knows": Case(
        spoil=section(quant_method="fp7"), hint="FP8", culprit="is already quantised (`fp7`)"
    ),
    "an activation scale of nothing": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.update({"model.norm.input_scale": torch.ones(1)})),
        hint="belong together", culprit="has the unexpected tensor `model.norm.input_scale`",
    ),
}  # fmt: skip
"""What headers show."""
IN_THE_WEIGHTS = {
    "a scale is NaN": Case(
        spoil=scale(float("nan")), hint=DAMAGED,
        culprit=f"tensor `{SCALES}` of `{FILE}`, the scales of `{WEIGHT}`, holds NaN or infinity",
    ),
    "a scale is infinite, quantised": Case(
        spoil=scale(float("inf"), torch.bfloat16), hint=DAMAGED, flags=("--use_qlora",),
        culprit=f"tensor `{SCALES}` of `{FILE}`, the scales of `{WEIGHT}`, holds NaN or infinity",
    ),
    "a power of two is NaN": Case(
        spoil=put(scales=torch.full((3, 2), 255, dtype=torch.uint8).view(E8M0)), hint=DAMAGED,
        culprit=f"tensor `{SCALES}` of `{FILE}`, the scales of `{WEIGHT}`, holds NaN or infinity",
    ),
    "a byte is no power of two": Case(
        spoil=put(scales=torch.full((3, 2), 255, dtype=torch.uint8)), hint=DAMAGED,
        culprit=f"tensor `{SCALES}` of `{FILE}`, the scales of `{WEIGHT}`, holds NaN or infinity",
    ),
    "a code is NaN": Case(
        spoil=code(0x7F), hint=DAMAGED, culprit=f"tensor `{WEIGHT}` of `{FILE}` holds NaN or infinity"
    ),
    "a code is NaN, quantised": Case(
        spoil=code(0xFF), hint=DAMAGED, flags=("--use_qlora",),
        culprit=f"tensor `{WEIGHT}` of `{FILE}` holds NaN or infinity",
    ),
    "a product is infinite": Case(
        spoil=scale(3e38), hint=DAMAGED, culprit=f"tensor `{WEIGHT}` of `{FILE}` holds NaN or infinity"
    ),
}  # fmt: skip
"""What they don't."""


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama in FP8, in blocks of 32; its own directory, which a test may spoil."""
    directory = tmp_path / "source" / "model"
    shutil.copytree(llama, directory)
    pack(directory, Stored(block=(32, 32)))
    return directory


@pytest.mark.parametrize("name", [*CASES, *IN_THE_WEIGHTS])
def test_an_fp8_model_that_can_not_be_prepared(ftload: Ftload, model: Path, tmp_path: Path, name: str) -> None:
    case = (CASES | IN_THE_WEIGHTS)[name]
    case.spoil(model)
    words = ["--model", str(model), "--output_dir", str(tmp_path / "out"), *case.flags]
    assert_refused(ftload, tmp_path, words, code=4, culprit=case.culprit, hint=case.hint)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_finds_it_and_inspect_shows_it(ftload: Ftload, model: Path, name: str) -> None:
    case = CASES[name]
    case.spoil(model)
    assert_one_line(ftload("plan", "--model", model), code=4, culprit=case.culprit, hint=case.hint)
    inspected = ftload("inspect", model, "--json")
    assert inspected.code == 0, inspected.err
    if name != "nothing is FP8":
        assert "fp8" in json.loads(inspected.out)["by_dtype"]
