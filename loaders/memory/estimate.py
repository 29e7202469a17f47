"""The memory that training takes on each GPU: weights, gradients, optimizer states, activations and all the rest.

Weights and gradients are counted, optimizer states follow their libraries' formulas (`optimizer.py`), activations are
simulated (`step/simulation.py`). The step is the one that a trainer runs on what `load_prepared` gives: forward pass,
under autocast with mixed precision, backward pass, `optimizer.step()`, `zero_grad()`. "GB" are 10⁹ bytes; what a GPU
sold as 80 GB has beyond that is left for fragmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import FtloadError, said_by
from ..plan.plan import Plan
from ..plan.planning import make_plan
from ..strategy import STRATEGIES
from ..trainers.registry import TRAINERS
from .optimizer import optimizer_bytes, optimizer_temporaries
from .sharding import DividedBase, Shares, one_share, shares_of, with_share
from .step.cut_model import layer_bytes
from .step.setting import PeftSetting, Setting, training_setting
from .step.simulation import Moment
from .trained import beside_base, trained_tensors
from .training_memory import NoEstimate, Part, TrainingMemory
from .training_run import TrainingRun
from .what_fits import GPU_GIGABYTES, Fits, Footprints, Simulations

if TYPE_CHECKING:
    from ..flags.declared import FlatArguments
    from ..flags.request import Request


CONTEXT_BYTES = 600_000_000
"""What the CUDA driver and the libraries' kernels occupy before the first tensor; `nvidia-smi` shows 0.4 to 0.7 GB."""
ASSUMED_LENGTH = 4096
"""Tokens in a sequence where `max_seq_length` is not given."""
_DTYPES = {2: "bfloat16", 4: "float32"}
METHODS = ("full", "lora", "qlora")
_ALONE = TrainingRun()


def estimate_training_memory(
    plan: Plan,
    flags: FlatArguments,
    run: TrainingRun = _ALONE,
    *,
    simulations: Simulations | None = None,
    gpus: tuple[int, ...] = GPU_GIGABYTES,
) -> TrainingMemory | NoEstimate:
    """The memory of training what the plan prepares, with these flags.

    Estimates that are given the same `simulations` simulate nothing twice. `gpus` are those, by their gigabytes, of
    which `fits` says what fits.
    """
    simulations = simulations or Simulations()
    sharding = run.sharding
    method = plan.strategy.name if plan.adapter is not None else "full"
    length, length_origin = _length(plan, flags)
    size = flags.per_device_train_batch_size
    setting = training_setting(plan, flags, run)
    shares = shares_of(run, accumulates=flags.gradient_accumulation_steps > 1)
    if shares.weights > 1 and setting.is_quantised and sharding is not None and not sharding.is_fsdp:
        return NoEstimate(method=method, reason="how ZeRO-3 divides 4-bit weights is not known here; for --fsdp it is")
    try:
        footprints = Footprints(plan, flags, setting, simulations)
        footprint = footprints.of(size, length, padded=size > 1)
        fits = Fits(footprints, size=size, length=length) if gpus else None
    except Exception as error:  # a model's own code may do what has no meaning without data
        return NoEstimate(method=method, reason=f"its training step can't be simulated: {said_by(error)}")
    base = DividedBase.of(plan, run)
    lasting = _lasting_parts(plan, base, flags, run, shares)
    lasting_bytes = sum(part.bytes for part in lasting)
    gathered = _gathered_bytes(plan, base, setting) if shares.weights > 1 else 0
    update = _update(plan, flags, run, shares)
    gradients = update.gradients
    moments = tuple(shares.divide_gradients(moment, gathered) for moment in footprint.moments)
    recomputed = tuple(
        shares.divide_gradients(moment, gathered)
        for moment in _recomputed(plan, flags, setting, size, length, simulations)
    )
    peak = max((*moments, update), key=lambda moment: moment.total)
    return TrainingMemory(
        method=method,
        batch_size=size,
        length=length,
        length_origin=length_origin,
        attention=setting.attention,
        sharding=sharding,
        parts=(*lasting, *_parts_at(peak, shares, gradients, setting, gathered, run)),
        moment=peak.name,
        all_logits=run.step.loss == "model" and not setting.liger,
        moments=(*moments, update),
        gradient_bytes=gradients,
        saved_bytes=footprint.saved,
        with_checkpointing=lasting_bytes + max(one.total for one in (*recomputed, update)) if recomputed else None,
        fits=tuple(
            fits.on(gigabytes, lasting=lasting_bytes, moments=moments, update=update) for gigabytes in gpus if fits
        ),
    )


def least_bytes(plan: Plan, flags: FlatArguments, run: TrainingRun = _ALONE) -> int:
    """What training takes at least, whatever the batch: what is there all the time, and the optimizer's step."""
    shares = shares_of(run, accumulates=flags.gradient_accumulation_steps > 1)
    lasting = _lasting_parts(plan, DividedBase.of(plan, run), flags, run, shares)
    return sum(part.bytes for part in lasting) + _update(plan, flags, run, shares).total


def _update(plan: Plan, flags: FlatArguments, run: TrainingRun, shares: Shares) -> Moment:
    """The optimizer's step."""
    return Moment(
        name="optimizer step", activations=0, logits=0,
        gradients=sum(one.nbytes for one in trained_tensors(plan, run)) // shares.gradients,
        temporary=optimizer_temporaries(plan, flags, run) // shares.optimizer,
    )  # fmt: skip


def _recomputed(
    plan: Plan, flags: FlatArguments, setting: Setting, size: int, length: int, simulations: Simulations
) -> tuple[Moment, ...]:
    """The moments of the same step with gradient checkpointing; none where it is on already, or the model has none."""
    if setting.checkpointing:
        return ()
    with suppress(Exception):  # transformers refuses it, or, as above, a model's own code does
        footprints = Footprints(plan, flags, replace(setting, checkpointing=True), simulations)
        return footprints.of(size, length, padded=size > 1).moments
    return ()


def compare_methods(
    plan: Plan, flags: FlatArguments, run: TrainingRun = _ALONE, *, simulations: Simulations | None = None
) -> tuple[TrainingMemory | NoEstimate, ...]:
    """The same for full fine-tuning, LoRA and QLoRA of the plan's model, in this order."""
    estimates: list[TrainingMemory | NoEstimate] = []
    for method in METHODS:
        try:
            other = _other_plan(plan, method)
            estimates.append(estimate_training_memory(other, flags, run, simulations=simulations))
        except FtloadError as error:
            estimates.append(NoEstimate(method=method, reason=error.message))
    return tuple(estimates)


def _other_plan(plan: Plan, method: str) -> Plan:
    """The plan of the same model for another method."""
    name = method
    if method == "full":
        name = "liger" if plan.request.use_liger_kernel else "standard"
    if name == plan.strategy.name:
        return plan
    return plan_again(plan, replace(plan.request, strategy=name, base="copy"))


def plan_again(plan: Plan, request: Request) -> Plan:
    """The plan of the same sources for another request. Raises `FtloadError` where they can't be prepared so."""
    skeleton, quantised = plan.skeleton, STRATEGIES[request.strategy].quantisation is not None
    if request.quantize_experts and quantised and plan.strategy.quantisation is None:
        skeleton = skeleton.with_fused_experts()
    return make_plan(request, plan.sources, plan.configuration, plan.tokenizer, plan.merged, skeleton)


def _length(plan: Plan, flags: FlatArguments) -> tuple[int, str]:
    """Tokens of a sequence, and where the number comes from."""
    if flags.max_seq_length is not None:
        return flags.max_seq_length, "max_seq_length"
    most = getattr(plan.skeleton.config.get_text_config(), "max_position_embeddings", None) or ASSUMED_LENGTH
    if most < ASSUMED_LENGTH:
        return most, "max_seq_length is not given: the longest that the model takes"
    return ASSUMED_LENGTH, f"max_seq_length is not given: {ASSUMED_LENGTH:,} is assumed"


def _lasting_parts(
    plan: Plan, base: DividedBase, flags: FlatArguments, run: TrainingRun, shares: Shares
) -> tuple[Part, ...]:
    """What is there all the time."""
    adapter = beside_base(plan, run)
    weights = with_share("counted from the checkpoint's headers", shares.weights)
    if base.whole and shares.weights > 1:
        weights += f", {base.whole:,} bytes aside: {base.reason}"
    optimizer = optimizer_bytes(plan, flags, run)
    return (
        Part(
            name="weights",
            bytes=base.whole + one_share(base.divided, shares.weights),
            origin=weights,
        ),
        Part(
            name="adapter",
            bytes=one_share(sum(adapter.values()), shares.weights),
            origin=with_share(_origin_of(adapter, plan, run), shares.weights),
        ),
        replace(optimizer, bytes=one_share(optimizer.bytes, shares.optimizer)),
        Part(
            name="CUDA context",
            bytes=CONTEXT_BYTES,
            origin="assumed: driver and kernels; not part of torch.cuda.max_memory_allocated",
        ),
    )


def _origin_of(adapter: Mapping[str, int], plan: Plan, run: TrainingRun) -> str:
    """Where an adapter's bytes come from, and which are for what where some are for more than A and B."""
    widths = {one.kind: one.width for one in trained_tensors(plan, run)}
    if adapter.keys() <= {"A and B"}:
        return f"counted from the layers' shapes, in {_DTYPES[widths.get('A and B', 4)]}"
    told = (
        f"{kind}{f' in {_DTYPES[widths[kind]]}' if kind in widths else ''} {size:,}" for kind, size in adapter.items()
    )
    return f"counted from the shapes, in bytes: {', '.join(told)}"


def _gathered_bytes(plan: Plan, base: DividedBase, setting: Setting) -> int:
    """The weights that each GPU holds whole: two layers, one of them prefetched, and all outside the layers.

    `setting` says in which dtype.
    """
    layers, outside = layer_bytes(plan.skeleton.model, setting, base.codes)
    return 2 * max(map(sum, layers)) + sum(outside)


def _parts_at(
    peak: Moment, shares: Shares, gradients: int, setting: Setting, gathered: int, run: TrainingRun
) -> tuple[Part, ...]:
    """What a moment holds beside what is there all the time; `gradients` are the bytes of all of them on one GPU."""
    kernels = f"{setting.attention} attention" + (", Liger kernels" if setting.liger else "")
    precision = "bfloat16 autocast" if setting.autocast else "no autocast"
    simulated = f"measured by simulation: a step of {TRAINERS[run.trainer].title} on `meta`, {precision}, {kernels}"
    details = ""
    if setting.is_quantised:
        details += f", {setting.unquantised_dtype} beside 4-bit weights"
    if setting.quantised_experts:
        details += ", as many tokens for each expert"
    if isinstance(setting.lora, PeftSetting):
        details += "".join(f", {words}" for words in setting.lora.costs)
    if setting.checkpointing:
        details += ", gradient checkpointing"
    some = f", of {gradients:,} bytes in the end" if peak.gradients < gradients else ""
    temporary = simulated
    if peak.name == "optimizer step":
        temporary = "formula: what the optimizer's step allocates"
    elif gathered:
        temporary += f"; {gathered:,} bytes are gathered weights, counted: two layers and all outside them"
    return (
        Part(
            name="gradients",
            bytes=peak.gradients,
            origin=with_share(f"counted: those that are there at the peak{some}", shares.gradients),
        ),
        Part(name="activations", bytes=peak.activations, origin=f"{simulated}{details}"),
        Part(name="logits and loss", bytes=peak.logits, origin=simulated),
        Part(name="temporary buffers", bytes=peak.temporary, origin=temporary),
    )
