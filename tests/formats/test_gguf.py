"""GGUF: types decoded as the `gguf` package does, architectures loaded as transformers does, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ftload.loaders.checkpoint.checkpoint import Checkpoint
from ftload.loaders.checkpoint.formats.gguf import Gguf, GgufWeight, Order, decode_blocks, stored_blocks
from ftload.loaders.checkpoint.gguf_header import GgufTensor, read_gguf_header
from ftload.loaders.model.gguf.checkpoint import open_gguf, read_gguf
from ftload.loaders.model.gguf.reader import quick_gguf_reader
from ftload.loaders.source.resolve import resolve_source
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GgufConfig, PretrainedConfig

from ..conftest import Result
from ..loaders.test_activations import measured_peak
from ..page_cache import cached_bytes, forget
from ..parity.compare import assert_same_adapter_config, assert_same_json, assert_same_tensors
from ..parity.reference import REFERENCE_TARGETS, run_reference
from ..parity.test_parity import TARGETS
from ..tokenizers import write_llama
from .gguf_models import BLOCK_TYPES, TINY, random_blocks, write_tiny

Ftload = Callable[..., Result]
VOCABULARY = 128
NUMBERS = (Type.F32, Type.F16, Type.BF16)
UNKNOWN = {Type.Q5_0, Type.Q5_1, Type.TQ1_0, Type.TQ2_0, Type.MXFP4, Type.NVFP4}
"""Types that transformers refuses where it decodes them itself."""
MAPPED = ("lfm2", "qwen35", "qwen35moe")


@pytest.fixture(autouse=True)
def quick_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for the same table of names at every module, which takes seconds."""
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))


# -- one tensor


def weight(directory: Path, parts: list[tuple[Type, tuple[int, ...], np.ndarray]], order: Order) -> Checkpoint:
    """A tensor `W` of rows of these parts."""
    path = directory / "m.gguf"
    begin, stored = 0, []
    with path.open("wb") as file:
        for kind, shape, values in parts:
            file.write(values.tobytes())
            tensor = GgufTensor(name=f"p{begin}", shape=shape, dtype=kind.name, begin=begin, nbytes=values.nbytes)
            stored.append(stored_blocks(tensor, path.name))
            begin += values.nbytes
    columns = parts[0][1][-1]
    made = GgufWeight(
        name="W", shape=(len(order.rows), columns), dtype="BF16", file=path.name, begin=0, end=begin, format=Gguf(),
        parts=tuple(stored), tag=parts[0][0].name, tile=columns, decode=decode_blocks, order=order,
    )  # fmt: skip
    return Checkpoint(
        source=resolve_source(str(path), None), tensors={"W": made}, stored={part.name: part for part in stored},
        weight_files=(path.name,),
    )  # fmt: skip


def decoded(kind: Type, values: np.ndarray) -> torch.Tensor:
    """As `load_gguf_checkpoint` decodes."""
    return torch.from_numpy(np.copy(gguf.quants.dequantize(values, kind))).to(torch.bfloat16)


@pytest.mark.parametrize("kind", [*BLOCK_TYPES, *NUMBERS], ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_its_library_does(tmp_path: Path, kind: Type) -> None:
    rng = np.random.default_rng(0)
    shape = (700, 512)  # more than are decoded at a time
    values = random_blocks(rng, kind, shape)
    checkpoint = weight(tmp_path, [(kind, shape, values)], Order(rows=range(700)))
    tensor, expected = checkpoint.tensors["W"], decoded(kind, values)
    assert torch.equal(checkpoint.read(tensor), expected)

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def any_range(data: st.DataObject) -> None:
        begin = data.draw(st.integers(0, tensor.parameters - 1))
        end = data.draw(st.integers(begin + 1, min(begin + 5000, tensor.parameters)))
        assert torch.equal(checkpoint.values(tensor, begin, end), expected.flatten()[begin:end])

    any_range()
    chunks = list(checkpoint.chunks(tensor, 1000))
    assert {len(chunk) for chunk in chunks[:-1]} == {1000}
    assert torch.equal(torch.cat(chunks), expected.flatten())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_of_several_parts_in_any_order(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    kinds = data.draw(st.lists(st.sampled_from([Type.Q8_0, Type.Q4_1, Type.F16]), min_size=3, max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    parts = [(kind, (n, 64), random_blocks(rng, kind, (n, 64))) for n, kind in zip(counts, kinds, strict=False)]
    total = sum(counts)
    first = data.draw(st.integers(0, total - 1))
    rows: Any = data.draw(
        st.one_of(
            st.integers(first + 1, total).map(lambda last: range(first, last)),
            st.lists(st.integers(0, total - 1), min_size=1, max_size=2 * total).map(np.asarray),
        )
    )
    columns = data.draw(st.none() | st.permutations(range(64)).map(np.asarray))
    checkpoint = weight(tmp_path_factory.mktemp("rows"), parts, Order(rows=rows, columns=columns))
    expected = torch.cat([decoded(kind, values) for kind, _, values in parts])[torch.as_tensor(np.asarray(rows))]
    expected = expected if columns is None else expected[:, torch.from_numpy(columns)]
    tensor = checkpoint.tensors["W"]
    assert torch.equal(checkpoint.read(tensor), expected)
    begin = data.draw(st.integers(0, tensor.parameters - 1))
    end = data.draw(st.integers(begin + 1, tensor.parameters))
    assert torch.equal(checkpoint.values(tensor, begin, end), expected.flatten()[begin:end])


def test_rows_in_another_order_are_read_together(tmp_path: Path) -> None:
    """A head's rows lie side by side in the file, whatever their order in it: no read for each."""
    rows = np.arange(128).reshape(2, 32, 2).swapaxes(1, 2).flatten()
    values = random_blocks(np.random.default_rng(0), Type.Q8_0, (128, 64))
    checkpoint = weight(tmp_path, [(Type.Q8_0, (128, 64), values)], Order(rows=rows))
    reads = []

    def read(part: Any, begin: int, end: int) -> torch.Tensor:
        reads.append((begin, end))
        return checkpoint._reader.values(part, begin, end)

    found = checkpoint.tensors["W"].values(64 * 64, 128 * 64, read)  # type: ignore[attr-defined]
    assert reads == [(64 * 68, 128 * 68)]
    assert torch.equal(found.reshape(64, 64), decoded(Type.Q8_0, values)[torch.from_numpy(rows[64:])])


@pytest.mark.parametrize("kind", [Type.Q5_K, Type.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("scattered", [False, True])
def test_reading_takes_the_memory_that_is_told(tmp_path: Path, kind: Type, scattered: bool) -> None:
    shape = (4096, 256)
    rows: Any = np.arange(4096).reshape(64, 32, 2).swapaxes(1, 2).flatten() if scattered else range(4096)
    values = random_blocks(np.random.default_rng(0), kind, shape)
    checkpoint = weight(tmp_path, [(kind, shape, values)], Order(rows=rows))
    for elements in (2**15, 2**20):
        assert_memory_is_told(checkpoint, checkpoint.tensors["W"], elements, least=0.5)


def assert_memory_is_told(checkpoint: Checkpoint, tensor: Any, elements: int, *, least: float) -> None:
    """What decoding allocates is no more than what is told, and not much less."""
    numpys = 0

    def decode() -> None:
        nonlocal numpys
        tracemalloc.start()
        try:
            tensor.values(0, elements, checkpoint._reader.values)
            numpys = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    decode()  # tables of the library are made once
    peak = measured_peak(decode) + numpys
    told = 2 * elements + tensor.reading_bytes(elements)
    assert least * told < peak <= told, (peak / elements, told / elements)


# -- whole models


def opened(path: Path) -> Checkpoint:
    return open_gguf(read_gguf(resolve_source(str(path), None)))


def types_of(name: str) -> list[Type]:
    """The types that the reference can load."""
    return [kind for kind in BLOCK_TYPES if name not in MAPPED or kind not in UNKNOWN]


def reference(source: Path, output: Path, strategy: str, name: str) -> None:
    """What the libraries make of the file, or of a decoded copy: they can't decode and quantise in one call."""
    arguments: dict[str, Any] = {"gguf_file": "m.gguf", "quantization_config": GgufConfig(dequantize=True)}
    if strategy == "standard":
        run_reference(source, output, strategy=strategy, tokenizer_size=VOCABULARY + 1, **arguments)
        return
    copy = source / "copy"
    if not copy.exists():
        run_reference(source, copy, strategy="standard", tokenizer_size=0, **arguments)
    targets = TARGETS.get(name, REFERENCE_TARGETS)
    run_reference(copy, output, strategy=strategy, tokenizer_size=VOCABULARY + 1, targets=targets)


@pytest.mark.parametrize("name", list(TINY))
def test_every_architecture_is_loaded_as_transformers_does(
    ftload: Ftload, llama: Path, tmp_path: Path, name: str
) -> None:
    write_tiny(tmp_path / "m.gguf", name, tokens=144, types=types_of(name))
    words = ["--model", tmp_path / "m.gguf", "--tokenizer_name_or_path", llama, "--output_dir", tmp_path / "out"]
    result = ftload("prepare", *words)
    assert result.code == 0, result.err
    reference(tmp_path, tmp_path / "reference", "standard", name)
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")
    pad = json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"]
    for file in ("config.json", "generation_config.json"):
        assert_same_json(tmp_path / "out" / file, tmp_path / "reference" / file, pad_token_id=pad)


FLAGS = {
    "standard": [],
    "lora": ["--use_lora", "--base", "copy"],
    "qlora": ["--use_qlora", "--min_quantized", "0"],
}


@pytest.mark.parametrize(
    ("name", "tied", "rows"),
    [
        ("llama", False, 128),
        ("llama", True, 128),
        ("qwen3_moe", False, 128),
        ("qwen2", False, 144),
        ("qwen35", True, 128),
    ],
)
def test_every_strategy_equals_the_reference(ftload: Ftload, tmp_path: Path, name: str, tied: bool, rows: int) -> None:
    source, tokenizer = tmp_path / "source", tmp_path / "tokenizer"
    source.mkdir()
    tokenizer.mkdir()
    write_tiny(source / "m.gguf", name, tokens=rows, tied=tied, types=types_of(name), seed=1)
    write_llama(tokenizer, vocab_size=VOCABULARY)
    for strategy, flags in FLAGS.items():
        out, theirs = tmp_path / strategy, tmp_path / f"reference-{strategy}"
        words = ["--model", source / "m.gguf", "--tokenizer_name_or_path", tokenizer, "--output_dir", out]
        result = ftload("prepare", *words, "--lora_rank", "8", "--embedding_init", "reference", *flags)
        assert result.code == 0, result.err
        reference(source, theirs, strategy, name)
        assert_same_tensors(out, theirs)
        for file in ("config.json", "generation_config.json"):
            assert_same_json(out / file, theirs / file, pad_token_id=VOCABULARY)
        if strategy != "standard":
            assert_same_tensors(out / "adapter", theirs / "adapter")
            assert_same_adapter_config(out / "adapter", theirs / "adapter")


@pytest.mark.parametrize("name", ["llama", "stablelm", "gemma4", "minimax_m2"])
def test_the_configuration_is_that_of_the_usual_reader(tmp_path: Path, name: str) -> None:
    write_tiny(tmp_path / "m.gguf", name, tokens=144, types=[Type.Q8_0])
    expected, _ = PretrainedConfig.get_config_dict(tmp_path, gguf_file="m.gguf")
    usual = gguf.GGUFReader
    with quick_gguf_reader():
        assert gguf.GGUFReader is not usual
        found, _ = PretrainedConfig.get_config_dict(tmp_path, gguf_file="m.gguf")
    assert gguf.GGUFReader is usual
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


def test_short_arrays_are_kept(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "lfm2", tokens=144, types=[Type.Q8_0])
    metadata = read_gguf_header(tmp_path / "m.gguf").metadata
    assert metadata["lfm2.attention.head_count_kv"] == [0, 2]
    assert len(metadata["tokenizer.ggml.tokens"]) == 144


def test_a_type_that_transformers_refuses_is_decoded_by_the_package(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "lfm2", tokens=144, types=[Type.Q5_0])
    checkpoint = opened(tmp_path / "m.gguf")
    (raw,) = [t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight"]
    assert raw.tensor_type is Type.Q5_0
    found = checkpoint.read(checkpoint.tensors["model.layers.0.feed_forward.w3.weight"])
    assert torch.equal(found, decoded(Type.Q5_0, raw.data))


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
        ("bloom", "transformer.h.0.self_attention.query_key_value.weight"),
        ("mamba", "backbone.layers.0.mixer.A_log"),
    ],
)
def test_what_is_made_as_a_whole_tells_its_memory(tmp_path: Path, name: str, parameter: str) -> None:
    write_tiny(tmp_path / "m.gguf", name, tokens=144)
    checkpoint = opened(tmp_path / "m.gguf")
    tensor = checkpoint.tensors[parameter]
    assert tensor.tile == tensor.parameters  # type: ignore[attr-defined]
    assert_memory_is_told(checkpoint, tensor, tensor.parameters, least=0.1)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "qwen35moe", "gemma3"])
def test_rows_are_read_in_pieces(tmp_path: Path, name: str) -> None:
    """Only vectors, and what is as small, are made as a whole; a tensor of experts is divided before it is read."""
    write_tiny(tmp_path / "m.gguf", name, tokens=144, types=types_of(name))
    whole = [tensor for tensor in opened(tmp_path / "m.gguf").packed if tensor.tile > tensor.shape[-1]]
    assert max((tensor.parameters for tensor in whole), default=0) < 10_000


def test_plan_reads_the_header_alone(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_tiny(path, "llama", tokens=8192, types=[Type.F32])
    forget(path)
    words = ["--model", path, "--tokenizer_name_or_path", llama]
    planned = ftload("plan", *words, "--json")
    assert planned.code == 0, planned.err
    assert cached_bytes(path) < path.stat().st_size / 5  # the system reads ahead of what is read
    result = ftload("prepare", *words, "--output_dir", tmp_path / "out", "--json")
    assert result.code == 0
    plan, report = json.loads(planned.out), json.loads(result.out)
    for section in ("parameters", "embeddings", "decisions", "source", "warnings"):
        assert plan[section] == report[section], section
    sizes = {file["path"]: file["bytes"] for file in report["files"]}
    assert {file["path"]: sizes[file["path"]] for file in plan["files"]} == {
        file["path"]: file["bytes"] for file in plan["files"]
    }


def test_the_report_tells_of_the_file_and_its_types(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_tiny(path, "llama", tokens=144, tied=True, types=[Type.Q4_K])
    words = ["prepare", "--model", path, "--tokenizer_name_or_path", llama, "--output_dir", tmp_path / "out", "--json"]
    report = json.loads(ftload(*words).out)
    assert report["source"]["kind"] == "gguf"
    assert report["source"]["files"] == [{"path": "m.gguf", "bytes": path.stat().st_size, "sha256": None}]
    stored = {(row["component"], row["format"], row["dtype"]): row for row in report["source"]["stored"]}
    layers = 2 * 3 * 256 * 512
    assert stored["mlp", "GGUF", "Q4_K"] == {
        "component": "mlp", "format": "GGUF", "dtype": "Q4_K", "tensors": 6, "parameters": layers,
        "bytes": layers // 256 * 144,
    }  # fmt: skip
    assert stored["norm", "GGUF", "F32"]["tensors"] == 5
    again = ftload(*words)
    assert again.code == 0
    assert "up to date" in again.err or json.loads(again.out)["created"] == report["created"]
    refused = ftload(*words[:-2], tmp_path / "other", "--use_lora", "--base", "reference")
    assert refused.code == 2
    assert "the original can't serve as the base: its weights are stored as GGUF" in refused.err


def test_little_memory_suffices(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "qwen3_moe", tokens=144)
    for strategy, flags in FLAGS.items():
        words = ["--model", tmp_path / "m.gguf", "--tokenizer_name_or_path", llama, "--max_memory", "64MB", *flags]
        assert ftload("prepare", *words, "--output_dir", tmp_path / strategy).code == 0
