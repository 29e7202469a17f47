"""The memory that training takes on each GPU: weights, gradients, optimizer states, activations and all the rest.

Weights and gradients are counted, optimizer states follow their libraries' formulas, activations are simulated (see
`activations.py`). The step is the one of Open Instruct's SFT script on what `load_prepared` gives, without autocast:
`outputs = model(**batch, use_cache=False)`, backward, `optimizer.step()`, `zero_grad()`; `outputs`, logits included,
lives until the next step. "GB" are 10⁹ bytes; what a GPU sold as 80 GB has beyond that is left for fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import floor, inf, sqrt
from typing import TYPE_CHECKING, Any, Literal

from ..errors import FtloadError, said_by
from ..plan.plan import Plan
from ..plan.planning import make_plan
from ..report.report import count_parameters
from ..system.cuda import cuda_problem
from .activations import Batch, Footprint, LoraSetting, Moment, Setting, Simulation, layer_bytes

if TYPE_CHECKING:
    from ..flags.declared import FlatArguments


GPU_GIGABYTES = (16, 24, 32, 40, 48, 80, 96, 141, 192)
"""The memories that GPUs are sold with."""


GIGABYTE = 10**9


CONTEXT_BYTES = 600_000_000
"""What the CUDA driver and the libraries' kernels occupy before the first tensor; `nvidia-smi` shows 0.4 to 0.7 GB."""


ASSUMED_LENGTH = 4096
"""Tokens in a sequence where `max_seq_length` is not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How several GPUs divide the states of training."""

    method: Literal["fsdp", "zero"]
    gpus: int
    stage: int = 3
    """1 divides optimizer states, 2 gradients too, 3 weights too (arXiv:1910.02054); FSDP is 3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of the memory at its peak."""

    name: str
    bytes: int
    origin: str
    """Where the number comes from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What fits on a GPU."""

    gigabytes: int
    fits: bool
    largest_batch: int
    """Sequences of the length asked for; 0 if not even one fits."""
    largest_length: int
    """Tokens of each sequence in a batch of the size asked for; 0 if not even one fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """The peak of one training step on one GPU, after the first step: optimizer states are there."""

    method: str
    """`full`, `lora` or `qlora`."""
    batch_size: int
    length: int
    length_origin: str
    attention: str
    sharding: Sharding | None
    parts: tuple[Part, ...]
    """Of the moment when memory is highest; they add up to `total`."""
    moment: str
    """That moment."""
    moments: tuple[Moment, ...]
    """The step's other peaks, beside what is there all the time."""
    gradient_bytes: int
    """Of all gradients on one GPU; at the peak, fewer may be there."""
    saved_bytes: int
    """Saved for the backward pass."""
    fits: tuple[Fit, ...]
    """For each of `GPU_GIGABYTES`."""

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return sum(part.bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "total_bytes": self.total}


@dataclass(frozen=True, kw_only=True, slots=True)
class NoEstimate:
    """A way of training that this model can't have, or whose step can't be simulated."""

    method: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


METHODS = ("full", "lora", "qlora")


def estimate_training_memory(
    plan: Plan, flags: FlatArguments, *, sharding: Sharding | None = None
) -> TrainingMemory | NoEstimate:
    """The memory of training what the plan prepares, with these flags."""
    method = plan.strategy.name if plan.adapter is not None else "full"
    length, length_origin = _length(plan, flags)
    size = flags.per_device_train_batch_size
    setting = training_setting(plan, flags)
    share = _Share(sharding, accumulates=flags.gradient_accumulation_steps > 1)
    if share.weights > 1 and setting.four_bit:
        reason = "its 4-bit weights are stored as uint8, which FSDP and ZeRO-3 do not divide: they flatten floats"
        return NoEstimate(method=method, reason=reason)
    try:
        steps = _Steps(plan, flags, setting)
        footprint = steps.run(size, length, padded=size > 1)
        by_size = steps.curves(max(size, 2), length)
        by_length = steps.curves(size, length)
    except Exception as error:  # a model's own code may do what has no meaning without data
        return NoEstimate(method=method, reason=f"its training step can't be simulated: {said_by(error)}")
    lasting = _lasting_parts(plan, flags, sharding, share)
    always = sum(part.bytes for part in lasting)
    gathered = _gathered_bytes(plan, setting) if share.weights > 1 else 0
    gradients = sum(count * item for count, item in _trainable(plan)) // share.gradients
    update = Moment(
        name="optimizer step", activations=0, logits=0, gradients=gradients,
        temporary=_optimizer_temporaries(plan, flags, sharding) // share.optimizer,
    )  # fmt: skip
    moments = (*(share.of_moment(moment, gathered) for moment in footprint.moments), update)
    peak = max(moments, key=lambda moment: moment.total)

    def fit(gigabytes: int) -> Fit:
        room = gigabytes * GIGABYTE - always
        fits = peak.total <= room
        # what sharding takes off a moment, or adds to it, does not depend on the batch
        rooms = [room + before.total - after.total for before, after in zip(footprint.moments, moments, strict=False)]
        if update.total > room:
            largest_size = largest_length = 0
        else:
            largest_size = _whole(c.largest_size(r, length) for c, r in zip(by_size, rooms, strict=True))
            largest_length = _whole(c.largest_length(r, size) for c, r in zip(by_length, rooms, strict=True))
        if size == 1 and largest_size < 2:
            largest_size = int(fits)
        return Fit(gigabytes=gigabytes, fits=fits, largest_batch=largest_size, largest_length=largest_length)

    return TrainingMemory(
        method=method,
        batch_size=size,
        length=length,
        length_origin=length_origin,
        attention=setting.attention,
        sharding=sharding,
        parts=(*lasting, *_moment_parts(peak, share, gradients, setting, gathered)),
        moment=peak.name,
        moments=moments,
        gradient_bytes=gradients,
        saved_bytes=footprint.saved,
        fits=tuple(fit(gigabytes) for gigabytes in GPU_GIGABYTES),
    )


def _whole(bounds: Iterable[float]) -> int:
    return max(0, floor(min(bounds)))


def compare_methods(
    plan: Plan, flags: FlatArguments, *, sharding: Sharding | None = None
) -> tuple[TrainingMemory | NoEstimate, ...]:
    """The same for full fine-tuning, LoRA and QLoRA of the plan's model, in this order."""
    estimates: list[TrainingMemory | NoEstimate] = []
    for method in METHODS:
        try:
            estimates.append(estimate_training_memory(_other_plan(plan, method), flags, sharding=sharding))
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
    request = replace(plan.request, strategy=name, base="copy")
    return make_plan(request, plan.sources, plan.configuration, plan.tokenizer, plan.checkpoint, plan.skeleton)


def training_setting(plan: Plan, flags: FlatArguments) -> Setting:
    """How the plan's model is trained on a GPU.

    Attention is what was asked for if the model can do it, whether this machine can or not; with a GPU here, it is what
    works here.
    """
    attention = plan.attention.effective
    if cuda_problem() is not None and getattr(plan.skeleton.model, "_supports_flash_attn", False):
        attention = plan.attention.requested
    lora = None
    if plan.targets is not None:
        lora = LoraSetting(
            layers=frozenset(layer.name for layer in plan.targets.layers),
            rank=plan.request.lora_rank,
            alpha=plan.request.lora_alpha,
            dropout=plan.request.lora_dropout,
        )
    return Setting(
        attention=attention,
        checkpointing=flags.gradient_checkpointing,
        lora=lora,
        four_bit=plan.quantised_layers,
        liger=plan.kernels is not None and plan.kernels.supported,
        router_loss=flags.load_balancing_loss,
    )


def _length(plan: Plan, flags: FlatArguments) -> tuple[int, str]:
    if flags.max_seq_length is not None:
        return flags.max_seq_length, "max_seq_length"
    most = getattr(plan.skeleton.config.get_text_config(), "max_position_embeddings", None) or ASSUMED_LENGTH
    if most < ASSUMED_LENGTH:
        return most, "max_seq_length is not given: the longest that the model takes"
    return ASSUMED_LENGTH, f"max_seq_length is not given: {ASSUMED_LENGTH:,} is assumed"


def _trainable(plan: Plan) -> list[tuple[int, int]]:
    """Elements and bytes of an element of each tensor that is trained."""
    if plan.adapter is not None:
        return [(tensor.parameters, 4) for tensor in plan.adapter_tensors()]
    return [
        (value.numel(), value.element_size())
        for name, value in plan.skeleton.model.named_parameters()
        if name not in plan.skeleton.never_trained
    ]


def _lasting_parts(plan: Plan, flags: FlatArguments, sharding: Sharding | None, share: _Share) -> tuple[Part, ...]:
    """What is there all the time."""
    weights, adapter = _weight_bytes(plan)
    optimizer = optimizer_bytes(plan, flags, sharding=sharding)
    return (
        Part(
            name="weights",
            bytes=-(-weights // share.weights),
            origin=_shared("counted from the checkpoint's headers", share.weights),
        ),
        Part(
            name="adapter",
            bytes=-(-adapter // share.weights),
            origin=_shared("counted from the layers' shapes, in float32", share.weights),
        ),
        replace(optimizer, bytes=-(-optimizer.bytes // share.optimizer)),
        Part(
            name="CUDA context",
            bytes=CONTEXT_BYTES,
            origin="assumed: driver and kernels; not part of torch.cuda.max_memory_allocated",
        ),
    )


def _weight_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of the base and of the adapter as `load_prepared` returns them."""
    total = sum(row["bytes"] for row in count_parameters(plan)["in_training"].values())
    adapter = sum(tensor.nbytes for tensor in plan.adapter_tensors())
    return total - adapter, adapter


def optimizer_bytes(plan: Plan, flags: FlatArguments, *, sharding: Sharding | None = None) -> Part:
    """All states of the optimizer that Open Instruct's SFT script creates.

    QLoRA: bitsandbytes' paged AdamW; two states an element, float32, or with `use_8bit_optimizer` one byte each and a
    float32 maximum for each 256 elements, for tensors of at least 4096 elements; two tables of 256 float32 are shared
    (bitsandbytes `optim/optimizer.py`). Otherwise torch's AdamW: two states in the parameter's dtype, and a float32
    count of steps for each tensor, which lies on the GPU with `fused_optimizer`. DeepSpeed (`Sharding.method` is
    `zero`) keeps both states and a copy of the weights in float32 (arXiv:1910.02054, section 3.1).
    """
    trainable = _trainable(plan)
    elements = sum(count for count, _ in trainable)
    name = "optimizer states"
    if sharding is not None and sharding.method == "zero":
        origin = "formula: AdamW under DeepSpeed, 12 bytes a trained parameter (two states and the weight in float32)"
        return Part(name=name, bytes=12 * elements, origin=_shared(origin, sharding.gpus))
    if plan.quantization_config is not None:
        paged = "; paged: may move to the host's memory"
        if flags.use_8bit_optimizer:
            eight = [count for count, _ in trainable if count >= 4096]
            four = elements - sum(eight)
            size = 2 * sum(eight) + 8 * sum(-(-count // 256) for count in eight) + 8 * four + (2048 if eight else 0)
            origin = f"formula: bitsandbytes' 8-bit AdamW, 2 bytes a trained parameter and 8 for each 256{paged}"
        else:
            size = 8 * elements
            origin = f"formula: bitsandbytes' AdamW, 8 bytes a trained parameter{paged}"
    else:
        size = sum(2 * count * item for count, item in trainable)
        if flags.fused_optimizer:
            size += 4 * len(trainable)
        origin = "formula: torch's AdamW, two states in the dtype of each trained parameter"
        if sharding is not None:
            origin += " (without mixed precision, under which FSDP keeps weights and states in float32)"
        if flags.use_8bit_optimizer:
            origin += " (use_8bit_optimizer is for QLoRA alone)"
    return Part(name=name, bytes=size, origin=_shared(origin, sharding.gpus if sharding else 1))


def _optimizer_temporaries(plan: Plan, flags: FlatArguments, sharding: Sharding | None) -> int:
    """What the step itself allocates: torch's unfused AdamW holds the roots of all second states at once.

    DeepSpeed turns its share of the gradients into float32 (`stage_1_and_2.py`).
    """
    if sharding is not None and sharding.method == "zero":
        return 4 * sum(count for count, _ in _trainable(plan))
    if plan.quantization_config is not None or flags.fused_optimizer:
        return 0
    return sum(count * item for count, item in _trainable(plan))


def _shared(origin: str, gpus: int) -> str:
    return origin if gpus == 1 else f"{origin}; a share of 1/{gpus}"


class _Share:
    """What each GPU holds of weights, gradients and optimizer states: one part in so many."""

    def __init__(self, sharding: Sharding | None, *, accumulates: bool) -> None:
        gpus = 1 if sharding is None else sharding.gpus
        stage = 0 if sharding is None else 3 if sharding.method == "fsdp" else sharding.stage
        self.optimizer = gpus if stage >= 1 else 1
        # FSDP keeps whole gradients while it accumulates (`no_sync`, which accelerate enters then)
        whole = sharding is not None and sharding.method == "fsdp" and accumulates
        self.gradients = gpus if stage >= 2 and not whole else 1
        self.weights = gpus if stage >= 3 else 1

    def of_moment(self, moment: Moment, gathered: int) -> Moment:
        """`gathered`: the weights that are whole while they are worked with."""
        return replace(moment, gradients=-(-moment.gradients // self.gradients), temporary=moment.temporary + gathered)


def _gathered_bytes(plan: Plan, setting: Setting) -> int:
    """The weights that each GPU holds whole: two layers, of which one is on its way, and all outside the layers."""
    layers, outside = layer_bytes(plan.skeleton.model, setting)
    return 2 * max(layers) + outside


def _moment_parts(peak: Moment, share: _Share, gradients: int, setting: Setting, gathered: int) -> tuple[Part, ...]:
    """`gradients` are the bytes of all of them on one GPU."""
    kernels = f"{setting.attention} attention" + (", Liger kernels" if setting.liger else "")
    simulated = f"measured by simulation: one step on `meta`, {kernels}"
    checkpointing = ", gradient checkpointing" if setting.checkpointing else ""
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
            origin=_shared(f"counted: those that are there at the peak{some}", share.gradients),
        ),
        Part(name="activations", bytes=peak.activations, origin=f"{simulated}{checkpointing}"),
        Part(name="logits and loss", bytes=peak.logits, origin=simulated),
        Part(name="temporary buffers", bytes=peak.temporary, origin=temporary),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Curve:
    """Bytes at a moment as they grow with a batch of b sequences of s tokens: c + e · s + b · (x · s + y · s²)."""

    c: float
    e: float
    x: float
    y: float

    def largest_size(self, room: int, length: int) -> float:
        """The b that fills `room` bytes."""
        each = self.x * length + self.y * length**2
        return (room - self.c - self.e * length) / each if each > 0 else inf

    def largest_length(self, room: int, size: int) -> float:
        """The s that fills `room` bytes."""
        left, linear, square = room - self.c, self.e + size * self.x, size * self.y
        if left <= 0 or square <= 0:
            return left / linear if linear > 0 else inf
        return (sqrt(linear**2 + 4 * square * left) - linear) / (2 * square)


class _Steps:
    """The simulated steps of one model, setting and set of flags."""

    def __init__(self, plan: Plan, flags: FlatArguments, setting: Setting) -> None:
        self._simulation = Simulation(plan.skeleton.model, setting)
        self._accumulate = flags.gradient_accumulation_steps > 1
        self._packing = flags.packing
        self._masks = setting.attention == "sdpa"
        self._known: dict[Batch, Footprint] = {}

    def run(self, size: int, length: int, *, padded: bool) -> Footprint:
        """Simulate a batch; where sequences are padded, sdpa needs a mask."""
        batch = Batch(size=size, length=length, padded=padded and self._masks)
        if self._packing:
            # one long sequence without padding; sdpa keeps its parts from each other by a mask
            batch = Batch(size=1, length=size * length, padded=self._masks)
        if batch not in self._known:
            self._known[batch] = self._simulation.run(batch, accumulate=self._accumulate)
        return self._known[batch]

    def curves(self, size: int, length: int) -> tuple[_Curve, ...]:
        """How each moment grows, from four batches: this one, twice as many sequences, twice as long ones, and both."""
        padded = size > 1  # what is alone in its batch is not padded
        batches = ((size, length), (2 * size, length), (size, 2 * length), (2 * size, 2 * length))
        curves = []
        for moments in zip(*(self.run(b, s, padded=padded).moments for b, s in batches), strict=True):
            once, more, longer, both = (moment.total for moment in moments)
            each, each_longer = (more - once) / size, (both - longer) / size
            square = (each_longer - 2 * each) / 2
            if abs(square) < each / 1000:
                square = 0.0  # the allocator's blocks
            constant, constant_longer = 2 * once - more, 2 * longer - both
            curves.append(
                _Curve(
                    c=2 * constant - constant_longer,
                    e=(constant_longer - constant) / length,
                    x=(each - square) / length,
                    y=square / length**2,
                )
            )
        return tuple(curves)
