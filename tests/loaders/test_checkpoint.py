"""Headers are read exactly, and anything that does not add up is refused by name."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ftload.loaders.checkpoint.json_files import fetch_config
from ftload.loaders.checkpoint.pickles import read_pickle
from ftload.loaders.checkpoint.safetensors_header import read_header
from ftload.loaders.errors import CheckpointError, SourceError
from ftload.loaders.source.resolve import resolve_source
from safetensors.torch import save_file


def _open(directory: Path, *, allow_pickle: bool = False) -> Checkpoint:
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text("{}")
    return open_checkpoint(resolve_source(str(directory), None), allow_pickle=allow_pickle)


def _write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.c": torch.arange(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.empty(0, 7, dtype=torch.float16),
    "ints": torch.arange(6, dtype=torch.int64).reshape(2, 3),
}


def test_headers_and_values_of_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = _open(tmp_path)
    assert {name: (meta.shape, meta.dtype) for name, meta in checkpoint.tensors.items()} == {
        "a": ((3, 4), "F32"),
        "b.c": ((5,), "BF16"),
        "scalar": ((), "F64"),
        "none": ((0, 7), "F16"),
        "ints": ((2, 3), "I64"),
    }
    for name, value in TENSORS.items():
        assert torch.equal(checkpoint.read(checkpoint.tensors[name]), value)
    for buffer in (None, bytearray(20), bytearray(8)):
        chunks = [chunk.clone() for chunk in checkpoint.chunks(checkpoint.tensors["a"], 5, buffer)]
        assert [tuple(chunk.shape) for chunk in chunks] == [(5,), (5,), (2,)]
        assert torch.equal(torch.cat(chunks).reshape(3, 4), TENSORS["a"])


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "x-1.safetensors")
    save_file({"b.c": TENSORS["b.c"]}, tmp_path / "x-2.safetensors")
    index = {"weight_map": {"a": "x-1.safetensors", "b.c": "x-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = _open(tmp_path)
    assert checkpoint.weight_files == ("x-1.safetensors", "x-2.safetensors")
    assert torch.equal(checkpoint.read(checkpoint.tensors["b.c"]), TENSORS["b.c"])
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"`x-2\.safetensors` is listed in .* but missing"):
        _open(tmp_path)
    index["weight_map"]["c"] = "x-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"b.c": TENSORS["b.c"]}, tmp_path / "x-2.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor `c` is not in `x-1\.safetensors`"):
        _open(tmp_path)


def test_a_single_file_wins_over_an_index_as_in_transformers_and_says_so(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    checkpoint = _open(tmp_path)
    assert checkpoint.weight_files == ("model.safetensors",)
    assert checkpoint.warnings == (
        "both `model.safetensors` and `model.safetensors.index.json` are there: the single file is used",
    )


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "d/x.safetensors", "x.txt", 3, None])
def test_an_index_can_not_lead_out_of_the_directory(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="which is not a shard's name"):
        _open(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": ENTRY}, b"1234567", r"`model\.safetensors` is truncated"),
        ({"a": ENTRY}, b"123456789", "has bytes that belong to no tensor"),
        ({"a": {**ENTRY, "shape": [3]}}, b"12345678", r"tensor `a` of shape \[3\] and dtype F32 should take 12 bytes"),
        ({"a": {**ENTRY, "dtype": "F31"}}, b"12345678", "tensor `a` has the unknown dtype `F31`"),
        ({"a": {**ENTRY, "shape": [-2]}}, b"12345678", "the header entry of `a` is malformed"),
        ({"a": {**ENTRY, "shape": [2.0]}}, b"12345678", "is not valid JSON"),
        ({"a": {**ENTRY, "shape": "2"}}, b"12345678", "the header entry of `a` is malformed"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"12345678", "the header entry of `a` is malformed"),
        ({"a": {**ENTRY, "data_offsets": ["0", "8"]}}, b"12345678", "the header entry of `a` is malformed"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, b"12345678", "the header entry of `a` is malformed"),
        ({"a": 3}, b"", "the header entry of `a` is malformed"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"123456789012", "overlap or leave a gap"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [9, 17]}}, b"1" * 17, "overlap or leave a gap"),
        (b'{"a": {}, "a": {}}', b"", "names a key twice"),
        (b"[1]", b"", "is not a JSON object"),
        (b"{", b"", "is not valid JSON"),
        (b"\xff\xff", b"", "is not valid JSON"),
        (b"[" * 100_000, b"", "is not valid JSON"),
    ],
)
def test_a_header_that_does_not_add_up(
    tmp_path: Path, header: dict[str, Any] | bytes, data: bytes, message: str
) -> None:
    _write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        _open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long"),
        (b"1234567", "is 7 bytes long"),
        (struct.pack("<Q", 2**40), "has a header of 1099511627776 bytes"),
        (struct.pack("<Q", 100) + b"{}", "has a header of 100 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        _open(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = _open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    last = max(checkpoint.tensors.values(), key=lambda meta: meta.end)
    with pytest.raises(CheckpointError, match=r"` ends after \d+ bytes, before byte \d+$"):
        checkpoint.read(last)


def test_pickles_need_a_flag_and_plain_tensors(tmp_path: Path) -> None:
    torch.save({"a": TENSORS["a"], "tied": TENSORS["a"]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="has only pickled weights"):
        _open(tmp_path)
    checkpoint = _open(tmp_path, allow_pickle=True)
    assert torch.equal(checkpoint.read(checkpoint.tensors["tied"]), TENSORS["a"])
    torch.save({"a": TENSORS["a"], "path": Path()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"`pytorch_model\.bin` can't be loaded as plain tensors"):
        _open(tmp_path, allow_pickle=True)


def _whole(checkpoint: Checkpoint, name: str, elements: int) -> torch.Tensor:
    """A tensor put together from chunks, each of which but the last has `elements`."""
    meta = checkpoint.tensors[name]
    chunks = [chunk.clone() for chunk in checkpoint.chunks(meta, elements, bytearray(64))]
    assert [len(chunk) for chunk in chunks[:-1]] == [elements] * (len(chunks) - 1)
    return torch.cat(chunks).reshape(meta.shape)


LINE = torch.arange(100, dtype=torch.bfloat16)
VIEWS = {
    "a": TENSORS["a"],
    "shared": TENSORS["a"],
    "transposed": TENSORS["a"].T,
    "part": LINE[10:35],
    "strided": LINE[2::3],
    "repeated": torch.tensor([1.0, 2.0]).expand(3, 2),
    "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
    "parameter": torch.nn.Parameter(TENSORS["a"]),
    "scalar": TENSORS["scalar"],
}


@pytest.mark.parametrize("elements", [1, 5, 7, 1000])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_pickled_tensors_are_read_at_their_places(tmp_path: Path, old: bool, elements: int) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(VIEWS, path, _use_new_zipfile_serialization=not old)
    checkpoint = _open(tmp_path, allow_pickle=True)
    assert checkpoint.loaded.keys() == (VIEWS.keys() if old else set())
    for name, value in VIEWS.items():
        assert torch.equal(_whole(checkpoint, name, elements), value), name
        assert torch.equal(checkpoint.read(checkpoint.tensors[name]), value), name
    if not old:
        raw, meta = path.read_bytes(), checkpoint.tensors["a"]
        assert raw[meta.begin : meta.end] == TENSORS["a"].numpy().tobytes()
        assert checkpoint.tensors["shared"].begin == checkpoint.tensors["transposed"].begin == meta.begin


def test_a_pickle_that_another_tool_packed_anew(tmp_path: Path) -> None:
    torch.save(VIEWS, tmp_path / "torch.bin")
    # the records in another order and place than torch would have given them
    with zipfile.ZipFile(tmp_path / "torch.bin") as old, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as new:
        for info in reversed(old.infolist()):
            new.writestr(info.filename, old.read(info))
    checkpoint = _open(tmp_path, allow_pickle=True)
    for name, value in VIEWS.items():
        assert torch.equal(checkpoint.read(checkpoint.tensors[name]), value), name
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("archive/data.pkl", bytes(1000))
    with pytest.raises(CheckpointError, match=r"`pytorch_model\.bin` is compressed"):
        _open(tmp_path, allow_pickle=True)


def test_a_pickle_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(100_000), "b": torch.ones(100_000)[::2]}, path)
    checkpoint = _open(tmp_path, allow_pickle=True)
    os.truncate(path, 4096)  # memory-mapped, this would be a SIGBUS
    for name in ("a", "b"):
        with pytest.raises(CheckpointError, match=r"` ends after \d+ bytes, before byte \d+$"):
            checkpoint.read(checkpoint.tensors[name])


def test_a_pickle_that_cannot_be_reached_is_no_bad_pickle() -> None:
    class Unreachable(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise SourceError("the hub is gone")

    with pytest.raises(SourceError, match=r"^the hub is gone$"):
        read_pickle(Unreachable(), "pytorch_model.bin")


def test_pickles_in_shards_agree_with_their_index(tmp_path: Path) -> None:
    torch.save({"a": TENSORS["a"]}, tmp_path / "x-1.bin")
    torch.save({"b": LINE}, tmp_path / "x-2.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x-1.bin", "b": "x-2.bin"}}))
    checkpoint = _open(tmp_path, allow_pickle=True)
    assert checkpoint.pickled
    assert torch.equal(checkpoint.read(checkpoint.tensors["b"]), LINE)
    index.write_text(json.dumps({"weight_map": {"a": "x-2.bin", "b": "x-1.bin"}}))
    with pytest.raises(CheckpointError, match=r"tensor `a` is not in `x-2\.bin`"):
        _open(tmp_path, allow_pickle=True)
    torch.save({"a": TENSORS["a"]}, tmp_path / "x-2.bin")
    with pytest.raises(CheckpointError, match=r"tensor `a` is both in `x-1\.bin` and in `x-2\.bin`"):
        _open(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    "state", [{1: LINE}, {"a": LINE.float().to_sparse()}, {"a": LINE.to(torch.complex64)}, [LINE], {"a": {"b": LINE}}]
)
def test_pickles_of_other_things(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"`pytorch_model\.bin`"):
        _open(tmp_path, allow_pickle=True)


def test_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no `config\.json`"):
        fetch_config(resolve_source(str(tmp_path), None))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as raised:
        fetch_config(resolve_source(str(tmp_path), None))
    assert raised.value.hint == "this is an adapter: give the model that it was trained on"
    with pytest.raises(CheckpointError, match="holds no weights"):
        _open(tmp_path)


def test_each_fp8_dtype_has_its_own_name(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -0.25, 6.0])
    tensors = {kind: values.to(getattr(torch, kind)) for kind in ("float8_e4m3fn", "float8_e5m2")}
    tensors["float8_e8m0fnu"] = torch.tensor([1.0, 2.0, 0.5]).to(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(resolve_source(str(tmp_path), None), allow_pickle=False)
    for kind, value in tensors.items():
        found = checkpoint.read(checkpoint.tensors[kind])
        assert found.dtype == value.dtype
        assert torch.equal(found.float(), value.float())


def test_an_empty_tensor_lies_where_another_begins() -> None:
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
            "last": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]},
        }
    ).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(8)
    tensors = read_header("file", len(data), lambda begin, end: data[begin:end])
    begin = 8 + len(header)
    assert [(tensor.name, tensor.begin, tensor.end) for tensor in tensors] == [
        ("a", begin, begin + 8), ("empty", begin, begin), ("last", begin + 8, begin + 8),
    ]  # fmt: skip
