"""Fused experts: parameters of three dimensions, each of which holds one projection of all experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..components import LinearLayer
from ..transformers_internals import experts_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_BLOCK = 64
"""Values that share one absmax where experts are 4-bit."""
_NESTED_BLOCK = 256
"""Of these absmax, those that are quantised together."""


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

    @property
    def rows_in_blocks(self) -> bool:
        """Whether an expert is (out, in), of rows that are whole blocks: as bitsandbytes takes it."""
        return not self.transposed and self.in_features % _BLOCK == 0

    @property
    def nested_in_slices(self) -> bool:
        """Whether an expert's double-quantised absmax are a slice of all of them; else all are float32 once loaded."""
        return self.experts == 1 or self.in_features * self.out_features % (_BLOCK * _NESTED_BLOCK) == 0

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
