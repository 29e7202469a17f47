"""How a model is trained, and on which batches, as the simulation needs to know it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...adapter.targets import ADAPTED
from ...model.transformers_internals import attention_support
from ...system.cuda import cuda_problem

if TYPE_CHECKING:
    from ...flags.declared import FlatArguments
    from ...model.experts.fused import FusedExperts
    from ...plan.plan import Plan
    from ..training_run import TrainingRun


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSetting:
    """The adapter that is trained."""

    layers: frozenset[str]
    """Full names of the linear layers that have one."""
    rank: int
    alpha: float
    dropout: float
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of its weights."""
    experts: tuple[FusedExperts, ...] = ()
    """Fused experts that have one, 4-bit or not."""
    expert_rank: int = 0

    @property
    def parts(self) -> Iterator[tuple[str, Any]]:
        """Names, and what tells one from another, of all that layers of one kind have alike."""
        return ((name, ()) for name in self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftSetting:
    """An adapter other than the default, which PEFT's own layers run."""

    config: str
    """Fields of PEFT's `LoraConfig`, as JSON."""
    tensors: frozenset[tuple[str, tuple[int, ...]]]
    """Names, as the base's modules have them, and shapes of all that is stored of it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` where all that is trained has that; else A, B and the like are float32, copies as what they copy."""

    @property
    def costs(self) -> tuple[str, ...]:
        """What of it takes more than a plain adapter does in a step, in words."""
        fields = json.loads(self.config)
        told = {
            "use_dora": "DoRA: the norms of each whole weight anew",
            "modules_to_save": "saved modules",
            "trainable_token_indices": "token rows: the whole embedding anew",
            "target_parameters": "adapted parameters: each whole one anew",
        }
        return tuple(words for field, words in told.items() if fields.get(field))

    @property
    def parts(self) -> Iterator[tuple[str, Any]]:
        """Names, and what tells one from another, of all that layers of one kind have alike."""
        return iter(self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a model is trained."""

    attention: str
    """`flash_attention_2`, `sdpa` or `eager`."""
    checkpointing: bool
    """Whether layers are recomputed in the backward pass (gradient checkpointing)."""
    lora: LoraSetting | PeftSetting | None = None
    """None: all parameters are trained."""
    quantised: frozenset[str] = frozenset()
    """Full names of the linear layers with quantised weights."""
    quantised_experts: tuple[FusedExperts, ...] = ()
    liger: bool = False
    router_loss: bool = False
    """Whether the load-balancing loss is computed."""
    autocast: bool = False
    """Whether the forward pass runs under bfloat16 autocast, and its outputs become float32, as accelerate has it."""
    loss: Literal["model", "chunks"] = "model"
    """As `TrainingStep.loss`."""
    keeps_outputs: bool = True
    """Whether the model's outputs, logits included, live until the backward pass is over."""
    unquantised_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of what is not quantised beside what is."""
    reentrant: bool = True
    """Whether checkpointing beside quantised weights is re-entrant."""
    wide: frozenset[str] = frozenset()
    """Full names of the parameters that are made float32 where all is trained."""
    device: Literal["cuda", "cpu"] = "cuda"
    """The device whose kernels, and whose rules of autocast, are simulated."""

    @property
    def is_quantised(self) -> bool:
        """Whether any weights are: then all other parameters have `unquantised_dtype`."""
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


def training_setting(plan: Plan, flags: FlatArguments, run: TrainingRun) -> Setting:
    """How the plan's model is trained on a GPU.

    Under mixed precision FSDP gathers all weights in bfloat16, DeepSpeed makes them bfloat16: neither has autocast.
    """
    is_bfloat16 = run.upcasts or run.makes_bfloat16
    packed = plan.quantised_experts
    return Setting(
        attention=training_attention(plan),
        checkpointing=flags.gradient_checkpointing,
        lora=_adapter_setting(plan, "bfloat16" if is_bfloat16 else run.step.adapter_dtype),
        quantised=plan.quantised_layers,
        quantised_experts=tuple(fused for fused in plan.skeleton.experts if fused.parameter in packed),
        liger=plan.kernels is not None
        and plan.kernels.supported
        and (plan.quantization_config is None or run.step.quantised_liger),
        router_loss=flags.load_balancing_loss,
        autocast=run.has_autocast(trains_all=plan.adapter is None),
        loss=run.step.loss,
        keeps_outputs=run.step.keeps_outputs,
        unquantised_dtype="bfloat16" if is_bfloat16 else run.step.unquantised_dtype,
        reentrant=run.step.reentrant,
        wide=wide_parameters(plan, run),
    )


def _adapter_setting(plan: Plan, dtype: Literal["float32", "bfloat16"]) -> LoraSetting | PeftSetting | None:
    if plan.adapter is None or plan.targets is None:
        return None
    facts, rank_of_experts = plan.adapter.facts(), plan.request.lora_experts
    if facts["settings"]:
        fields = plan.adapter.config(plan.targets, base="", revision=None)
        # what it starts from changes nothing, and some of it can't be computed on `meta`
        fields |= {"init_lora_weights": True, "inference_mode": False}
        tensors = ((tensor.name.removeprefix(ADAPTED), tensor.shape) for tensor in plan.adapter_tensors())
        return PeftSetting(config=json.dumps(fields, sort_keys=True), tensors=frozenset(tensors), dtype=dtype)
    return LoraSetting(
        layers=frozenset(layer.name for layer in plan.targets.layers),
        rank=facts["r"],
        alpha=facts["alpha"],
        dropout=facts["dropout"],
        dtype=dtype,
        experts=plan.skeleton.experts if rank_of_experts else (),
        expert_rank=rank_of_experts or 0,
    )


def training_attention(plan: Plan) -> str:
    """The implementation of attention.

    Without a GPU here, it is the requested one if the model supports it; with a GPU, the one that works here.
    """
    if cuda_problem() is not None and attention_support(type(plan.skeleton.model)).flash:
        return plan.attention.requested
    return plan.attention.effective


def wide_parameters(plan: Plan, run: TrainingRun) -> frozenset[str]:
    """Names of the trained parameters that `TrainingStep.embedding_dtype` makes float32 in the step."""
    if plan.adapter is not None or run.step.embedding_dtype == "bfloat16" or run.upcasts or run.makes_bfloat16:
        return frozenset()
    if training_attention(plan) == "flash_attention_2":
        return frozenset()
    model = plan.skeleton.model
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    return frozenset(
        name for name, value in model.named_parameters() if id(value) in ends or "norm" in name.rpartition(".")[0]
    )
