"""The reference of adapters other than the default: PEFT's own, of any `LoraConfig`, through public calls alone.

One thread computes, as in ftload while weights are written: the sums of LAPACK's decompositions depend on it.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

QLORA = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
"""Of `BitsAndBytesConfig`, beside the dtype that is computed in."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch compute with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_adapter_reference(
    source: Path,
    output: Path,
    fields: Mapping[str, Any],
    *,
    strategy: str,
    tokenizer_size: int,
    seed: int = 42,
    computed_by: int = 1,
) -> None:
    """Save the base to `output` and the adapter that PEFT makes of `LoraConfig(**fields)` to `output/adapter`.

    As `run_reference` does it: load, seed, resize, save, prepare for k-bit training, wrap, save. An adapter that takes
    its values out of the base, PiSSA's or OLoRA's, is made of the bfloat16 model, and the base is saved after it,
    without it; in 4-bit that base is then loaded as `BitsAndBytesConfig` quantises it, and saved again. `computed_by`
    is the number of threads.
    """
    changes = str(fields.get("init_lora_weights")).startswith(("pissa", "olora"))
    four_bit = strategy == "qlora"
    with threads(computed_by), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not changes:
            model = _load(source, tokenizer_size, seed, four_bit=four_bit)
            model.save_pretrained(output)
            _wrap(model, fields, four_bit=four_bit).save_pretrained(output / "adapter", save_embedding_layers=False)
            return
        adapted = _wrap(_load(source, tokenizer_size, seed, four_bit=False), fields, four_bit=False)
        adapted.save_pretrained(output / "adapter", save_embedding_layers=False)
        residual = output / "residual" if four_bit else output
        adapted.unload().save_pretrained(residual)
        if four_bit:
            _load(residual, 0, seed, four_bit=True).save_pretrained(output)
            shutil.rmtree(residual)


def _load(source: Path, tokenizer_size: int, seed: int, *, four_bit: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    arguments: dict[str, Any] = {"dtype": torch.bfloat16}
    if four_bit:
        arguments["quantization_config"] = BitsAndBytesConfig(**QLORA, bnb_4bit_compute_dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(source, **arguments)
    set_seed(seed)
    if tokenizer_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokenizer_size, pad_to_multiple_of=8)
    return model


def _wrap(model: Any, fields: Mapping[str, Any], *, four_bit: bool) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # PEFT changes lists that it was given
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, **deepcopy(dict(fields)))
    return get_peft_model(model, config)
