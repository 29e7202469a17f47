"""Killed at any instant, an output is absent or whole, and the next run goes on to the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ..tokenizers import write_llama

TRIALS = 200


def test_killed_at_random_instants(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=24, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, vocab_size=136, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    write_llama(tmp_path / "model", vocab_size=128)
    (tmp_path / "work").mkdir()
    script = Path(__file__).with_name("kill_trials.py")
    command = [sys.executable, script, tmp_path / "model", tmp_path / "work", str(TRIALS), "20261124"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=7200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(done.stdout)
    assert tally["trials"] == TRIALS
    # the instants were spread over the whole run, its last stages included
    assert tally["killed"] > TRIALS / 3, tally
    assert tally["resumed"] > TRIALS / 40, tally
    print(tally)
