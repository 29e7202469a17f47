"""What the benchmarks share: a Llama's shapes, and time and memory of a process."""

from __future__ import annotations

import importlib.metadata
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
