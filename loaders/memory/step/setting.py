"""How a model is trained, and on which batches, as the simulation needs to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...model.transformers_internals import attention_support
from ...system.cuda import cuda_problem

if TYPE_CHECKING:
    from ...flags.declared import FlatArguments
    from ...model.experts.fused import FusedExperts
    from ...plan.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSetting:
    """The adapter that is trained."""

    layers: frozenset[str]
    """Full names of the linear layers that have one."""
    rank: int
    alpha: float
    dropout: float
    experts: tuple[FusedExperts, ...] = ()
    """Fused experts that have one, 4-bit or not."""
    expert_rank: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a model is trained."""

    attention: str
    """`flash_attention_2`, `sdpa` or `eager`."""
    checkpointing: bool
    """Whether layers are recomputed in the backward pass (gradient checkpointing)."""
    lora: LoraSetting | None = None
    """None: all parameters are trained."""
    quantised: frozenset[str] = frozenset()
    """Full names of the linear layers with quantised weights."""
    quantised_experts: tuple[FusedExperts, ...] = ()
    liger: bool = False
    router_loss: bool = False
    """Whether the load-balancing loss is computed."""
    device: Literal["cuda", "cpu"] = "cuda"
    """The device whose kernels are simulated."""

    @property
    def is_quantised(self) -> bool:
        """Whether any weights are: then all other parameters are float32, as k-bit preparation leaves them."""
        return bool(self.quantised or self.quantised_experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What goes into one forward pass."""

    size: int
    """Sequences."""
    length: int
    """Tokens in each of them."""
    padded: bool = False
    """Whether some sequences are shorter: sdpa needs a mask then."""


def training_setting(plan: Plan, flags: FlatArguments) -> Setting:
    """How the plan's model is trained on a GPU.

    Without a GPU here, attention is the requested one if the model supports it; with a GPU, the one that works here.
    """
    attention = plan.attention.effective
    if cuda_problem() is not None and attention_support(type(plan.skeleton.model)).flash:
        attention = plan.attention.requested
    lora = None
    if plan.adapter is not None and plan.targets is not None:
        facts, rank_of_experts = plan.adapter.facts(), plan.request.lora_experts
        lora = LoraSetting(
            layers=frozenset(layer.name for layer in plan.targets.layers),
            rank=facts["r"],
            alpha=facts["alpha"],
            dropout=facts["dropout"],
            experts=plan.skeleton.experts if rank_of_experts else (),
            expert_rank=rank_of_experts or 0,
        )
    packed = plan.quantised_experts
    return Setting(
        attention=attention,
        checkpointing=flags.gradient_checkpointing,
        lora=lora,
        quantised=plan.quantised_layers,
        quantised_experts=tuple(fused for fused in plan.skeleton.experts if fused.parameter in packed),
        liger=plan.kernels is not None and plan.kernels.supported,
        router_loss=flags.load_balancing_loss,
    )
