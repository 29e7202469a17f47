"""What the benchmarks share: a Llama's shapes, and time and memory of processes that are compared."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8},
    # Llama 3.2 1B and 3B, Llama 3.1 8B, 70B and 405B
    "1.2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
FTLOAD = (sys.executable, "-m", "ftload.cli")
DEQUANTIZE = """
import sys, time, torch, transformers
source, target, config_class, *gguf_file = sys.argv[1:]
transformers.AutoModelForCausalLM.from_pretrained
begin = time.perf_counter()
options = {"quantization_config": getattr(transformers, config_class)(dequantize=True)}
if gguf_file:
    options["gguf_file"] = gguf_file[0]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
model.save_pretrained(target)
print("work", time.perf_counter() - begin)
"""
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
SPARSE_SHARD_BYTES = 5 * 10**9


Stored = dict[str, tuple[str, tuple[int, ...]]]
"""Name to safetensors dtype and shape."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: medians."""

    job: str
    seconds: float | None = None
    work_seconds: float | None = None
    """Of them, beyond start-up: imports and, of ftload, the plan."""
    processor_seconds: float | None = None
    """Of all threads: they depend less on what else the machine does."""
    peak_anonymous_bytes: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that reads the directory `model` and writes `out`."""

    name: str
    model: Path
    out: Path
    command: tuple[Any, ...]


def llama_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama checkpoint and their shapes."""
    hidden, inner = config.hidden_size, config.intermediate_size
    key = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, out, into in (("q", hidden, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, hidden)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (out, into)
        for name, out, into in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = (out, into)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def write_sparse(directory: Path, shape: dict[str, int]) -> None:
    """A Llama checkpoint of zeros in bfloat16."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **shape, num_key_value_heads=8, vocab_size=128256, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    write_settings(directory, config)
    write_sparse_tensors(directory, {name: ("BF16", dimensions) for name, dimensions in llama_shapes(config).items()})


def write_random(directory: Path, shape: dict[str, int], *, tied: bool, shard_bytes: int = 4 * 10**9) -> None:
    """A Llama checkpoint of random weights in bfloat16, in shards of about so many bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        **shape, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=tied, dtype="bfloat16",
        max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    write_settings(directory, config)
    noise = (torch.randn(2**22) * 0.02).to(torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, int] = {}
    size = 0
    for name, dimensions in llama_shapes(config).items():
        count = int(torch.tensor(dimensions).prod())
        if size + 2 * count > shard_bytes and shards[-1]:
            save_file(shards[-1], directory / f"part-{len(shards)}", metadata={"format": "pt"})
            shards[-1].clear()
            shards.append({})
            size = 0
        shards[-1][name] = noise.repeat(-(-count // noise.numel()))[:count].reshape(dimensions)
        weight_map[name] = len(shards)
        size += 2 * count
    save_file(shards[-1], directory / f"part-{len(shards)}", metadata={"format": "pt"})
    names = {
        part: f"model-{part:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        for part in range(1, len(shards) + 1)
    }
    for part, name in names.items():
        (directory / f"part-{part}").rename(directory / name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": {name: names[part] for name, part in weight_map.items()}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_settings(directory: Path, config: Any, **more: Any) -> None:
    """A directory with a model's configuration, `more` in its config.json, and a tokenizer."""
    from tests.tokenizers import write_llama3

    directory.mkdir()
    write_llama3(directory, vocab_size=1000)
    config.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def write_sparse_tensors(directory: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Zeros, by name their safetensors dtype and shape: real headers, and data that the file system need not store."""
    from ftload.loaders.checkpoint.tensors import ITEM_BYTES

    shards: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    size = 0
    for name, (dtype, dimensions) in tensors.items():
        count = ITEM_BYTES[dtype] * math.prod(dimensions)
        if size + count > SPARSE_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = dtype, dimensions, count
        size += count
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, dimensions, count) in shard.items():
            header[name] = {"dtype": dtype, "shape": dimensions, "data_offsets": [position, position + count]}
            position += count
            weight_map[name] = file
        raw = json.dumps(header).encode()
        with (directory / file).open("wb") as opened:
            opened.write(len(raw).to_bytes(8, "little") + raw)
            opened.truncate(8 + len(raw) + position)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def llama_in_fp8(directory: Path, shape: dict[str, int], *, tied: bool) -> Stored:
    """Write the settings of a Llama whose linear layers are FP8 in blocks of 128; returns its tensors."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **shape, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=tied, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    write_settings(directory, config, quantization_config=FP8)
    stored: Stored = {}
    for name, dimensions in llama_shapes(config).items():
        packed = name.endswith("proj.weight")
        stored[name] = ("F8_E4M3" if packed else "BF16", dimensions)
        if packed:
            stored[f"{name}_scale_inv"] = "F32", tuple(-(-size // 128) for size in dimensions)
    return stored


def write_random_tensors(directory: Path, stored: Stored) -> None:
    """In one file; scales are what keeps values small."""
    import torch
    from safetensors.torch import save_file

    noise = torch.randn(2**22)
    of_dtype = {
        "BF16": (noise * 0.02).bfloat16(), "F8_E4M3": (noise * 100).clamp(-448, 448).to(torch.float8_e4m3fn),
        "F32": noise.abs() * 1e-4, "U8": torch.randint(256, (2**22,)).to(torch.uint8),
    }  # fmt: skip
    exponents = torch.randint(112, 124, (2**22,)).to(torch.uint8)
    tensors = {}
    for name, (dtype, dimensions) in stored.items():
        values = exponents if name.endswith("_scales") else of_dtype[dtype]
        count = math.prod(dimensions)
        tensors[name] = values.repeat(-(-count // values.numel()))[:count].reshape(dimensions)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def settle(directory: Path, *, cold: bool = False) -> None:
    """Let the disk finish with the run before, which may have to do with what was deleted after it; then have all of a
    directory's files in the page cache, as far as they fit into it, or nothing of them."""
    os.sync()
    for path in filter(Path.is_file, directory.rglob("*")):
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**24):
                    pass


def seconds_of_work(report: dict[str, Any]) -> float:
    """What a run took from the first weight on: beyond imports, while which weights are read ahead, and the plan."""
    return sum(report["timings"].get(stage, 0.0) for stage in ("write", "save", "hash"))


def measure(command: list[Any], environment: dict[str, str] | None = None) -> tuple[float, int, str]:
    """Wall seconds, the largest anonymous memory (sampled every 10 ms) and the output of one process."""
    environment = environment or {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        peak = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]) * 1024)
            except (OSError, IndexError):
                pass
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        log.seek(0)
        text = log.read().decode()
    if process.returncode:
        sys.exit(f"{command} failed:\n{text[-3000:]}")
    return seconds, peak, text


def prepare(name: str, model: Path, out: Path, *flags: str) -> Job:
    command = (*FTLOAD, "prepare", "--quiet", "--model", model, "--output_dir", out, *flags)
    return Job(name=name, model=model, out=out, command=command)


def alternate(jobs: list[Job], runs: int) -> list[Row]:
    """Run all in turn, each model read once before each run.

    The first round brings the libraries into the page cache and is not counted. It ends everything unless all jobs
    write the same weights.
    """
    figures: dict[str, list[Row]] = {job.name: [] for job in jobs}
    for run in range(runs + 1):
        for job in jobs:
            settle(job.model)
            figure = run_once(job)
            if run:
                figures[job.name].append(figure)
                shutil.rmtree(job.out)
        if not run:
            for job in jobs[1:]:
                different = first_difference(jobs[0].out, job.out)
                if different:
                    sys.exit(f"{jobs[0].name} and {job.name} write different weights: {different}")
            for job in jobs:
                shutil.rmtree(job.out)
    return [median(name, rows) for name, rows in figures.items()]


def first_difference(ours: Path, theirs: Path) -> str | None:
    """What differs first in the tensors of two directories, adapters among them: names, dtypes, shapes or bytes."""
    import torch
    from safetensors import safe_open

    stored: list[dict[str, torch.Tensor]] = []
    for directory in (ours, theirs):
        stored.append({})
        for path in sorted(directory.glob("**/*.safetensors")):
            with safe_open(path, "pt") as file:
                folder = path.parent.relative_to(directory)
                stored[-1].update({str(folder / name): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    if not stored[0]:
        return f"there are no tensors in {ours}"
    for name in sorted({*stored[0], *stored[1]}):
        first, second = (tensors.get(name) for tensors in stored)
        if first is None or second is None:
            return f"{name} is only in {ours if second is None else theirs}"
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return f"{name} is {first.dtype} {list(first.shape)}, and {second.dtype} {list(second.shape)}"
        if not torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8)):
            return f"{name} has other values"
    return None


def run_once(job: Job) -> Row:
    """Leaves what the job wrote."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak, said = measure(list(job.command))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = job.out / "ftload_report.json"
    if report.exists():
        work = seconds_of_work(json.loads(report.read_text()))
    else:
        work = float(said.rpartition("work ")[2].split()[0]) if "work " in said else None
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Row(
        job=job.name, seconds=seconds, work_seconds=work, processor_seconds=processor, peak_anonymous_bytes=peak,
        note=said.rpartition("\nnote ")[2].strip() if "\nnote " in said else "",
    )  # fmt: skip


def median(name: str, rows: list[Row]) -> Row:
    fields = ("seconds", "work_seconds", "processor_seconds", "peak_anonymous_bytes")
    columns = {field: [getattr(row, field) for row in rows] for field in fields}
    return Row(
        job=name,
        note=rows[-1].note,
        **{field: None if None in values else statistics.median(values) for field, values in columns.items()},
    )


def against(ours: Row, theirs: Row) -> Row:
    """The ratio of two rows, for people."""
    faster = theirs.seconds / ours.seconds
    ratios = [
        f"{faster:.1f}× faster" if faster >= 1 else f"{1 / faster:.1f}× slower",
        f"{theirs.processor_seconds / ours.processor_seconds:.1f}× less of the processors",
        f"{ours.peak_anonymous_bytes / theirs.peak_anonymous_bytes:.2f} of its memory",
    ]
    if theirs.work_seconds is not None:
        ratios.insert(1, f"beyond start-up {theirs.work_seconds / ours.work_seconds:.1f}×")
    return Row(job=f"**{ours.job}, against {theirs.job.rpartition(': ')[2]}**", note=f"**{', '.join(ratios)}**")


def print_header(runs: int) -> None:
    print(f"medians of {runs} runs; {describe_machine()}")
    print("| job | seconds | beyond start-up | processor seconds | peak anonymous memory | |")
    print("|---|---:|---:|---:|---:|---|")


def print_row(row: Row) -> None:
    seconds = [
        "–" if value is None else f"{value:.2f}" for value in (row.seconds, row.work_seconds, row.processor_seconds)
    ]
    memory = "–" if row.peak_anonymous_bytes is None else f"{row.peak_anonymous_bytes / 1e9:.2f} GB"
    print(f"| {row.job} | {' | '.join(seconds)} | {memory} | {row.note} |", flush=True)


def describe_machine() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")}
    return {"cpus": str(len(os.sched_getaffinity(0))), "platform": platform.platform(), **versions}
