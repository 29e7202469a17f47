"""What the benchmarks share: a Llama's shapes, and time and memory of a process."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    # Llama 3.2 1B and 3B, Llama 3.1 8B, 70B and 405B
    "1.2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
SPARSE_SHARD_BYTES = 5 * 10**9


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


def write_random(directory: Path, shape: dict[str, int], *, tied: bool) -> None:
    """A Llama checkpoint of random weights in bfloat16, in shards of about 4 GB."""
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
        if size + 2 * count > 4 * 10**9:
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


def settle(directory: Path, *, cold: bool = False) -> None:
    """Let the disk finish with the run before, which may have to do with what was deleted after it; then have all of a
    directory's files in the page cache, as far as they fit into it, or nothing of them."""
    os.sync()
    for path in directory.iterdir():
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**24):
                    pass


def seconds_of_work(report: dict[str, Any]) -> float:
    """What a run took from the first weight on: beyond imports, while which weights are read ahead, and the plan."""
    return sum(report["timings"].get(stage, 0.0) for stage in ("fetch", "write", "save", "hash"))


def measure(command: list[Any]) -> tuple[float, int, str]:
    """Wall seconds, the largest anonymous memory (sampled every 10 ms) and the output of one process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
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


def describe_machine() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")}
    return {"cpus": str(len(os.sched_getaffinity(0))), "platform": platform.platform(), **versions}
