"""Loading what was prepared: the model as the training script would hold it before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, UsageError
from .experts.registration import register_experts
from .liger import apply_liger, liger_problem
from .model.model_class import native_class, unknown_to_auto
from .model.transformers_internals import attention_support, checkpoint_activations, remote_class
from .plan.vocabulary import set_padding
from .report.outputs import read_report
from .system.attention import resolve_attention
from .system.quiet import quiet_bitsandbytes, quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_prepared(
    directory: str | Path, *, trust_remote_code: bool = False, dtype: str | torch.dtype = "bfloat16"
) -> tuple[PreTrainedModel | Any, PreTrainedTokenizerBase]:
    """Load a prepared directory on this machine's GPU, or on the CPU where there is none.

    Returns the model, in training mode, and its tokenizer. Under LoRA and QLoRA it is a `PeftModel` whose float32
    adapter is trainable and whose base is frozen, after k-bit preparation where the base is 4-bit; else all parameters
    are trainable but those that the model's class makes without a gradient, such as biases that balance experts:
    loading alone would ask one of them too. Gradient checkpointing is on if it was asked for. Attention and Liger
    kernels are resolved anew for this machine; a difference to what was asked for is a Python warning. The directory
    may have been moved since it was written: the adapter's configuration names the place that its base was loaded from,
    or the hub's repository that `ftload verify --fix --base` had it name.

    `dtype` is that of a base that is not 4-bit: `bfloat16`, or `float32` (the name, or torch's own). Trained in float32
    under autocast to bfloat16 (mixed precision), the weights are their own master copy, in which small steps are not
    lost; they take twice the memory, and so do gradients and optimizer states. All other dtypes stay as they are: of
    parameters that the architecture keeps in float32, and of adapters.

    Raises `UsageError` for another `dtype`, and for float32 with a 4-bit base; `CheckpointError` when the directory
    holds no report that this version understands, and when the base that an adapter refers to is gone.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float32"):
        raise UsageError(f"`dtype` is `{dtype}`", hint="training starts from bfloat16 or float32")
    directory = Path(directory).expanduser().absolute()
    report = read_report(directory)
    if dtype == "float32" and report.quantization is not None:
        raise UsageError(
            f"the base of `{directory}` is 4-bit: there are no weights to hold in float32",
            hint="leave `dtype` out: its adapter, which is what is trained, is float32 in any case",
        )
    base = {"pretrained_model_name_or_path": str(directory)}
    if report.adapter is not None and report.base == "reference":
        base = {
            "pretrained_model_name_or_path": report.adapter.base,
            "revision": report.adapter.revision or "main",
        }
        place = Path(report.adapter.base)
        if place.is_absolute() and not place.exists():
            raise CheckpointError(
                f"the base of `{directory}`, `{place}`, does not exist", hint="prepare it again with --base copy"
            )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    checkpointing = report.gradient_checkpointing
    if report.quantization is not None:
        register_experts()
    with quiet_transformers():
        config = AutoConfig.from_pretrained(**base, trust_remote_code=trust_remote_code)
        pad = report.embeddings.pad_token_id
        if pad is not None:
            set_padding(config, pad)  # a base that is another's has its own
        model_class = _model_class(config, base, trust_remote_code=trust_remote_code)
        attention = resolve_attention(
            attention_support(model_class),
            use_flash_attn=report.attention.requested == "flash_attention_2",
        )
        loader = model_class if unknown_to_auto(config) else AutoModelForCausalLM
        loaded: Any = loader.from_pretrained(
            **base,
            config=config,
            output_loading_info=True,
            dtype=getattr(torch, dtype),
            attn_implementation=attention.effective,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    model, info = loaded
    if pad is not None and model.generation_config is not None:
        model.generation_config.pad_token_id = pad
    wrong = {what: sorted(map(str, info[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    for what, keys in wrong.items():
        if keys:
            # transformers would go on with random weights
            raise CheckpointError(f"`{directory}`: {len(keys)} {what} tensors, `{keys[0]}` among them")
    if attention.reason is not None:
        warnings.warn(f"attention is {attention.effective}: {attention.reason}", stacklevel=2)
    if report.kernels is not None:
        problem = liger_problem()
        if problem is None and not apply_liger(model):
            problem = f"Liger has no kernels for `{model.config.model_type}`"
        if problem is not None:
            warnings.warn(f"Liger kernels are not applied: {problem}", stacklevel=2)

    for name in report.parameters.never_trained:
        model.get_parameter(name).requires_grad_(False)
    if report.quantization is not None:
        from peft import prepare_model_for_kbit_training

        _keep_weights_in_place(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        # as k-bit preparation does it, which calls a method that transformers is about to drop
        checkpoint_activations(model, use_reentrant=report.quantization is not None)
        if report.adapter is not None:
            # frozen embeddings would leave the checkpointed blocks without an input that needs a gradient
            model.enable_input_require_grads()
    if report.adapter is not None:
        with quiet_bitsandbytes():  # PEFT imports it
            from peft import PeftModel

        with warnings.catch_warnings():
            # PEFT asks for `is_gradient_checkpointing`, which transformers renames: nothing that a user could change
            warnings.simplefilter("ignore", FutureWarning)
            # it looks for the ranks of parameters among the layers alone, and uses them all the same
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            model = PeftModel.from_pretrained(model, str(directory / "adapter"), is_trainable=True)
        if Path(report.adapter.base).is_absolute():
            # what is trained is saved with it, and the directory may have been moved
            model.peft_config["default"].base_model_name_or_path = base["pretrained_model_name_or_path"]
    model.train()
    return model, tokenizer


def _model_class(config: PretrainedConfig, base: Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    """The class of the model."""
    from transformers import AutoModelForCausalLM

    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if remote is not None and trust_remote_code:
        return remote_class(remote, base["pretrained_model_name_or_path"], revision=base.get("revision"))
    return native_class(config) or AutoModelForCausalLM


def _keep_weights_in_place(model: PreTrainedModel) -> None:
    """A forward pass in eval mode repacks 4-bit weights on CPUs with AVX512-BF16: gradients are wrong from then on."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
