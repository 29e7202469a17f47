"""What is wanted: the flags, resolved once into values that the rest of ftload works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import UsageError

if TYPE_CHECKING:
    from .declared import Arguments, TokenizerConfig

_PUBLISHING = ("push_to_hub", "save_to_hub", "hf_entity", "hf_repo_id", "hf_repo_revision")
"""Flags that ask for an upload."""
_OF_ADAPTERS = (
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "lora_config",
    "lora_experts",
)
"""ftload's own flags that mean nothing without an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Everything of the flags that changes what is written."""

    arguments: Arguments
    """All flags as they were given: for the report."""
    tokenizer: TokenizerConfig
    model: str | None
    """None for the base of the first adapter that is merged."""
    merge_adapters: tuple[str, ...]
    """Trained adapters, as they were named, in the order in which they are merged."""
    revision: str | None
    config_name: str | None
    config_overrides: Mapping[str, Any]
    trust_remote_code: bool
    source_cache: str
    """`hub`, or `none`: weights from a hub are read by ranges and never lie on this disk."""
    allow_pickle: bool
    dequantize: bool
    """Whether weights that transformers would load packed are decoded."""
    strategy: str
    """A key of `strategy.STRATEGIES`."""
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_targets: tuple[str, ...] | None
    """None asks for the reference's seven names."""
    lora_experts: int | None
    """Rank of the adapters of experts; None leaves them untrained."""
    lora_settings: Mapping[str, Any]
    """Fields of PEFT's `LoraConfig` other than those above, where they are not the default's."""
    quantize_experts: bool
    bnb_4bit_quant_storage: str | None
    """torch's name of the dtype that 4-bit codes are stored under; None for what the checkpoint has, else uint8."""
    bnb_4bit_compute_dtype: str | None
    """torch's name of the dtype that 4-bit layers compute in; None for what the checkpoint has, else bfloat16."""
    bnb_4bit_quant_type: str | None
    """bitsandbytes' name of a 4-bit type; None for what the checkpoint has, else NF4."""
    bnb_4bit_use_double_quant: bool | None
    """Whether absmax is quantised too; None for what the checkpoint does, else yes."""
    use_liger_kernel: bool
    use_flash_attn: bool
    gradient_checkpointing: bool
    embedding_init: str
    """`mean` or `reference`."""
    base: str
    """`auto`, `copy`, `link` or `reference`."""
    min_quantized: float
    """Percent."""
    device: str
    """Where NF4 is encoded: `cpu` or `cuda`."""
    seed: int
    output: Path
    overwrite: bool
    strict: bool
    """Whether anything that is done otherwise than asked is an error."""
    max_shard_bytes: int
    max_memory_bytes: int
    """For the tensors that are being worked on; the interpreter and its libraries come on top."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]


def resolve_request(arguments: Arguments) -> Request:
    """Turn flags into a request. Raises `UsageError` where they contradict each other."""
    from .declared import all_flags, parse_size
    from .lora_config import resolve_lora
    from .model_page import repository_of
    from .training_refusals import training_warnings

    flat, own = arguments.flat, arguments.own
    adapters = tuple(own.merge_adapter or ())
    if not flat.model_name_or_path and not adapters:
        raise UsageError("no model is given", hint="give a hub id, a directory or a .gguf file before the flags")
    texts = [
        ("--model", flat.model_name_or_path or ""),
        ("--output_dir", flat.output_dir),
        ("--lora_config", own.lora_config or ""),
    ]
    for flag, value in (*texts, *(("--merge_adapter", name) for name in adapters)):
        if not value.isascii() and value != value.encode(errors="replace").decode():
            # the report, the configuration and the adapter are UTF-8 and name both
            raise UsageError(f"`{flag}`: `{value}` is not valid UTF-8", hint="rename it")
    model, revision = None, flat.model_revision
    if flat.model_name_or_path:
        model, revision = repository_of(flat.model_name_or_path, revision)
    decisions = []
    if flat.use_qlora and not flat.use_lora and arguments.origins["use_lora"] != "default":
        decisions.append(
            Decision(what="use_lora", requested="false", effective="true", reason="use_qlora trains a LoRA adapter")
        )
    publish = [name for name in _PUBLISHING if arguments.origins[name] != "default" and getattr(flat, name)]
    if publish:
        decisions.append(
            Decision(
                what=" ".join(publish),
                requested="upload",
                effective="no upload",
                reason="ftload never uploads anything",
            )
        )
    if flat.use_qlora:
        strategy = "qlora"
    elif flat.use_lora:
        strategy = "lora"
    elif flat.use_liger_kernel:
        strategy = "liger"
    else:
        strategy = "standard"
    adapter_only = [name for name in _OF_ADAPTERS if getattr(own, name) != all_flags()[name].default]
    if own.base == "reference":
        adapter_only.append("base")
    if adapter_only and not (flat.use_lora or flat.use_qlora):
        raise UsageError(f"`--{adapter_only[0]}` is for adapters", hint="pass --use_lora or --use_qlora as well")
    for name in (
        "bnb_4bit_quant_storage", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"
    ):  # fmt: skip
        if getattr(own, name) is not None and not flat.use_qlora:
            raise UsageError(f"`--{name}` is for 4-bit weights", hint="pass --use_qlora as well")
    try:
        output = Path(flat.output_dir).expanduser().absolute()
    except RuntimeError as error:  # `~name` of nobody
        raise UsageError(f"`--output_dir` is `{flat.output_dir}`, whose home directory is not known") from error
    if output.name == "..":
        output = output.resolve()
    lora = resolve_lora(arguments)
    return Request(
        arguments=arguments,
        tokenizer=arguments.tokenizer,
        model=model,
        merge_adapters=adapters,
        revision=revision,
        config_name=flat.config_name,
        config_overrides=_overrides(flat.additional_model_arguments),
        trust_remote_code=arguments.tokenizer.trust_remote_code,
        source_cache=own.source_cache,
        allow_pickle=own.allow_pickle,
        dequantize=own.dequantize,
        strategy=strategy,
        lora_rank=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        lora_targets=lora.targets,
        lora_experts=own.lora_experts,
        lora_settings=lora.settings,
        quantize_experts=own.quantize_experts,
        bnb_4bit_quant_storage=own.bnb_4bit_quant_storage,
        bnb_4bit_compute_dtype=own.bnb_4bit_compute_dtype,
        bnb_4bit_quant_type=own.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=own.bnb_4bit_use_double_quant,
        use_liger_kernel=flat.use_liger_kernel,
        use_flash_attn=flat.use_flash_attn,
        gradient_checkpointing=flat.gradient_checkpointing,
        embedding_init=own.embedding_init,
        base=own.base,
        min_quantized=own.min_quantized,
        device=own.device,
        seed=flat.seed,
        output=output,
        overwrite=own.overwrite,
        strict=own.strict,
        max_shard_bytes=parse_size(own.max_shard_size),
        max_memory_bytes=parse_size(own.max_memory),
        decisions=(*decisions, *lora.decisions),
        warnings=training_warnings(flat),
    )


def _overrides(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
