"""MXFP4: values and files against transformers' `dequantize=True`, and what is said of damaged checkpoints."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ftload.loaders.checkpoint.formats import mxfp4
from ftload.loaders.checkpoint.formats.interface import Headers
from ftload.loaders.checkpoint.tensors import TORCH_NAMES, TensorMeta
from ftload.loaders.errors import CheckpointError, MissingRequirementError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json
from ftload.loaders.source.resolve import resolve_source
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ..cli.spoilt import FILE, Case, edit_json, edit_weights
from ..cli.test_bad_input import assert_one_line, assert_refused
from ..conftest import Result
from ..parity.compare import assert_same_output
from ..parity.reference import run_reference
from ..tokenizers import write_llama
from .memory import decoding_peak

Ftload = Callable[..., Result]
Tensors = dict[str, torch.Tensor]

SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
VOCABULARY = 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""Those of the reference's seven that gpt-oss has."""
UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


def write_gpt_oss(directory: Path, *, rows: int = 144, shards: bool = False, every_scale: bool = False) -> None:
    """A tiny random gpt-oss, its experts in MXFP4, with every code; or with every scale but 253 to 255 as well."""
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, sliding_window=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = parameter.shape
            blocks = torch.arange(experts * outputs * inputs // 2).reshape(experts, outputs, -1, 16)
            scales = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=generator)
            if every_scale:
                scales = torch.arange(scales.numel()).reshape(scales.shape) % 253
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = (blocks * 37 % 256).to(torch.uint8), scales.byte()
        else:
            tensors[name] = torch.empty(parameter.shape).normal_(std=0.05, generator=generator).bfloat16()
    directory.mkdir()
    config.save_pretrained(directory)
    edit_json(
        directory / "config.json", architectures=["GptOssForCausalLM"], dtype="bfloat16", quantization_config=SECTION
    )
    write_llama(directory, vocab_size=VOCABULARY)
    if not shards:
        save_file(tensors, directory / FILE, metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {name: f"model-{index % 3 + 1:05d}-of-00003.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    index = json.dumps({"metadata": {}, "weight_map": files})
    (directory / "model.safetensors.index.json").write_text(index)


def write_experts(directory: Path, blocks: torch.Tensor, scales: torch.Tensor) -> Checkpoint:
    save_file({"W_blocks": blocks, "W_scales": scales}, directory / FILE)
    (directory / "config.json").write_text(json.dumps({"quantization_config": SECTION}))
    return open_checkpoint(resolve_source(str(directory), None), allow_pickle=False)


def decoded_by_transformers(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales)


def assert_same_bits(values: torch.Tensor, expected: torch.Tensor) -> None:
    assert (values.dtype, values.shape) == (torch.bfloat16, expected.shape)
    assert torch.equal(values.view(torch.int16), expected.view(torch.int16))


# -- what is written


@pytest.mark.parametrize(("rows", "shards"), [(144, False), (128, True)])
def test_every_strategy_equals_the_reference(tmp_path: Path, rows: int, shards: bool) -> None:
    import transformers

    source, plain = tmp_path / "source", tmp_path / "plain"
    write_gpt_oss(source, rows=rows, shards=shards, every_scale=True)
    dequantised = transformers.Mxfp4Config(dequantize=True)
    # no library quantises it in one step
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=dequantised
    )
    loaded.save_pretrained(plain)
    for strategy, flags in (
        ("standard", []),
        ("lora", ["--use_lora"]),
        ("qlora", ["--use_qlora", "--min_quantized", "0"]),
    ):
        out, reference = tmp_path / strategy, tmp_path / f"reference-{strategy}"
        report = prepared(source, out, *flags)
        run_reference(
            plain if strategy == "qlora" else source,
            reference,
            strategy=strategy,
            tokenizer_size=VOCABULARY + 1,
            targets=TARGETS,
            **({} if strategy == "qlora" else {"quantization_config": dequantised}),
        )
        assert report["embeddings"]["rows_after"] == (136 if rows == VOCABULARY else rows)
        assert_same_output(out, reference, strategy, pad_token_id=VOCABULARY)


def prepared(source: Path, output: Path, *flags: str) -> dict[str, Any]:
    words = ["--model", str(source), "--output_dir", str(output), "--lora_rank", "8"]
    outcome = prepare(parse_arguments([*words, "--embedding_init", "reference", *flags]), Silent())
    assert outcome is not None
    return to_json(outcome.report)


def test_parameters_are_counted_as_the_model_has_them(ftload: Ftload, tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "model")
    experts = 2 * 4 * (64 * 192 + 96 * 64)
    shown = json.loads(ftload("inspect", tmp_path / "model", "--json").out)
    assert shown["by_dtype"]["mxfp4"] == {"tensors": 4, "parameters": experts, "bytes": experts // 2 + experts // 32}
    planned = json.loads(ftload("plan", "--model", tmp_path / "model", "--json").out)
    assert planned["parameters"]["by_dtype"]["bfloat16"]["parameters"] == shown["total"]["parameters"]
    assert planned["quantization"] is None


def test_a_base_that_is_packed_is_written_decoded(ftload: Ftload, tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "model")
    words = ["prepare", "--model", tmp_path / "model", "--use_lora", "--output_dir", tmp_path / "out"]
    assert_one_line(
        ftload(*words, "--base", "reference"), code=2, culprit="its weights are stored as MXFP4 (`model.layers.0.",
        hint="--base copy",
    )  # fmt: skip
    assert ftload(*words).code == 0
    assert (tmp_path / "out" / FILE).exists()
    assert ftload("verify", tmp_path / "out").code == 0


# -- the decoder


def test_every_byte_under_every_scale(tmp_path: Path) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, 255, 16).contiguous()
    checkpoint = write_experts(tmp_path, blocks, scales)
    values = checkpoint.read(checkpoint.tensors["W"])
    assert_same_bits(values, decoded_by_transformers(blocks, scales))
    # and by the specification
    by_hand = [math.ldexp(value, 127 - 127) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
    assert values[0, :32:2, 127].tolist() == by_hand + [-value for value in by_hand]
    assert values[0, 32, 127].item() == 0
    assert values[0, 33, 127].item() == 0.5
    assert values[0, 2, 0].item() == 2.0**-128
    assert values[0, [8, 10, 12, 14], 253].tolist() == [2.0**127, 1.5 * 2.0**127, math.inf, math.inf]


many = settings(max_examples=60, deadline=None)


@st.composite
def experts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of any size, over many or few scales."""
    count, outputs = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 31, 32, 33, 64, 97]))
    groups = draw(st.integers(1, 6))
    lowest = draw(st.integers(0, 254))
    highest = draw(st.integers(lowest, 254))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    blocks = torch.randint(0, 256, (count, outputs, groups, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(lowest, highest + 1, (count, outputs, groups), generator=generator).to(torch.uint8)
    return blocks, scales


@given(packed=experts(), data=st.data())
@many
def test_any_range_in_any_chunks(packed: tuple[torch.Tensor, torch.Tensor], data: st.DataObject) -> None:
    expected = decoded_by_transformers(*packed)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mxfp4, "_TILE", data.draw(st.sampled_from([1, 2**12, 2**20])))
        patch.setattr(mxfp4, "_ROWS", 32)
        checkpoint = write_experts(Path(directory), *packed)
        (tensor,) = checkpoint.packed
        assert (tensor.name, tensor.shape) == ("W", tuple(expected.shape))
        assert_same_bits(checkpoint.read(tensor), expected)
        n = expected.numel()
        begin = data.draw(st.integers(0, n - 1))
        end = data.draw(st.integers(begin, n))
        assert_same_bits(checkpoint.values(tensor, begin, end), expected.flatten()[begin:end])
        elements = data.draw(st.integers(max(1, n // 50), n + 1))
        chunks = list(checkpoint.chunks(tensor, elements))
        assert [len(chunk) for chunk in chunks[:-1]] == [elements] * (len(chunks) - 1)
        assert_same_bits(torch.cat(chunks), expected.flatten())


@pytest.mark.parametrize(
    ("inputs", "outputs", "parts"),
    [(2880, 5760, 3), (2880, 2880, 2), (64, 192, 1), (4096, 8192, 4), (2912, 5760, 1), (16384, 65536, 4)],
)
def test_large_experts_are_decoded_in_parts(tmp_path: Path, inputs: int, outputs: int, parts: int) -> None:
    shape = (1, outputs, inputs // 32)
    meta = {
        f"W{suffix}": TensorMeta(name=f"W{suffix}", shape=size, dtype="U8", file=FILE, begin=0, end=0)
        for suffix, size in (("_blocks", (*shape, 16)), ("_scales", shape))
    }
    (tensor,) = mxfp4.Mxfp4().find(Headers(source=resolve_source(str(tmp_path), None), tensors=meta), strict=False)
    assert tensor.parameters == parts * tensor.tile


def test_chunks_stay_what_they_are_when_the_next_are_decoded(tmp_path: Path) -> None:
    blocks, scales = torch.randint(0, 256, (3, 8, 2, 16)).to(torch.uint8), torch.full((3, 8, 2), 127).to(torch.uint8)
    checkpoint = write_experts(tmp_path, blocks, scales)
    (tensor,) = checkpoint.packed
    for elements in (512, 100):
        chunks = list(checkpoint.chunks(tensor, elements))
        assert_same_bits(torch.cat(chunks), decoded_by_transformers(blocks, scales).flatten())


@pytest.mark.parametrize("elements", [2**15, 2**20, 10**9])
@pytest.mark.parametrize("most", [2**19, 2**20])
def test_reading_takes_the_memory_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, elements: int
) -> None:
    monkeypatch.setattr(mxfp4, "_TILE", most)
    blocks = torch.zeros((3, 1024, 32, 16), dtype=torch.uint8)
    checkpoint = write_experts(tmp_path, blocks, blocks[..., 0].clone())
    (tensor,) = checkpoint.packed
    checkpoint.read(tensor)  # compiles
    wanted = min(elements, tensor.parameters)

    def read() -> None:
        for chunk in checkpoint.chunks(tensor, wanted):
            chunk.sum()

    peak = decoding_peak(read)
    told = 2 * wanted + tensor.reading_bytes(wanted)
    assert 0.6 * told < peak < told


def test_decoding_without_numba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_experts(
        tmp_path, torch.zeros((1, 1, 1, 16), dtype=torch.uint8), torch.zeros((1, 1, 1), dtype=torch.uint8)
    )
    monkeypatch.setitem(sys.modules, "ftload.loaders.checkpoint.formats.mxfp4_kernel", None)
    mxfp4._decoder.cache_clear()
    try:
        with pytest.raises(MissingRequirementError, match="MXFP4 is decoded by numba, which can't be used: import of"):
            checkpoint.read(checkpoint.tensors["W"])
    finally:
        mxfp4._decoder.cache_clear()


# -- damaged checkpoints


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda d: edit_weights(d, lambda t: t.update({name: how(t[name]).contiguous()}))


def put(value: int, name: str = f"{UP}_scales") -> Callable[[Path], None]:
    def spoil(tensors: Tensors) -> None:
        tensors[name][1, 5, 0] = value

    return lambda d: edit_weights(d, spoil)


def decode_all(tensors: Tensors) -> None:
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        tensors[name] = decoded_by_transformers(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))


BELONG, DAMAGED, LAYOUT = "belong together", "damaged or was saved from", "not stored as gpt-oss is"
CASES = {
    "no scales": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.pop(f"{UP}_scales")),
        culprit=f"tensor `{UP}_scales` is missing, where there is `{UP}_blocks`", hint=LAYOUT,
    ),
    "no blocks": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.pop(f"{DOWN}_blocks")), flags=("--use_lora",),
        culprit=f"tensor `{DOWN}_blocks` is missing, where there is `{DOWN}_scales`", hint=LAYOUT,
    ),
    "signed blocks": Case(
        spoil=change(f"{UP}_blocks", lambda t: t.to(torch.int8)),
        culprit=f"tensor `{UP}_blocks` of `{FILE}` holds int8, MXFP4 is stored in uint8", hint=LAYOUT,
    ),
    "scales as numbers": Case(
        spoil=change(f"{UP}_scales", lambda t: t.float()),
        culprit=f"tensor `{UP}_scales` of `{FILE}` holds float32, MXFP4 is stored in uint8", hint=LAYOUT,
    ),
    "blocks in rows": Case(
        spoil=change(f"{UP}_blocks", lambda t: t.flatten(2)),
        culprit=f"tensor `{UP}_blocks` of `{FILE}` has shape [4, 192, 32], the blocks of experts have [experts, rows, "
        "blocks, 16]", hint=LAYOUT,
    ),
    "other blocks": Case(
        spoil=change(f"{UP}_blocks", lambda t: t.reshape(4, 192, 4, 8)), culprit="has shape [4, 192, 4, 8]", hint=LAYOUT
    ),
    "no experts": Case(
        spoil=lambda d: [change(f"{UP}_{part}", lambda t: t[:0])(d) for part in ("blocks", "scales")],
        culprit=f"tensor `{UP}_blocks` of `{FILE}` has shape [0, 192, 2, 16]", hint=LAYOUT,
    ),
    "a scale too few": Case(
        spoil=change(f"{UP}_scales", lambda t: t[:, :, 1:]),
        culprit=f"tensor `{UP}_scales` of `{FILE}` has shape [4, 192, 1], its blocks ask for [4, 192, 2]", hint=LAYOUT,
    ),
    "another shape than the model's": Case(
        spoil=lambda d: [change(f"{UP}_{part}", lambda t: t[:, 32:])(d) for part in ("blocks", "scales")],
        culprit=f"tensor `{UP}` has shape [4, 64, 160], the configuration asks for [4, 64, 192]", hint=BELONG,
    ),
    "there twice": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.update({UP: torch.zeros(4, 64, 192, dtype=torch.bfloat16)})),
        culprit=f"tensor `{UP}` is both in `{FILE}` and, as MXFP4, in `{FILE}`", hint=LAYOUT,
    ),
    "not packed": Case(
        spoil=lambda d: edit_weights(d, decode_all),
        culprit="config.json says MXFP4, but no tensor is stored so: `model.layers.0.mlp.experts.down_proj` of "
        f"`{FILE}` holds bfloat16", hint=BELONG,
    ),
    "not in config.json": Case(
        spoil=lambda d: edit_json(d / "config.json", quantization_config=None),
        culprit="holds MXFP4 tensors (`model.layers.0.mlp.experts.down_proj`), but its config.json has no "
        "`quantization_config`", hint=None,
    ),
    "another method in config.json": Case(
        spoil=lambda d: edit_json(
            d / "config.json",
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        ),
        culprit="says `bitsandbytes`, but tensor `model.layers.0.mlp.experts.down_proj` is stored as MXFP4",
        hint=BELONG,
    ),
    "a scale that is NaN": Case(
        spoil=put(255), culprit=f"tensor `{UP}_scales` of `{FILE}` holds a scale that is NaN (255), of expert 1",
        hint=DAMAGED,
    ),
    "a scale that is too large": Case(
        spoil=put(254), culprit=f"tensor `{UP}` of `{FILE}` holds NaN or infinity", hint=DAMAGED
    ),
}  # fmt: skip
IN_THE_WEIGHTS = {"a scale that is NaN", "a scale that is too large"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt-oss") / "model"
    write_gpt_oss(directory)
    return directory


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_checkpoint(ftload: Ftload, sound: Path, tmp_path: Path, name: str) -> None:
    model, case = tmp_path / "model", CASES[name]
    shutil.copytree(sound, model)
    case.spoil(model)
    words = ["--model", str(model), "--output_dir", str(tmp_path / "out"), *case.flags]
    assert_refused(ftload, tmp_path, words, code=4, culprit=case.culprit, hint=case.hint)
    planned = ftload("plan", "--model", model, *case.flags)
    if name in IN_THE_WEIGHTS:
        assert planned.code == 0
    else:
        assert_one_line(planned, code=4, culprit=case.culprit, hint=case.hint)
    assert ftload("inspect", model).code == 0  # headers can always be looked at


sizes = st.lists(st.integers(0, 40), max_size=5).map(tuple)
dtypes = st.sampled_from(sorted(TORCH_NAMES))


@given(
    blocks=st.tuples(sizes | st.tuples(*[st.integers(0, 40)] * 3, st.just(16)), dtypes | st.just("U8")),
    scales=st.tuples(st.none() | sizes, dtypes | st.just("U8")),
    strict=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_any_headers(
    sound: Path, blocks: tuple[tuple[int, ...], str], scales: tuple[tuple[int, ...] | None, str], strict: bool
) -> None:
    """They can be decoded, or are refused; to be shown they may be anything."""
    found = {"W_blocks": blocks, "W_scales": (scales[0] or blocks[0][:-1], scales[1])}
    meta = {
        name: TensorMeta(name=name, shape=shape, dtype=dtype, file=FILE, begin=0, end=0)
        for name, (shape, dtype) in found.items()
    }
    headers = Headers(source=resolve_source(str(sound), None), tensors=meta)
    try:
        packed = list(mxfp4.Mxfp4().find(headers, strict=strict))
    except CheckpointError as error:
        assert strict
        assert re.match(r"tensor `W_(blocks|scales)` of `model.safetensors` (holds|has shape)", error.message)
        return
    for tensor in packed:
        assert meta["W_blocks"].parameters * 2 == tensor.parameters == meta["W_scales"].parameters * 32 > 0
        assert tensor.parameters % tensor.tile == 0
    assert packed or not strict


def test_names_alone_mean_nothing(tmp_path: Path) -> None:
    """Without a word in config.json, tensors that are called alike are what they are."""
    tensors = {"a_blocks": torch.zeros(3), "b_scales": torch.zeros(2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / FILE)
    found = open_checkpoint(resolve_source(str(tmp_path), None), allow_pickle=False)
    assert list(found.tensors) == ["a_blocks", "b_scales"]
    assert not found.packed
