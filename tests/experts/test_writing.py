"""Experts as QLoRA writes them: byte for byte what bitsandbytes makes of the model's own fused parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.tensors import TensorMeta
from ftload.loaders.errors import MissingRequirementError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.model.experts.stacked import StackedExperts, stack_experts
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json
from safetensors.torch import save_file

from ..parity.compare import assert_same_json, assert_same_tensors, read_tensors
from ..parity.reference import run_reference
from ..parity.zoo import write_tiny
from ..tokenizers import write_llama
from .checkpoints import random_model

ARCHITECTURES = (
    "mixtral", "qwen3_moe", "qwen3_moe_64", "qwen3_moe_48", "qwen3_moe_odd", "qwen3_5_moe", "olmoe", "gpt_oss",
    "gpt_oss_square", "deepseek_v3", "glm4_moe", "granitemoe", "nemotron_h",
)  # fmt: skip
"""Those that the field trains, and sizes that are no multiples of 64 and of 16384."""
FLAGS = ("--use_qlora", "--min_quantized", "0", "--lora_rank", "8", "--embedding_init", "reference")


def _prepare(source: Path, output: Path, *flags: str) -> dict[str, Any]:
    words = ["--model", str(source), "--output_dir", str(output), *FLAGS, *flags]
    outcome = prepare(parse_arguments(words), Silent())
    assert outcome is not None
    return to_json(outcome.report)


def _write(directory: Path, name: str, layout: str) -> Path:
    """A model's checkpoint: as transformers saves it, or its own parameters as they are, experts fused."""
    model = random_model(name, vocab_size=144)
    model.save_pretrained(directory, max_shard_size="100KB" if layout == "saved" else "5GB")
    if layout == "fused":
        for path in directory.glob("model*"):
            path.unlink()
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    write_llama(directory, vocab_size=128)
    return directory


@pytest.mark.parametrize("layout", ["saved", "fused"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bytes_are_bitsandbytes_own(tmp_path: Path, name: str, layout: str) -> None:
    source = _write(tmp_path / "source", name, layout)
    report = _prepare(source, tmp_path / "out", "--max_memory", "64MB")
    targets = list(report["adapter"]["targets"])
    run_reference(source, tmp_path / "reference", strategy="qlora", tokenizer_size=129, targets=targets)
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")
    assert_same_tensors(tmp_path / "out" / "adapter", tmp_path / "reference" / "adapter")
    assert_same_json(tmp_path / "out" / "config.json", tmp_path / "reference" / "config.json", pad_token_id=128)
    fused = [key for key in read_tensors(tmp_path / "out") if key.endswith("experts.down_proj.absmax")]
    assert fused
    assert report["quantization"]["experts"] == 2 * len(fused)
    assert "any other program imports `ftload.register` first" in (tmp_path / "out" / "README.md").read_text()
    weights = sum(group["parameters"] for group in report["parameters"]["by_component"].values())
    assert report["parameters"]["total"] == weights
    assert report["parameters"]["by_component"]["experts"]["parameters"] > report["parameters"]["total"] / 4


def test_experts_stay_as_they_are_when_asked(tmp_path: Path) -> None:
    source = _write(tmp_path / "source", "qwen3_moe", "saved")
    report = _prepare(source, tmp_path / "out", "--quantize_experts", "false")
    tensors = read_tensors(tmp_path / "out")
    assert tensors["model.layers.0.mlp.experts.3.down_proj.weight"].dtype == torch.bfloat16
    assert not any("experts" in name and "absmax" in name for name in tensors)
    assert report["quantization"]["experts"] == 0
    assert "ftload.register" not in (tmp_path / "out" / "README.md").read_text()
    assert (
        "4 fused expert parameters (`model.layers.0.mlp.experts.gate_up_proj`) stay 16-bit, as --quantize_experts "
        "false asks: k-bit preparation makes them float32 in training"
    ) in report["warnings"]


def test_a_layout_that_is_not_known_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    """Inkling's halves are interleaved; JetMoe's class has experts of its own."""
    for kind, parameter in (
        ("inkling2_text", "model.layers.0.mlp.experts.gate_up_proj"),
        ("jetmoe", "model.layers.0.self_attention.experts.input_linear.weight"),
    ):
        source = tmp_path / kind
        write_tiny(source, kind, vocab_size=144)
        write_llama(source, vocab_size=128)
        report = _prepare(source, tmp_path / f"{kind} out")
        (warning,) = (text for text in report["warnings"] if "fused expert parameters" in text)
        assert f"(`{parameter}`) stay 16-bit, in a layout that ftload can't quantise" in warning
        words = ["--model", str(source), "--output_dir", str(tmp_path / "none"), "--use_qlora"]
        with pytest.raises(MissingRequirementError, match=r"of the weight matrices would be 4-bit.* experts \("):
            prepare(parse_arguments(words), Silent())


def test_what_is_prepared_is_taken_over_when_it_is_prepared_again(tmp_path: Path) -> None:
    source = _write(tmp_path / "source", "mixtral", "saved")
    _prepare(source, tmp_path / "out")
    _prepare(tmp_path / "out", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "out")


# -- reading experts as one tensor


class Merge:
    """A conversion that is given: it puts sources together as it is told."""

    def __init__(self, put: Any) -> None:
        self.put = put

    def load(self, values: Any) -> dict[str, torch.Tensor]:
        return {"experts.gate_up_proj": self.put(list(values.values()))}


def _metas(*shapes: tuple[int, ...], dtypes: tuple[str, ...] = ()) -> list[TensorMeta]:
    dtypes = dtypes or ("F32",) * len(shapes)
    return [
        TensorMeta(name=f"t{index}", shape=shape, dtype=dtype, file="f", begin=0, end=0)
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def _in_order(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Gates first, then ups: of each expert, one after the other."""
    half = len(tensors) // 2
    return torch.stack([torch.cat(pair) for pair in zip(tensors[:half], tensors[half:], strict=True)])


ORDERS: dict[str, tuple[Any, list[tuple[int, ...]], tuple[int, int, int]]] = {
    "one tensor an expert": (_in_order, [(6, 10)] * 6, (3, 12, 10)),
    "turned": (lambda tensors: torch.stack([one.T for one in tensors]), [(6, 10)] * 3, (3, 10, 6)),
    "stacks of gates and ups": (lambda tensors: torch.cat(tensors, dim=1), [(3, 6, 10), (3, 6, 10)], (3, 12, 10)),
    "a stack, each turned": (lambda tensors: tensors[0].transpose(1, 2), [(3, 6, 10)], (3, 10, 6)),
    "from the last to the first": (lambda tensors: torch.stack(tensors[::-1]), [(6, 10)] * 3, (3, 6, 10)),
}


@pytest.mark.parametrize("case", ORDERS)
def test_values_are_those_of_the_merged_tensor(case: str) -> None:
    put, shapes, shape = ORDERS[case]
    sources = _metas(*shapes)
    stack = stack_experts("experts.gate_up_proj", shape, sources, Merge(put))
    assert isinstance(stack, StackedExperts)
    stored = {source.name: torch.randn(source.shape) for source in sources}

    def read(tensor: TensorMeta, begin: int, end: int, _: Any = None) -> torch.Tensor:
        return stored[tensor.name].reshape(-1)[begin:end]

    whole = put(list(stored.values())).reshape(-1)
    size, tile = math.prod(shape), stack.tile
    for begin, end in ((0, size), (0, tile), (tile, 2 * tile), (tile, size), (size - tile, size)):
        assert stack.values(begin, end, read).equal(whole[begin:end])
    assert stack.part(7, 101, read).equal(whole[7:101])
    assert {source.name for source in stack.taken_from} == set(stored)


@pytest.mark.parametrize(
    ("put", "shapes", "shape"),
    [
        pytest.param(
            lambda tensors: torch.stack(tensors, dim=2).flatten(1, 2), [(3, 6, 10)] * 2,
            (3, 12, 10), id="interleaved rows",
        ),
        pytest.param(
            lambda tensors: torch.stack(tensors[0].chunk(2, dim=1), dim=2).flatten(1, 2),
            [(3, 12, 10)], (3, 12, 10), id="halves interleaved",
        ),
        pytest.param(lambda tensors: torch.stack(tensors) + 1, [(6, 10)] * 3, (3, 6, 10), id="other values"),
        pytest.param(lambda tensors: torch.stack(tensors[:2]), [(6, 10)] * 3, (3, 6, 10), id="one left out"),
        pytest.param(lambda tensors: torch.cat(tensors, dim=1)[None], [(6, 5)] * 2, (1, 6, 10), id="beside each other"),
        pytest.param(lambda tensors: torch.stack(tensors), [(60,)] * 3, (3, 6, 10), id="no matrices"),
        pytest.param(lambda tensors: torch.stack(tensors), [(6, 10)] * 2, (3, 6, 10), id="an expert is missing"),
    ],
)  # fmt: skip
def test_what_is_not_whole_matrices_in_a_row_is_not_stacked(put: Any, shapes: Any, shape: Any) -> None:
    assert stack_experts("experts.gate_up_proj", shape, _metas(*shapes), Merge(put)) is None


def test_dtypes_that_differ_are_read_as_float32() -> None:
    sources = _metas((6, 10), (6, 10), dtypes=("BF16", "F16"))
    stack = stack_experts("experts.gate_up_proj", (2, 6, 10), sources, Merge(torch.stack))
    assert stack is not None
    assert stack.dtype == "F32"
    stored = {"t0": torch.randn(6, 10).bfloat16(), "t1": torch.randn(6, 10).half()}
    values = stack.values(0, 120, lambda tensor, begin, end: stored[tensor.name].reshape(-1)[begin:end])
    assert values.equal(torch.cat([value.float().reshape(-1) for value in stored.values()]))
