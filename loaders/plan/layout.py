"""Where each tensor of a safetensors file lies, decided before its data exist.

Tensors are ordered as the safetensors library orders them (largest dtype first, then by name), so a file of fixed
sizes is byte for byte what the library writes. The JSON states of 4-bit weights have a length that depends on the data:
they come first, and what they leave unused is padding of the header, so that everything else, and the size of the
file, stays put.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..steps.step import OutputTensor

METADATA = {"format": "pt"}
"""What transformers writes, and asks for on loading."""


# the order of the `Dtype` enum in the safetensors library, by which it sorts
_DTYPE_RANK = {
    code: rank
    for rank, code in enumerate(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32",
         "F64", "I64", "U64")
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The places of a file's tensors, in bytes from its start."""

    variable: tuple[OutputTensor, ...]
    fixed: tuple[OutputTensor, ...]
    fixed_begin: int
    """Where the data of fixed size begin; everything before is the header and the variable tensors."""
    size: int
    """Of the whole file."""

    def offsets(self) -> dict[str, int]:
        """The first byte of each fixed tensor."""
        result = {}
        position = self.fixed_begin
        for tensor in self.fixed:
            result[tensor.name] = position
            position += tensor.nbytes
        return result

    def head(self, states: Mapping[str, bytes]) -> bytes:
        """Everything before the fixed tensors: length, padded header, and the variable tensors' bytes."""
        entries = _entries(self.variable, self.fixed, {name: len(state) for name, state in states.items()})
        data = b"".join(states[tensor.name] for tensor in self.variable)
        length = self.fixed_begin - 8 - len(data)
        return length.to_bytes(8, "little") + entries.ljust(length) + data


def lay_out(tensors: Iterable[OutputTensor]) -> Layout:
    """Place the tensors of one file."""
    ordered = sorted(tensors, key=lambda tensor: (-_DTYPE_RANK[tensor.dtype], tensor.name))
    variable = tuple(tensor for tensor in ordered if tensor.variable)
    fixed = tuple(tensor for tensor in ordered if not tensor.variable)
    reserved = {tensor.name: tensor.nbytes for tensor in variable}
    longest = 8 + len(_entries(variable, fixed, reserved)) + sum(reserved.values())
    fixed_begin = -(-longest // 8) * 8
    return Layout(
        variable=variable,
        fixed=fixed,
        fixed_begin=fixed_begin,
        size=fixed_begin + sum(tensor.nbytes for tensor in fixed),
    )


def _entries(variable: tuple[OutputTensor, ...], fixed: tuple[OutputTensor, ...], lengths: Mapping[str, int]) -> bytes:
    header: dict[str, object] = {"__metadata__": METADATA}
    position = 0
    for tensor in (*variable, *fixed):
        length = lengths.get(tensor.name, tensor.nbytes)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": [length] if tensor.variable else list(tensor.shape),
            "data_offsets": [position, position + length],
        }
        position += length
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
