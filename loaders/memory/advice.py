"""What to change of a run's flags so that training fits on a GPU: the shortest list of changes.

All lists of one change are tried, then all of two, and so on; of lists that are equally long, those that alter the
result of training least come first (`changes.py`). So the list that is found is the shortest, and none of its changes
can be left out. Lists that cut sequences are tried only once all others are: first those that leave at least half of
the length. Of the batch sizes and lengths in a list, the largest that fits is taken: first of the lengths, as cutting
loses data.

Every list is tried by an estimate of its own, with the plan that its flags give. Two things save estimates: simulated
steps are shared (`Simulations`), and a list whose weights and optimizer states alone are too large is not simulated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..errors import FtloadError, ResourceError
from ..flags.request import Request, resolve_request
from ..flags.strict import check_strict
from .changes import Change, Kind, changed, flags_of, go_together, harm, in_order, possible_changes, typed
from .estimate import estimate_training_memory, least_bytes, plan_again
from .sharding import Sharding
from .training_memory import NoEstimate, TrainingMemory
from .what_fits import Simulations

if TYPE_CHECKING:
    from ..flags.declared import Arguments
    from ..flags.gpu_sizes import Gpus
    from ..plan.plan import Plan
    from .training_run import TrainingRun


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvisedChange:
    """One change of a list, made after those before it."""

    change: Kind
    words: str
    flags: Mapping[str, Any]
    """The new values of flags, by name."""
    saves_bytes: int
    """Of the peak on each GPU; below 0 where it takes more by itself."""
    total_bytes: int
    """The peak once it is made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """Whether training fits on one kind of GPU, and what to change where it does not."""

    gpus: str
    """As `--fit` names them."""
    gpu_count: int
    gpu_bytes: int
    """Of the memory of each."""
    method: str
    """`full`, `lora` or `qlora`: what the flags ask for."""
    total_bytes: int | None
    """The peak on each GPU with the flags as they were given; None where there is no estimate."""
    reason: str | None
    """Why there is none."""
    fits_as_given: bool
    fits: bool
    """As given, or with these changes."""
    changes: tuple[AdvisedChange, ...]
    """Of the shortest list; empty where it fits as given, and where nothing does."""
    smallest_bytes: int | None
    """The smallest peak that was found, where nothing fits."""
    paged_bytes: int | None
    """Optimizer states that would have to move to the host's memory for that to fit; None where that is no way out."""

    @property
    def flags(self) -> dict[str, Any]:
        """The new values of all flags that are changed, by name."""
        return {name: value for change in self.changes for name, value in change.flags.items()}

    @property
    def command_line(self) -> str:
        """The same, to be appended to the command."""
        return typed(self.flags)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "flags": self.flags, "command_line": self.command_line}


def advise(
    plan: Plan, arguments: Arguments, run: TrainingRun, gpus: Iterable[Gpus], simulations: Simulations
) -> tuple[Advice, ...]:
    """For each kind of GPU, what to change of what was asked for so that it fits.

    `2x80GB` means FSDP on two GPUs; where no number is named, the run's own sharding counts.
    """
    trials: dict[Sharding | None, _Trials] = {}
    advice = []
    for one in gpus:
        sharding = run.sharding
        if one.count is not None:
            sharding = Sharding(method="fsdp", gpus=one.count) if one.count > 1 else None
        if sharding not in trials:
            trials[sharding] = _Trials(plan, arguments, replace(run, sharding=sharding), simulations)
        advice.append(_advise(trials[sharding], one, 1 if sharding is None else sharding.gpus))
    return tuple(advice)


def fit_error(advice: Iterable[Advice]) -> ResourceError | None:
    """The error that ends the command where nothing fits on one of the GPUs; None where something does on each."""
    failed = [one for one in advice if not one.fits]
    if not failed:
        return None
    messages, hint = [], None
    for one in failed:
        if one.smallest_bytes is None:
            messages.append(f"whether `{one.method}` fits on `{one.gpus}` is not known: {one.reason}")
            continue
        hint = hint or "take more GPUs, as in `--fit 2x80GB`, larger ones, or a smaller model"
        messages.append(
            f"nothing fits on `{one.gpus}`: with all that can be changed, training takes {one.smallest_bytes:,} bytes"
        )
        if one.paged_bytes is not None:
            hint = (
                f"the optimizer is paged: on `{one.gpus}` it may still run, slowly, with up to {one.paged_bytes:,} "
                "bytes of its states in the host's memory"
            )
    return ResourceError("; ".join(messages), hint=hint)


def _advise(trials: _Trials, gpus: Gpus, count: int) -> Advice:
    given = trials.estimate(())
    known = isinstance(given, TrainingMemory)
    fits_as_given = known and given.total <= gpus.bytes
    found = trials.shortest(gpus.bytes) if known and not fits_as_given else None
    smallest = trials.smallest() if known and not fits_as_given and found is None else None
    changes: list[AdvisedChange] = []
    before = given.total if known else 0
    for change, total in found or ():
        changes.append(
            AdvisedChange(
                change=change.kind, words=change.words, flags=change.flags, saves_bytes=before - total,
                total_bytes=total,
            )
        )  # fmt: skip
        before = total
    return Advice(
        gpus=str(gpus),
        gpu_count=count,
        gpu_bytes=gpus.bytes,
        method=given.method,
        total_bytes=given.total if known else None,
        reason=None if known else given.reason,
        fits_as_given=fits_as_given,
        fits=fits_as_given or found is not None,
        changes=tuple(changes),
        smallest_bytes=None if smallest is None else smallest[1].total,
        paged_bytes=None if smallest is None else trials.paged_bytes(*smallest, gpus.bytes),
    )


class _Trials:
    """Estimates of one run with its flags changed in all ways that there are."""

    def __init__(self, plan: Plan, arguments: Arguments, run: TrainingRun, simulations: Simulations) -> None:
        self._plan, self._arguments, self._run, self._simulations = plan, arguments, run, simulations
        self._quantised = plan.strategy.quantisation is not None
        self._plans: dict[tuple[Any, ...], Plan | None] = {_planned_by(arguments): plan}
        self._estimates: dict[str, tuple[tuple[Change, ...], TrainingMemory | NoEstimate]] = {}
        given = self.estimate(())
        self._possible: dict[Kind, tuple[Change, ...]] = {}
        self._length = given.length if isinstance(given, TrainingMemory) else 0
        if isinstance(given, TrainingMemory):
            possible = possible_changes(plan, arguments, length=given.length, sharding=run.sharding)
            in_4_bits = self._quantised or ("qlora" in possible and self._can_be_prepared(possible["qlora"][0]))
            for kind, ways in possible.items():
                if self._can_be_prepared(ways[0]) and go_together((kind,), quantised=in_4_bits):
                    self._possible[kind] = ways

    def shortest(self, room: int) -> list[tuple[Change, int]] | None:
        """The shortest list that fits into `room` bytes, each change with the peak once it is made."""
        for possible in self._stages():
            changes = self._shortest_of(possible, room)
            if changes is not None:
                peaks = [self.estimate(changes[:number]) for number in range(1, len(changes) + 1)]
                totals = [peak.total for peak in peaks if isinstance(peak, TrainingMemory)]
                if len(totals) == len(changes):
                    return list(zip(changes, totals, strict=True))
        return None

    def smallest(self) -> tuple[tuple[Change, ...], TrainingMemory]:
        """The smallest estimate of all lists of changes, each as great as it can be."""
        greatest = [ways[-1] for ways in self._possible.values()]
        best: tuple[tuple[Change, ...], TrainingMemory] | None = None
        for count in range(len(greatest), -1, -1):
            for chosen in combinations(greatest, count):
                if not go_together(tuple(change.kind for change in chosen), quantised=self._quantised):
                    continue
                changes = in_order(chosen)
                if best is not None and not self._may_take_less(changes, best[1].total):
                    continue
                found = self.estimate(changes)
                if isinstance(found, TrainingMemory) and (best is None or found.total < best[1].total):
                    best = changes, found
        assert best is not None, "the list without changes has an estimate"
        return best

    def paged_bytes(self, changes: tuple[Change, ...], peak: TrainingMemory, room: int) -> int | None:
        """The optimizer's states, where training would fit but for them, and they may move to the host's memory.

        bitsandbytes' paged optimizer lets the driver move them (arXiv:2305.14314, section 3). They come back for the
        optimizer's step, when activations are gone.
        """
        arguments = changed(self._arguments, changes)
        plan = self._plan_of(arguments)
        is_paged = plan is not None and plan.strategy.quantisation is not None and self._run.step.named_optimizer
        if plan is None or not is_paged or self._run.sharding is not None:
            return None
        states = sum(part.bytes for part in peak.parts if part.name == "optimizer states")
        fits = peak.total - states <= room and least_bytes(plan, arguments.flat, self._run) <= room
        return states if fits else None

    def estimate(self, changes: tuple[Change, ...]) -> TrainingMemory | NoEstimate:
        """The memory with these changes, by a plan of their own."""
        key = typed(flags_of(changes))
        if key not in self._estimates:
            arguments = changed(self._arguments, changes)
            plan = self._plan_of(arguments)
            if plan is None:
                estimate = NoEstimate(method="", reason="it can't be prepared so")
            else:
                estimate = estimate_training_memory(
                    plan, arguments.flat, self._run, simulations=self._simulations, gpus=()
                )
            self._estimates[key] = changes, estimate
        return self._estimates[key][1]

    def _can_be_prepared(self, change: Change) -> bool:
        return (
            change.kind not in ("liger", "lora", "qlora")
            or self._plan_of(changed(self._arguments, (change,))) is not None
        )

    def _stages(self) -> Iterator[dict[Kind, tuple[Change, ...]]]:
        """What is tried first, and what only where that does not fit: to cut sequences, down to half, and further."""
        lengths = self._possible.get("length", ())
        halves = tuple(change for change in lengths if 2 * change.flags["max_seq_length"] >= self._length)
        possible = self._possible.copy()
        possible.pop("length", None)
        yield possible
        for ways in (halves, lengths):
            if ways:
                possible["length"] = ways
                yield possible

    def _shortest_of(self, possible: dict[Kind, tuple[Change, ...]], room: int) -> tuple[Change, ...] | None:
        """The shortest list of such changes that fits into `room` bytes; of equally long ones, the mildest."""
        for count in range(1, len(possible) + 1):
            for kinds in sorted(combinations(possible, count), key=harm):
                if go_together(kinds, quantised=self._quantised):
                    changes = self._least_changes({kind: possible[kind] for kind in kinds}, room)
                    if changes is not None:
                        return changes
        return None

    def _least_changes(self, possible: Mapping[Kind, tuple[Change, ...]], room: int) -> tuple[Change, ...] | None:
        """The least change of each kind that fits into `room` bytes together; None if even the greatest do not."""
        changes = {kind: ways[-1] for kind, ways in possible.items()}
        if not self._fits(changes.values(), room):
            return None
        for kind in ("length", "batch"):
            if kind in changes:
                ways = possible[kind]
                # the last one fits
                number = bisect_left(
                    ways[:-1], True, key=lambda way: self._fits((changes | {way.kind: way}).values(), room)
                )
                changes[kind] = ways[number]
        return in_order(changes.values())

    def _fits(self, changes: Iterable[Change], room: int) -> bool:
        changes = in_order(changes)
        if not self._may_take_less(changes, room):
            return False
        estimate = self.estimate(changes)
        return isinstance(estimate, TrainingMemory) and estimate.total <= room

    def _may_take_less(self, changes: tuple[Change, ...], room: int) -> bool:
        """Whether what does not depend on the batch fits into `room` bytes."""
        arguments = changed(self._arguments, changes)
        plan = self._plan_of(arguments)
        return plan is not None and least_bytes(plan, arguments.flat, self._run) <= room

    def _plan_of(self, arguments: Arguments) -> Plan | None:
        """The plan of the same sources for other arguments; None where they can't be prepared so."""
        key = _planned_by(arguments)
        if key not in self._plans:
            try:
                self._plans[key] = self._make_plan(resolve_request(arguments))
            except FtloadError:
                self._plans[key] = None
        return self._plans[key]

    def _make_plan(self, request: Request) -> Plan:
        made = plan_again(self._plan, request)
        if request.strict:
            check_strict(made.decisions)
        return made


def _planned_by(arguments: Arguments) -> tuple[Any, ...]:
    """The values of those flags among all changes that alter what is prepared."""
    flat, own = arguments.flat, arguments.own
    return flat.use_lora, flat.use_qlora, flat.use_liger_kernel, own.bnb_4bit_quant_storage
