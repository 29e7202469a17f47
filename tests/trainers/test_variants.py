"""Adapters other than LoRA, trained by each trainer as its recipe says: what was prepared, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Result

from .script_runs import needs, run_recipe

Ftload = Callable[..., Result]
VARIANTS: dict[str, list[str]] = {
    "dora": ["--use_qlora", "--use_dora", "true", "--use_rslora", "true"],
    "pissa": ["--use_qlora", "--init_lora_weights", "pissa"],
    "modules": ["--use_lora", "--base", "copy", "--lora_modules_to_save", "lm_head", "norm"],
    "modules of a 4-bit base": ["--use_qlora", "--lora_modules_to_save", "norm"],
    "rows": ["--use_qlora", "--trainable_token_indices", "3", "49152"],
}
REFUSED = {("trl", "rows"), ("accelerate-fsdp", "modules"), ("accelerate-fsdp", "rows")}
OTHER_DTYPES = {
    ("llamafactory", "modules"): torch.float32,
    ("axolotl", "modules of a 4-bit base"): torch.bfloat16,
}
"""Of copies of the base, where a trainer has them in another one."""
ENVIRONMENTS = {
    "trl": "trl", "transformers": "trl", "accelerate-fsdp": "trl", "axolotl": "axolotl", "llamafactory": "llamafactory",
}  # fmt: skip


def stored_name(name: str) -> str:
    """What PEFT calls a parameter in an adapter's file; that of the default adapter goes without its name already."""
    name = name.replace(".modules_to_save.", ".").removesuffix(".default")
    return name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trainer", [pytest.param(name, marks=needs(where)) for name, where in ENVIRONMENTS.items()])
def test_the_recipe_trains_what_was_prepared(
    ftload: Ftload, trainer: str, variant: str, tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    if (trainer, variant) in REFUSED:
        pytest.skip("refused: the embeddings are tied")
    environment = ENVIRONMENTS[trainer]
    run = run_recipe(
        ftload,
        trainer,
        tiny_llama,
        conversations,
        tmp_path,
        *VARIANTS[variant],
        *("--lora_dropout", "0", "--max_seq_length", "128"),
        options=("--fsdp",) if trainer == "accelerate-fsdp" else (),
        processes=2 if trainer == "accelerate-fsdp" else 0,
        environment=environment,
        program=Path(__file__).with_name(f"{environment}_on_cpu.py") if environment != "trl" else None,
    )
    stored = load_file(run.prepared / "adapter/adapter_model.safetensors")
    before = {stored_name(name): value for name, value in run.before.items()}
    assert before.keys() == stored.keys()
    for name, value in stored.items():
        dtype = value.dtype if ".lora_" in name else OTHER_DTYPES.get((trainer, variant), value.dtype)
        assert before[name].dtype == dtype, name
        assert torch.equal(before[name].to(value.dtype), value), name
    assert run.facts["trained"] == run.report["parameters"]["trainable"]
    assert len(run.facts["losses"]) == 2
    assert all(torch.tensor(run.facts["losses"]).isfinite())
    after = load_file(run.trained / "adapter_model.safetensors")
    assert after.keys() == stored.keys()
    assert not [name for name, value in stored.items() if torch.equal(after[name].to(value.dtype), value)]
