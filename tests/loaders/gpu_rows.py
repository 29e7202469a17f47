"""Training steps that others measured on a GPU, and what the simulation says of the same steps.

The rows and their source are in `tests/data/gpu_memory.json`. Sizes are MiB (2^20 bytes), as there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "data" / "gpu_memory.json"
MIB = 2**20
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
BLOCK = 512
"""What PyTorch's CUDA allocator rounds sizes up to."""
CUBLAS_WORKSPACE = 4096 * 1024 * 2 + 16 * 1024 * 8
"""Bytes that PyTorch allocates for each cuBLAS handle below compute capability 9 (`CublasHandlePool.cpp`)."""
THREADS = 2
"""Those that have a handle: one runs the forward pass, one the backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuRow:
    """One step, as it was measured."""

    model: str
    quantization: str
    """`nf4`, without double quantisation, or `none`: float16."""
    lora_rank: int
    batch: int
    length: int
    attention: str
    resident_before_step: float
    """When neither gradients nor optimizer states are there yet."""
    peak_allocated: float
    peak_forward: float
    peak_backward: float
    peak_optimizer: float
    optimizer_states: float
    gradients: float

    def __str__(self) -> str:
        return f"{self.model}-{self.quantization}-r{self.lora_rank}-{self.batch}x{self.length}-{self.attention}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatedRow:
    """The same step, simulated."""

    resident: float
    peak: float
    moment: str
    """When the peak is."""
    peak_optimizer: float
    optimizer_states: float
    gradients: float


def read_rows() -> tuple[GpuRow, ...]:
    """All of them."""
    return tuple(GpuRow(**row) for row in json.loads(DATA.read_text())["rows"])


def estimate_row(row: GpuRow) -> EstimatedRow:
    """What is held, from the model's shapes alone, and the step's peaks, simulated."""
    import torch
    from ftload.loaders.memory.step.setting import Batch, LoraSetting, Setting
    from ftload.loaders.memory.step.simulation import Simulation

    model = model_of(row.model)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    adapted = {name: module for name, module in linear.items() if name.endswith(TARGETS)}
    quantised = frozenset(linear if row.quantization == "nf4" else ())
    weights = sum(weight_bytes(model, quantised))
    adapter = sum(
        rounded(4 * row.lora_rank * width)
        for module in adapted.values()
        for width in (module.in_features, module.out_features)
    )
    lora = LoraSetting(layers=frozenset(adapted), rank=row.lora_rank, alpha=2 * row.lora_rank, dropout=0.0)
    setting = Setting(attention=row.attention, checkpointing=True, lora=lora, quantised=quantised, reentrant=False)
    with keys_and_values_expanded():
        footprint = Simulation(model, setting).run(Batch(size=row.batch, length=row.length))
    tokens = rounded(8 * row.batch * row.length)
    lasting = weights + adapter + 2 * adapter + tokens + THREADS * CUBLAS_WORKSPACE
    # torch's AdamW has the roots of all second states at once, and the model's outputs are there still
    update = footprint.moments[-1].total + adapter
    return EstimatedRow(
        resident=(weights + adapter) / MIB,
        peak=(lasting + max(footprint.peak.total, update)) / MIB,
        moment=footprint.peak.name if footprint.peak.total >= update else "optimizer step",
        peak_optimizer=(lasting + update) / MIB,
        optimizer_states=2 * adapter / MIB,
        gradients=footprint.moments[-1].gradients / MIB,
    )


def model_of(name: str) -> Any:
    """A model on `meta`, in float16."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shape: dict[str, Any] = json.loads(DATA.read_text())["models"][name]
    kind = shape.pop("model_type")
    if kind == "mistral":
        shape["sliding_window"] = None  # of version 0.3
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape), dtype=torch.float16)


def weight_bytes(model: Any, quantised: frozenset[str]) -> Iterator[int]:
    """Of each weight: float16; or NF4, a float32 maximum for every 64 and the 16 values, and all others float32."""
    for name, value in model.named_parameters():
        if name.removesuffix(".weight") in quantised:
            yield rounded(value.numel() // 2) + rounded(4 * (value.numel() // 64)) + rounded(4 * 16)
        else:
            yield rounded(value.numel() * (4 if quantised else 2))


def rounded(size: int) -> int:
    """What the allocator gives out for it."""
    return -(-size // BLOCK) * BLOCK


@contextlib.contextmanager
def keys_and_values_expanded() -> Iterator[None]:
    """Let transformers repeat keys and values for sdpa, as those who measured did."""
    from transformers.integrations import sdpa_attention

    own = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = own
