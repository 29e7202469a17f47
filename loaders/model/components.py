"""What a parameter is for, decided by what it is called and, where there is a model, by its modules' classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Component = Literal["embedding", "attention", "mlp", "experts", "router", "norm", "head", "adapter"]
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate", "router_proj", "ffn_gate_inp"})
_HEADS = re.compile(
    r"(^|\.)(lm_head|embed_out|unembed|lm_loss|generator_lm_head)$"
    r"|(^|\.)(lm_head\.decoder|predictions(\.decoder)?)$|^pred_layer\.proj$|^(output|head|decoder)$"
)
"""Modules by these names are output embeddings; the last three only where nothing stands around them."""
_EMBEDDINGS = re.compile(r"embed|embd|^(wte|wpe)$")
_NO_EMBEDDINGS = re.compile(r"norm|proj|mapping|patch|vision|relative")
_NORMS = re.compile(r"norm|(^|_)ln(_|\d|$)")
_EXPERTS = re.compile(r"experts|\.shared_expert\.|_exps\.|_shexp\.|block_sparse_moe\.(in|out)put_linear\.")


def component_of(
    parameter: str, module_classes: Mapping[str, str] | None = None, *, head: str | None = None
) -> Component:
    """Say what `parameter` (its dotted name) belongs to, by names as checkpoints and GGUF files have them.

    Where there is a model, it decides what names can't: `module_classes` maps the dotted name of each module to its
    class name, and `head` is the output embedding's module. What fits nothing else counts as `mlp`.
    """
    module, _, leaf = parameter.rpartition(".")
    path = module.split(".")
    last = path[-1].lower()
    if ".lora_" in parameter:
        return "adapter"
    if _HEADS.search(module) if module_classes is None else _is_head(module, leaf, head):
        return "head"
    class_name = "" if module_classes is None else module_classes.get(module, "")
    is_embedding = _EMBEDDINGS.search(last) and not _NO_EMBEDDINGS.search(last)
    if "Embedding" in class_name or (module_classes is None and is_embedding):
        return "embedding"
    # a list of norms is called as one, and what is in it by a number
    named = path[-2].lower() if last.isdecimal() and len(path) > 1 else last
    if _NORMS.search(named) or "norm" in class_name.lower():
        return "norm"
    if "router" in path or last in ROUTER_NAMES or leaf == "e_score_correction_bias" or "Router" in class_name:
        return "router"
    if _EXPERTS.search(parameter):
        return "experts"
    return "attention" if "attention" in module or "attn" in parameter else "mlp"


def _is_head(module: str, leaf: str, head: str | None) -> bool:
    """Whether a module is the output embedding or, of a bias, what holds it."""
    return head is not None and (module == head or (leaf == "bias" and module == head.rpartition(".")[0]))


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
    fused: bool = False
    """Whether its weight is one expert's part of a fused parameter: a layer of its own only where that is 4-bit."""

    @property
    def leaf(self) -> str:
        """The last part of the name, which target patterns are compared with."""
        return self.name.rpartition(".")[2]
