"""Every flag: its name, type, default, choices and help, declared once.

`FlatArguments` and `TokenizerConfig` carry the names, types and defaults of the two dataclasses that Open
Instruct's SFT script parses its command line into, so that a training command line or YAML file can be handed
to ftload unchanged; `OwnOptions` is what ftload adds. `command_line.py` parses into them, and `cli/options.py`
makes `--help` from them. The file is long because the contract has 100 flags.
"""

# ruff: noqa: RUF009 - `field` below wraps dataclasses.field, which the rule can't see

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from ..errors import UsageError
from ..system.safe_text import masked

MODEL = "Model"
ADAPTER = "Adapter"
QUANTISATION = "Quantisation"
TOKENIZER = "Tokenizer"
OUTPUT = "Output"
TRAINING = "Training: recorded only"
PANELS = (MODEL, ADAPTER, QUANTISATION, TOKENIZER, OUTPUT, TRAINING)
"""The panels of `--help`, in the order in which they are shown."""
PLAN = "Plan"
MERGE = "Merge"
"""The panels that `ftload plan` and `ftload merge` show before them."""

Origin: TypeAlias = Literal["default", "yaml", "cli"]
"""Where a flag's value came from."""
Kind: TypeAlias = Literal["bool", "int", "float", "str", "bool or str", "list", "str or list", "json"]
"""How the text of a flag's value is read."""


def field(default: Any, panel: str, help: str, *, choices: tuple[str, ...] = (), adds: bool = False) -> Any:
    """Declare a flag: a dataclass field whose metadata holds `panel`, `help`, `choices` and `adds`."""
    metadata = {"panel": panel, "help": help, "choices": choices, "adds": adds}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


TRAINERS = ("trl", "transformers", "accelerate-fsdp", "axolotl", "llamafactory", "open-instruct")
"""Those of `ftload recipe`."""
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatArguments:
    """The training script's own arguments; most are recorded, the rest say what to prepare."""

    exp_name: str = field("finetune", TRAINING, "Name of the experiment")
    do_not_randomize_output_dir: bool = field(
        False, TRAINING, "Training writes straight into output_dir, without a random subfolder"
    )
    model_name_or_path: str | None = field(
        None, MODEL, "Hub id, local directory or .gguf file to prepare; --model is short for it"
    )
    config_name: str | None = field(None, MODEL, "Hub id or path of another model's config to use")
    use_flash_attn: bool = field(True, MODEL, "Ask for FlashAttention 2; where it can't be had, sdpa or else eager")
    model_revision: str | None = field(None, MODEL, "Branch, tag or commit of the model")
    additional_model_arguments: dict | str | None = field(
        {}, MODEL, """Overrides of the model's config, e.g. '{"attention_dropout": 0.1}'"""
    )
    low_cpu_mem_usage: bool = field(False, MODEL, "Accepted; ftload never holds the whole model in memory")
    dataset_name: str | None = field(None, TRAINING, "Data set to train on, by name")
    dataset_mixer: dict | None = field(None, TRAINING, "Data sets and their shares, as a JSON object")
    dataset_mixer_list: list[str] = field(
        ["allenai/tulu-3-sft-personas-algebra", "1.0"], TRAINING, "Data sets, each followed by its share"
    )
    dataset_mixer_list_splits: list[str] = field(["train"], TRAINING, "Splits of the data sets to train on")
    dataset_transform_fn: list[str] = field(
        ["sft_tulu_tokenize_and_truncate_v1", "sft_tulu_filter_v1"],
        TRAINING,
        "Functions that are applied to the data set",
    )
    dataset_target_columns: list[str] = field(
        ["input_ids", "attention_mask", "labels"], TRAINING, "Columns that training reads"
    )
    dataset_cache_mode: str = field(
        "local", TRAINING, "Where the processed data set is cached", choices=("hf", "local")
    )
    dataset_local_cache_dir: str = field("local_dataset_cache", TRAINING, "Folder of the local data set cache")
    dataset_config_hash: str | None = field(None, TRAINING, "Hash that names a cached data set")
    dataset_skip_cache: bool = field(False, TRAINING, "Process the data set anew, whatever is cached")
    dataset_mix_dir: str | None = field(None, TRAINING, "Folder for a copy of the mixed data set")
    dataset_config_name: str | None = field(None, TRAINING, "Configuration of the data set")
    max_train_samples: int | None = field(None, TRAINING, "Train on at most this many samples")
    preprocessing_num_workers: int | None = field(None, TRAINING, "Processes that prepare the data set")
    max_seq_length: int | None = field(None, TRAINING, "Longest sequence in tokens; longer ones are cut")
    overwrite_cache: bool = field(False, TRAINING, "Replace cached training sets")
    clip_grad_norm: float = field(-1, TRAINING, "Largest gradient norm; -1 does not clip")
    gradient_accumulation_steps: int = field(1, TRAINING, "Forward and backward passes to one update")
    learning_rate: float = field(2e-5, TRAINING, "Learning rate after the warm-up")
    logging_steps: int | None = field(None, TRAINING, "Log every so many steps")
    lora_rank: int = field(64, ADAPTER, "Rank of the LoRA matrices")
    lora_alpha: float = field(16, ADAPTER, "Scale of the LoRA update, divided by the rank")
    lora_dropout: float = field(0.1, ADAPTER, "Dropout before the LoRA matrices")
    lr_scheduler_type: str = field("linear", TRAINING, "Course of the learning rate", choices=LR_SCHEDULERS)
    num_train_epochs: int = field(2, TRAINING, "Passes over the data set")
    output_dir: str = field("output/", OUTPUT, "Directory to write; it must not exist yet")
    per_device_train_batch_size: int = field(8, TRAINING, "Sequences on each device in one pass")
    use_lora: bool = field(False, ADAPTER, "Prepare a LoRA adapter")
    use_qlora: bool = field(False, QUANTISATION, "Quantise the base to 4-bit NF4 and prepare a LoRA adapter")
    use_8bit_optimizer: bool = field(False, TRAINING, "Keep optimizer states in 8 bits")
    warmup_ratio: float = field(0.03, TRAINING, "Share of the steps in which the learning rate rises")
    final_lr_ratio: float | None = field(
        None, TRAINING, "Learning rate at the end as a share of the highest; linear schedule only"
    )
    weight_decay: float = field(0.0, TRAINING, "Weight decay of AdamW")
    timeout: int = field(1800, TRAINING, "Seconds after which a stuck collective operation fails")
    resume_from_checkpoint: str | None = field(None, TRAINING, "Training checkpoint to go on from")
    report_to: str | list[str] = field("all", TRAINING, "Experiment trackers to report to")
    save_to_hub: str | None = field(None, TRAINING, "Hub id that training saves to")
    gradient_checkpointing: bool = field(False, MODEL, "Recompute activations in the backward pass to save memory")
    use_liger_kernel: bool = field(False, MODEL, "Train with Liger's fused kernels")
    max_train_steps: int | None = field(None, TRAINING, "Number of updates, whatever num_train_epochs says")
    seed: int = field(42, MODEL, "Seed of everything drawn at random: adapters, new embedding rows")
    checkpointing_steps: str | None = field(None, TRAINING, "Save every so many steps, or each epoch")
    keep_last_n_checkpoints: int = field(3, TRAINING, "Training checkpoints to keep; -1 keeps all")
    fused_optimizer: bool = field(True, TRAINING, "Use the fused AdamW")
    load_balancing_loss: bool = field(False, TRAINING, "Add the load-balancing loss of mixture-of-experts models")
    load_balancing_weight: float = field(0.5, TRAINING, "Weight of that loss")
    clean_checkpoints_at_end: bool = field(True, TRAINING, "Delete training checkpoints once training is done")
    with_tracking: bool = field(False, TRAINING, "Track the run with the experiment trackers")
    wandb_project_name: str = field("open_instruct_internal", TRAINING, "Weights & Biases project")
    wandb_entity: str | None = field(None, TRAINING, "Weights & Biases team or user")
    push_to_hub: bool = field(True, TRAINING, "Training uploads its result; ftload never does")
    hf_entity: str | None = field(None, TRAINING, "Hub user or organisation that training uploads to")
    hf_repo_id: str | None = field(None, TRAINING, "Hub repository that training uploads to")
    hf_repo_revision: str | None = field(None, TRAINING, "Branch that training uploads to")
    hf_repo_url: str | None = field(None, TRAINING, "Address of that repository")
    try_launch_beaker_eval_jobs: bool = field(True, TRAINING, "Start evaluation jobs after training")
    hf_metadata_dataset: str | None = field(
        "allenai/tulu-3-evals", TRAINING, "Data set that collects the results of evaluations"
    )
    cache_dataset_only: bool = field(False, TRAINING, "Stop once the data set is cached")
    add_seed_and_date_to_exp_name: bool = field(True, TRAINING, "Append seed and time to the experiment's name")
    try_auto_save_to_beaker: bool = field(True, TRAINING, "Copy the result to Beaker's output folder")
    gs_bucket_path: str | None = field(None, TRAINING, "Google Storage path for the result")
    oe_eval_tasks: list[str] | None = field(None, TRAINING, "Evaluation tasks to start after training")
    oe_eval_max_length: int = field(4096, TRAINING, "Longest generation in those tasks")
    sync_each_batch: bool = field(False, TRAINING, "Synchronise gradients in every pass, to save memory")
    packing: bool = field(False, TRAINING, "Pack sequences without padding")
    verbose: bool = field(False, TRAINING, "Log more while training")
    sequence_parallel_size: int = field(1, TRAINING, "Devices that share one sequence")


TOKENIZER_FUNCTIONS = "get_tokenizer_simple_v1, get_tokenizer_tulu_v1, _v2_1 or _v2_2"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Which tokenizer to take, and how to make it ready for chat fine-tuning."""

    tokenizer_name_or_path: str | None = field(
        None, TOKENIZER, "Hub id or directory of the tokenizer, if it isn't the model's"
    )
    tokenizer_revision: str | None = field(None, TOKENIZER, "Branch, tag or commit of the tokenizer")
    trust_remote_code: bool = field(False, MODEL, "Run the Python code that comes with the model or tokenizer")
    use_fast: bool = field(True, TOKENIZER, "Use the fast tokenizer")
    chat_template_name: str | None = field(
        None, TOKENIZER, "Built-in chat template, or a .jinja file; unset keeps the tokenizer's own"
    )
    add_bos: bool = field(False, TOKENIZER, "Begin the chat template with the bos token")
    get_tokenizer_fn: str = field(
        "get_tokenizer_tulu_v2_2", TOKENIZER, f"How the tokenizer is made ready: {TOKENIZER_FUNCTIONS}"
    )
    tokenizer_files_hash: list[str] | None = field(None, TOKENIZER, "Recorded; the report holds the true hashes")
    use_slow_tokenizer: bool = field(False, TOKENIZER, "Accepted and ignored, as in training")
    tokenizer_name: str | None = field(None, TOKENIZER, "Deprecated name of tokenizer_name_or_path")
    ground_truths_key: str = field("ground_truth", TRAINING, "Column that holds the right answers")
    sft_messages_key: str = field("messages", TRAINING, "Column that holds the conversations")


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnOptions:
    """What ftload adds; a training script knows none of these."""

    json: bool = field(False, OUTPUT, "Print exactly one JSON document on stdout")
    strict: bool = field(False, OUTPUT, "Make every fallback an error")
    overwrite: bool = field(False, OUTPUT, "Replace output_dir if it exists")
    base: str = field(
        "auto",
        OUTPUT,
        "Copy or hard-link a base that stays as it is, or point the adapter at it; auto does the least",
        choices=("auto", "copy", "link", "reference"),
    )
    embedding_init: str = field(
        "mean",
        TOKENIZER,
        "New embedding rows: the mean of the old ones, or initialised as transformers does",
        choices=("mean", "reference"),
    )
    lora_target_modules: list[str] | None = field(
        None, ADAPTER, "Layers to adapt, by name; unset takes the usual seven, or the architecture's own"
    )
    lora_target_parameters: list[str] | None = field(
        None, ADAPTER, "Parameters to adapt that are no layer's weight, by name, e.g. mlp.experts.down_proj"
    )
    lora_modules_to_save: list[str] | None = field(
        None, ADAPTER, "Layers to train whole and to keep in the adapter, by name, e.g. lm_head"
    )
    trainable_token_indices: list[str] | None = field(
        None, ADAPTER, "Tokens whose embedding rows are trained, by id; new for the rows that are added"
    )
    use_dora: bool = field(False, ADAPTER, "Train a magnitude of each output beside the LoRA matrices (DoRA)")
    use_rslora: bool = field(False, ADAPTER, "Divide the scale of the LoRA update by the rank's square root (rsLoRA)")
    init_lora_weights: bool | str = field(
        True, ADAPTER, "First values: true (B is zero), gaussian, orthogonal, pissa, pissa_niter_N or olora"
    )
    lora_config: str | None = field(
        None, ADAPTER, "adapter_config.json of PEFT, or a YAML file of LoraConfig's fields; flags go before it"
    )
    min_quantized: float = field(
        90.0, QUANTISATION, "Least percentage of the weight matrices outside embeddings and head that must become 4-bit"
    )
    quantize_experts: bool = field(
        True, QUANTISATION, "Quantise fused experts too; false leaves them 16-bit, as transformers does"
    )
    bnb_4bit_quant_storage: str | None = field(
        None,
        QUANTISATION,
        "Dtype that 4-bit codes are stored under; FSDP divides floats alone; unset takes uint8, or the checkpoint's",
        choices=("uint8", "bfloat16", "float16"),
    )
    bnb_4bit_compute_dtype: str | None = field(
        None,
        QUANTISATION,
        "Dtype that 4-bit layers compute in; T4 and V100 need float16; unset takes bfloat16, or the checkpoint's",
        choices=("bfloat16", "float16", "float32"),
    )
    bnb_4bit_quant_type: str | None = field(
        None,
        QUANTISATION,
        "4-bit type of weights; unset takes nf4, or the checkpoint's",
        choices=("nf4", "fp4"),
    )
    bnb_4bit_use_double_quant: bool | None = field(
        None,
        QUANTISATION,
        "Quantise the statistics of 4-bit weights too: 0.37 bits less a weight; unset does, or as the checkpoint",
    )
    lora_experts: int | None = field(
        None, ADAPTER, "Train the experts of a mixture too, each by an adapter of this rank; unset leaves them"
    )
    device: str = field(
        "cpu",
        QUANTISATION,
        "Where weights are encoded, as bitsandbytes does there",
        choices=("cpu", "cuda"),
    )
    max_shard_size: str = field("5GB", OUTPUT, "Largest weight file, e.g. 500MB or 2GiB")
    max_memory: str = field("2GB", OUTPUT, "Memory for the tensors that are being worked on")
    source_cache: str = field(
        "hub",
        MODEL,
        "Keep weights from a hub in its cache, or (none) read them by ranges: only the output takes disk",
        choices=("hub", "none"),
    )
    allow_pickle: bool = field(False, MODEL, "Read .bin files where there is no safetensors file")
    merge_adapter: list[str] | None = field(
        None,
        MODEL,
        "Trained adapters to merge into the model, one after another; --model defaults to their base",
        adds=True,
    )
    dequantize: bool = field(False, MODEL, "Decode a bitsandbytes checkpoint (NF4, FP4, LLM.int8) to bfloat16")
    quiet: bool = field(False, OUTPUT, "Show no progress and no closing table")
    debug: bool = field(False, OUTPUT, "Show a traceback with errors")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What `ftload plan` takes beside all other flags."""

    for_: str = field("open-instruct", PLAN, "Count the step that this trainer runs", choices=TRAINERS)
    mixed_precision: str = field(
        "bf16", PLAN, "Count it under autocast, or without: accelerate's flag of this name", choices=("bf16", "no")
    )
    html: str | None = field(None, PLAN, "Write the plan to this file too, as one page without scripts or network")
    fsdp: int | None = field(None, PLAN, "Count each GPU's share of this many under FSDP, which divides all floats")
    zero: int | None = field(
        None, PLAN, "Count each GPU's share under DeepSpeed ZeRO: 1 divides optimizer states, 2 gradients, 3 weights"
    )
    gpus: int = field(8, PLAN, "GPUs that --zero divides among")
    fit: list[str] | None = field(
        None,
        PLAN,
        "What to change so that it fits on GPUs of 24GB, or with FSDP on 2x80GB; exit 6 if nothing does",
        adds=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """What `ftload merge` takes beside all other flags."""

    adapter_only: bool = field(
        False,
        MERGE,
        "Merge nothing: write an adapter of 4-bit experts as PEFT needs it for --model, the same model in 16 bits",
    )


_KINDS: dict[str, Kind] = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "str",
    "bool | str": "bool or str",
    "list[str]": "list",
    "str | list[str]": "str or list",
    "dict": "json",
    "dict | str": "json",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag as its dataclass declares it."""

    name: str
    type: str
    """The annotation as written, e.g. `str | None`."""
    kind: Kind
    optional: bool
    """Whether None is a value."""
    default: Any
    choices: tuple[str, ...]
    adds: bool
    """Whether giving it again adds to its list; otherwise the last one counts, as for Open Instruct."""
    help: str
    panel: str
    group: str
    """Name of the dataclass that declares the flag."""


@functools.cache
def all_flags() -> Mapping[str, Flag]:
    """Return every flag by name: the training script's, the tokenizer's, then ftload's own."""
    groups = (FlatArguments, TokenizerConfig, OwnOptions)
    return MappingProxyType({flag.name: flag for group in groups for flag in _declared(group)})


@functools.cache
def plan_flags() -> Mapping[str, Flag]:
    """Return by name what `ftload plan` takes beside `all_flags`."""
    return MappingProxyType({flag.name: flag for flag in _declared(PlanOptions)})


@functools.cache
def merge_flags() -> Mapping[str, Flag]:
    """Return by name what `ftload merge` takes beside `all_flags`."""
    return MappingProxyType({flag.name: flag for flag in _declared(MergeOptions)})


def _declared(group: type) -> Iterator[Flag]:
    defaults = group()
    for declared in dataclasses.fields(group):
        annotation = str(declared.type)
        yield Flag(
            name=declared.name.rstrip("_"),  # `for` is a word of Python
            type=annotation,
            kind=_KINDS[annotation.removesuffix(" | None")],
            optional=annotation.endswith(" | None"),
            default=getattr(defaults, declared.name),
            group=group.__name__,
            **declared.metadata,
        )


def _for_report(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, list):
        return [_for_report(item) for item in value]
    if isinstance(value, dict):
        return {key: _for_report(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no inf and no nan
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Every flag's value, and where each came from."""

    flat: FlatArguments
    tokenizer: TokenizerConfig
    own: OwnOptions
    origins: Mapping[str, Origin]
    """The origin of each flag, by name."""

    def report(self) -> dict[str, dict[str, Any]]:
        """Return `{flag: {"value", "origin"}}` for JSON, with credentials in addresses masked."""
        groups = {type(group).__name__: group for group in (self.flat, self.tokenizer, self.own)}
        return {
            flag.name: {
                "value": _for_report(getattr(groups[flag.group], flag.name)),
                "origin": self.origins[flag.name],
            }
            for flag in all_flags().values()
        }


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes in a size such as `5GB` (10^9), `2GiB` (2^30) or `4096`.

    Units are decimal unless they hold an `i`, as huggingface_hub and transformers read them; upper and lower
    case are alike.

    Raises:
        UsageError: `text` is not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match and (match[2] or not match[3]):
        size = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
        if size > 0:
            return size
    raise UsageError(
        f"`{text}` is not a size of at least one byte",
        hint="write a number and a unit, e.g. `500MB` or `2GiB`",
    )
