"""4 bits for the weights of linear layers and of experts: NF4, the quantisation of QLoRA (arXiv:2305.14314), or FP4.

bitsandbytes loads linear layers; experts, in the layout of its `replace_parameter_4bit`, are loaded by `experts/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.formats.nf4 import ANY_STATE, BLOCK, CODE_BOOKS
from ..checkpoint.tensors import DTYPE_CODES, ITEM_BYTES, TORCH_NAMES
from ..decision import Decision
from ..errors import CheckpointError, MissingRequirementError, UsageError
from ..flags.request import Request
from ..model.experts.fused import FusedExperts
from ..model.tensor_map import ModelTensor
from ..steps.plain import All, Cast
from ..steps.step import Encoder, OutputTensor, Step
from ..system.cuda import cuda_problem
from ..system.quiet import quiet_bitsandbytes
from .encode import FourBits, encode, encode_with_bitsandbytes, library_problem, numba_problem, stored_shapes
from .loaded import loaded_layer
from .quantise import Quantize
from .slices import nested_in_slices, rows_in_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Nf4Linear:
    """The linear layers that bitsandbytes replaces, and fused experts, in 4 bits."""

    kind: FourBits
    tags: tuple[str, ...] = tuple(CODE_BOOKS)
    bits: int = 4
    block_size: int = BLOCK
    storage: str = "U8"
    """safetensors code of the dtype that codes are stored under: always the same bytes."""
    compute: str = "bfloat16"
    """torch's name of the dtype that layers compute in."""

    def configured(self, request: Request, stored: Mapping[str, Any] | None) -> Nf4Linear:
        """The settings that are asked for, else those of the checkpoint's `quantization_config`, else QLoRA's own.

        Raises `CheckpointError` for stored dtypes that are none, and `UsageError` where the checkpoint's weights, which
        are taken over as they are, are quantised otherwise than asked.
        """
        found = stored or {}
        asked = {
            "bnb_4bit_quant_type": request.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": request.bnb_4bit_use_double_quant,
        }
        for name, value in asked.items():
            if name in found and value not in (None, found[name]):
                raise UsageError(
                    f"`--{name}` is {str(value).lower()}, and the checkpoint's weights are quantised already, with "
                    f"{str(found[name]).lower()}: they are taken over as they are",
                    hint="leave it out, or decode them with --dequantize",
                )
        settings = {**{name: value for name, value in asked.items() if value is not None}, **found}
        kind = FourBits(
            quant_type=settings.get("bnb_4bit_quant_type", "nf4"),
            double_quant=bool(settings.get("bnb_4bit_use_double_quant", True)),
        )
        storage = request.bnb_4bit_quant_storage or _dtype_in(found, "bnb_4bit_quant_storage", "uint8")
        compute = request.bnb_4bit_compute_dtype or _dtype_in(found, "bnb_4bit_compute_dtype", "bfloat16")
        return replace(self, kind=kind, storage=DTYPE_CODES[storage], compute=compute)

    @property
    def tag(self) -> str:
        """`nf4` or `fp4`."""
        return self.kind.quant_type

    def covers(self, tensors: tuple[ModelTensor, ...]) -> bool:
        """The weights of linear layers, fused experts, and what the checkpoint holds in NF4 already."""
        tensor = tensors[0]
        return tensor.packed is not None or tensor.linear is not None or tensor.experts is not None

    def step(self, tensors: tuple[ModelTensor, ...]) -> Step:
        """Encode a weight, or take over the parts that it is stored in."""
        (tensor,) = tensors
        if tensor.packed is not None:
            return self._take_over(tensor)
        transposed = tensor.linear is not None and tensor.linear.transposed
        shape = tensor.shape[::-1] if transposed else tensor.shape
        return Step(
            operation=Quantize(
                source=tensor.sources[0],
                name=tensor.name,
                transposed=transposed,
                dtype=tensor.quantised_from,
                kind=self.kind,
            ),
            outputs=tuple(
                self._part(tensor, suffix, stored, dtype)
                for suffix, (stored, dtype) in stored_shapes(
                    shape, TORCH_NAMES[tensor.quantised_from], self.kind
                ).items()
            ),
            encodes=True,
        )

    def _take_over(self, tensor: ModelTensor) -> Step:
        assert tensor.packed is not None
        weight = tensor.packed.name
        is_double = any(part.name.endswith(".nested_absmax") for part in tensor.packed.parts)
        if (tensor.packed.tag, is_double) != (self.tag, self.kind.double_quant):
            found, said = (
                f"{name} with {'double' if double else 'single'} quantisation"
                for name, double in ((tensor.packed.tag, is_double), (self.tag, self.kind.double_quant))
            )
            raise CheckpointError(
                f"tensor `{weight}` is stored in {found}, config.json says {said}",
                hint="config.json and the weights must belong together",
            )
        outputs = tuple(
            replace(
                self._part(tensor, part.name.removeprefix(weight), part.shape, part.dtype),
                variable=False,
            )
            for part in tensor.packed.parts
        )
        copies = tuple(
            Cast(
                source=replace(part, shape=output.shape, dtype=output.dtype), name=output.name, dtype=output.dtype,
                codes=part.name == weight,
            )
            for part, output in zip(tensor.packed.parts, outputs, strict=True)
        )  # fmt: skip
        return Step(operation=All(operations=copies), outputs=outputs)

    def _part(self, tensor: ModelTensor, suffix: str, shape: tuple[int, ...], dtype: str) -> OutputTensor:
        """One of the tensors that a weight is stored in: its codes where there is no `suffix`, else a statistic."""
        is_codes, is_state = not suffix, suffix.startswith(ANY_STATE)
        if is_codes:
            shape, dtype = self._codes_shape(tensor, prod(shape) * ITEM_BYTES[dtype]), self.storage
        return OutputTensor(
            name=tensor.name + suffix,
            shape=shape,
            dtype=dtype,
            component=tensor.component,
            counted_as=self.tag,
            parameters=prod(tensor.shape) if is_codes else 0,
            part_of=None if is_codes else tensor.name,
            overhead=is_state,
            variable=is_state,
        )

    def _codes_shape(self, tensor: ModelTensor, size: int) -> tuple[int, int]:
        """The shape of so many bytes of codes as they are stored.

        Raises `UsageError` where they are no whole elements: bitsandbytes raises on a CPU, and on a GPU it takes memory
        for fewer bytes than it writes.
        """
        width = ITEM_BYTES[self.storage]
        if size % width:
            raise UsageError(
                f"tensor `{tensor.name}`: its {size:,} bytes of 4-bit codes are no whole number of "
                f"{TORCH_NAMES[self.storage]}, under which bitsandbytes would store them",
                hint="pass --bnb_4bit_quant_storage uint8",
            )
        return size // width, 1

    def load(self, layer: nn.Module, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """bitsandbytes' layer."""
        return loaded_layer(layer, parts, self.compute_dtype(config))

    def loaded(self, part: OutputTensor, experts: FusedExperts) -> OutputTensor:
        """Where an expert's double-quantised absmax are no slice of all, all absmax themselves are held, in float32."""
        suffix = part.name.removeprefix(experts.parameter)
        if nested_in_slices(experts):
            return part
        if suffix == ".absmax":
            return replace(part, dtype="F32")
        return replace(part, shape=(0,)) if suffix in (".nested_absmax", ".nested_quant_map") else part

    @property
    def mixed_precision(self) -> str | None:
        """The dtype of storage, if it is a float: FSDP divides no others, and casts floats before it gathers them."""
        name = TORCH_NAMES[self.storage]
        return name if name.lstrip("b").startswith("float") else None

    def is_divided(self, part: OutputTensor, experts: FusedExperts | None) -> bool:
        """Codes under a float, and those of ftload's own layer of experts: accelerate leaves bitsandbytes' uint8 out.

        Statistics are no parameters.
        """
        own_layer = experts is not None and not rows_in_blocks(experts)
        return part.part_of is None and (self.mixed_precision is not None or own_layer)

    def problem(self, tensors: tuple[ModelTensor, ...]) -> str | None:
        """What keeps transformers from loading a group in 4 bits: the same for all of its tensors."""
        return tensors[0].quantised_problem

    def config(self, stored: Mapping[str, Any] | None) -> dict[str, Any]:
        """transformers' `BitsAndBytesConfig` as the reference builds it, or the stored one with these dtypes."""
        import torch
        from transformers import BitsAndBytesConfig

        storage = TORCH_NAMES[self.storage]
        if stored is not None:
            return {**stored, "bnb_4bit_quant_storage": storage, "bnb_4bit_compute_dtype": self.compute}
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind.quant_type,
            bnb_4bit_use_double_quant=self.kind.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute),
            bnb_4bit_quant_storage=getattr(torch, storage),
        ).to_dict()

    def compute_dtype(self, config: Mapping[str, Any]) -> str:
        """torch's name of the dtype that layers compute in."""
        return config["bnb_4bit_compute_dtype"]

    def facts(self, config: Mapping[str, Any], block_size: int) -> dict[str, Any]:
        """What the report says of a `quantization_config`."""
        return {
            "method": "bitsandbytes",
            "quant_type": config["bnb_4bit_quant_type"],
            "double_quant": config["bnb_4bit_use_double_quant"],
            "block_size": block_size,
            "compute_dtype": config["bnb_4bit_compute_dtype"],
            "storage_dtype": config["bnb_4bit_quant_storage"],
        }

    def choose_encoder(self, device: str) -> tuple[Encoder, tuple[Decision, ...]]:
        """numba's encoder on a CPU, bitsandbytes on a GPU and where numba can't be used.

        Raises `MissingRequirementError` where there is no GPU for `cuda`.
        """
        decisions = []
        encoder: Encoder = partial(encode, quant_type=self.kind.quant_type)
        if device == "cuda":
            problem = cuda_problem()
            if problem is not None:
                raise MissingRequirementError(
                    f"`--device cuda`: {problem}", hint="leave it out: the CPU encodes as well"
                )
            encoder = partial(encode_with_bitsandbytes, quant_type=self.kind.quant_type, device="cuda")
        else:
            problem = numba_problem()
            if problem is not None:
                encoder = partial(encode_with_bitsandbytes, quant_type=self.kind.quant_type)
                decisions.append(
                    Decision(what="4-bit encoder", requested="numba", effective="bitsandbytes", reason=problem)
                )
        problem = library_problem() if self.kind.double_quant else None
        if problem is not None:
            decisions.append(
                Decision(
                    what="4-bit statistics",
                    requested="bitsandbytes' C function",
                    effective="bitsandbytes' package",
                    reason=problem,
                )
            )
        return encoder, tuple(decisions)

    def try_library(self) -> str:
        """Quantise a block of either type by bitsandbytes, and back."""
        import torch

        with quiet_bitsandbytes():
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        for device in devices:
            for name, book in CODE_BOOKS.items():
                values = torch.tensor(book * 4, device=device)
                codes, state = quantize_4bit(values, blocksize=BLOCK, quant_type=name)
                if not torch.equal(dequantize_4bit(codes, state).reshape(-1), values):
                    raise RuntimeError(f"a block in {name.upper()} does not come back as it was on {device}")
        return f"a block quantised to NF4 and to FP4, and back, on {' and '.join(devices)}"

    def try_encoder(self) -> str:
        """Let numba compile the encoder."""
        problem = numba_problem()
        if problem is not None:
            raise MissingRequirementError(problem.partition(": ")[2])
        return "compiles the NF4 encoder"


def _dtype_in(settings: Mapping[str, Any], key: str, default: str) -> str:
    name = settings.get(key, default)
    if not isinstance(name, str) or name not in DTYPE_CODES:
        raise CheckpointError(f"`{key}` of config.json is {name!r}, which is no dtype", hint=f"pass --{key} {default}")
    return name


NF4_LINEAR = Nf4Linear(kind=FourBits())
