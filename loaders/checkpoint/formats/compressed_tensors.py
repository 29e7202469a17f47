"""Weights of compressed-tensors, as llm-compressor writes them: FP8, and integers of one to eight bits, packed or not.

config.json's `quantization_config` divides the modules into `config_groups`. A module `X` of a group is stored as

- `X.weight` (float8_e4m3fn or int8, (out, in)), or `X.weight_packed` (int32, (out, ceil(in · bits / 32)), the first
  weight in the lowest bits) with `X.weight_shape` (int64 or int32, (2,));
- `X.weight_scale` (bfloat16, float16 or float32): (1,) by the strategy `tensor`, (out, 1) by `channel`,
  (out, in / group_size) by `group`, (ceil(out / height), ceil(in / width)) by `block`;
- `X.weight_zero_point` (int8, as the scale), unless the group is symmetric. Beside packed weights, those of the
  strategies `channel` and `group` are packed too, down the rows: (ceil(out · bits / 32), …) of int32.

A value is (weight - zero point) · scale, in the scale's dtype. Source: the package `compressed-tensors` 0.20, whose
functions decode here (`compressors/pack_quantized`, `compressors/naive_quantized`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, MissingRequirementError
from ...system.versions import installed_version
from ..compressed_schemes import Scheme, read_groups, scheme_of
from ..finite import all_finite
from ..tensors import ITEM_BYTES, TORCH_NAMES, TensorMeta
from .interface import Headers, PackedTensor, Read

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

WORD = 32
"""Bits that are packed into one element."""
_WEIGHT_PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
)  # fmt: skip
_ACTIVATIONS = re.compile(r"(input|output|q|k|v)_(scale|zero_point|global_scale)")
"""How activations and caches of keys and values were quantised: no weights, and transformers drops them too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedWeight(PackedTensor):
    """A weight, its scale, and perhaps its zero point."""

    scheme: Scheme
    scale: TensorMeta
    zero_point: TensorMeta | None

    def reading_bytes(self, elements: int) -> int:
        """Codes as they are stored and as numbers of the scale's dtype; what unpacking and padding take; scales."""
        elements, size = min(max(elements, self.tile), self.parameters), ITEM_BYTES[self.dtype]
        codes = elements * self.parts[0].nbytes // self.parameters
        scales = elements * self.scale.parameters // self.parameters
        if self.zero_point is not None:
            scales += WORD * self.scale.parameters // self.shape[0]
        work = size * elements
        if self.scheme.is_packed:  # to int8; in any width but 4 and 8 bits, through words of 32
            work = max(work + elements, 0 if self.scheme.bits in (4, 8) else (10 - size) * elements)
        elif self.scheme.is_float:  # through indices of 32 bits
            work = max(work if self.zero_point is None else 2 * work, 4 * elements)
        if self.scheme.block is not None:  # padded to whole blocks
            sides = zip((elements // self.shape[1], self.shape[1]), self.scheme.block, strict=True)
            rows, columns = (-(-side // min(side, edge)) * min(side, edge) for side, edge in sides)
            work = max(work, 2 * size * rows * columns if rows * columns > elements else 0)
        if self.zero_point is None:
            return codes + work + scales * 2 * size + 4096
        return max(codes + work + scales * (3 * size + 2), scales * (12 + size)) + 4096

    @property
    def stored_bytes(self) -> int:
        """Size of all that makes up the weight; scales of activations are no part of it."""
        return sum(part.nbytes for part in self.parts if not _ACTIVATIONS.fullmatch(part.name.rpartition(".")[2]))

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode whole rows with the package's own functions, in the scale's dtype.

        Raises `CheckpointError` for scales that are not finite.
        """
        import torch
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        if begin >= end:
            return torch.empty(0, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        columns = self.shape[1]
        first, last = begin // columns, -(-end // columns)
        scheme, weight = self.scheme, self.parts[0]
        scale = self._of_rows(self.scale, first, last, read)
        if not all_finite(scale):
            raise CheckpointError(f"tensor `{self.scale.name}` of `{self.scale.file}` holds NaN or infinity")
        zero_point = None
        if self.zero_point is not None and scheme.packs_zero_points:
            whole = first // WORD * WORD  # a row that begins with a word
            width = self.zero_point.shape[1]
            words = read(self.zero_point, whole * scheme.bits // WORD * width, -(-last * scheme.bits // WORD) * width)
            # the package turns them itself for `packed_dim=0`, and fails where one word holds all rows (0.20)
            words = words.view(-1, width).T.clone(memory_format=torch.contiguous_format)
            zero_point = _unpack(words, scheme.bits, last - whole).T[first - whole :]
        elif self.zero_point is not None:
            zero_point = self._of_rows(self.zero_point, first, last, read)
        width = weight.shape[1]
        codes = read(weight, first * width, last * width).view(-1, width)
        if scheme.is_packed:
            codes = _unpack(codes, scheme.bits, columns)
        elif scheme.is_float:  # a lookup takes a quarter of the time of torch's cast
            numbers = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(scale.dtype)
            codes = numbers.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)
        if scheme.block is not None:  # it would pad the rows and columns to whole blocks
            height, width = scheme.block
            scheme = replace(scheme, block=(min(height, last - first), min(width, columns)))
        return dequantize(x_q=codes, scale=scale, zero_point=zero_point, args=_arguments(scheme)).flatten()

    def _of_rows(self, part: TensorMeta, first: int, last: int, read: Read) -> Tensor:
        """What `part`, of the scale's shape, holds for the rows from `first` to `last` (exclusive)."""
        if self.scheme.strategy == "tensor":
            return read(part, 0, 1).reshape(part.shape)
        height = 1 if self.scheme.block is None else self.scheme.block[0]
        width = part.shape[1]
        return read(part, first // height * width, -(-last // height) * width).view(-1, width)


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The numbers (int8, rows × columns) that rows of words (int32) hold."""
    import torch
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    if bits == 8:  # whole bytes, for which the package takes ten times as long
        return (words.view(torch.uint8) ^ 128).view(torch.int8)[:, :columns]
    return unpack_from_int32(words, bits, torch.Size((len(words), columns)))


@cache
def _arguments(scheme: Scheme) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs.model_validate(
        {
            "num_bits": scheme.bits,
            "type": "float" if scheme.is_float else "int",
            "symmetric": scheme.symmetric,
            "strategy": scheme.strategy,
            "group_size": scheme.group_size,
            "block_structure": None if scheme.block is None else list(scheme.block),
        }
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedTensors:
    """The formats of compressed-tensors that its package decodes row by row."""

    name: str = "compressed-tensors"
    method: str = "compressed-tensors"
    kind: str = "compressed"

    def find(self, headers: Headers, *, strict: bool) -> Iterator[CompressedWeight]:
        """Compressed weights. Reads the shapes of packed ones, 16 bytes each.

        If `strict`, raises `CheckpointError` for settings that are not known or contradict the tensors, and for parts
        that are missing, left over, or of another shape or dtype; `MissingRequirementError` without the package. Else
        what can't be decoded is left as it is stored.
        """
        if headers.section.get("quant_method") != self.method:
            return
        try:
            groups = read_groups(headers.section, headers.source.model)
        except CheckpointError:
            if strict:
                raise
            return
        if strict:
            _require_package()
        modules, activations = _by_module(headers.tensors)
        beside = _beside(modules, activations)
        schemes = {module: scheme_of(module, groups) for module in modules}
        shapes = _read_shapes(headers, modules, schemes)
        for module, parts in modules.items():
            try:
                weight = _weight_of(self, module, parts, schemes[module], shapes.get(module), beside.get(module, ()))
            except CheckpointError:
                if strict:
                    raise
                continue
            yield weight

    def claims(self, section: Mapping[str, Any], *, found: bool) -> bool:
        """Whatever says so: that its format is known, `find` has seen."""
        return section.get("quant_method") == self.method

    def kept_settings(self, section: Mapping[str, Any]) -> None:
        """Nothing: they are decoded."""
        return


_LEAST_VERSION = "0.20"
"""Before, widths that do not divide a word were packed otherwise."""


def _require_package() -> None:
    """Raise `MissingRequirementError` unless `compressed-tensors` can decode what `find` finds."""
    from packaging.version import Version

    found = installed_version("compressed-tensors")
    if found is None or Version(found) < Version(_LEAST_VERSION):
        raise MissingRequirementError(
            f"reading compressed-tensors needs the `compressed-tensors` package, {_LEAST_VERSION} or later"
            + ("" if found is None else f": {found} is installed"),
            hint="pip install 'ftload[compressed-tensors]'",
        )


def _by_module(
    tensors: Mapping[str, TensorMeta],
) -> tuple[dict[str, dict[str, TensorMeta]], list[tuple[str, TensorMeta]]]:
    """The parts of each module with compressed weights, and what describes activations, with its module."""
    modules: dict[str, dict[str, TensorMeta]] = {}
    activations: list[tuple[str, TensorMeta]] = []
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _WEIGHT_PARTS or (part == "weight" and tensor.dtype in ("F8_E4M3", "I8")):
            modules.setdefault(module, {})[part] = tensor
        elif _ACTIVATIONS.fullmatch(part):
            activations.append((module, tensor))
    for module, parts in modules.items():
        weight = tensors.get(f"{module}.weight")
        if weight is not None:
            parts["weight"] = weight
        modules[module] = dict(sorted(parts.items()))  # the weight comes first, in messages too
    return modules, activations


def _beside(
    modules: Mapping[str, object], activations: list[tuple[str, TensorMeta]]
) -> dict[str, tuple[TensorMeta, ...]]:
    """What describes activations, by the module with a weight that it goes with: its own, or the nearest."""
    nearest: dict[str, str] = {}
    for module in modules:
        above = module
        while above not in nearest:
            nearest[above] = module
            above = above.rpartition(".")[0]
    found: dict[str, tuple[TensorMeta, ...]] = {}
    for module, tensor in activations if nearest else ():
        while module not in nearest:
            module = module.rpartition(".")[0]
        found[nearest[module]] = (*found.get(nearest[module], ()), tensor)
    return found


def _read_shapes(
    headers: Headers, modules: Mapping[str, Mapping[str, TensorMeta]], schemes: Mapping[str, Scheme | None]
) -> dict[str, tuple[int, int]]:
    """What `weight_shape` says, by module.

    Of a hub, where each is a request of its own, they are not read where groups tell the shape: Kimi K2 has 69,000.
    """
    stored = {}
    for module, parts in modules.items():
        scheme, shape = schemes[module], parts.get("weight_shape")
        told = headers.source.kind == "hub" and scheme is not None and scheme.group_size is not None
        if shape is not None and shape.shape == (2,) and shape.dtype in _SHAPE_CODES and not told:
            stored[module] = shape
    read = headers.read(list(stored.values()))
    return {
        module: struct.unpack(_SHAPE_CODES[shape.dtype], data)
        for (module, shape), data in zip(stored.items(), read, strict=True)
    }


_SHAPE_CODES = {"I64": "<2q", "I32": "<2i"}


def _weight_of(
    form: CompressedTensors,
    module: str,
    parts: Mapping[str, TensorMeta],
    scheme: Scheme | None,
    shape: tuple[int, int] | None,
    beside: tuple[TensorMeta, ...],
) -> CompressedWeight:
    """Put a weight together. Raises `CheckpointError` unless its parts are those of `scheme`, in their shapes."""
    if scheme is None:
        name = next(iter(parts.values())).name
        raise CheckpointError(f"tensor `{name}` is compressed, but no group of config.json's `config_groups` means it")
    needed = ["weight_packed", "weight_shape"] if scheme.is_packed else ["weight"]
    needed.append("weight_scale")
    for part, tensor in parts.items():
        if part not in (*needed, "weight_zero_point"):
            raise CheckpointError(
                f"tensor `{tensor.name}` of `{tensor.file}` is no part of `{scheme.format}`, as which config.json says "
                f"that `{module}` is stored"
            )
    if not scheme.symmetric:
        needed.append("weight_zero_point")
    for part in needed:
        if part not in parts:
            raise CheckpointError(f"tensor `{module}.{part}` is missing: `{next(iter(parts.values())).name}` needs it")
    weight, scale, zero_point = parts[needed[0]], parts["weight_scale"], parts.get("weight_zero_point")
    if scheme.is_packed:
        _check(parts["weight_shape"], tuple(_SHAPE_CODES), (2,))
    _check(weight, ("I32",) if scheme.is_packed else ("F8_E4M3",) if scheme.is_float else ("I8",))
    if len(weight.shape) != 2 or not weight.parameters:
        raise CheckpointError(
            f"tensor `{weight.name}` of `{weight.file}` has the shape {list(weight.shape)}: no matrix"
        )
    rows, columns = weight.shape
    if scheme.is_packed:
        if shape is None:
            groups = scale.shape[-1] if scale.shape else 0
            shape = rows, groups * (scheme.group_size or 0)
        rows, columns = shape
        if rows < 1 or columns < 1 or weight.shape != (rows, -(-columns * scheme.bits // WORD)):
            raise CheckpointError(
                f"tensor `{weight.name}` of `{weight.file}` is {list(weight.shape)}: {scheme.bits} bits of "
                f"{list(shape)} weights, which `{module}.weight_shape` tells of, do not take that"
            )
    if scheme.group_size is not None and columns % scheme.group_size:
        raise CheckpointError(
            f"tensor `{weight.name}` of `{weight.file}` has {columns} columns, which groups of {scheme.group_size} do "
            "not divide"
        )
    _check(scale, ("BF16", "F16", "F32"), *scheme.scale_shapes(rows, columns))
    if zero_point is not None and scheme.packs_zero_points:
        _check(zero_point, ("I32",), (-(-rows * scheme.bits // WORD), scale.shape[1]))
    elif zero_point is not None:
        _check(zero_point, ("I8", "F8_E4M3") if scheme.is_float else ("I8",), scale.shape)
    return CompressedWeight(
        name=f"{module}.weight", shape=(rows, columns), dtype=scale.dtype, file=weight.file, begin=weight.begin,
        end=weight.end, format=form, tag=scheme.tag, tile=columns * (scheme.block[0] if scheme.block else 1),
        parts=(weight, *(tensor for tensor in parts.values() if tensor is not weight), *beside),
        scheme=scheme, scale=scale, zero_point=zero_point,
    )  # fmt: skip


def _check(tensor: TensorMeta, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
    """Raise `CheckpointError` unless the tensor has one of the dtypes and, where there are any, one of the shapes."""
    if tensor.dtype not in dtypes or (shapes and tensor.shape not in shapes):
        shape = f" {list(shapes[0])}" if shapes else ""
        raise CheckpointError(
            f"tensor `{tensor.name}` of `{tensor.file}` is {tensor.dtype} {list(tensor.shape)}, where "
            f"{' or '.join(dtypes)}{shape} is needed",
            hint="config.json and the weights must belong together",
        )
