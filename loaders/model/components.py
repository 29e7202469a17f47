"""What a parameter is for, decided by what the model's modules are and are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Component = Literal["embedding", "attention", "mlp", "experts", "router", "norm", "head", "adapter"]


ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate", "router_proj"})


def component_of(parameter: str, module_classes: Mapping[str, str], *, head: str | None) -> Component:
    """Say what `parameter` (its dotted name) belongs to.

    `module_classes` maps the dotted name of each module to its class name; `head` is the output embedding's name. What
    fits nothing else counts as `mlp`.
    """
    module, _, leaf = parameter.rpartition(".")
    path = module.split(".")
    if module == head:
        return "head"
    if "Embedding" in module_classes.get(module, ""):
        return "embedding"
    if "norm" in path[-1].lower() or "norm" in module_classes.get(module, "").lower() or path[-1].startswith("ln_"):
        return "norm"
    if "router" in path or path[-1] in ROUTER_NAMES or "Router" in module_classes.get(module, ""):
        return "router"
    if any("experts" in part for part in (*path, leaf)):
        return "experts"
    if any("attn" in part or "attention" in part for part in path):
        return "attention"
    return "mlp"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLayer:
    """A linear layer of the model: `torch.nn.Linear`, or GPT-2's Conv1D, which stores its weight transposed."""

    name: str
    in_features: int
    out_features: int
    component: Component
    transposed: bool
    in_blocks: bool
    """Whether it lies in a list of layers that text passes through: the language model's blocks."""

    @property
    def leaf(self) -> str:
        """The last part of the name, which target patterns are compared with."""
        return self.name.rpartition(".")[2]


def component_by_name(parameter: str) -> Component:
    """What a parameter is for, as far as its name tells; the names are those of checkpoints and of GGUF files."""
    if ".lora_" in parameter:
        return "adapter"
    module = parameter.rpartition(".")[0]
    leaf = module.rpartition(".")[2]
    if leaf in ("lm_head", "embed_out") or module == "output":
        return "head"
    if leaf.endswith("_exps") or leaf.endswith("_shexp"):
        return "experts"
    if leaf == "ffn_gate_inp":
        return "router"
    is_embedding = ("embed" in leaf or "embd" in leaf or leaf in ("wte", "wpe")) and "norm" not in leaf
    return component_of(parameter, {module: "Embedding"} if is_embedding else {}, head=None)
