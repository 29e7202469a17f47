"""FP8: what is decoded, against transformers' own dequantisation and, where that fails, an independent computation."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ftload.loaders.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ftload.loaders.checkpoint.formats import fp8
from ftload.loaders.checkpoint.formats.interface import PackedTensor
from ftload.loaders.checkpoint.plain import PlainReader
from ftload.loaders.errors import MissingRequirementError
from ftload.loaders.source.resolve import resolve_source
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ..conftest import Result
from ..loaders.plans import make_plan
from ..parity.compare import assert_same_adapter_config, assert_same_json, assert_same_tensors
from ..parity.models import write_model
from ..parity.multimodal import write_published
from ..parity.reference import REFERENCE_TARGETS, run_reference
from ..parity.test_parity import TARGETS
from ..parity.zoo import write_tiny
from ..tokenizers import write_llama
from .fp8_models import E4M3, E8M0, Stored, pack, quantise
from .memory import decoding_peak

Ftload = Callable[..., Result]
FILE = "model.safetensors"
VOCABULARY = 128

STORED = {
    "blocks": Stored(block=(32, 32)),
    "channels": Stored(block=(1, 64), section={"weight_block_size": None}),
    "tensors": Stored(
        block=None, scales=torch.bfloat16, activation="activation_scale", section={"activation_scheme": "static"},
        scale_shape=lambda scales: scales.reshape(()),
    ),
    "powers of two": Stored(block=(32, 32), scales=E8M0, section={"scale_fmt": "ue8m0"}),
    "MXFP8": Stored(block=(1, 32), scales=torch.uint8, method="mxfp8"),
    "FP4": Stored(block=(1, 32), scales=E8M0, codes=torch.int8),
    "DeepSeek-V4's names": Stored(block=(32, 32), suffix="scale"),
    "Mistral's names": Stored(block=(32, 32), suffix="qscale_weight"),
}  # fmt: skip
"""What transformers decodes."""


# -- one tensor


def opened(directory: Path, tensors: dict[str, torch.Tensor], **section: Any) -> Checkpoint:
    """A checkpoint of these tensors, whose config.json says FP8."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / FILE)
    config = {"quantization_config": {"quant_method": "fp8", **section}}
    (directory / "config.json").write_text(json.dumps(config))
    return open_checkpoint(resolve_source(str(directory), None), allow_pickle=False)


def only(checkpoint: Checkpoint) -> PackedTensor:
    (tensor,) = checkpoint.tensors.values()
    assert isinstance(tensor, PackedTensor)
    return tensor


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bits, but for those of NaN."""
    both = found.isnan() & expected.isnan()
    return found.dtype == expected.dtype and bool(
        ((found.view(torch.int16) == expected.view(torch.int16)) | both).all()
    )


def every_code(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes in an order that repeats in no block, all of them where there is room."""
    codes = torch.arange(math.prod(shape)) * 167 % 256
    return codes.to(torch.uint8).reshape(shape).view(dtype)


def library(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """transformers' dequantisation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)


SCALE_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, E8M0]


def some_scales(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-2
    if dtype in (torch.uint8, E8M0):
        return (torch.arange(math.prod(shape)) * 37 % 255).to(torch.uint8).reshape(shape).view(dtype)
    return values.to(dtype)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((64, 96), (2, 3), (32, 32)),
        ((64, 96), (4, 6), [128, 128]),
        ((64, 96), (64, 3), [1, 32]),
        ((64, 96), (64, 1), None),
        ((64, 96), (1,), None),
        ((64, 96), (), [128, 128]),
        ((3, 16, 64), (3, 2, 4), (8, 16)),
        ((3, 16, 64), (3, 1, 1), None),
        ((3, 16, 64), (), None),
    ],
)
def test_weights_are_decoded_as_transformers_does(
    tmp_path: Path,
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    block: list[int] | None,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
) -> None:
    stored = (*shape[:-1], shape[-1] // 2) if dtype == torch.int8 else shape
    codes, scales = every_code(dtype, stored), some_scales(scale_dtype, grid)
    checkpoint = opened(tmp_path, {"W": codes, "W_scale_inv": scales}, weight_block_size=block)
    tensor = only(checkpoint)
    assert (tensor.name, tensor.shape, tensor.dtype) == ("W", shape, "BF16")
    assert tensor.tag == ("fp4" if dtype == torch.int8 else "fp8")
    assert tensor.stored_bytes == codes.nbytes + scales.nbytes
    expected = library(codes, scales)
    assert expected.shape == shape
    assert same(checkpoint.read(tensor), expected)


@pytest.mark.parametrize(("shape", "grid"), [((576, 160), (5, 2)), ((192, 960), (2, 8)), ((2, 192, 136), (2, 2, 2))])
def test_the_last_block_is_smaller_where_the_grid_says_so(
    tmp_path: Path, shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    codes, scales = every_code(E4M3, shape), some_scales(torch.float32, grid)
    checkpoint = opened(tmp_path, {"W": codes, "W_scale_inv": scales}, weight_block_size=[128, 128])
    wide = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]
    expected = (codes.float() * wide).bfloat16()
    assert same(checkpoint.read(only(checkpoint)), expected)
    # transformers makes blocks of equal size of the grid, or can't
    if shape[-2] % grid[-2] or shape[-1] % grid[-1]:
        with pytest.raises(ValueError, match="not divisible by scale grid"):
            library(codes, scales)
    else:
        assert not same(library(codes, scales), expected)


@pytest.mark.parametrize(("shape", "count"), [((6, 40), 6), ((3, 8, 16), 3)])
def test_one_scale_a_channel_or_an_expert(tmp_path: Path, shape: tuple[int, ...], count: int) -> None:
    codes, scales = every_code(E4M3, shape), some_scales(torch.float32, (count,))
    checkpoint = opened(tmp_path, {"W": codes, "W_scale_inv": scales}, weight_block_size=None)
    expected = (codes.float() * scales.reshape(-1, *[1] * (len(shape) - 1))).bfloat16()
    assert same(checkpoint.read(only(checkpoint)), expected)


def test_every_power_of_two_that_a_byte_stands_for(tmp_path: Path) -> None:
    scales = torch.arange(255, dtype=torch.uint8).reshape(255, 1)
    codes = torch.ones(255, 3).to(E4M3)
    expected = torch.tensor([math.ldexp(1, b - 127) for b in range(255)]).bfloat16()[:, None].expand(255, 3)
    for dtype in (torch.uint8, E8M0):
        checkpoint = opened(tmp_path, {"W": codes, "W_scale_inv": scales.view(dtype)}, weight_block_size=None)
        assert same(checkpoint.read(only(checkpoint)), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_of_any_weight(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([E4M3, torch.float8_e5m2, torch.int8]))
    scale_dtype = data.draw(st.sampled_from(SCALE_DTYPES))
    size = st.integers(1, 20)
    experts, rows, columns = data.draw(st.integers(1, 3)), data.draw(size), data.draw(size)
    height, width = data.draw(size), data.draw(size)
    per_byte = 2 if dtype == torch.int8 else 1
    grid = (experts, -(-rows // height), -(-columns * per_byte // width))
    codes, scales = every_code(dtype, (experts, rows, columns)), some_scales(scale_dtype, grid)
    directory = tmp_path_factory.mktemp("any")
    checkpoint = opened(directory, {"W": codes, "W_scale_inv": scales}, weight_block_size=[height, width])
    tensor = only(checkpoint)
    unpacked = codes.float() if per_byte == 1 else library(codes, torch.ones(())).float()
    as_floats = torch.exp2(scales.float() - 127) if scale_dtype == torch.uint8 else scales.float()
    wide = as_floats.repeat_interleave(height, -2).repeat_interleave(width, -1)[:, :rows, : columns * per_byte]
    expected = (unpacked * wide).bfloat16()
    assert same(checkpoint.read(tensor), expected)
    flat = expected.flatten()
    begin = data.draw(st.integers(0, len(flat)))
    end = data.draw(st.integers(begin, len(flat)))
    assert same(checkpoint.values(tensor, begin, end), flat[begin:end])
    elements = data.draw(st.integers(1, len(flat) + 5))
    chunks = list(checkpoint.chunks(tensor, elements))
    assert all(len(chunk) == elements for chunk in chunks[:-1])
    assert same(torch.cat(chunks), flat)
    buffer = bytearray(2 * data.draw(st.integers(1, elements)))
    assert same(torch.cat([chunk.clone() for chunk in checkpoint.chunks(tensor, elements, buffer)]), flat)


def test_chunks_lie_in_the_buffer(tmp_path: Path) -> None:
    codes = every_code(E4M3, (40, 96))
    checkpoint = opened(tmp_path, {"W": codes, "W_scale_inv": torch.ones(())})
    buffer = bytearray(2 * 960)
    for chunk in checkpoint.chunks(only(checkpoint), 960, buffer):
        assert chunk.data_ptr() == torch.frombuffer(buffer, dtype=torch.bfloat16).data_ptr()


def test_a_weight_of_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftload.loaders.checkpoint.formats.fp8._PIECE", 700)
    for dtype, columns in ((E4M3, 90), (torch.int8, 45)):
        codes, scales = every_code(dtype, (60, columns)), some_scales(torch.float32, (4, 3))
        checkpoint = opened(tmp_path, {"W": codes, "W_scale_inv": scales}, weight_block_size=[15, 30])
        assert same(checkpoint.read(only(checkpoint)), library(codes, scales))


@pytest.mark.parametrize("elements", [2**16, 2**20, 2**22])
@pytest.mark.parametrize(("dtype", "grid"), [(E4M3, (64, 8)), (E4M3, (8192, 32)), (E4M3, ()), (torch.int8, (8192, 32))])
def test_decoding_takes_the_memory_that_is_told(
    tmp_path: Path, dtype: torch.dtype, grid: tuple[int, ...], elements: int
) -> None:
    codes = torch.zeros(8192, 512, dtype=torch.uint8).view(dtype)
    tensor = only(opened(tmp_path, {"W": codes, "W_scale_inv": torch.ones(grid)}, weight_block_size=None))
    read = PlainReader(source=resolve_source(str(tmp_path), None)).values

    def decode() -> None:
        tensor.values(0, elements, read)

    decode()  # compiles
    peak = decoding_peak(decode)
    assert peak - 2 * elements <= tensor.reading_bytes(elements) < 1.5 * (peak - 2 * elements) + 2**18


def test_decoding_without_numba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(tmp_path, {"W": torch.ones(1, 4).to(E4M3), "W_scale_inv": torch.ones(())})
    monkeypatch.setitem(sys.modules, "ftload.loaders.checkpoint.formats.fp8_kernel", None)
    fp8._kernel.cache_clear()
    try:
        with pytest.raises(MissingRequirementError, match="FP8 is decoded by numba, which can't be used: import of"):
            checkpoint.read(only(checkpoint))
    finally:
        fp8._kernel.cache_clear()


# -- whole models


def write_source(directory: Path, architecture: str, stored: Stored, *, rows: int = 128, shards: bool = False) -> None:
    write_model(directory, architecture, vocab_size=rows, dtype="bfloat16", shards=shards)
    pack(directory, stored)
    write_llama(directory, vocab_size=VOCABULARY)


def reference(source: Path, output: Path, strategy: str, targets: list[str]) -> None:
    """What the libraries make of a source; they quantise no FP8 checkpoint, so of a decoded one."""
    decode = transformers.FineGrainedFP8Config(dequantize=True)
    run = partial(run_reference, strategy=strategy, tokenizer_size=VOCABULARY + 1, targets=targets)
    if strategy != "qlora":
        run(source, output, quantization_config=decode)
        return
    decoded = output.with_name("decoded")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=decode)
    model.save_pretrained(decoded)
    run(decoded, output)


FLAGS = {
    "standard": ("--no_use_lora",),
    "lora": ("--use_lora", "--base", "copy"),
    "qlora": ("--use_qlora", "--min_quantized", "0"),
}


@pytest.mark.parametrize(
    ("architecture", "kind", "shards", "rows"),
    [
        ("llama", "blocks", True, 128),
        ("llama", "tensors", False, 144),
        ("llama", "FP4", False, 144),
        ("llama", "Mistral's names", False, 144),
        ("qwen3", "channels", False, 128),
        ("qwen3", "powers of two", True, 144),
        ("qwen3", "MXFP8", False, 144),
        ("qwen3_moe", "blocks", True, 128),
        ("qwen3_moe", "DeepSeek-V4's names", False, 144),
    ],
)
def test_every_strategy_equals_the_reference(
    ftload: Ftload, tmp_path: Path, architecture: str, kind: str, shards: bool, rows: int
) -> None:
    source = tmp_path / "source"
    write_source(source, architecture, STORED[kind], rows=rows, shards=shards)
    assert len(list(source.glob("*.safetensors"))) > 1 if shards else (source / FILE).exists()
    for strategy, flags in FLAGS.items():
        out = tmp_path / strategy
        result = ftload(
            "prepare", "--model", source, "--output_dir", out, "--lora_rank", 8, "--embedding_init", "reference", *flags
        )
        assert result.code == 0, result.err
        theirs = tmp_path / f"reference-{strategy}"
        reference(source, theirs, strategy, TARGETS.get(architecture, REFERENCE_TARGETS))
        assert_same_tensors(out, theirs)
        for name in ("config.json", "generation_config.json"):
            assert_same_json(out / name, theirs / name, pad_token_id=VOCABULARY)
        if strategy != "standard":
            assert_same_tensors(out / "adapter", theirs / "adapter")
            assert_same_adapter_config(out / "adapter", theirs / "adapter")


def matrices(directory: Path) -> tuple[str, ...]:
    """The weights of linear layers of a tiny model that blocks of 8 × 32 divide; routers are never FP8."""
    stored = load_file(directory / FILE)
    others = ("norm", "embed", "head", "wte", "wpe", "router", "gate.weight")
    return tuple(
        name
        for name, value in stored.items()
        if name.endswith("weight") and value.dim() == 2 and not value.shape[0] % 8 and not value.shape[1] % 32
        if not any(part in name for part in others)
    )


def assert_tensors_equal_the_reference(ftload: Ftload, source: Path, *, qlora_too: bool) -> None:
    for strategy in ("standard", "qlora") if qlora_too else ("standard",):
        out, theirs = source.parent / strategy, source.parent / f"reference-{strategy}"
        targets = ("--lora_target_modules", "o_proj") if strategy == "qlora" else ()
        result = ftload("prepare", "--model", source, "--output_dir", out, *FLAGS[strategy], *targets)
        assert result.code == 0, result.err
        reference(source, theirs, strategy, ["o_proj"])
        assert_same_tensors(out, theirs)


@pytest.mark.parametrize(
    ("model_type", "count"),
    [("deepseek_v3", 28), ("deepseek_v4", 62), ("minimax_m2", 32), ("glm4_moe", 26), ("ministral3", 14), ("gpt2", 8)],
)
def test_types_as_they_are_published(ftload: Ftload, tmp_path: Path, model_type: str, count: int) -> None:
    source = tmp_path / "source"
    write_tiny(source, model_type, vocab_size=144)
    assert len(matrices(source)) == count
    pack(source, Stored(block=(8, 32)), only=matrices(source))
    write_llama(source, vocab_size=VOCABULARY)
    assert_tensors_equal_the_reference(ftload, source, qlora_too=model_type == "deepseek_v3")


@pytest.mark.parametrize(("model_type", "count"), [("qwen3_5", 11), ("qwen3_5_moe", 35), ("gemma3", 14)])
def test_multimodal_types_as_they_are_published(ftload: Ftload, tmp_path: Path, model_type: str, count: int) -> None:
    """Of which transformers loads the language model alone, and gives what it has decoded no prefix."""
    source = tmp_path / "source"
    write_published(source, model_type, vocab_size=144)
    chosen = tuple(name for name in matrices(source) if "language_model" in name and name.endswith("proj.weight"))
    assert len(chosen) == count
    pack(source, Stored(block=(8, 32)), only=chosen)
    write_llama(source, vocab_size=VOCABULARY)
    assert_tensors_equal_the_reference(ftload, source, qlora_too=model_type == "qwen3_5_moe")
    plan, _ = make_plan(source, tmp_path)
    # experts keep their own tensors: no layer's are put together to be divided again
    assert [step.outputs[0].name for step in plan.steps if len(step.outputs) > 1] == []


def test_edges_of_deepseek_as_if_they_were_decoded_before(ftload: Ftload, tmp_path: Path) -> None:
    """Smaller last blocks, which transformers refuses: 24 or 40 rows in blocks of 16, 96 columns in blocks of 64."""
    source, decoded = tmp_path / "source", tmp_path / "decoded"
    write_tiny(decoded, "deepseek_v3", vocab_size=144)
    write_llama(decoded, vocab_size=VOCABULARY)
    shutil.copytree(decoded, source)
    names = tuple(name for name in load_file(source / FILE) if name.endswith(("proj.weight", "_mqa.weight")))
    pack(source, Stored(block=(16, 64)), only=names)
    packed = load_file(source / FILE)
    for name in names:
        codes, scales = packed[name], packed.pop(f"{name}_scale_inv")
        rows, columns = codes.shape
        wide = scales.repeat_interleave(16, 0).repeat_interleave(64, 1)[:rows, :columns]
        packed[name] = (codes.float() * wide).bfloat16()
    assert any(packed[name].shape[0] % 16 for name in names)
    assert any(packed[name].shape[1] % 64 for name in names)
    save_file(packed, decoded / FILE, metadata={"format": "pt"})
    flags = ("--use_qlora", "--min_quantized", "0", "--lora_target_modules", "o_proj")
    for model in (source, decoded):
        result = ftload("prepare", "--model", model, "--output_dir", tmp_path / f"{model.name} out", *flags)
        assert result.code == 0, result.err
    assert_same_tensors(tmp_path / "source out", tmp_path / "decoded out")


@pytest.mark.parametrize("block", [(8, 32), (24, 40)])
def test_fused_experts(ftload: Ftload, tmp_path: Path, block: tuple[int, int]) -> None:
    """As gpt-oss has them: no checkpoint like this is known, but nothing else could be meant."""
    source, decoded = tmp_path / "source", tmp_path / "decoded"
    write_tiny(decoded, "gpt_oss", vocab_size=144)
    write_llama(decoded, vocab_size=VOCABULARY)
    shutil.copytree(decoded, source)
    experts = tuple(name for name, value in load_file(source / FILE).items() if value.dim() == 3)
    assert len(experts) == 4
    stored = Stored(block=block)
    packed = load_file(source / FILE)
    for name in experts:
        codes, scales = quantise(packed[name].float(), stored)
        wide = scales.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
        packed[name] = (codes.float() * wide[:, : codes.shape[1], : codes.shape[2]]).bfloat16()
        if not codes.shape[1] % block[0] and not codes.shape[2] % block[1]:
            assert same(packed[name], library(codes, scales))
    save_file(packed, decoded / FILE, metadata={"format": "pt"})
    pack(source, stored, only=experts)
    for model in (source, decoded):
        result = ftload("prepare", "--model", model, "--output_dir", tmp_path / f"{model.name} out", *FLAGS["standard"])
        assert result.code == 0, result.err
    assert_same_tensors(tmp_path / "source out", tmp_path / "decoded out")


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("kv_scale",), ("k_proj.output_scale", "v_proj.v_scale")])
def test_scales_of_cached_keys_and_values_are_left_out(ftload: Ftload, tmp_path: Path, names: tuple[str, ...]) -> None:
    source, out, plain = (tmp_path / name for name in ("source", "out", "plain"))
    stored = Stored(block=None, suffix="weight_scale", activation="input_scale", section={"kv_cache_scheme": "static"})
    write_source(source, "llama", stored, rows=144)
    assert ftload("prepare", "--model", source, "--output_dir", plain).code == 0
    tensors = load_file(source / FILE)
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.self_attn.{name}": torch.tensor(0.5) for name in names}
    save_file(tensors, source / FILE)
    result = ftload("prepare", "--model", source, "--output_dir", out)
    assert result.code == 0, result.err
    assert_same_tensors(out, plain)


def test_lora_gets_a_decoded_base_of_its_own(ftload: Ftload, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_source(source, "llama", STORED["blocks"], rows=144)
    words = ["prepare", "--model", source, "--use_lora", "--output_dir"]
    assert ftload(*words, tmp_path / "out").code == 0
    report = json.loads((tmp_path / "out" / "ftload_report.json").read_text())
    assert report["base"] == "copy"
    assert report["parameters"]["by_dtype"].keys() == {"bfloat16", "float32"}
    refused = ftload(*words, tmp_path / "other", "--base", "reference")
    assert refused.code == 2
    assert "the original can't serve as the base: its weights are stored as FP8" in refused.err


@pytest.mark.parametrize("kind", ["blocks", "FP4"])
def test_plan_and_inspect_count_logical_parameters(ftload: Ftload, tmp_path: Path, kind: str) -> None:
    source, decoded = tmp_path / "source", tmp_path / "decoded"
    write_model(decoded, "llama", vocab_size=144, dtype="bfloat16")
    write_llama(decoded, vocab_size=VOCABULARY)
    write_source(source, "llama", STORED[kind], rows=144)
    found, expected = (json.loads(ftload("inspect", model, "--json").out) for model in (source, decoded))
    assert found["total"]["parameters"] == expected["total"]["parameters"]
    tag = "fp4" if kind == "FP4" else "fp8"
    assert found["by_dtype"][tag]["tensors"] == 14
    assert found["by_dtype"][tag]["parameters"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert found["quantization"]["method"] == "fp8"
    plans = [json.loads(ftload("plan", "--model", model, "--use_qlora", "--json").out) for model in (source, decoded)]
    assert plans[0]["parameters"] == plans[1]["parameters"]


def test_what_is_not_fp8_stays_as_it_is(ftload: Ftload, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_source(source, "llama", STORED["blocks"], rows=144)
    before = load_file(source / FILE)
    assert ftload("prepare", "--model", source, "--output_dir", tmp_path / "out").code == 0
    after = load_file(tmp_path / "out" / FILE)
    plain = [name for name, value in before.items() if value.dtype == torch.bfloat16]
    assert len(plain) == 7
    assert all(torch.equal(before[name], after[name]) for name in plain)
    assert after.keys() == {name for name in before if not name.endswith("_scale_inv")}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
