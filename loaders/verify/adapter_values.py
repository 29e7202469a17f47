"""Whether a prepared adapter starts from what it should: from random numbers, or from the base that lies there."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ..adapter.peft_lora import PeftLora
from ..adapter.peft_variant import PeftVariant
from ..adapter.targets import Targets, lora_names
from ..model.tensor_map import ModelTensor
from .files import Context

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch import Tensor

_ENOUGH_BYTES = 64
"""Sixteen numbers: fewer may be equal by chance."""
_MOST_BYTES = 16 * 1024
_CHUNK_ELEMENTS = 1 << 20
_ZERO_B = (True, "gaussian")
"""Values of `init_lora_weights` by which B is zero."""


def starts_at_zero(context: Context) -> bool:
    """Whether lora B is zero before the first step."""
    adapter = context.report.adapter
    return adapter is not None and adapter.settings.get("init_lora_weights", True) in _ZERO_B


def check_initial_values(context: Context, adapter: PeftLora | PeftVariant, targets: Targets) -> Iterator[str]:
    """Whether what is random was drawn for itself, and what is of the base is what lies there."""
    yield from _check_drawn(context, targets)
    with _open(context) as file:
        for name in context.adapter:
            if name.endswith(".lora_magnitude_vector"):
                yield from _check_magnitudes(name, file.get_tensor(name))
        # of a base on a hub, each tensor would have to be asked for
        if isinstance(adapter, PeftVariant) and adapter.made is not None and context.base_source.kind != "hub":
            for name in sorted(adapter.made.others.keys() & context.adapter.keys()):
                yield from _check_copy(context, name, *adapter.copied(name), file.get_slice(name))


def _open(context: Context) -> Any:
    from safetensors import safe_open

    return safe_open(context.adapter_file, framework="pt")


def _check_drawn(context: Context, targets: Targets) -> Iterator[str]:
    """Whether every lora A, and each expert's in a fused one, is another; B too where it does not start at zero.

    16 KiB of each are read.
    """
    experts = {lora_names(fused.name)[0]: fused.experts.experts for fused in targets.fused}
    drawn = (".lora_A.weight",) if starts_at_zero(context) else (".lora_A.weight", ".lora_B.weight")
    others: dict[bytes, str] = {}
    with context.adapter_file.open("rb") as file:
        for name, tensor in context.adapter.items():
            count = experts.get(name, 1)
            size = tensor.nbytes // count
            if not name.endswith(drawn) or size < _ENOUGH_BYTES:
                continue
            for number in range(count):
                file.seek(tensor.begin + number * size)
                values = file.read(min(size, _MOST_BYTES))
                what = f"`{name}`" if count == 1 else f"`{name}` of expert {number}"
                if values == values[:4] * (len(values) // 4):
                    yield f"{what} was not drawn: its numbers are all the same"
                # digests: of thousands of experts, the values would not fit into memory
                elif others.setdefault(sha256(values).digest(), what) != what:
                    yield f"{what} was not drawn: it is the same as {others[sha256(values).digest()]}"


def _check_magnitudes(name: str, values: Tensor) -> Iterator[str]:
    """DoRA's are lengths: of the weights of each output."""
    import torch

    if not torch.isfinite(values).all() or not (values > 0).all():
        yield f"`{name}` holds what is no length: {values[~(torch.isfinite(values) & (values > 0))][0].item()}"


def _check_copy(
    context: Context, name: str, parameter: str, rows: tuple[int, ...] | None, stored: Any
) -> Iterator[str]:
    """Whether a tensor of the adapter is the base's, or some of its rows; what loading converts is not compared."""
    import torch

    tensor = _of_base(context, parameter)
    if tensor is None or tensor.conversion is not None or tensor.packed is not None:
        return
    (source,) = tensor.sources
    loaded = context.skeleton.model.get_parameter(parameter).dtype
    shape = stored.get_shape()
    width = source.parameters // source.shape[0]
    at_once = 1 if rows is not None else max(1, _CHUNK_ELEMENTS // width)
    for begin in range(0, shape[0], at_once):
        end = min(begin + at_once, shape[0])
        first = begin if rows is None else rows[begin]
        last = end if rows is None else first + 1
        found = stored[begin:end].reshape(-1)
        values = context.base.values(source, first * width, last * width).reshape(-1).to(loaded)
        if not torch.equal(found, values.to(found.dtype)):
            where = f"row {begin} of `{name}`" if rows is not None else f"`{name}`"
            yield f"{where} is not " + (f"row {first} of " if rows is not None else "") + f"the base's `{source.name}`"
            return


def _of_base(context: Context, parameter: str) -> ModelTensor | None:
    """What a parameter is made of; a tied one is stored under one of its names."""
    model = context.skeleton.model
    tensors = {id(model.get_parameter(one.parameter)): one for one in context.skeleton.tensors if not one.buffer}
    return tensors.get(id(model.get_parameter(parameter)))


def check_residual(context: Context, name: str, layer: LoraLayer) -> Iterator[str]:
    """Whether what an adapter starts from was taken out of the weight of the layer `name`: `scaling · B A`.

    It is seen along the columns of B, where the original is known: `scaling · B A` for PiSSA, `B A` for OLoRA (PEFT's
    `pissa_init` and `olora_init`). What is left was rounded, or quantised, after it.
    """
    import torch

    tensor, settings = _of_base(context, f"{name}.weight"), context.document["adapter"]["settings"]
    if tensor is None or tensor.conversion is not None:
        return
    (source,) = tensor.sources
    weight = context.base.read(source).float()
    a, b = (getattr(layer, f"lora_{which}")["default"].weight.detach().cpu().float() for which in "AB")
    directions, lengths = torch.linalg.qr(b)
    along = directions.T @ (weight.T if getattr(layer, "fan_in_fan_out", False) else weight)
    product, scaling = lengths @ a, layer.scaling["default"]
    original = product if settings["init_lora_weights"] == "olora" else scaling * product
    taken = scaling * product
    if not torch.linalg.norm(along - (original - taken)) <= torch.linalg.norm(taken) / 2:
        yield f"`{source.name}` is not what is left of the original once the adapter's initial values are taken out"
