"""8-bit weights of bitsandbytes (LLM.int8): how they are stored and decoded.

A weight `X.weight` (int8, (out_features, in_features)) has a scale a row, `X.SCB` (float32, (out_features,)), the
largest magnitude of the row, and `X.weight_format` (uint8, ()), 0 for rows. A value is `code · scale / 127`. Sources:
LLM.int8, arXiv:2208.07339, section 2; bitsandbytes' `Linear8bitLt` for the layout, `int8_vectorwise_dequant` for the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ..tensors import TensorMeta
from .interface import Headers, PackedTensor, Read

if TYPE_CHECKING:
    from torch import Tensor

_SCALES, _WEIGHT, _FORMAT = ".SCB", ".weight", ".weight_format"


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed8Bit(PackedTensor):
    """A weight in 8 bits, with a scale a row."""

    def reading_bytes(self, elements: int) -> int:
        """Codes, and their product with the scales in float32, twice."""
        return 9 * min(max(elements, self.tile), self.parameters)

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode as bitsandbytes does, in float32. Raises `CheckpointError` for scales that are not finite."""
        scales = read(self.parts[1], begin // self.tile, -(-end // self.tile))
        if not scales.isfinite().all():
            raise CheckpointError(f"tensor `{self.parts[1].name}` of `{self.parts[1].file}` holds NaN or infinity")
        codes = read(self.parts[0], begin, end).view(-1, self.tile)
        return (codes * scales[:, None]).mul_(_SCALE).bfloat16().flatten()


_SCALE = 7.874015718698502e-3
"""bitsandbytes' 1/127."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bitsandbytes8Bit:
    """LLM.int8, to be shown or decoded."""

    name: str = "bitsandbytes LLM.int8"
    method: str = "bitsandbytes"
    kind: str = "8-bit"

    def find(self, headers: Headers, *, strict: bool) -> Iterator[Packed8Bit]:
        """8-bit weights.

        Raises `CheckpointError` for scales that are missing, of another size or dtype, or of no weight; if `strict`,
        also for weights that are not to be decoded and for another order than that of rows.
        """
        if headers.section.get("quant_method", self.method) != self.method or not headers.section.get("load_in_8bit"):
            return
        for name, scales in headers.tensors.items():
            if strict and name.endswith(_FORMAT) and name.removesuffix(_FORMAT) + _SCALES not in headers.tensors:
                raise CheckpointError(f"tensor `{name.removesuffix(_FORMAT)}{_SCALES}` of an 8-bit weight is missing")
            if not name.endswith(_SCALES):
                continue
            layer = name.removesuffix(_SCALES)
            codes = headers.tensors.get(layer + _WEIGHT)
            if codes is None or codes.dtype != "I8" or len(codes.shape) != 2:
                raise CheckpointError(f"tensor `{name}` of `{scales.file}` has no 8-bit weight `{layer}{_WEIGHT}`")
            if scales.dtype != "F32" or scales.shape != codes.shape[:1]:
                raise CheckpointError(
                    f"tensor `{name}` of `{scales.file}` is {scales.dtype} {list(scales.shape)}, where `{codes.name}` "
                    f"needs F32 {list(codes.shape[:1])}"
                )
            order = headers.tensors.get(layer + _FORMAT)
            if strict:
                _check_decodable(headers, codes, order)
            yield Packed8Bit(
                name=codes.name, shape=codes.shape, dtype="BF16", file=codes.file, begin=codes.begin, end=codes.end,
                format=self, parts=(codes, scales) if order is None else (codes, scales, order), tag="int8",
                tile=codes.shape[1], as_linear=True,
            )  # fmt: skip

    def claims(self, section: Mapping[str, Any], *, found: bool) -> bool:
        """8 bits."""
        return found and bool(section.get("load_in_8bit"))

    def kept_settings(self, section: Mapping[str, Any]) -> None:
        """Nothing: they are decoded."""
        return


def _check_decodable(headers: Headers, codes: TensorMeta, order: TensorMeta | None) -> None:
    if not headers.dequantize:
        raise CheckpointError(
            f"tensor `{codes.name}` is stored in 8 bits (LLM.int8), which nothing that is written keeps",
            hint="decode it with --dequantize, or start from the 16-bit model",
        )
    if order is not None and any(headers.read([order])[0]):
        raise CheckpointError(
            f"tensor `{order.name}` of `{order.file}` tells of another order than that of rows",
            hint="save it again with a bitsandbytes of this year, or start from the 16-bit model",
        )
