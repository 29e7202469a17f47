"""Autocast on `meta` against PyTorch's own: its table for CUDA, and what its autocast for a CPU really does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.memory.step.autocast import POLICIES, Autocast
from torch.nn import functional

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
LISTS = {
    "AT_FORALL_LOWER_PRECISION_FP": "bfloat16",
    "AT_FORALL_FP32": "float32",
    "AT_FORALL_FP32_SET_OPT_DTYPE": "accumulate",
    "AT_FORALL_PROMOTE": "widest",
}
INNER = re.compile(r"_?convolution|_thnn_.*|.*_cell|nuclear_norm|_?upsample.*|nll_loss2d")
"""What Python has no function for, or one of another name."""


@pytest.mark.parametrize("name", LISTS)
def test_the_table_for_cuda_is_that_of_the_installed_pytorch(name: str) -> None:
    listed = re.search(rf"#define {name}\(_\)((?:.*\\\n)*.*)\n", HEADER.read_text())
    assert listed is not None
    operations = {one for one in re.findall(r"_\((\w+)", listed[1]) if not INNER.fullmatch(one)}
    assert len(operations) >= 8
    assert {operation: POLICIES["cuda"].get(operation) for operation in operations} == dict.fromkeys(
        operations, LISTS[name]
    )


X, W, ROW = (4, 4), (4, 4), (4,)
CALLS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "linear": (functional.linear, (X, W)),
    "matmul": (torch.matmul, (X, W)),
    "@": (lambda x, w: x @ w, (X, W)),
    "method": (lambda x, w: x.mm(w), (X, W)),
    "addmm": (torch.addmm, (ROW, X, W)),
    "baddbmm": (torch.baddbmm, ((1, 4, 4), (1, 4, 4), (1, 4, 4))),
    "einsum": (lambda x, w: torch.einsum("ij,jk->ik", x, w), (X, W)),
    "conv1d": (functional.conv1d, ((1, 4, 4), (4, 4, 2))),
    "attention": (functional.scaled_dot_product_attention, ((1, 1, 4, 4), (1, 1, 4, 4), (1, 1, 4, 4))),
    "layer_norm": (lambda x: functional.layer_norm(x, (4,)), (X,)),
    "softmax": (lambda x: functional.softmax(x, dim=-1), (X,)),
    "softmax in float32": (lambda x: functional.softmax(x, dim=-1, dtype=torch.float32), (X,)),
    "pow": (lambda x: x.pow(2), (X,)),
    "**": (lambda x: x**2, (X,)),
    "sum": (lambda x: x.sum(), (X,)),
    "cross_entropy": (lambda x: functional.cross_entropy(x, x.argmax(-1)), (X,)),
    "cat": (lambda x, w: torch.cat([x, w]), (X, W)),
    "index_copy": (lambda x, w: x.index_copy(0, torch.arange(4, device=x.device), w), (X, W)),
    "silu": (functional.silu, (X,)),
    "+": (torch.add, (X, W)),
}


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16",), ("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", CALLS)
def test_results_have_the_dtypes_of_autocast_on_a_cpu(name: str, dtypes: tuple[str, ...]) -> None:
    function, shapes = CALLS[name]

    def made(device: str) -> list[torch.Tensor]:
        return [
            torch.ones(shape, dtype=getattr(torch, dtypes[number % len(dtypes)]), device=device)
            for number, shape in enumerate(shapes)
        ]

    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = function(*made("cpu")).dtype
    except RuntimeError as error:  # dtypes that autocast does not bring together
        with pytest.raises(RuntimeError, match="dtype"), Autocast("cpu").region():
            function(*made("meta"))
        assert "dtype" in str(error)
        return
    with Autocast("cpu").region():
        assert function(*made("meta")).dtype == expected


def test_results_on_a_gpu_where_its_table_is_another() -> None:
    """As PyTorch's page on automatic mixed precision has it, section CUDA Ops Reference."""
    x = torch.ones(4, 4, dtype=torch.bfloat16, device="meta")
    with Autocast("cuda").region():
        assert functional.layer_norm(x, (4,)).dtype == torch.float32
        assert functional.softmax(x, dim=-1).dtype == torch.float32
        assert (x.softmax(-1, torch.bfloat16)).dtype == torch.bfloat16
        assert x.sum().dtype == x.cumsum(0).dtype == (x**2).dtype == x.rsqrt().dtype == torch.float32
        assert torch.ones(2, dtype=torch.long, device="meta").sum().dtype == torch.long
        assert functional.silu(x).dtype == (x @ x.float()).dtype == torch.bfloat16
        assert torch.scatter_add(x, 0, torch.zeros(4, 4, dtype=torch.long, device="meta"), x.float()).dtype == (
            torch.float32
        )


def test_copies_of_trained_weights_are_kept_to_the_end_of_the_region() -> None:
    autocast, x = Autocast("cuda"), torch.ones(1, 4, device="meta")
    trained, frozen = (torch.ones(4, 4, device="meta", requires_grad=one) for one in (True, False))
    casts: list[Any] = []

    def saved(value: torch.Tensor) -> torch.Tensor:
        casts.append(value.untyped_storage()._cdata)
        return value

    def copies(weight: torch.Tensor) -> int:
        casts.clear()
        inputs = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda value: value), autocast.region():
            kept = [functional.linear(inputs, weight) for _ in range(3)]
            kept.append(functional.linear(inputs, weight.view(4, 4)))
        assert len(kept) == 4
        return len(set(casts))

    # of a leaf one copy, another of its view; of what has no gradient one each time. The input is a leaf too, and is
    # saved where the weight's gradient is wanted
    assert (copies(trained), copies(frozen)) == (2 + 1, 4)


def test_a_region_within_a_region_is_none_of_its_own_and_nothing_is_cast_behind_it() -> None:
    autocast, x = Autocast("cuda"), torch.ones(4, 4, device="meta")
    again = autocast.in_region(lambda: (x @ x).dtype)
    with autocast.region():
        assert again() == torch.bfloat16
        assert (x @ x).dtype == torch.bfloat16
    assert (x @ x).dtype == torch.float32
    assert again() == torch.bfloat16
    with pytest.raises(ZeroDivisionError), autocast.region():
        raise ZeroDivisionError
    assert (x @ x).dtype == torch.float32
