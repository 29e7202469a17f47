"""Which fused experts a checkpoint's files hold in 4 bits: from their headers and the states' few bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..checkpoint.formats.interface import Headers
from ..checkpoint.formats.nf4 import ANY_STATE, BLOCK, NESTED_BLOCK, Bitsandbytes4Bit, Packed4Bit
from ..checkpoint.safetensors_header import read_header
from ..checkpoint.tensors import TensorMeta
from ..errors import CheckpointError
from ..model.experts.fused import FusedExperts
from ..source.source import Source


def stored_experts(
    files: Iterable[str | Path], experts: Sequence[FusedExperts], leads_to: Callable[[str], str]
) -> dict[str, Packed4Bit]:
    """The fused parameters that are stored in 4 bits, by the model's name of each.

    `leads_to` gives the parameter that a stored name leads to by transformers' own conversions.

    Raises `CheckpointError` for one that is not as the model needs it, for one that is stored in another way as well,
    and for a layer that is 4-bit in part.
    """
    by_directory: dict[Path, dict[str, TensorMeta]] = {}
    for file in map(Path, files):
        if file.suffix == ".safetensors":
            by_directory.setdefault(file.parent, {}).update(_tensors_of(file))
    found = {}
    for directory, tensors in by_directory.items():
        here = _find(directory, tensors, experts)
        parts = {part.name for packed in here.values() for part in packed.parts}
        for name in tensors if here else ():
            if name not in parts and (parameter := leads_to(name)) in here:
                raise CheckpointError(f"`{parameter}` is stored in 4 bits, and `{name}` is a part of it as well")
        found |= here
    for one in experts:
        halves = [other for other in experts if other.module == one.module]
        if one.parameter in found and not all(other.parameter in found for other in halves):
            missing = next(other.parameter for other in halves if other.parameter not in found)
            raise CheckpointError(
                f"`{one.parameter}` is stored in 4 bits, and `{missing}` is not: experts are 4-bit as a whole"
            )
    return found


def _tensors_of(file: Path) -> dict[str, TensorMeta]:
    with file.open("rb") as opened:

        def read(begin: int, end: int) -> bytes:
            opened.seek(begin)
            return opened.read(end - begin)

        return {tensor.name: tensor for tensor in read_header(file.name, file.stat().st_size, read)}


def _find(directory: Path, tensors: Mapping[str, TensorMeta], experts: Sequence[FusedExperts]) -> dict[str, Packed4Bit]:
    """A stored name may have a prefix more than the model's: that of a head, where the model is loaded without one."""
    of_model = {one.parameter: one for one in experts}
    named = {}
    for state in tensors:
        stored, is_state, _ = state.partition(ANY_STATE)
        if is_state:
            parts = stored.split(".")
            tails = (".".join(parts[index:]) for index in range(len(parts)))
            name = next((tail for tail in tails if tail in of_model), None)
            if name is not None:
                named[stored] = of_model[name]
    if not named:
        return {}
    source = Source(model=str(directory), kind="local", revision=None, commit=None, root=directory, files=())
    parts = {name: meta for name, meta in tensors.items() if any(name.startswith(stored) for stored in named)}
    found = {}
    for packed in Bitsandbytes4Bit().find(Headers(source=source, tensors=parts), strict=True):
        fused = named[packed.name]
        _check(packed, fused)
        found[fused.parameter] = packed
    return found


def _check(packed: Packed4Bit, fused: FusedExperts) -> None:
    if packed.shape != fused.shape:
        raise CheckpointError(
            f"`{packed.name}` of `{packed.file}` is a 4-bit {packed.shape}, and the model's is {fused.shape}"
        )
    if packed.state.block_size != BLOCK or packed.state.nested_block_size not in (None, NESTED_BLOCK):
        raise CheckpointError(
            f"`{packed.name}` of `{packed.file}` has blocks of {packed.state.block_size} weights, and not of {BLOCK}"
        )
