"""4-bit NormalFloat (NF4) and 4-bit floats (FP4), as bitsandbytes computes and stores them.

A weight `W` of n elements is stored as `W` (uint8, (n+1)//2 × 1, two codes a byte), `.absmax` (uint8, one a block of
64), `.nested_absmax` (float32, one for 256 blocks), `.quant_map` (float32, 16), `.nested_quant_map` (float32, 256) and
`.quant_state.bitsandbytes__nf4` or `…__fp4` (uint8: JSON); without double quantisation `.absmax` is float32, and
nothing is nested. Sources: QLoRA, arXiv:2305.14314, appendix E for NF4's code book and section 3 for double
quantisation; bitsandbytes' `get_4bit_type` for FP4's, `QuantState.as_dict(packed=True)` for the layout.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.formats.nf4 import ANY_STATE, BLOCK, CODE_BOOKS, NESTED_BLOCK, dynamic_map
from ..errors import MissingRequirementError, said_by
from ..system.quiet import quiet_bitsandbytes

if TYPE_CHECKING:
    from torch import Tensor


_OFFSET_CHARACTERS = 24
"""The longest that Python prints a non-negative float: 17 digits, a point, leading zeros or an exponent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FourBits:
    """How weights are quantised."""

    quant_type: str = "nf4"
    """`nf4` or `fp4`."""
    double_quant: bool = True
    """Whether absmax is quantised too, to 8 bits."""

    @property
    def state_suffix(self) -> str:
        """What follows the weight's name in that of its JSON state."""
        return ANY_STATE + self.quant_type


def stored_shapes(
    shape: tuple[int, ...], dtype: str, kind: FourBits = FourBits()
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Suffix to (shape, safetensors dtype) of what a weight of `shape` is stored in; the JSON state at its longest.

    `dtype` is torch's name for what it was before: the state records it, and bitsandbytes goes back to it.
    """
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    state = len(_state(shape, dtype, kind, 0.0)) - len("0.0") + _OFFSET_CHARACTERS if kind.double_quant else None
    nested: dict[str, tuple[tuple[int, ...], str]] = {
        ".nested_absmax": ((-(-blocks // NESTED_BLOCK),), "F32"),
        ".nested_quant_map": ((256,), "F32"),
    }
    return {
        "": (((n + 1) // 2, 1), "U8"),
        ".absmax": ((blocks,), "U8" if kind.double_quant else "F32"),
        **(nested if kind.double_quant else {}),
        ".quant_map": ((16,), "F32"),
        kind.state_suffix: ((state or len(_state(shape, dtype, kind, None)),), "U8"),
    }


def encode(values: Tensor, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """The encoder compiled by numba: bit for bit what bitsandbytes computes on a CPU."""
    import numpy as np
    import torch

    from .kernel import encode_bfloat16, encode_float32

    values = values.detach() if values.requires_grad else values
    n = values.numel()
    whole = n // BLOCK * BLOCK
    codes = _scratch((n + 1) // 2)
    absmax = np.empty(-(-n // BLOCK), np.float32)
    rest = np.empty(0, np.float32)
    # torch gives the interpreter's lock away in each of its calls, numpy does not: few of the former
    if values.dtype == torch.bfloat16:
        bits = values.view(torch.int16).numpy().reshape(-1)[:whole]
        finite = encode_bfloat16(bits, codes[: whole // 2], absmax, _thresholds(quant_type), _steps(quant_type))
    else:
        wide = values.to(torch.float32).numpy().reshape(-1)[:whole]
        finite = encode_float32(wide, codes[: whole // 2], absmax, _bounds(quant_type), _steps(quant_type))
    if whole < n:
        rest = values.reshape(-1)[whole:].to(torch.float32).numpy()
    if not (finite and np.isfinite(rest).all()):
        raise ValueError("NaN or infinity")
    if whole < n:
        # bitsandbytes divides where a whole block is multiplied, and pads an odd end with a zero
        absmax[-1] = max(np.abs(rest).max(), np.float32(1e-38))
        scaled = np.append(rest / absmax[-1], np.zeros(n % 2, np.float32))
        counts = _order(quant_type)[np.searchsorted(_bounds(quant_type)[:15], scaled)]
        codes[whole // 2 :] = counts[::2] << 4 | counts[1::2]
    return torch.from_numpy(codes), torch.from_numpy(absmax)


def encode_with_bitsandbytes(values: Tensor, quant_type: str = "nf4", device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The encoder on a GPU, and where numba can't be used: bitsandbytes itself."""
    import torch

    flat = values.reshape(-1).contiguous().to(device)
    if not torch.isfinite(flat).all():
        raise ValueError("NaN or infinity")
    codes, state = _bitsandbytes().quantize_4bit(
        flat, blocksize=BLOCK, quant_type=quant_type, compress_statistics=False
    )
    return codes.reshape(-1).cpu(), state.absmax.cpu()


def numba_problem() -> str | None:
    """Why numba's encoder can't be used here; None when it can. Compiles it, unless it lies in numba's cache."""
    import torch

    try:
        encode(torch.ones(BLOCK, dtype=torch.bfloat16))
    except Exception as error:  # not installed, no place for its cache, no compiler for this processor: all alike here
        return f"numba can't be used: {said_by(error)}"
    return None


def statistics(absmax: Tensor, shape: tuple[int, ...], dtype: str, kind: FourBits = FourBits()) -> dict[str, Any]:
    """Absmax (float32, one a block) → suffix to tensor, everything but the codes; by double quantisation, or as it is.

    `shape` is the logical shape of the weight and `dtype` torch's name for its dtype, which the JSON state records.
    `absmax` is overwritten. From a million or so blocks on, torch's mean depends on the number of its threads: to get
    the same bytes everywhere, set it to one.
    """
    import torch

    offset, nested = None, {}
    if kind.double_quant:
        mean = absmax.mean()
        absmax, of_absmax = _quantize_blockwise(absmax.sub_(mean))
        offset, nested = mean.item(), {".nested_absmax": of_absmax, ".nested_quant_map": dynamic_map()}
    state = torch.frombuffer(bytearray(_state(shape, dtype, kind, offset)), dtype=torch.uint8)
    return {
        ".absmax": absmax,
        **nested,
        ".quant_map": torch.tensor(CODE_BOOKS[kind.quant_type], dtype=torch.float32),
        kind.state_suffix: state,
    }


@cache
def _order(quant_type: str) -> Any:
    """The codes in the order of their values (uint8, 16); FP4's two zeros in that in which torch sorts them."""
    import numpy as np
    import torch

    return torch.argsort(torch.tensor(CODE_BOOKS[quant_type], dtype=torch.float32)).numpy().astype(np.uint8)


@cache
def _steps(quant_type: str) -> Any:
    """How much a code grows from one value to the next greater one (int16, 15), and the code of the lowest value."""
    import numpy as np

    order = _order(quant_type).astype(np.int16)
    return np.append(np.diff(order), order[:1])


@cache
def _bounds(quant_type: str) -> Any:
    """The 15 midpoints of the sorted code book (float32), and a sixteenth number that nothing reaches."""
    import numpy as np

    values = np.array(CODE_BOOKS[quant_type], np.float32)[_order(quant_type)]
    return np.append((values[:-1] + values[1:]) / np.float32(2), np.float32(2))


@cache
def _thresholds(quant_type: str) -> Any:
    """What bfloat16 weights are compared with, by the absmax of their block (int16, 32768 × 16)."""
    import numpy as np

    from .kernel import find_thresholds

    thresholds = np.empty((2**15, 16), np.int16)
    find_thresholds(_bounds(quant_type), thresholds)
    return thresholds


_local = threading.local()


def _scratch(size: int) -> Any:
    """Bytes for codes, the same for each call from a thread: fresh memory would have to be zeroed by the kernel."""
    import numpy as np

    if size > getattr(_local, "codes", np.empty(0, np.uint8)).size:
        _local.codes = np.empty(size, np.uint8)
    return _local.codes[:size]


def _quantize_blockwise(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes (uint8, n) and nested absmax (float32) of n float32 values, by bitsandbytes' own C function.

    It is called without importing the package, which takes seconds; where its library can't be found, through it.
    """
    function = _library_function()
    if function is None:
        codes, state = _bitsandbytes().quantize_blockwise(values, code=dynamic_map(), blocksize=NESTED_BLOCK)
        return codes, state.absmax
    return _call(function, values)


def _call(function: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    codes = torch.empty(values.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-values.numel() // NESTED_BLOCK), dtype=torch.float32)
    # held until the function returns: two threads that come first at once each make a map, and one of them is not kept
    tensors = (dynamic_map(), values, absmax, codes)
    function(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        ctypes.c_longlong(NESTED_BLOCK),
        ctypes.c_longlong(values.numel()),
    )
    return codes, absmax


def _bitsandbytes() -> Any:
    """bitsandbytes' functions. Raises `MissingRequirementError` where it does not import."""
    try:
        with quiet_bitsandbytes():
            import bitsandbytes.functional
    except Exception as error:  # a build for another machine raises whatever it likes
        raise MissingRequirementError(
            f"bitsandbytes does not import: {said_by(error)}", hint="`ftload doctor` says how to fix it"
        ) from error
    return bitsandbytes.functional


def library_problem() -> str | None:
    """Why bitsandbytes' C function can't be called past the package, whose import takes seconds; None when it can."""
    if _library_function() is not None:
        return None
    return f"no `{_SYMBOL}` of its library gives the codes that are expected: not the release that ftload was made for?"


_SYMBOL = "cquantize_blockwise_cpu_fp32"
"""Not published by bitsandbytes: another release may leave it out, or let it mean something else."""


@cache
def _library_function() -> Any | None:
    spec = importlib.util.find_spec("bitsandbytes")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for path in Path(folder).glob("libbitsandbytes_cpu.*"):
            try:
                function = getattr(ctypes.CDLL(str(path)), _SYMBOL)
            except (OSError, AttributeError):
                continue
            if _gives_every_code(function):
                return function
    return None


def _gives_every_code(function: Any) -> bool:
    """Whether the 256 values of the map, doubled and from the last to the first, get their own codes and absmax.

    For the few nearest to zero it takes any neighbour, in all releases so far.
    """
    import torch

    values = dynamic_map().flip(0)
    codes, absmax = _call(function, values * 2)
    near = torch.allclose(dynamic_map()[codes.long()], values, rtol=0, atol=1e-4)
    return near and torch.equal(absmax, torch.tensor([2.0]))


def _state(shape: tuple[int, ...], dtype: str, kind: FourBits, offset: float | None) -> bytes:
    state: dict[str, Any] = {
        "quant_type": kind.quant_type,
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": list(shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()
