"""The jobs of `gpu_check`: what each of them measures, on a GPU or, in a rehearsal, on the CPU.

A job yields what it has found so far, again and again, so that what was found is not lost with a process that hangs or
crashes. `ok` is whether all is as it should be; None where it could not be checked.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import seconds_of_work

TOLERANCE = 0.05
"""Of the estimate of memory, as a share of what was measured."""
METHODS = {"full": (), "lora": ("--use_lora",), "qlora": ("--use_qlora",)}
PRECISIONS = ("no", "bf16")
FURTHER = (
    ("qlora", "large", ("--use_qlora", "--no_use_flash_attn", "--gradient_checkpointing")),
    ("qlora", "large", ("--use_qlora", "--use_8bit_optimizer", "--gradient_checkpointing")),
    ("qlora", "experts", ("--use_qlora", "--gradient_checkpointing")),
    ("lora", "large", ("--use_lora", "--no_use_flash_attn")),
)
"""Cells of the grid of memory beside each method with and without checkpointing, if there is time for them."""

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job runs, and how large its models are."""

    work: Path
    """Models lie here, made by the first job that needs them."""
    device: str
    """`cuda`, or `cpu` in a rehearsal."""
    seconds: float
    """What the job may take; then it is killed."""
    begin: float = field(default_factory=time.monotonic)

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        return self.begin + self.seconds - time.monotonic()

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """Sequences and tokens; several sequences are padded."""
        return ((1, 32), (2, 16)) if self.is_rehearsal else ((1, 2048), (4, 1024))

    def source(self, name: str) -> Path:
        """A random model in bfloat16, with a tokenizer."""
        import torch
        import transformers

        from tests.tokenizers import write_llama3

        directory = self.work / name
        if directory.exists():
            return directory
        kind, shape = MODELS[name]
        if self.is_rehearsal:
            tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024}
            shape = {**shape, **tiny}
        config = getattr(transformers, kind)(
            **{"num_key_value_heads": shape["num_attention_heads"] // 4, "vocab_size": 32768, **shape},
            max_position_embeddings=8192,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        unfinished = self.work / f"{name}.unfinished"
        model.save_pretrained(unfinished)
        write_llama3(unfinished, vocab_size=1000)
        return unfinished.rename(directory)

    def prepare(self, name: str, *flags: str) -> Path:
        """What `ftload prepare` makes of a model with these flags, made once."""
        from ftload.cli.app import run

        directory = self.work / "-".join(["prepared", name, *(flag.strip("-") for flag in flags)])
        if directory.exists():
            return directory
        words = ["--model", str(self.source(name)), "--output_dir", str(directory), "--json", "--quiet", *flags]
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            code = run(["prepare", *words])
        if code:
            raise RuntimeError(told.getvalue())
        return directory

    def batch(self, size: int, length: int) -> dict[str, Any]:
        """Random tokens; where there are several sequences, the first is half as long."""
        import torch

        tokens = torch.randint(100, 1000, (size, length), device=self.device)
        mask = torch.ones_like(tokens)
        if size > 1:
            mask[0, length // 2 :] = 0
        return {"input_ids": tokens, "labels": tokens.masked_fill(mask == 0, -100), "attention_mask": mask}

    def wait(self) -> None:
        """Until the device has done what it was told."""
        import torch

        if not self.is_rehearsal:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what nothing holds any longer."""
        import torch

        gc.collect()
        if not self.is_rehearsal:
            torch.cuda.empty_cache()

    def allocated(self, *, most: bool = False) -> int:
        """Bytes that the CUDA allocator has given out, or the most of them since the last `reset`; 1 in a rehearsal."""
        import torch

        if self.is_rehearsal:
            return 1
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()

    def reset(self) -> None:
        """Begin to look for the most bytes anew."""
        import torch

        self.wait()
        if not self.is_rehearsal:
            torch.cuda.reset_peak_memory_stats()

    def workspaces(self) -> int:
        """Bytes that PyTorch allocates for cuBLAS, once for each of two threads (`CublasHandlePool.cpp`)."""
        import torch

        from tests.loaders.gpu_rows import CUBLAS_WORKSPACE, THREADS

        if self.is_rehearsal or torch.cuda.get_device_capability()[0] < 9:
            return THREADS * CUBLAS_WORKSPACE
        return THREADS * 32 * 2**20


MODELS: dict[str, tuple[str, dict[str, int]]] = {
    # 0.85 B parameters: full fine-tuning fits into 24 GB
    "large": (
        "LlamaConfig",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32},
    ),
    "small": (
        "LlamaConfig",
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8},
    ),
    "experts": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16,
            "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
        },
    ),
}  # fmt: skip


def load(directory: Path) -> Any:
    from ftload import load_prepared

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_prepared(directory)[0]


# memory ---------------------------------------------------------------------------------------------------------------


def check_memory(place: Place) -> Iterator[Result]:
    """Each method with and without checkpointing and autocast, for two batches: 24 cells, and some more."""
    cells: list[Result] = []
    groups = [
        (method, "large", (*flags, *checkpointing))
        for (method, flags), checkpointing in itertools.product(METHODS.items(), ((), ("--gradient_checkpointing",)))
    ]
    longest = 0.0
    for number, (method, name, flags) in enumerate([*groups, *FURTHER]):
        if place.seconds_left < 1.5 * longest:
            yield memory_result(place, cells, left_out=len(groups) + len(FURTHER) - number)
            return
        begin = time.monotonic()
        for cell in memory_cells(place, method, name, flags):
            cells.append(cell)
            yield memory_result(place, cells, left_out=len(groups) + len(FURTHER) - number)
        place.free()
        longest = max(longest, time.monotonic() - begin)
    yield memory_result(place, cells, left_out=0)


def memory_result(place: Place, cells: list[Result], *, left_out: int) -> Result:
    """`left_out` groups of cells were not measured, or not all of them."""
    measured = [cell for cell in cells if cell["error"] is None]
    off = [cell for cell in measured if abs(cell["off_percent"]) > 100 * TOLERANCE]
    ok = len(measured) >= 24 and not off
    worst = max((abs(cell["off_percent"]) for cell in measured), default=0.0)
    return {
        "ok": ok, "measured": len(measured), "errors": len(cells) - len(measured), "groups_left_out": left_out,
        "worst_percent": round(worst, 2), "cells": cells,
    }  # fmt: skip


def memory_cells(place: Place, method: str, name: str, flags: tuple[str, ...]) -> Iterator[Result]:
    """The cells of one model: without and with autocast, for each batch."""
    import torch
    from ftload.loaders.memory.estimate import CONTEXT_BYTES, estimate_training_memory
    from ftload.loaders.memory.training_memory import TrainingMemory
    from ftload.loaders.memory.training_run import TrainingRun

    from tests.loaders.plans import make_plan

    before = place.allocated()
    model = load(place.prepare(name, *flags))
    for precision, (size, length) in itertools.product(PRECISIONS, place.batches):
        batch_flags = ["--per_device_train_batch_size", str(size), "--max_seq_length", str(length)]
        run = TrainingRun(mixed_precision=precision)
        plan, arguments = make_plan(place.source(name), place.work / "plan", *flags, *batch_flags)
        estimated = estimate_training_memory(plan, arguments, run, gpus=())
        assert isinstance(estimated, TrainingMemory), estimated
        cell = {
            "method": method, "model": name, "flags": " ".join(flags), "mixed_precision": precision,
            "batch": size, "length": length, "attention": estimated.attention,
            # the allocator sees what cuBLAS has, and not the context
            "estimated_bytes": estimated.total - CONTEXT_BYTES + place.workspaces(),
            "peak": estimated.moment,
            "moments": {moment.name: moment.total for moment in estimated.moments},
            "before_bytes": before, "loaded_bytes": place.allocated(), "off_percent": 0.0, "error": None,
        }  # fmt: skip
        try:
            phases = peaks_of_a_step(place, model, size, length, run, eight_bit="--use_8bit_optimizer" in flags)
        except torch.OutOfMemoryError as error:
            cell["error"] = str(error).splitlines()[0]
        else:
            measured = max(phases.values())
            cell |= {"measured_bytes": measured, "phases": phases}
            if not place.is_rehearsal:
                cell["off_percent"] = 100 * (cell["estimated_bytes"] / measured - 1)
        model.zero_grad()
        place.free()
        yield cell


def peaks_of_a_step(place: Place, model: Any, size: int, length: int, run: Any, *, eight_bit: bool) -> dict[str, int]:
    """The most bytes in each part of the training script's third step: by then the optimizer has its states."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if getattr(model, "is_loaded_in_4bit", False):
        from bitsandbytes.optim import AdamW

        # not paged, as it is in the script: the allocator would not see the pages
        optimizer: Any = AdamW(trained, optim_bits=8 if eight_bit else 32, is_paged=False)
    else:
        optimizer = torch.optim.AdamW(trained, fused=True)
    forward, batch = forward_pass(place, model, run.mixed_precision), place.batch(size, length)
    phases = {}
    for _ in range(3):
        place.reset()
        outputs = forward(batch)
        loss = outputs.loss
        if not run.step.keeps_outputs:
            del outputs
        phases["forward"] = place.allocated(most=True)
        place.reset()
        loss.backward()
        place.wait()
        phases["backward"] = place.allocated(most=True)
        place.reset()
        optimizer.step()
        place.wait()
        phases["optimizer"] = place.allocated(most=True)
        optimizer.zero_grad()
        outputs = loss = None
    return phases


def forward_pass(place: Place, model: Any, precision: str) -> Callable[[dict[str, Any]], Any]:
    """As accelerate prepares a model: with bf16 under autocast, and outputs become float32 behind it."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32

    def forward(batch: dict[str, Any]) -> Any:
        with torch.autocast(place.device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return model(**batch, use_cache=False)

    return convert_outputs_to_fp32(forward) if precision == "bf16" else forward


# kernels --------------------------------------------------------------------------------------------------------------


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: value.grad.float() for name, value in model.named_parameters() if value.grad is not None}
    return loss.item(), gradients


def compare_gradients(place: Place, model: Any, other: Any) -> Result:
    """Two models of the same weights: losses within 1 %, and every gradient in the same direction."""
    import torch

    torch.manual_seed(0)
    batch = place.batch(2, 256)
    loss, gradients = loss_and_gradients(model, batch)
    other_loss, other_gradients = loss_and_gradients(other, batch)
    cosines = {
        name: torch.nn.functional.cosine_similarity(value.flatten(), other_gradients[name].flatten(), dim=0).item()
        for name, value in gradients.items()
    }
    worst = min(cosines, key=cosines.__getitem__)
    ok = gradients.keys() == other_gradients.keys() and abs(loss - other_loss) < 0.01 * loss and cosines[worst] > 0.98
    return {"ok": ok, "losses": [loss, other_loss], "lowest_cosine": cosines[worst], "of": worst}


def check_liger(place: Place) -> Iterator[Result]:
    """Forward and backward, and the memory of a step."""
    from ftload.loaders.liger import liger_problem

    problem = liger_problem()
    if problem is not None and not place.is_rehearsal:
        yield {"ok": None, "skipped": problem}
        return
    plain = load(place.prepare("small", "--no_use_flash_attn"))
    fused = load(place.prepare("small", "--no_use_flash_attn", "--use_liger_kernel"))
    kernels = type(fused.model.norm).__name__, fused.model.norm.forward.__qualname__
    if "Liger" not in "".join(kernels) and not place.is_rehearsal:
        yield {"ok": False, "error": f"Liger's norm is not in place: {kernels}"}
        return
    result = compare_gradients(place, plain, fused)
    yield result
    del plain, fused
    place.free()
    cells: list[Result] = []
    for cell in memory_cells(place, "full", "large", ("--use_liger_kernel", "--gradient_checkpointing")):
        cells.append(cell)
        off = [one for one in cells if one["error"] is None and abs(one["off_percent"]) > 100 * TOLERANCE]
        yield {**result, "ok": result["ok"] and not off, "cells": cells}


def check_flash(place: Place) -> Iterator[Result]:
    """FlashAttention 2 against eager attention."""
    import importlib.util

    if importlib.util.find_spec("flash_attn") is None and not place.is_rehearsal:
        yield {"ok": None, "skipped": "flash-attn is not installed"}
        return
    flash = load(place.prepare("small"))
    if flash.config._attn_implementation != "flash_attention_2" and not place.is_rehearsal:
        yield {"ok": False, "error": f"attention is {flash.config._attn_implementation}"}
        return
    yield compare_gradients(place, load(place.prepare("small", "--no_use_flash_attn")), flash)


# 4 bits ---------------------------------------------------------------------------------------------------------------


def check_four_bit(place: Place) -> Iterator[Result]:
    """4-bit bases made on the CPU, dense and of experts: logits on the GPU against those on the CPU, and a step."""
    import ftload.register  # noqa: F401 (transformers alone does not load 4-bit experts)

    result: Result = {"ok": True}
    for name in ("small", "experts"):
        prepared = place.prepare(name, "--use_qlora")
        found = compare_logits(place, prepared)
        model = load(prepared)
        loss, gradients = loss_and_gradients(model, place.batch(2, 64))
        finite = all(bool(value.isfinite().all()) for value in gradients.values())
        found |= {"loss": loss, "gradients": len(gradients), "gradients_finite": finite}
        ok = result["ok"] and found.pop("ok") and finite and bool(gradients)
        result |= {"ok": ok, name: found}
        yield result
        del model, gradients
        place.free()


def compare_logits(place: Place, prepared: Path) -> Result:
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(100, 1000, (2, 128), generator=torch.Generator().manual_seed(0))
    logits = []
    for device in ("cpu", place.device):
        model = AutoModelForCausalLM.from_pretrained(prepared, device_map={"": device}, attn_implementation="eager")
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False  # it would repack the weights
        with torch.no_grad():
            logits.append(model(tokens.to(device)).logits.float().cpu())
    on_cpu, on_gpu = logits
    cosine = torch.nn.functional.cosine_similarity(on_cpu.flatten(), on_gpu.flatten(), dim=0).item()
    largest, scale = (on_cpu - on_gpu).abs().max().item(), on_cpu.abs().max().item()
    return {"ok": cosine > 0.999 and largest < 0.05 * scale, "cosine": cosine, "largest_difference": largest,
            "largest_logit": scale}  # fmt: skip


def check_encode(place: Place) -> Iterator[Result]:
    """`--device cuda` against the CPU's encoder: what is written, the seconds, and how fast each encodes.

    The two may choose another code where a weight lies within 1 ulp of a threshold, and where a whole block is 0.
    """
    from safetensors.torch import load_file

    tensors, seconds = [], {}
    for number, device in enumerate(("cpu", place.device)):
        directory = place.prepare("large", "--use_qlora", "--device", device, "--seed", str(number))
        report = json.loads((directory / "ftload_report.json").read_text())
        seconds[f"{number}: {device}"] = round(seconds_of_work(report), 2)
        files = sorted(directory.glob("*.safetensors"))
        tensors.append({name: value for file in files for name, value in load_file(file).items()})
    cpu, gpu = tensors
    if {n: (v.shape, v.dtype) for n, v in cpu.items()} != {n: (v.shape, v.dtype) for n, v in gpu.items()}:
        yield {"ok": False, "error": "names, shapes or dtypes differ"}
        return
    codes = [name for name in cpu if f"{name}.absmax" in cpu]
    total = sum(cpu[name].numel() for name in codes)
    other = sum(int((cpu[name] != gpu[name]).sum()) for name in codes)
    maxima = sum(int((cpu[f"{name}.absmax"] != gpu[f"{name}.absmax"]).sum()) for name in codes)
    maxima_total = sum(cpu[f"{name}.absmax"].numel() for name in codes)
    ok = other <= total * 1e-4 and maxima <= maxima_total * 1e-3
    result: Result = {
        "ok": ok, "code_bytes": total, "other_code_bytes": other, "maxima": maxima_total, "other_maxima": maxima,
        "writing_seconds": seconds,
    }  # fmt: skip
    yield result
    yield {**result, "million_weights_per_second": encoding_rates(place)}


def encoding_rates(place: Place) -> dict[str, int]:
    """Of ftload's encoder on one thread, of `--device cuda` with what it copies, and of bitsandbytes' kernel alone."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from ftload.loaders.nf4.encode import encode, encode_with_bitsandbytes

    count = 2**16 if place.is_rehearsal else 2**25
    weight = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    there = weight.to(place.device)
    jobs: dict[str, Callable[[], object]] = {
        "ftload, one CPU thread": lambda: encode(weight),
        "--device cuda": lambda: encode_with_bitsandbytes(weight, device=place.device),
        "bitsandbytes, on the GPU": lambda: quantize_4bit(there, blocksize=64, quant_type="nf4"),
    }
    rates = {}
    for name, job in jobs.items():
        taken = []
        for _ in range(4):
            place.wait()
            begin = time.perf_counter()
            job()
            place.wait()
            taken.append(time.perf_counter() - begin)
        rates[name] = round(count / statistics.median(taken[1:]) / 1e6)
    return rates


def check_load(place: Place) -> Iterator[Result]:
    """Seconds of `load_prepared`, the second time, when libraries are imported and files are in the page cache."""
    result: Result = {"ok": True}
    for method, flags in METHODS.items():
        prepared = place.prepare("large", *flags)
        for _ in range(2):
            begin = time.perf_counter()
            model = load(prepared)
            place.wait()
            taken = time.perf_counter() - begin
            devices = {value.device.type for value in model.parameters()}
            del model
            place.free()
        result |= {f"{method}_seconds": round(taken, 2), "ok": result["ok"] and devices == {place.device}}
        yield result


@dataclass(frozen=True, kw_only=True)
class Job:
    run: Callable[[Place], Iterator[Result]]
    share: float
    """Of the time that all have: what it may take of it."""


JOBS = {
    "memory": Job(run=check_memory, share=0.55),
    "four-bit": Job(run=check_four_bit, share=0.1),
    "liger": Job(run=check_liger, share=0.15),
    "encode": Job(run=check_encode, share=0.1),
    "load": Job(run=check_load, share=0.1),
    "flash": Job(run=check_flash, share=0.1),
}
"""In the order of their worth: where time runs out, the last ones are left out."""
