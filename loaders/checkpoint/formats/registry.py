"""All formats that weights are stored in, and what a checkpoint holds once they have been asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import CheckpointError
from ...source.source import Source
from ..tensors import TensorMeta
from .compressed_tensors import CompressedTensors
from .fp8 import FP8
from .interface import Headers, PackedTensor, StoredFormat
from .llm_int8 import Bitsandbytes8Bit
from .mxfp4 import Mxfp4
from .nf4 import Bitsandbytes4Bit

FORMATS: tuple[StoredFormat, ...] = (
    Bitsandbytes4Bit(),
    Bitsandbytes8Bit(),
    CompressedTensors(),
    FP8(),
    Mxfp4(),
)


def logical_tensors(
    source: Source, stored: Mapping[str, TensorMeta], *, strict: bool, dequantize: bool = False
) -> dict[str, TensorMeta]:
    """The tensors that the model knows, by name: what a packed tensor is made of is hidden behind it.

    Raises `CheckpointError` as `StoredFormat.find` does.
    """
    headers = Headers(source=source, tensors=stored, dequantize=dequantize)
    owners: dict[str, PackedTensor] = {}
    for form in FORMATS:
        for tensor in form.find(headers, strict=strict):
            owners |= {part.name: tensor for part in tensor.parts}
    found = (owners.get(name, meta) for name, meta in stored.items())
    return {tensor.name: tensor for tensor in found}


def claimed_format(
    source: Source, section: Mapping[str, Any] | None, packed: Collection[PackedTensor]
) -> StoredFormat | None:
    """The format that `quantization_config` of config.json means; None for weights that are stored as they are.

    Raises `CheckpointError` where it is not known, or the tensors are stored otherwise: they would only look missing
    and unexpected.
    """
    found: dict[StoredFormat, PackedTensor] = {}
    for tensor in packed:
        if tensor.format is not None:
            found.setdefault(tensor.format, tensor)
    if section is None:
        for form, tensor in found.items():
            if form.claims({}, found=True):
                continue
            raise CheckpointError(
                f"`{source.model}` holds {form.kind} tensors (`{tensor.name}`), but its config.json has no "
                "`quantization_config`"
            )
        return None
    claimed = next((form for form in FORMATS if form.claims(section, found=form in found)), None)
    if claimed is None:
        raise already_quantised(source, section)
    for form, tensor in found.items():
        if form is not claimed:
            raise CheckpointError(
                f"config.json of `{source.model}` says `{_method(section)}`, but tensor `{tensor.name}` is stored as "
                f"{form.name}",
                hint="config.json and the weights must belong together",
            )
    return claimed


def already_quantised(source: Source, section: Mapping[str, Any]) -> CheckpointError:
    """The error for weights in a format that is not known, by config.json's name for it."""
    names = [form.name for form in FORMATS]
    return CheckpointError(
        f"`{source.model}` is already quantised (`{_method(section)}`)",
        hint=f"start from the 16-bit model; of quantised ones, {', '.join(names)} can be used",
    )


def _method(section: Mapping[str, Any]) -> Any:
    method = section.get("quant_method")
    return getattr(method, "value", method)  # transformers' enumeration, once it has read it
