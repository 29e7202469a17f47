"""The GPU that training memory is drawn against."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ftload.loaders.memory import chosen_gpu
from ftload.loaders.memory.advice import Advice
from ftload.loaders.memory.chosen_gpu import ChosenGpu, choose_gpu, smallest_gpu, sold_as
from ftload.loaders.memory.sharding import Sharding
from ftload.loaders.memory.training_memory import NoEstimate, TrainingMemory
from ftload.loaders.system import cuda

from .memories import training_memory

GB = 10**9
METHODS = [training_memory(name, {"weights": size * GB}) for name, size in (("full", 200), ("lora", 81), ("qlora", 20))]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_gpu, "first_gpu", lambda: None)


@pytest.mark.parametrize(
    ("asked", "size", "reason"),
    [
        ("full", 192, "the largest here, and full does not fit"),
        ("lora", 96, "the smallest here on which lora fits"),
        ("qlora", 24, "the smallest here on which qlora fits"),
    ],
)
def test_without_a_gpu_it_is_the_smallest_that_suffices(asked: str, size: int, reason: str) -> None:
    assert choose_gpu(METHODS, asked) == ChosenGpu(bytes=size * GB, gigabytes=size, reason=reason)


def test_a_method_without_an_estimate_stands_back() -> None:
    unknown = NoEstimate(method="qlora", reason="no layer can be quantised")
    others: list[TrainingMemory | NoEstimate] = [unknown, *METHODS[1:2]]
    found = choose_gpu(others, "qlora")
    assert found == ChosenGpu(bytes=96 * GB, gigabytes=96, reason="the smallest here on which lora fits")
    assert choose_gpu([unknown], "qlora") is None


def test_a_gpu_that_is_here_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_gpu, "first_gpu", lambda: ("NVIDIA H100 80GB HBM3", 85_030_000_000))
    gpu = choose_gpu(METHODS, "qlora")
    reason = "the GPU of this machine: NVIDIA H100 80GB HBM3"
    assert gpu == ChosenGpu(bytes=85_030_000_000, gigabytes=80, reason=reason)


@pytest.mark.parametrize(
    ("bytes_", "gigabytes"),
    [
        (15_835_660_288, 16),  # Tesla T4
        (25_386_352_640, 24),  # RTX 4090
        (85_024_112_640, 80),  # H100
        (150_754_820_096, 141),  # H200
        (12_884_901_888, None),
        (60 * GB, None),
        (300 * GB, None),
    ],
)
def test_what_it_is_sold_as(bytes_: int, gigabytes: int | None) -> None:
    assert sold_as(bytes_) == gigabytes


def advice(gpus: str, count: int, size: int) -> Advice:
    return Advice(
        gpus=gpus, gpu_count=count, gpu_bytes=size, method="qlora", total_bytes=20 * GB, reason=None,
        fits_as_given=True, fits=True, changes=(), smallest_bytes=None, paged_bytes=None,
    )  # fmt: skip


SHARED = [replace(method, sharding=Sharding(method="fsdp", gpus=2)) for method in METHODS]
SIZES = [advice("2x48GB", 2, 48 * GB), advice("24GB", 1, 24 * GB), advice("44GB", 1, 44 * GB)]


@pytest.mark.parametrize(
    ("methods", "fit", "expected"),
    [
        (METHODS, SIZES, (24, 24, "the one of --fit 24GB")),
        (METHODS, SIZES[::-1], (44, None, "the one of --fit 44GB")),
        (METHODS, SIZES[:1], (48, 48, "each of --fit 2x48GB; nothing is divided here")),
        (SHARED, SIZES[::-1], (48, 48, "each of --fit 2x48GB")),
        (SHARED, SIZES[1:], (24, 24, "the one of --fit 24GB; these are shares of 2 GPUs")),
    ],
)
def test_what_is_asked_for_comes_before_all(
    methods: list[TrainingMemory],
    fit: list[Advice],
    expected: tuple[int, int | None, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chosen_gpu, "first_gpu", lambda: ("NVIDIA H100 80GB HBM3", 85_030_000_000))
    size, gigabytes, reason = expected
    assert choose_gpu(methods, "full", fit) == ChosenGpu(bytes=size * GB, gigabytes=gigabytes, reason=reason)


def test_the_smallest_gpu_has_every_byte() -> None:
    assert [smallest_gpu(size) for size in (0, 16 * GB, 16 * GB + 1, 192 * GB, 192 * GB + 1)] == [16, 16, 24, 192, None]


def test_what_torch_says_of_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name = "Tesla T4"
        total_memory = 15_835_660_288

    def broken(_: int) -> Properties:
        raise RuntimeError("CUDA driver error: unknown error")

    monkeypatch.setattr(cuda, "cuda_problem", lambda: "torch is built without CUDA")
    assert cuda.first_gpu() is None
    monkeypatch.setattr(cuda, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    assert cuda.first_gpu() == ("Tesla T4", 15_835_660_288)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert cuda.first_gpu() is None
