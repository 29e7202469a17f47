"""The reference: what the training script's model-loading block does, through the libraries' public calls alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

REFERENCE_TARGETS = ["q_proj", "o_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]


def run_reference(
    source: Path,
    output: Path,
    *,
    strategy: str,
    tokenizer_size: int,
    seed: int = 42,
    rank: int = 8,
    targets: list[str] | None = None,
    four_bit: Mapping[str, Any] | None = None,
    **load_arguments: Any,
) -> None:
    """Load, seed, resize, save the base to `output`, wrap it and save the adapter to `output/adapter`.

    The seed is set after loading: some models draw from the global generator within `from_pretrained`. `four_bit` are
    settings of `BitsAndBytesConfig` in the place of the script's, or beside them.
    """
    import torch
    import transformers
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
    from safetensors.torch import save_file
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        set_seed,
    )

    if strategy == "qlora":
        settings: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
        load_arguments["quantization_config"] = BitsAndBytesConfig(**{**settings, **(four_bit or {})})
    model_class = AutoModelForCausalLM
    if "gguf_file" not in load_arguments:
        config = load_arguments["config"] = AutoConfig.from_pretrained(source)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # what is left of Mllama and Emu3 when it is saved
            model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(source, dtype=torch.bfloat16, **load_arguments)
    set_seed(seed)
    if tokenizer_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokenizer_size, pad_to_multiple_of=8)
    if strategy == "qlora":
        storage = load_arguments["quantization_config"].bnb_4bit_quant_storage
        experts = take_out_experts(model, storage, load_arguments["quantization_config"])
        if experts:
            output.mkdir()
            save_file(experts, output / "experts.safetensors")
    model.save_pretrained(output)
    if strategy in ("standard", "liger"):
        return
    if strategy == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=rank,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=targets or REFERENCE_TARGETS,
    )
    get_peft_model(model, config).save_pretrained(output / "adapter", save_embedding_layers=False)


def take_out_experts(model: Any, storage: Any, config: Any) -> dict[str, Any]:
    """Quantise fused experts by bitsandbytes; returns what it stores them in, by name, and leaves the model without.

    `replace_parameter_4bit` knows no dtype of storage: the codes are viewed as `storage`, as `quantize_4bit` does for
    linear layers. Experts are those that transformers' decorator has marked, in either orientation.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    parameters = [
        (path, module, name)
        for path, module in model.named_modules()
        for name in ("gate_up_proj", "up_proj", "down_proj")
        if hasattr(module, "is_transposed") and hasattr(module, name)
    ]
    for _, module, name in parameters:
        replace_parameter_4bit(
            module, name, compress_statistics=config.bnb_4bit_use_double_quant, quant_type=config.bnb_4bit_quant_type,
            blocksize=64,
        )  # fmt: skip
    state = model.state_dict()
    for module in {module for _, module, _ in parameters}:
        del module.parametrizations
    return {
        stored: state[stored].view(-1).view(storage).view(-1, 1) if stored == f"{path}.{name}" else state[stored]
        for path, _, name in parameters
        for stored in state
        if stored == f"{path}.{name}" or stored.startswith(f"{path}.{name}.")
    }


if __name__ == "__main__":
    import sys

    run_reference(Path(sys.argv[1]), Path(sys.argv[2]), strategy=sys.argv[3], tokenizer_size=0, rank=64)
