"""Whatever header ftload takes, the safetensors library takes too: files are copied whole, for others to read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors
from ftload.loaders.checkpoint.safetensors_header import read_header
from ftload.loaders.errors import CheckpointError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cases import dump, joined, spoilt_bytes, spoilt_json

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "U8", "shape": [0, 7], "data_offsets": [32, 32]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
DATA = bytes(range(40))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        header, _ = draw(spoilt_json(HEADER))
        return joined(dump(header), DATA)
    content = joined(dump(HEADER), DATA)
    return draw(spoilt_bytes(content, len(content)))[0]


def described(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """What ftload makes of a file."""
    tensors = read_header("file", len(content), lambda begin, end: content[begin:end])
    return {tensor.name: (tensor.dtype, list(tensor.shape), content[tensor.begin : tensor.end]) for tensor in tensors}


def test_what_is_taken_is_what_safetensors_reads() -> None:
    taken = refused = 0

    @settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(files())
    def compare(content: bytes) -> None:
        nonlocal taken, refused
        try:
            found = described(content)
        except CheckpointError as error:
            assert "`file`" in error.message
            refused += 1
            return
        read = {
            name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in safetensors.deserialize(content)
        }
        assert found == read
        taken += 1

    compare()
    assert taken > 50, taken  # 210 of 3000, when this was written
    assert refused > 50, refused


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps({**HEADER, "__metadata__": 3}).encode(),
        json.dumps({**HEADER, "__metadata__": {"format": 3}}).encode(),
        json.dumps({**HEADER, "__metadata__": {"format": "\ud800"}}).encode(),
        json.dumps({**HEADER, "a": {**HEADER["a"], "more": float("nan")}}).encode(),
        json.dumps({**HEADER, "a": {**HEADER["a"], "more": float("inf")}}).encode(),
        json.dumps({**HEADER, "scalar": {**HEADER["scalar"], "shape": {}}}).encode(),
        json.dumps(HEADER).encode("utf-16"),
        json.dumps(HEADER).replace('"__meta', '"\\ud800": {}, "__meta').encode(),
    ],
)
def test_a_header_that_python_alone_would_read(raw: bytes) -> None:
    content: Any = joined(raw, DATA)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    with pytest.raises(CheckpointError):
        described(content)
