"""Which list of changes is advised where several would do: on invented peaks, against trying everything.

What a change saves is drawn at random here, so that lists are tried which no real model would lead to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.flags.declared import Arguments, FlatArguments
from ftload.loaders.flags.gpu_sizes import Gpus
from ftload.loaders.flags.request import resolve_request
from ftload.loaders.memory import advice as module
from ftload.loaders.memory.advice import Advice, advise
from ftload.loaders.memory.estimate import estimate_training_memory
from ftload.loaders.memory.sharding import Sharding
from ftload.loaders.memory.training_memory import Part, TrainingMemory
from ftload.loaders.memory.training_run import TrainingRun
from ftload.loaders.memory.what_fits import Simulations
from ftload.loaders.plan.plan import Plan
from ftload.loaders.plan.sources import resolve_sources
from ftload.loaders.prepare import read_and_plan
from ftload.loaders.progress import Silent, Stopwatch

MILDEST_FIRST = ["checkpointing", "storage", "batch", "liger", "8-bit optimizer", "lora", "qlora", "length"]
"""Written out once more: the order is a promise of docs/plan.md."""
SIZES, LENGTHS = (8, 4, 2, 1), (600, 512, 384, 256, 128)
"""Batches and lengths, as given and as they can be advised."""
State = dict[str, Any]
GIVEN: dict[str, list[str]] = {
    "full": [],
    "full on 2": ["--fsdp", "2"],
    "lora": ["--use_lora"],
    "lora on 2": ["--use_lora", "--fsdp", "2"],
    "qlora": ["--use_qlora"],
    "qlora on 2": ["--use_qlora", "--fsdp", "2"],
}


class Landscape:
    """Peaks that the state of a run's flags gives, each flag by a factor of its own."""

    def __init__(self, factors: dict[str, float], room: float) -> None:
        self._factors = dict.fromkeys(MILDEST_FIRST, 1.0) | factors
        self.room = int(10**9 * room)

    @classmethod
    def drawn(cls, seed: int) -> Landscape:
        draw = random.Random(seed)
        factors = {kind: draw.uniform(0.4, 1.0) for kind in MILDEST_FIRST}
        factors["qlora"] *= factors["lora"]
        return cls(factors, draw.choice([0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9]))

    def peak(self, state: State) -> int:
        """Bytes; batch and length count by their shares of what was given."""
        factor = 1.0
        for kind in MILDEST_FIRST:
            if kind in ("batch", "length"):
                share = state[kind] / (SIZES if kind == "batch" else LENGTHS)[0]
                factor *= self._factors[kind] + (1 - self._factors[kind]) * share
            elif state[kind]:
                factor *= self._factors[kind]
        return int(10**9 * factor)


def state_of(plan: Plan, flags: FlatArguments) -> State:
    """The state that a plan and its flags are in."""
    method = plan.strategy.name
    return {
        "checkpointing": flags.gradient_checkpointing,
        "storage": plan.request.bnb_4bit_quant_storage == "bfloat16",
        "batch": flags.per_device_train_batch_size,
        "liger": plan.kernels is not None and plan.kernels.supported,
        "8-bit optimizer": flags.use_8bit_optimizer and method == "qlora",
        "lora": method == "lora",
        "qlora": method == "qlora",
        "length": flags.max_seq_length,
    }


def all_lists(state: State, gpus: int) -> Iterator[dict[str, Any]]:
    """Every list of changes, each kind with its new value."""
    values: dict[str, tuple[Any, ...]] = dict.fromkeys(MILDEST_FIRST, (True,))
    values |= {"batch": SIZES[1:], "length": LENGTHS[1:]}
    possible = [kind for kind in MILDEST_FIRST if kind not in ("lora", "qlora", "storage")]
    possible += [kind for kind in ("lora", "qlora") if not state["qlora"] and not state[kind]]
    possible += ["storage"] if gpus > 1 else []
    for count in range(1, len(possible) + 1):
        for kinds in combinations(possible, count):
            quantised = state["qlora"] or "qlora" in kinds
            if not {"lora", "qlora"} <= {*kinds} and (quantised or not {"storage", "8-bit optimizer"} & {*kinds}):
                for chosen in product(*(values[kind] for kind in kinds)):
                    yield dict(zip(kinds, chosen, strict=True))


def preference(changes: dict[str, Any]) -> tuple[Any, ...]:
    """What is compared, the first difference counts; the smallest is advised."""
    worst_first = sorted((MILDEST_FIRST.index(kind) for kind in changes), reverse=True)
    kept = -changes.get("length", 0), -changes.get("batch", 0)
    lost = 0 if "length" not in changes else 1 if 2 * changes["length"] >= LENGTHS[0] else 2
    return lost, len(changes), worst_first, kept


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Plan, Arguments, TrainingMemory]]:
    from ..parity.models import write_model
    from ..tokenizers import write_llama

    source = tmp_path_factory.mktemp("source") / "llama"
    write_model(source, "llama", vocab_size=136, dtype="bfloat16")
    write_llama(source, vocab_size=128)
    made = {}
    for name, words in GIVEN.items():
        method = [word for word in words if word.startswith("--use_")]
        arguments = parse_arguments(["--model", str(source), "--max_seq_length", str(LENGTHS[0]), *method])
        request = resolve_request(arguments)
        plan = read_and_plan(request, resolve_sources(request), Stopwatch(Silent()))
        estimate = estimate_training_memory(plan, arguments.flat)
        assert isinstance(estimate, TrainingMemory)
        made[name] = plan, arguments, estimate
    return made


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("seed", range(10))
def test_the_list_is_the_one_that_trying_everything_finds(
    prepared: dict[str, tuple[Plan, Arguments, TrainingMemory]],
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    seed: int,
) -> None:
    plan, arguments, real = prepared[given]
    number = seed * len(GIVEN) + [*GIVEN].index(given)
    landscape, gpus = Landscape.drawn(number), 2 if "on 2" in given else 1
    start = state_of(plan, arguments.flat)
    assert start["batch"] == SIZES[0]
    invent(monkeypatch, landscape, real)
    advice = asked(plan, arguments, landscape.room, gpus)
    peaks = [(preference(changes), landscape.peak({**start, **exclusive(changes)}), changes)
             for changes in all_lists(start, gpus)]  # fmt: skip
    assert advice.total_bytes == landscape.peak(start)
    assert advice.fits_as_given == (landscape.peak(start) <= landscape.room)
    if advice.fits_as_given:
        assert advice.changes == ()
        return
    fitting = sorted((wish, peak, changes) for wish, peak, changes in peaks if peak <= landscape.room)
    if not fitting:
        assert (advice.fits, advice.changes) == (False, ())
        assert advice.smallest_bytes == min(peak for _, peak, _ in peaks)
        return
    _, peak, best = fitting[0]
    assert {change.change for change in advice.changes} == {*best}
    assert advice.flags.get("per_device_train_batch_size") == best.get("batch")
    assert advice.flags.get("max_seq_length") == best.get("length")
    assert advice.changes[-1].total_bytes == peak
    kinds = [change.change for change in advice.changes]
    waits = [kind for kind in kinds if kind in ("storage", "8-bit optimizer") and "qlora" in kinds]
    # the mildest first, and what QLoRA alone has right behind it
    assert [kind for kind in kinds if kind not in waits] == [
        kind for kind in MILDEST_FIRST if kind in best and kind not in waits
    ]
    if waits:
        behind = kinds.index("qlora") + 1
        assert kinds[behind : behind + len(waits)] == waits


@pytest.mark.parametrize(
    ("given", "factors", "room", "advised"),
    [
        # {checkpointing, qlora} would do as well: two that alter less are taken
        ("full", {"checkpointing": 0.9, "batch": 0.43, "liger": 0.5, "qlora": 0.28}, 0.26, ["batch", "liger"]),
        # shorter sequences alone would do: three changes that lose no data are taken
        (
            "full", {"checkpointing": 0.5, "batch": 0.543, "liger": 0.7, "length": 0.0}, 0.22,
            ["checkpointing", "batch", "liger"],
        ),
        ("full", {"checkpointing": 0.5, "batch": 0.543, "length": 0.0}, 0.22, ["checkpointing", "batch", "length"]),
        ("full", {"checkpointing": 0.9, "batch": 0.9, "length": 0.0}, 0.22, ["length"]),
        # one change is less than two
        ("full", {"checkpointing": 0.5, "batch": 0.0, "liger": 0.5, "qlora": 0.1}, 0.124, ["qlora"]),
        ("qlora on 2", {"storage": 0.9, "8-bit optimizer": 0.8, "length": 0.5}, 0.75, ["storage", "8-bit optimizer"]),
    ],
)  # fmt: skip
def test_what_is_preferred(
    prepared: dict[str, tuple[Plan, Arguments, TrainingMemory]],
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    factors: dict[str, float],
    room: float,
    advised: list[str],
) -> None:
    plan, arguments, real = prepared[given]
    landscape = Landscape(factors, room)
    invent(monkeypatch, landscape, real)
    advice = asked(plan, arguments, landscape.room, 2 if "on 2" in given else 1)
    assert [change.change for change in advice.changes] == advised


def invent(monkeypatch: pytest.MonkeyPatch, landscape: Landscape, real: TrainingMemory) -> None:
    """Put invented peaks in the place of estimates."""

    def estimated(plan: Plan, flags: FlatArguments, *_: Any, **__: Any) -> TrainingMemory:
        size = landscape.peak(state_of(plan, flags))
        return replace(real, parts=(Part(name="weights", bytes=size, origin="invented"),))

    monkeypatch.setattr(module, "estimate_training_memory", estimated)
    monkeypatch.setattr(module, "least_bytes", lambda *_: 0)


def exclusive(changes: dict[str, Any]) -> dict[str, Any]:
    """A method takes the place of the one before."""
    return {**changes, **({"lora": False} if "qlora" in changes else {})}


def asked(plan: Plan, arguments: Arguments, room: int, gpus: int) -> Advice:
    sharding = Sharding(method="fsdp", gpus=gpus) if gpus > 1 else None
    size = Gpus(count=None, size=f"{room}B", bytes=room)
    (advice,) = advise(plan, arguments, TrainingRun(sharding=sharding), [size], Simulations())
    return advice
