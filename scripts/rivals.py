"""The jobs of `bench_rivals`, each in a process of its own: `python scripts/rivals.py JOB …`.

Libraries are used through their public calls. A job says what it took beyond imports ("work"). None imports ftload but
`prepared`, so that all others run in the rivals' environment as well.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

RANK = 64
TARGETS = ["q_proj", "o_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = 4
"""Of the batch with which the first step is done: few, so that what loading takes is seen on a slow processor too."""
SAMPLE = 4096
"""Elements of each parameter that are kept of it: whole parameters would take longer to write than the step."""


def convert(source: str, target: str) -> None:
    """FP8 in blocks to bfloat16, by compressed-tensors, file by file: what llm-compressor converts with as well."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint

    begin = time.perf_counter()
    convert_checkpoint(source, target, FP8BlockDequantizer.from_pretrained(source))
    print("work", time.perf_counter() - begin)


def layer_by_layer(source: str, target: str, workers: str) -> None:
    """QLoRA as fsdp_qlora of answer.ai loads it: a model on `meta`, of which one tensor after another is read and
    quantised, several at a time."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import prepare_model_for_kbit_training
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    begin = time.perf_counter()
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                bias = module.bias is not None
                packed = Linear4bit(module.in_features, module.out_features, bias, torch.bfloat16, quant_type="nf4")
                model.set_submodule(name, packed)

    def load(file: Any, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        value = file.get_tensor(name)
        if isinstance(module.get_parameter(leaf), Params4bit):
            # quantised when it is moved
            value = Params4bit(value, requires_grad=False, quant_type="nf4", module=module).to("cpu")
        else:
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, value)

    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as file, ThreadPoolExecutor(int(workers)) as pool:
            list(pool.map(lambda name, file=file: load(file, name), list(file.keys())))
    model.tie_weights()
    model.is_loaded_in_4bit = True
    model.config.quantization_config = four_bit()
    model.save_pretrained(target)
    set_seed(42)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with_adapter(model).save_pretrained(Path(target) / "adapter", save_embedding_layers=False)
    print("work", time.perf_counter() - begin)


def unsloth(source: str, target: str) -> None:
    """QLoRA by unsloth, which without a GPU has transformers load the model.

    Gradient checkpointing changes nothing that is saved.
    """
    import torch
    from unsloth import FastLanguageModel

    begin = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(source, dtype=torch.bfloat16, load_in_4bit=True)
    model.save_pretrained(target)
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, target_modules=TARGETS, lora_alpha=16, lora_dropout=0.1, random_state=42
    )
    model.save_pretrained(Path(target) / "adapter", save_embedding_layers=False)
    print("work", time.perf_counter() - begin)


def prepared(source: str, target: str) -> None:
    """The first step from a directory that ftload prepared."""
    import ftload

    import_libraries()
    begin = time.perf_counter()
    model, _ = ftload.load_prepared(source)
    take_step(model, target, begin)


def reference(source: str, target: str, strategy: str) -> None:
    """The first step from the source, as training scripts make the model at each start."""
    import_libraries()
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    begin = time.perf_counter()
    AutoTokenizer.from_pretrained(source)  # `load_prepared` returns one as well
    options = {"quantization_config": four_bit()} if strategy == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
    set_seed(42)
    if strategy == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if strategy != "standard":
        model = with_adapter(model)
    take_step(model.train(), target, begin)


JOBS = {job.__name__: job for job in (convert, layer_by_layer, unsloth, prepared, reference)}


# -- what jobs are made of


def import_libraries() -> None:
    """What either way to the first step imports, so that both begin to count behind it."""
    import bitsandbytes
    import peft
    import transformers

    _ = bitsandbytes.nn.Linear4bit, peft.PeftModel, transformers.LlamaForCausalLM


def four_bit() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=16, lora_dropout=0.1, target_modules=TARGETS)
    )


def take_step(model: Any, target: str, begin: float) -> None:
    """One step of AdamW; leaves the loss and a sample of each parameter that was trained."""
    import torch
    from safetensors.torch import save_file

    loaded = time.perf_counter()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    torch.manual_seed(0)  # of dropout
    batch = torch.randint(1000, (1, TOKENS))
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    end = time.perf_counter()
    Path(target).mkdir()
    sample = {name: value.detach().flatten()[:SAMPLE].clone() for name, value in trained.items()}
    save_file({"loss": loss.detach(), **sample}, Path(target) / "trained.safetensors")
    print("work", end - begin)
    print(f"note {loaded - begin:.1f} s until it is loaded, {end - loaded:.1f} s the step")


if __name__ == "__main__":
    JOBS[sys.argv[1]](*sys.argv[2:])
