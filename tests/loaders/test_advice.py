"""What `ftload plan --fit` advises: it fits by a second estimate, and nothing shorter does.

The second estimate is made from the words of a command line, as if they were typed: parsed, planned and simulated anew.
What could be changed is listed here once more, so that a list which the search does not try is missed by it alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import FtloadError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.flags.declared import Arguments
from ftload.loaders.flags.gpu_sizes import Gpus, parse_gpus
from ftload.loaders.flags.request import resolve_request
from ftload.loaders.memory.advice import Advice, advise
from ftload.loaders.memory.changes import ORDER
from ftload.loaders.memory.estimate import estimate_training_memory
from ftload.loaders.memory.sharding import Sharding
from ftload.loaders.memory.training_memory import TrainingMemory
from ftload.loaders.memory.training_run import TrainingRun
from ftload.loaders.memory.what_fits import Simulations
from ftload.loaders.plan.plan import Plan
from ftload.loaders.plan.sources import resolve_sources
from ftload.loaders.prepare import read_and_plan
from ftload.loaders.progress import Silent, Stopwatch

from ..headers import write_headers

_LLAMA_3 = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "num_key_value_heads": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "1 B": (
        "LlamaConfig",
        {**_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32},
    ),
    "8 B": (
        "LlamaConfig",
        {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
         "num_attention_heads": 32},
    ),
    # Liger has nothing for it
    "GPT-2": ("GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024}),
    "mixture": (
        "Qwen3MoeConfig",
        {"vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 24,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16,
         "num_experts_per_tok": 4},
    ),
}  # fmt: skip
CASES = [
    ("1 B", "", "16GB"),
    ("1 B", "", "24GB"),
    ("1 B", "", "48GB"),
    ("1 B", "", "80GB"),
    ("1 B", "", "4GB"),
    ("1 B", "", "2x16GB"),
    ("1 B", "--max_seq_length 1024 --per_device_train_batch_size 4", "16GB"),
    ("1 B", "--per_device_train_batch_size 6 --gradient_accumulation_steps 5", "80GB"),
    ("1 B", "--gradient_checkpointing --per_device_train_batch_size 1", "10GB"),
    ("1 B", "--gradient_checkpointing --per_device_train_batch_size 1 --use_liger_kernel --use_qlora", "3GB"),
    ("1 B", "--use_lora", "8GB"),
    ("1 B", "--use_lora --max_seq_length 2048", "24GB"),
    ("1 B", "--use_qlora --max_seq_length 8192 --per_device_train_batch_size 1", "6GB"),
    ("1 B", "--use_qlora --packing --per_device_train_batch_size 4", "16GB"),
    ("1 B", "--use_qlora --max_seq_length 512 --lora_rank 512", "12GB"),
    (
        "1 B",
        "--use_qlora --gradient_checkpointing --per_device_train_batch_size 1 --max_seq_length 256 --lora_rank 512",
        "8GB",
    ),
    ("8 B", "", "8GB"),
    ("8 B", "", "24GB"),
    ("8 B", "", "80GB"),
    ("8 B", "", "192GB"),
    ("8 B", "", "2x80GB"),
    ("8 B", "", "2x24GB"),
    ("8 B", "", "8x24GB"),
    ("8 B", "--max_seq_length 2048 --use_liger_kernel", "141GB"),
    ("8 B", "--use_lora --max_seq_length 2048", "24GB"),
    ("8 B", "--use_lora --base reference", "16GB"),
    ("8 B", "--use_qlora", "16GB"),
    ("8 B", "--use_qlora", "24GB"),
    ("8 B", "--use_qlora --gradient_checkpointing --per_device_train_batch_size 1", "11GB"),
    ("8 B", "--use_qlora --gradient_checkpointing --per_device_train_batch_size 1", "2x16GB"),
    ("8 B", "--use_qlora --gradient_checkpointing --per_device_train_batch_size 1 --use_liger_kernel", "2x10GB"),
    ("8 B", "--use_qlora --max_seq_length 100 --per_device_train_batch_size 1", "8GB"),
    ("GPT-2", "", "8GB"),
    ("GPT-2", "--per_device_train_batch_size 16", "24GB"),
    ("GPT-2", "--use_qlora --per_device_train_batch_size 1 --gradient_checkpointing", "3GB"),
    ("mixture", "", "80GB"),
    ("mixture", "--use_lora", "40GB"),
    ("mixture", "--use_qlora", "16GB"),
]  # fmt: skip


class Opinion:
    """Estimates of one model by the words of command lines."""

    def __init__(self, source: Path) -> None:
        self.source, self._peaks = source, dict[tuple[str, int], int | None]()
        self._plans, self._simulations = dict[tuple[Any, ...], Plan](), Simulations()

    def arguments(self, words: Iterable[str]) -> Arguments:
        return parse_arguments(["--model", str(self.source), "--output_dir", "/nowhere/out", *words])

    def plan(self, words: Iterable[str]) -> Plan:
        """As `ftload plan` makes it; what the plan does not depend on makes no new one."""
        arguments = self.arguments(words)
        flat, own = arguments.flat, arguments.own
        flags = flat.use_lora, flat.use_qlora, flat.use_liger_kernel, flat.lora_rank, own
        key = tuple(map(str, flags))
        if key not in self._plans:
            request = resolve_request(arguments)
            watch = Stopwatch(Silent())
            self._plans[key] = read_and_plan(request, resolve_sources(request), watch, headers_only=True)
        return self._plans[key]

    def peak(self, words: Iterable[str], gpus: Gpus) -> int | None:
        """Bytes on each GPU; None where there is no estimate."""
        words = list(words)
        key = " ".join(words), gpus.count or 1
        if key not in self._peaks:
            result = estimate_training_memory(
                self.plan(words), self.arguments(words).flat, run_on(gpus), simulations=self._simulations, gpus=()
            )
            self._peaks[key] = result.total if isinstance(result, TrainingMemory) else None
        return self._peaks[key]

    def fits(self, words: Iterable[str], gpus: Gpus) -> bool:
        peak = self.peak(words, gpus)
        return peak is not None and peak <= gpus.bytes


def run_on(gpus: Gpus) -> TrainingRun:
    return TrainingRun(sharding=None if gpus.count is None else Sharding(method="fsdp", gpus=gpus.count))


@pytest.fixture(scope="module")
def opinions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opinion]:
    root = tmp_path_factory.mktemp("models")
    return {name: Opinion(write_headers(root / name, *MODELS[name])) for name in MODELS}


@pytest.fixture(scope="module")
def asked(opinions: dict[str, Opinion]) -> dict[str, tuple[Opinion, Simulations]]:
    """For each model what the advice is made from: plans and simulations that no second opinion sees."""
    return {name: (Opinion(opinion.source), Simulations()) for name, opinion in opinions.items()}


def advice_for(asked: tuple[Opinion, Simulations], words: list[str], gpus: Gpus) -> Advice:
    source, simulations = asked
    (advice,) = advise(source.plan(words), source.arguments(words), TrainingRun(), [gpus], simulations)
    return advice


def ways(arguments: Arguments, model: str, gpus: Gpus, shortest: int) -> dict[str, list[str]]:
    """The strongest change of each kind, in words; sequences have at least `shortest` tokens."""
    flat = arguments.flat
    length = given_length(arguments, model)
    size, steps = flat.per_device_train_batch_size, flat.gradient_accumulation_steps
    found = {
        "checkpointing": [] if flat.gradient_checkpointing else ["--gradient_checkpointing"],
        "batch": [] if size == 1 else batch(1, size * steps),
        "liger": [] if flat.use_liger_kernel or model == "GPT-2" else ["--use_liger_kernel"],
        "8-bit": [] if flat.use_8bit_optimizer else ["--use_8bit_optimizer"],
        "storage": ["--bnb_4bit_quant_storage", "bfloat16"] if gpus.count is not None else [],
        "lora": [] if flat.use_lora or flat.use_qlora else ["--use_lora"],
        "qlora": [] if flat.use_qlora else ["--use_qlora", "--base", "copy"],
        "length": ["--max_seq_length", str(shortest)] if length > shortest else [],
    }
    return {kind: words for kind, words in found.items() if words}


def given_length(arguments: Arguments, model: str) -> int:
    return arguments.flat.max_seq_length or (1024 if model == "GPT-2" else 4096)


def batch(size: int, sequences: int) -> list[str]:
    steps = sequences // size
    return ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps)]


def lists(
    arguments: Arguments, model: str, gpus: Gpus, counts: Iterable[int], *, shortest: int = 10**9
) -> list[list[str]]:
    """All lists of so many changes, in words: those that can be typed; sequences have at least `shortest` tokens."""
    kinds = ways(arguments, model, gpus, shortest)
    found = []
    for count in counts:
        for chosen in combinations(kinds, count):
            quantised = arguments.flat.use_qlora or "qlora" in chosen
            if {"lora", "qlora"} <= {*chosen}:
                continue
            if quantised or not {"storage", "8-bit"} & {*chosen}:
                found.append([word for kind in chosen for word in kinds[kind]])
    return found


@pytest.mark.parametrize(("model", "flags", "size"), CASES, ids=[" ".join(filter(None, case)) for case in CASES])
def test_what_is_advised_fits_and_nothing_shorter_does(
    opinions: dict[str, Opinion], asked: dict[str, tuple[Opinion, Simulations]], model: str, flags: str, size: str
) -> None:
    words, gpus, opinion = flags.split(), parse_gpus(size), opinions[model]
    arguments = opinion.arguments(words)
    advice = advice_for(asked[model], words, gpus)
    assert advice.total_bytes == opinion.peak(words, gpus)
    assert advice.fits_as_given == opinion.fits(words, gpus)
    if advice.fits_as_given:
        assert (advice.fits, advice.changes, advice.command_line) == (True, (), "")
        return
    if not advice.fits:
        assert advice.changes == ()
        everything = lists(arguments, model, gpus, range(len(ORDER) + 1), shortest=128)
        peaks = [peak for peak in (opinion.peak([*words, *more], gpus) for more in everything) if peak is not None]
        assert min(peaks) > gpus.bytes
        assert advice.smallest_bytes == min(peaks)
        return
    # every estimate below is of flags as they are typed
    changed = [*words, *advice.command_line.split()]
    assert Opinion(opinion.source).peak(changed, gpus) == advice.changes[-1].total_bytes <= gpus.bytes
    length = given_length(arguments, model)
    half = -(-length // 256) * 128
    stages = (half, 128) if any(change.change == "length" for change in advice.changes) else ()
    if stages and advice.flags["max_seq_length"] >= half:
        stages = (half,)
    for number in range(len(advice.changes)):
        left = [change for other, change in enumerate(advice.changes) if other != number]
        typed = [word for change in left for word in typed_change(change.flags)]
        try:
            assert not opinion.fits([*words, *typed], gpus), advice.changes[number]
        except FtloadError:  # what goes with QLoRA alone is refused without it
            assert advice.changes[number].change == "qlora"
    shorter = lists(arguments, model, gpus, range(len(advice.changes)), shortest=stages[-1] if stages else 10**9)
    if stages:  # the last resort: nothing else fits, however long the list
        shorter += lists(arguments, model, gpus, range(len(ORDER) + 1))
    if len(stages) == 2:  # and nothing that leaves half of the length
        shorter += lists(arguments, model, gpus, range(len(ORDER) + 1), shortest=half)
    fitting = [more for more in shorter if opinion.fits([*words, *more], gpus)]
    assert fitting == []
    before = advice.total_bytes or 0
    typed = []
    for change in advice.changes:
        typed += typed_change(change.flags)
        peak = opinion.peak([*words, *typed], gpus)
        assert (change.total_bytes, change.saves_bytes) == (peak, before - (peak or 0))
        before = peak or 0
    flat, now = arguments.flat, opinion.arguments(changed).flat
    sequences = flat.per_device_train_batch_size * flat.gradient_accumulation_steps
    assert now.per_device_train_batch_size * now.gradient_accumulation_steps == sequences
    for change in advice.changes:
        if change.change == "batch":
            sizes = [size for size in range(1, flat.per_device_train_batch_size) if sequences % size == 0]
            sizes = [size for size in sizes if flat.per_device_train_batch_size % size == 0]
            larger = next((size for size in sizes if size > now.per_device_train_batch_size), None)
            if larger is not None:
                assert not opinion.fits([*changed, *batch(larger, sequences)], gpus)
        if change.change == "length":
            length = now.max_seq_length or 0
            assert length % 128 == 0
            if length + 128 < given_length(arguments, model):
                longer = [*changed, "--max_seq_length", str(length + 128)]
                smallest = batch(1, sequences) if any(one.change == "batch" for one in advice.changes) else []
                assert not opinion.fits([*longer, *smallest], gpus)


def typed_change(flags: Any) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value).lower())]


def test_every_kind_of_answer_is_among_the_cases(
    asked: dict[str, tuple[Opinion, Simulations]],
) -> None:
    answers = [advice_for(asked[model], flags.split(), parse_gpus(size)) for model, flags, size in CASES]
    assert {change.change for advice in answers for change in advice.changes} == {*ORDER}
    assert {(advice.fits_as_given, advice.fits) for advice in answers} == {
        (True, True), (False, True), (False, False),
    }  # fmt: skip
    assert {len(advice.changes) for advice in answers} >= {0, 1, 2, 3}
