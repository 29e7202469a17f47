"""Fused experts: parameters of three dimensions, each of which holds one projection of all experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..components import LinearLayer
from ..transformers_internals import experts_layout

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedExperts:
    """One projection of all experts of a layer, fused in one parameter."""

    parameter: str
    """Its name in the model: `model.layers.0.mlp.experts.gate_up_proj`."""
    experts: int
    in_features: int
    out_features: int
    transposed: bool
    """Whether it is (experts, in, out), as in gpt-oss, rather than (experts, out, in)."""

    @property
    def module(self) -> str:
        """The name of the module of a layer's experts."""
        return self.parameter.rpartition(".")[0]

    @property
    def projection(self) -> str:
        """`gate_up` (or `up`, of experts without a gate) or `down`.

        Not `gate_up_proj`: PEFT would rewrite such targets for architectures whose weights are merged on loading.
        """
        return self.parameter.rpartition(".")[2].removesuffix("_proj")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the parameter."""
        matrix = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return (self.experts, *matrix)

    def layer(self, expert: int) -> LinearLayer:
        """One expert's projection, as a linear layer: what stands in the parameter's place where it is 4-bit."""
        return LinearLayer(
            name=f"{self.module}.{expert}.{self.projection}",
            in_features=self.in_features,
            out_features=self.out_features,
            component="experts",
            transposed=False,
            in_blocks=True,
            fused=True,
        )


def find_experts(model: PreTrainedModel) -> tuple[FusedExperts, ...]:
    """The fused experts of a model that transformers runs by one of its exchangeable functions, in module order.

    Those of other classes (Llama 4, DBRX, JetMoe) multiply all experts at once, or in a layout of their own.
    """
    found = []
    for name, module in model.named_modules():
        layout = experts_layout(module)
        for leaf in layout.parameters if layout is not None else ():
            experts, rows, columns = module.get_parameter(leaf).shape
            assert layout is not None
            found.append(
                FusedExperts(
                    parameter=f"{name}.{leaf}",
                    experts=experts,
                    in_features=rows if layout.transposed else columns,
                    out_features=columns if layout.transposed else rows,
                    transposed=layout.transposed,
                )
            )
    return tuple(found)


def by_module(experts: Iterable[FusedExperts]) -> dict[str, tuple[FusedExperts, ...]]:
    """The projections of each module of experts, in order."""
    modules: dict[str, tuple[FusedExperts, ...]] = {}
    for fused in experts:
        modules[fused.module] = (*modules.get(fused.module, ()), fused)
    return modules


def take_apart(
    module: Any, fused: Iterable[FusedExperts], layer: Callable[[FusedExperts, int], nn.Module], numbers: Iterable[int]
) -> None:
    """Put layers in the place of the fused parameters of a module: `layer` makes one for a projection and an expert.

    Only the experts of these `numbers` get any.
    """
    import torch

    fused = tuple(fused)
    for one in fused:
        delattr(module, one.parameter.rpartition(".")[2])
    for number in numbers:
        module.add_module(str(number), torch.nn.ModuleDict({one.projection: layer(one, number) for one in fused}))


def empty_layer(fused: FusedExperts, _: int) -> nn.Module:
    """An expert's projection as a linear layer on `meta`."""
    import torch

    return torch.nn.Linear(fused.in_features, fused.out_features, bias=False, device="meta")
