"""What words and YAML mean: against transformers' HfArgumentParser, rule by rule, and at random."""

from __future__ import annotations

import dataclasses
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ftload.loaders.errors import UsageError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.flags.declared import Arguments, Flag, all_flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TRAINING = [flag for flag in all_flags().values() if flag.group != "OwnOptions"]


def values_of(arguments: Arguments) -> dict[str, Any]:
    groups = (arguments.flat, arguments.tokenizer, arguments.own)
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


def given_values(arguments: Arguments) -> dict[str, Any]:
    """The values that don't come from a default."""
    return {name: value for name, value in values_of(arguments).items() if arguments.origins[name] != "default"}


def parse(line: str) -> dict[str, Any]:
    return given_values(parse_arguments(shlex.split(line)))


def refusal(argv: list[str]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse_arguments(argv)
    assert "\n" not in caught.value.message
    assert not caught.value.message.endswith(".")
    return caught.value


def yaml_file(tmp_path: Path, text: str, name: str = "run.yaml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# Against HfArgumentParser


@cache
def reference_parser() -> Any:
    """HfArgumentParser over dataclasses with the same fields, JSON objects as strings."""
    from transformers import HfArgumentParser

    types: dict[str, Any] = {
        "bool": bool,
        "int": int,
        "float": float,
        "str": str,
        "list[str]": list[str],
        "str | list[str]": str | list[str],
        "dict": str,
        "dict | str": str,
    }
    groups = []
    for group in ("FlatArguments", "TokenizerConfig"):
        fields = []
        for flag in TRAINING:
            if flag.group != group:
                continue
            kind = types[flag.type.removesuffix(" | None")]
            # a plain default of `str | list[str]` gets lost in HfArgumentParser, a factory's does not
            factory = flag.kind == "str or list" or isinstance(flag.default, list | dict)
            default: dict[str, Any] = (
                {"default_factory": lambda value=flag.default: value} if factory else {"default": flag.default}
            )
            metadata = {"choices": list(flag.choices)} if flag.choices else {}
            field: Any = dataclasses.field(**default, metadata=metadata)
            fields.append((flag.name, kind | None if flag.optional else kind, field))
        groups.append(dataclasses.make_dataclass(group, fields))
    return HfArgumentParser(groups)


def as_declared(flag: Flag, value: Any) -> Any:
    """What Open Instruct does afterwards: JSON is loaded. And what YAML 1.1 reads amiss, as declared."""
    if flag.name == "additional_model_arguments" and isinstance(value, str):
        from transformers.training_args import _convert_str_dict  # what Open Instruct imports

        return _convert_str_dict(json.loads(value))
    if flag.kind == "json" and isinstance(value, str):
        return json.loads(value)
    if flag.kind == "float" and isinstance(value, str):
        return float(value)
    if isinstance(value, list):
        return [str(item) for item in value]
    return value


def assert_same(arguments: Arguments, reference: tuple[Any, ...]) -> None:
    ours = values_of(arguments)
    theirs = {name: value for group in reference for name, value in dataclasses.asdict(group).items()}
    assert len(theirs) == 87
    for flag in TRAINING:
        assert ours[flag.name] == as_declared(flag, theirs[flag.name]), flag.name


COMMAND_LINES = [
    "",
    """--exp_name tulu3_8b_sft --model_name_or_path meta-llama/Llama-3.1-8B --model_revision main
    --tokenizer_name meta-llama/Llama-3.1-8B --tokenizer_revision main --use_slow_tokenizer False
    --dataset_mixer_list allenai/tulu-3-sft-mixture 1.0 --max_seq_length 4096
    --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --learning_rate 5e-06
    --lr_scheduler_type linear --warmup_ratio 0.03 --weight_decay 0.0 --num_train_epochs 2
    --output_dir /output --with_tracking --report_to wandb --logging_steps 1 --seed 8
    --gradient_checkpointing --push_to_hub False --chat_template_name tulu""",
    """--model_name_or_path huggyllama/llama-7b --use_flash_attn --use_lora --lora_rank 64 --lora_alpha 16
    --lora_dropout 0.1 --tokenizer_name huggyllama/llama-7b --use_slow_tokenizer
    --dataset_name allenai/tulu-v2-sft-mixture --max_seq_length 2048 --preprocessing_num_workers 16
    --per_device_train_batch_size 1 --learning_rate 1e-4 --num_train_epochs 5 --checkpointing_steps epoch""",
    """--model_name_or_path=meta-llama/Llama-2-70b-hf --use_qlora --use_lora --lora_rank=256 --lora_alpha=512
    --lora_dropout=.05 --use_flash_attn=False --gradient_checkpointing=true --low_cpu_mem_usage
    --max_seq_length=1024 --clip_grad_norm=0.3 --output_dir=output/qlora_70B/ --report_to tensorboard""",
    """--model-name-or-path Qwen/Qwen2.5-7B --use-liger-kernel --gradient-checkpointing yes --packing
    --per-device-train-batch-size 4 --dataset-mixer-list a/b 0.5 c/d 1000 --dataset-mixer-list-splits train
    test --no-push-to-hub --no_try_launch_beaker_eval_jobs""",
    """--dataset_mixer_list allenai/tulu-3-sft-personas-math 0.5 ai2-adapt-dev/oasst1_converted 7132
    --dataset_mixer_list_splits train train --dataset_transform_fn sft_tulu_tokenize_and_truncate_v1
    --dataset_target_columns input_ids labels --dataset_cache_mode hf --dataset_skip_cache
    --dataset_local_cache_dir /weka/cache --dataset_config_hash 0123abc --cache_dataset_only""",
    """--clip_grad_norm -1 --lora_alpha -1.5 --keep_last_n_checkpoints -1 --seed 0 --weight_decay 1e-2
    --max_train_steps 100 --max_train_samples 1000 --final_lr_ratio 0.1 --timeout 7200""",
    """--additional_model_arguments '{"attention_dropout": 0.1, "rope_scaling": {"factor": 2.0}}'
    --trust_remote_code --config_name some/config --model_revision step=100""",
    """--additional_model_arguments '{"a": "1", "b": "0.50", "c": "True", "d": "x", "e": "-1", "f": "1e-5", "g": "007",
    "h": {"i": "false", "j": ["1"], "k": null, "l": "."}, "m": "1.2.3", "n": "\u0663", "o": 2, "p": "5."}'""",
    """--use_flash_attn no --fused_optimizer 0 --clean_checkpoints_at_end f --verbose Y --sync_each_batch 1
    --add_seed_and_date_to_exp_name FALSE --do_not_randomize_output_dir TRUE --push_to_hub N""",
    "--report_to wandb tensorboard --oe_eval_tasks gsm8k::tulu mmlu:mc::tulu --oe_eval_max_length 8192",
    "--seed 1 --seed 2 --oe_eval_tasks a b --oe_eval_tasks c --use_lora --use_lora False --use_lora",
    """--no_use_flash_attn --no_push_to_hub --no-add-seed-and-date-to-exp-name --no_try_auto_save_to_beaker
    --no_clean_checkpoints_at_end --no_use_fast""",
    """--exp_name 'a name with spaces' --gs_bucket_path gs://bucket/a=b --hf_repo_revision= --wandb_entity None
    --hf_repo_url https://huggingface.co/x?y=z&a=b --save_to_hub null""",
    """--add_bos --chat_template_name olmo --get_tokenizer_fn get_tokenizer_tulu_v1
    --tokenizer_name_or_path allenai/OLMo-2-1124-7B --ground_truths_key answer --sft_messages_key chat
    --tokenizer_files_hash abc def""",
    """--use_8bit_optimizer --load_balancing_loss --load_balancing_weight 0.01 --sequence_parallel_size 8
    --model_name_or_path /models/OLMoE --lr_scheduler_type cosine_with_restarts --dataset_mix_dir mix
    --resume_from_checkpoint output/step_500 --checkpointing_steps 500 --wandb_project_name my-project""",
    """--exp_name -  --wandb_entity '- not a flag' --learning_rate 1_0e-6 --logging_steps 1_0 --overwrite_cache""",
    # from the beginnings of their names; scripts/train/tulu3/finetune_8b.sh has the first
    """--chat_template tulu --model_name meta-llama/Llama-3.1-8B --model_rev main --max_seq 4096 --lora_r=8
    --gradient_check --per_device 1 --no_push --no_use_fl --use_q --use_lo false --report_ tensorboard
    --dataset_mixer_list_ train test --dataset_tr a b --learning-r 5e-6 --max-train-st 10 --output-d out""",
    """--output_dir output --hf_entity me --hf_repo_id me-models --hf_metadata_dataset '' --push_to_hub
    --dataset_config_name default --num_train_epochs 03 --warmup_ratio 0 --final_lr_ratio 1""",
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_mean_what_they_mean_to_hf_argument_parser(line: str) -> None:
    words = shlex.split(line)
    reference = reference_parser().parse_args_into_dataclasses(words, look_for_args_file=False)
    assert_same(parse_arguments(words), reference)


OTHER = {"int": "7", "float": "0.25", "str": "x", "list": "x", "str or list": "x", "json": "{}"}


def another_value(flag: Flag) -> str:
    """A value that is not the default."""
    if flag.kind == "bool":
        return str(not flag.default)
    return next((choice for choice in flag.choices if choice != flag.default), OTHER[flag.kind])


def beginnings() -> dict[str, Flag]:
    """Every beginning of an underscored name that is no name itself, with a flag that it may be short for.

    Those without `_` are left out: argparse of Python 3.11 finds them ambiguous, as each name is there with dashes too.
    """
    found: dict[str, Flag] = {}
    for flag in TRAINING:
        for name in (flag.name, f"no_{flag.name}") if flag.default is True else (flag.name,):
            found |= {name[:end]: flag for end in range(name.find("_") + 1, len(name)) if "_" in name}
    return {name: flag for name, flag in found.items() if name not in all_flags()}


def test_every_beginning_of_a_name_is_short_for_what_it_is_to_argparse(capsys: pytest.CaptureFixture[str]) -> None:
    parser = reference_parser()
    defaults = vars(parser.parse_args([]))
    short, ambiguous = [], []
    for name, flag in beginnings().items():
        words = [f"--{name}" if name.startswith("no_") else f"--{name}={another_value(flag)}"]
        try:
            theirs = vars(parser.parse_args(words))
        except SystemExit:
            assert "error: ambiguous option: " in capsys.readouterr().err
            assert refusal(words).message.startswith(f"ambiguous flag `--{name}`: it could be ")
            ambiguous.append(name)
        else:
            changed = [key for key, value in theirs.items() if value != defaults[key]]
            assert list(given_values(parse_arguments(words))) == changed == [flag.name], name
            short.append(name)
    assert len(short) > 500
    assert len(ambiguous) == 71


YAML_FILES = [
    """model_name_or_path: meta-llama/Llama-3.1-8B
model_revision: main
use_flash_attn: true
tokenizer_name: meta-llama/Llama-3.1-8B
use_slow_tokenizer: false
dataset_mixer_list: [allenai/tulu-3-sft-mixture, 1.0]
max_seq_length: 4096
learning_rate: 5.0e-06
num_train_epochs: 2
output_dir: /output/
report_to:
- wandb
- tensorboard
push_to_hub: no
""",
    """model_name_or_path: huggyllama/llama-7b
use_lora: yes
lora_rank: 64
lora_alpha: 16
lora_dropout: 0.1
dataset_name: allenai/tulu-v2-sft-mixture
learning_rate: 2e-5
report_to: wandb
""",
    """dataset_mixer:
  allenai/tulu-v2-sft-mixture: 1.0
  other/set: 1000
use_qlora: on
use_lora: true
gradient_checkpointing: true
seed: 123
""",
    """additional_model_arguments:
  attention_dropout: 0.1
  rope_scaling: {rope_type: yarn, factor: 4.0}
  layers: [1, 2, 3]
  tie: false
  window: null
  as_written: "8"
  twice: 1
  twice: 1
trust_remote_code: true
trust_remote_code: true
""",
    """# a comment
exp_name: "quoted: name"
wandb_entity: null
hf_entity: ~
checkpointing_steps:
max_train_steps: null
oe_eval_tasks: null
oe_eval_max_length: 8192
timeout: 30:00
""",
    """exp_name: &name tulu
wandb_project_name: *name
dataset_transform_fn:
  - sft_tulu_tokenize_and_truncate_v1
  - sft_tulu_filter_v1
dataset_cache_mode: hf
lr_scheduler_type: constant_with_warmup
clip_grad_norm: -1
keep_last_n_checkpoints: -1
""",
    """chat_template_name: olmo
add_bos: True
use_fast: OFF
get_tokenizer_fn: get_tokenizer_tulu_v2_1
tokenizer_name_or_path: allenai/OLMo-2-1124-7B
sft_messages_key: "messages"
""",
    """use_liger_kernel: true
packing: true
per_device_train_batch_size: 4
gradient_accumulation_steps: 0x10
warmup_ratio: 0
weight_decay: .1
final_lr_ratio: 1
additional_model_arguments: '{"attention_dropout": "0.5", "tie": "true"}'
gs_bucket_path: gs://bucket/a=b
fused_optimizer: false
dataset_mixer: {a: "1", a: '1'}
per_device_train_batch_size: 4
oe_eval_tasks: []
""",
]


@pytest.mark.parametrize("text", YAML_FILES)
def test_yaml_files_mean_what_they_mean_to_hf_argument_parser(text: str, tmp_path: Path) -> None:
    name = yaml_file(tmp_path, text)
    arguments = parse_arguments([name])
    assert_same(arguments, reference_parser().parse_yaml_file(name))
    keys = set(yaml.safe_load(text))
    assert arguments.origins == {flag: "yaml" if flag in keys else "default" for flag in all_flags()}


# The command line, rule by rule


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--use_qlora", {"use_qlora": True}),
        ("--use-qlora", {"use_qlora": True}),
        ("--per-device_train-batch_size 2", {"per_device_train_batch_size": 2}),
        ("--model a/b", {"model_name_or_path": "a/b"}),
        ("--model=a/b --model-name-or-path a/b", {"model_name_or_path": "a/b"}),
        ("--model a --model b", {"model_name_or_path": "b"}),
        ("--strict", {"strict": True}),
        ("--no-strict", {"strict": False}),
        ("--no_use_lora", {"use_lora": False}),
        ("--use_lora tRuE", {"use_lora": True}),
        ("--use_lora=n", {"use_lora": False}),
        ("--use_lora --no_use_lora", {"use_lora": False}),
        ("--use_lora --json", {"use_lora": True, "json": True}),
        ("--hf_repo_url a=b=c", {"hf_repo_url": "a=b=c"}),
        ("--hf_repo_url=a=b=c", {"hf_repo_url": "a=b=c"}),
        ("--exp_name=--odd", {"exp_name": "--odd"}),
        ("--exp_name=", {"exp_name": ""}),
        ("--dataset_mixer_list a 1.0 b 0.5 --seed 1", {"dataset_mixer_list": ["a", "1.0", "b", "0.5"], "seed": 1}),
        ("--dataset_mixer_list=a=b", {"dataset_mixer_list": ["a=b"]}),
        ("--dataset_mixer_list a -1", {"dataset_mixer_list": ["a", "-1"]}),
        ("--lora-target-modules q_proj v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("--use_do --use_rs", {"use_dora": True, "use_rslora": True}),
        ("--init_lora_weights pissa_niter_16", {"init_lora_weights": "pissa_niter_16"}),
        ("--init_lora_weights TRUE", {"init_lora_weights": True}),
        ("--init_lora_weights=false", {"init_lora_weights": False}),
        ("--trainable_token_indices new", {"trainable_token_indices": ["new"]}),
        ("--trainable_token_indices 0 128256", {"trainable_token_indices": ["0", "128256"]}),
        ("--lora-modules-to-save lm_head", {"lora_modules_to_save": ["lm_head"]}),
        ("--lora_target_parameters a.b c", {"lora_target_parameters": ["a.b", "c"]}),
        ("--report_to wandb", {"report_to": ["wandb"]}),
        ("--clip_grad_norm -1e-3", {"clip_grad_norm": -0.001}),
        ("--clip_grad_norm -inf", {"clip_grad_norm": float("-inf")}),
        ("--max_train_steps NONE", {"max_train_steps": None}),
        ("--final_lr_ratio null", {"final_lr_ratio": None}),
        ("--oe_eval_tasks none", {"oe_eval_tasks": None}),
        ("--oe_eval_tasks none a", {"oe_eval_tasks": ["none", "a"]}),
        ("--dataset_mixer null", {"dataset_mixer": None}),
        ("--additional_model_arguments none", {"additional_model_arguments": None}),
        ("--wandb_entity none", {"wandb_entity": "none"}),
        ("--dataset_mixer '{\"a\": 1}'", {"dataset_mixer": {"a": 1}}),
        ('--dataset_mixer \'{"a": "1"}\'', {"dataset_mixer": {"a": "1"}}),
        ("--additional_model_arguments {}", {"additional_model_arguments": {}}),
        (
            """--additional_model_arguments '{"a": "\u00b2", "b": "1"}'""",
            {"additional_model_arguments": {"a": "\u00b2", "b": 1}},
        ),
        ("--base copy --embedding_init reference", {"base": "copy", "embedding_init": "reference"}),
        ("--max_shard_size 2GiB", {"max_shard_size": "2GiB"}),
        ("--lora_rank 1 --lora_dropout 0 --seed 0", {"lora_rank": 1, "lora_dropout": 0.0, "seed": 0}),
        # beginnings: of the training script's names first, then of ftload's own and of what is negated only here
        ("--model_name a --max-seq_l 8", {"model_name_or_path": "a", "max_seq_length": 8}),
        ("--seq 2 --verb", {"sequence_parallel_size": 2, "verbose": True}),
        ("--max_s 8 --ou x", {"max_seq_length": 8, "output_dir": "x"}),
        ("--max_sh 1GB --max-mem 2GB", {"max_shard_size": "1GB", "max_memory": "2GB"}),
        ("--emb reference --js --qui", {"embedding_init": "reference", "json": True, "quiet": True}),
        ("--no_add_s", {"add_seed_and_date_to_exp_name": False}),
        ("--no_a", {"add_seed_and_date_to_exp_name": False}),
        ("--no_use_lo", {"use_lora": False}),
        ("--base copy --str", {"base": "copy", "strict": True}),
    ],
)
def test_what_a_command_line_means(line: str, expected: dict[str, Any]) -> None:
    assert parse(line) == expected


def test_origins_hold_even_for_values_equal_to_the_default() -> None:
    arguments = parse_arguments(["--seed", "42"])
    assert arguments.origins == {name: "cli" if name == "seed" else "default" for name in all_flags()}
    assert list(arguments.origins) == list(all_flags())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lora_rank", "`--lora_rank` needs a value: an int"),
        ("--lora_rank --use_lora", "`--lora_rank` needs a value: an int"),
        ("--oe_eval_tasks", "`--oe_eval_tasks` needs a value: a list of strings"),
        ("--lora-rank x", "`--lora-rank` takes an int, not `x`"),
        ("--lora_rank=1.5", "`--lora_rank` takes an int, not `1.5`"),
        ("--lora_rank none", "`--lora_rank` takes an int, not `none`"),
        ("--learning_rate fast", "`--learning_rate` takes a float, not `fast`"),
        ("--use_lora=maybe", "`--use_lora` takes true or false, not `maybe`"),
        ("--use_lora=", "`--use_lora` takes true or false, not ``"),
        ("--use_lora foo", "`foo` after `--use_lora` belongs to no flag"),
        ("--use_lora true foo", "`foo` after `--use_lora true` belongs to no flag"),
        (
            "--lora_rank 3 4 5",
            "`4` after `--lora_rank 3` belongs to no flag; `5` after `--lora_rank 3` belongs to no flag",
        ),
        ("--no_use_lora=true", "`--no_use_lora` takes no value, but `true` follows it"),
        ("--no-use-lora false", "`--no-use-lora` takes no value, but `false` follows it"),
        ("--dataset_cache_mode disk", "`--dataset_cache_mode` takes one of hf, local, not `disk`"),
        ("--base=move", "`--base` takes one of auto, copy, link, reference, not `move`"),
        ("--dataset_mixer [1]", "`--dataset_mixer` takes a JSON object, not `[1]`"),
        ("--dataset_mixer x", "`--dataset_mixer` takes a JSON object, not `x`"),
        (
            "--dataset_mixer '{\"a\": NaN}'",
            "`--dataset_mixer` takes a JSON object, not an object that holds NaN, which is not JSON",
        ),
        (
            '--dataset_mixer \'{"a": 1, "a": 2}\'',
            "`--dataset_mixer` takes a JSON object, not an object that holds `a` twice",
        ),
        ("--model a --model_name_or_path b", "`--model a` and `--model_name_or_path b` name different models"),
        ("--lora_rank 0", "`lora_rank` must be at least 1, not 0"),
        ("--lora_experts 0", "`lora_experts` must be at least 1, not 0"),
        ("--lora_dropout 1", "`lora_dropout` must be at least 0 and below 1, not 1.0"),
        ("--min_quantized 100.5", "`min_quantized` is a percentage, 0 to 100, not 100.5"),
        ("--min_quantized nan", "`min_quantized` is a percentage, 0 to 100, not nan"),
        ("--lora_dropout nan", "`lora_dropout` must be at least 0 and below 1, not nan"),
        ("--seed -1", "`seed` must be at least 0 and below 2^32, not -1"),
        ("--seed 4294967296", "`seed` must be at least 0 and below 2^32, not 4294967296"),
        ("--init_lora_weights", "`--init_lora_weights` needs a value: true, false or a name"),
        (
            "--init_lora_weights pisa",
            "`init_lora_weights` is true, gaussian, orthogonal, pissa, pissa_niter_N (N up to 9999) or olora, "
            "not `pisa`",
        ),
        (
            "--init_lora_weights pissa_niter_-1",
            "`init_lora_weights` is true, gaussian, orthogonal, pissa, pissa_niter_N (N up to 9999) or olora, "
            "not `pissa_niter_-1`",
        ),
        (
            "--init_lora_weights eva",
            "`init_lora_weights` can't be `eva`: EVA starts from the activations of data, and ftload reads none",
        ),
        (
            "--init_lora_weights loftq",
            "`init_lora_weights` can't be `loftq`: PEFT computes LoftQ on a GPU, and without double quantisation",
        ),
        (
            "--trainable_token_indices 1 -2",
            "`trainable_token_indices` takes the ids of tokens, or `new` alone, not `-2`",
        ),
        (
            "--trainable_token_indices new 1",
            "`trainable_token_indices` takes the ids of tokens, or `new` alone, not `new`",
        ),
        ("--trainable_token_indices 7 8 007", "`trainable_token_indices` names token 7 twice"),
        ("--max_shard_size 5XB", "`max_shard_size`: `5XB` is not a size of at least one byte"),
        (
            "--use_lora run.yaml",
            "`run.yaml` after `--use_lora` is out of place: one YAML file can be given, before the flags",
        ),
        ("--lora_rnak 8", "unknown flag `--lora_rnak` (nearest: `--lora_rank` or `--lora_alpha`)"),
        ("--Weight-Decai=8", "unknown flag `--Weight-Decai` (nearest: `--weight_decay`)"),
        ("--max_seq_lenght 8", "unknown flag `--max_seq_lenght` (nearest: `--max_seq_length`)"),
        ("--mod a", "ambiguous flag `--mod`: it could be `--model_name_or_path`, `--model_revision`"),
        ("--no_use=1", "ambiguous flag `--no_use`: it could be `--no_use_flash_attn`, `--no_use_fast`"),
        (
            "--lora_ 8 --seed x",
            "ambiguous flag `--lora_`: it could be `--lora_rank`, `--lora_alpha`, `--lora_dropout`; "
            "`--seed` takes an int, not `x`",
        ),
        (
            "--m 1",
            "ambiguous flag `--m`: it could be `--model_name_or_path`, `--model_revision`, `--max_train_samples`, "
            "`--max_seq_length`, `--max_train_steps`",
        ),
        (
            "--de cuda --qui --de=x",
            "ambiguous flag `--de`: it could be `--device`, `--dequantize`, `--debug`; "
            "ambiguous flag `--de`: it could be `--device`, `--dequantize`, `--debug`",
        ),
        ("--lora_r x", "`--lora_r` (`--lora_rank`) takes an int, not `x`"),
        (
            "--lr 3e-4",
            "`--lr` (`--lr_scheduler_type`) takes one of linear, cosine, cosine_with_restarts, polynomial, "
            "constant, constant_with_warmup, not `3e-4`",
        ),
        ("--max-seq", "`--max-seq` (`--max_seq_length`) needs a value: an int"),
        ("--model", "`--model` needs a value: a string"),
        ("--batch_size 4", "unknown flag `--batch_size` (nearest: `--per_device_train_batch_size`)"),
        ("--epochs 3", "unknown flag `--epochs` (nearest: `--num_train_epochs`)"),
        ("--steps 3", "unknown flag `--steps`"),
        ("--no_push 1", "`--no_push` takes no value, but `1` follows it"),
        ("--model a --model_name b", "`--model a` and `--model_name_or_path b` name different models"),
        ("--=1", "unknown flag `--`"),
        ("--load_in_4bit", "unknown flag `--load_in_4bit` (nearest: `--use_qlora`)"),
        ("--load-in-8bit true", "unknown flag `--load-in-8bit` (nearest: `--use_qlora`)"),
        ("--bits 4", "unknown flag `--bits` (nearest: `--use_qlora`)"),
        ("--qlora", "unknown flag `--qlora` (nearest: `--use_qlora`)"),
        ("-seed 8", "unknown flag `-seed` (nearest: `--seed`)"),
        ("--zzzzzz 1 2 3", "unknown flag `--zzzzzz`"),
        ("--no_lora_rank", "unknown flag `--no_lora_rank` (nearest: `--lora_rank`)"),
        ("--exp_name 'a\nb' --seed 'x\ny'", r"`--seed` takes an int, not `x\ny`"),
        ("--seed https://u:secret@h", "`--seed` takes an int, not `https://***@h`"),
    ],
)
def test_what_a_command_line_cannot_mean(line: str, message: str) -> None:
    assert refusal(shlex.split(line)).message == message


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    name = yaml_file(tmp_path, "lora_rnak: 8\nseed: x\nuse_lorra: true\n")
    error = refusal([name, "--learnin-rate", "1", "--lora_rank", "0", "--use_lora", "foo"])
    assert error.message == (
        f"unknown key `lora_rnak` in `{name}` (nearest: `lora_rank` or `lora_alpha`); "
        f"`seed` in `{name}` takes an int, not `x`; "
        f"unknown key `use_lorra` in `{name}` (nearest: `use_lora` or `use_qlora`); "
        "unknown flag `--learnin-rate` (nearest: `--learning_rate`); "
        "`foo` after `--use_lora` belongs to no flag; "
        "`lora_rank` must be at least 1, not 0"
    )
    assert error.hint == "`--help` lists every flag"


def test_a_list_of_problems_ends() -> None:
    error = refusal([f"--q{number}" for number in range(60)])
    assert error.message.startswith("unknown flag `--q0`; unknown flag `--q1`; ")
    assert error.message.endswith("; unknown flag `--q49`; and 10 more")


def test_a_value_that_looks_like_a_flag_gets_a_hint() -> None:
    assert refusal(["--exp_name", "-foo"]).hint == "write `--exp_name=-foo` if that is the value"


MODELS = ["meta-llama/Llama-3.1-8B", "gpt2", "/models/llama", "model.gguf", "what is this?", "run.yaml.gguf"]


@pytest.mark.parametrize("word", MODELS)
def test_the_model_may_come_before_the_flags(word: str) -> None:
    arguments = parse_arguments([word, "--use_lora"])
    assert given_values(arguments) == {"model_name_or_path": word, "use_lora": True}
    assert arguments.origins["model_name_or_path"] == "cli"
    assert parse_arguments([word, "--use_lora", "--model", word]) == arguments
    assert parse_arguments([word, "--use_lora", "--model_name", word]) == arguments


def test_model_and_yaml_file_come_in_either_order(tmp_path: Path) -> None:
    name = yaml_file(tmp_path, "model: a/b\nlora_rank: 64\n")
    expected = {"model_name_or_path": "c/d", "lora_rank": 64, "seed": 1}
    for words in ([name, "c/d"], ["c/d", name], [name, "--model", "c/d"]):
        assert given_values(parse_arguments([*words, "--seed", "1"])) == expected
    assert given_values(parse_arguments([name])) == {"model_name_or_path": "a/b", "lora_rank": 64}


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("a --model b", "`a` and `--model b` name different models", None),
        ("a --model a --model_name b", "`a` and `--model a` and `--model_name_or_path b` name different models", None),
        ("a b --seed 1", "`a` and `b` come before the flags: only one can be the model", None),
        ("run.json --seed 1", "`run.json` is neither a model nor a YAML file (.yaml or .yml)", None),
        ("--use_qlora a/b", "`a/b` after `--use_qlora` belongs to no flag", "a model comes before the flags"),
        ("--seed 1 m.gguf", "`m.gguf` after `--seed 1` belongs to no flag", "a model comes before the flags"),
        (
            "--use_qlora a",
            "`a` after `--use_qlora` belongs to no flag",
            "`--use_qlora` stands alone, or takes true or false",
        ),
    ],
)
def test_one_model_at_most(line: str, message: str, hint: str | None) -> None:
    error = refusal(shlex.split(line))
    assert (error.message, error.hint) == (message, hint)


def test_one_yaml_file_at_most(tmp_path: Path) -> None:
    name = yaml_file(tmp_path, "seed: 1\n")
    assert refusal([name, "b.yml"]).message.startswith("`b.yml` is out of place")
    assert refusal([name, "a/b", "b.yml"]).message.startswith("`b.yml` is out of place")


# YAML, rule by rule


def test_flags_override_the_file(tmp_path: Path) -> None:
    name = yaml_file(tmp_path, "model: a/b\nlora_rank: 64\nseed: 1\nuse-lora: true\n", "run.yml")
    arguments = parse_arguments([name, "--lora_rank", "16", "--model_name_or_path", "c/d"])
    assert given_values(arguments) == {
        "model_name_or_path": "c/d",
        "lora_rank": 16,
        "seed": 1,
        "use_lora": True,
    }
    assert {name: origin for name, origin in arguments.origins.items() if origin != "default"} == {
        "model_name_or_path": "cli",
        "lora_rank": "cli",
        "seed": "yaml",
        "use_lora": "yaml",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 2e-5", {"learning_rate": 2e-5}),
        ("learning_rate: 1", {"learning_rate": 1.0}),
        ("num_train_epochs: 2.0", {"num_train_epochs": 2}),
        ("num_train_epochs: '3'", {"num_train_epochs": 3}),
        ("model_revision: 2024", {"model_revision": "2024"}),
        ("model_revision: 0123", {"model_revision": "0123"}),
        ("model_revision: 1_0", {"model_revision": "1_0"}),
        ("model_revision: 2024-01-01", {"model_revision": "2024-01-01"}),
        ("model_revision: 1.10", {"model_revision": "1.10"}),
        ("exp_name: 'no'", {"exp_name": "no"}),
        ("wandb_entity: None", {"wandb_entity": None}),
        ("wandb_entity: 'null'", {"wandb_entity": None}),
        ("max_train_steps: none", {"max_train_steps": None}),
        ("oe_eval_tasks: none", {"oe_eval_tasks": None}),
        ("report_to: none", {"report_to": "none"}),
        ("dataset_mixer_list: a", {"dataset_mixer_list": ["a"]}),
        ("dataset_mixer_list: [a, 1.0, b, 10]", {"dataset_mixer_list": ["a", "1.0", "b", "10"]}),
        ("use_lora: 'yes'", {"use_lora": True}),
        ("use_lora: 1", {"use_lora": True}),
        ("use_lora: y", {"use_lora": True}),
        ("base: copy\nstrict: true", {"base": "copy", "strict": True}),
        ("init_lora_weights: true", {"init_lora_weights": True}),
        ("init_lora_weights: olora", {"init_lora_weights": "olora"}),
        ("trainable_token_indices: [3, 4]", {"trainable_token_indices": ["3", "4"]}),
        ("trainable_token_indices: new", {"trainable_token_indices": ["new"]}),
        (
            "additional_model_arguments: {1: {a: [.5, 0x10, ~, off, x]}}",
            {"additional_model_arguments": {"1": {"a": [0.5, 16, None, False, "x"]}}},
        ),
        ("additional_model_arguments: null", {"additional_model_arguments": None}),
        ("model: a\nmodel_name_or_path: a", {"model_name_or_path": "a"}),
        ("seed: 1\nlora_rank: 8\nseed: 1.0", {"seed": 1, "lora_rank": 8}),
        ("use_lora: true\nuse-lora: on", {"use_lora": True}),
        ("clip_grad_norm: .inf\nclip_grad_norm: 1e999", {"clip_grad_norm": float("inf")}),
        ("dataset_mixer: {a: [1], a: [1], b: 2}\ndataset_mixer: {b: 2, a: [1]}", {"dataset_mixer": {"a": [1], "b": 2}}),
        (
            """additional_model_arguments: '{"a": "1", "b": {"c": "False"}}'""",
            {"additional_model_arguments": {"a": 1, "b": {"c": False}}},
        ),
        ("""dataset_mixer: '{"a": "1"}'""", {"dataset_mixer": {"a": "1"}}),
        ("\ufeffseed: 1", {"seed": 1}),
        ("---\nseed: 1\n...\n", {"seed": 1}),
    ],
)
def test_what_yaml_means(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    given = given_values(parse_arguments([yaml_file(tmp_path, text)]))
    assert given == expected
    for name, value in expected.items():
        assert type(given[name]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: null", "`seed` in `FILE` takes an int, not null"),
        ("seed: true", "`seed` in `FILE` takes an int, not `true`"),
        ("seed: 1.5", "`seed` in `FILE` takes an int, not `1.5`"),
        ("seed: .inf", "`seed` in `FILE` takes an int, not `.inf`"),
        ("seed: [1]", "`seed` in `FILE` takes an int, not a list"),
        ("seed: {a: 1}", "`seed` in `FILE` takes an int, not a mapping"),
        ("learning_rate: yes", "`learning_rate` in `FILE` takes a float, not `yes`"),
        ("use_lora: 2", "`use_lora` in `FILE` takes true or false, not `2`"),
        ("use_lora: ", "`use_lora` in `FILE` takes true or false, not null"),
        (
            "save_to_hub: false",
            "`save_to_hub` in `FILE` takes a string, not the boolean `false`: quote it if it is a string",
        ),
        ("exp_name: [a]", "`exp_name` in `FILE` takes a string, not a list"),
        (
            "dataset_mixer_list: [a, [b]]",
            "`dataset_mixer_list` in `FILE` takes a list of strings, not a list or mapping inside a list",
        ),
        ("dataset_mixer_list: [a, ~]", "`dataset_mixer_list` in `FILE` takes a list of strings, not null"),
        ("report_to: {a: b}", "`report_to` in `FILE` takes a string or a list of strings, not a mapping"),
        (
            "lr_scheduler_type: warm",
            "`lr_scheduler_type` in `FILE` takes one of linear, cosine, cosine_with_restarts, polynomial, "
            "constant, constant_with_warmup, not `warm`",
        ),
        ("additional_model_arguments: '[1]'", "`additional_model_arguments` in `FILE` takes a JSON object, not `[1]`"),
        (
            "dataset_mixer:\n  a: 1\n  b: 2\n  a: 2",
            "`dataset_mixer` in `FILE` takes a JSON object, not an object in which `a` has two values, "
            "on lines 2 and 4",
        ),
        (
            "dataset_mixer:\n  {a: 1,\n   a: true}",
            "`dataset_mixer` in `FILE` takes a JSON object, not an object in which `a` has two values, "
            "on lines 2 and 3",
        ),
        ("seed: 1\n\nseed: 2\nseed: 1", "`seed` has two values in `FILE`, on lines 1 and 3"),
        ("seed: 1\nseed: 1\n\nseed: 2", "`seed` has two values in `FILE`, on lines 1 and 4"),
        ("use_lora: true\nuse-lora: no", "`use_lora` and `use-lora` have two values in `FILE`, on lines 1 and 2"),
        (
            "model: a\nmodel_name_or_path: b",
            "`model` and `model_name_or_path` have two values in `FILE`, on lines 1 and 2",
        ),
        ("seed: 1\nseed: x", "`seed` in `FILE` takes an int, not `x`"),
        ("learning: 1", "unknown key `learning` in `FILE` (nearest: `learning_rate`)"),
        ("load_in_4bit: true", "unknown key `load_in_4bit` in `FILE` (nearest: `use_qlora`)"),
        ("lora_target_modules: []", "`lora_target_modules` must name at least one layer"),
        ("lora_target_parameters: []", "`lora_target_parameters` must name at least one parameter"),
        ("lora_modules_to_save: []", "`lora_modules_to_save` must name at least one layer"),
        ("trainable_token_indices: []", "`trainable_token_indices` must name at least one token"),
        ("init_lora_weights: [pissa]", "`init_lora_weights` in `FILE` takes true, false or a name, not a list"),
        ("lora_rank: 0", "`lora_rank` must be at least 1, not 0"),
        ("no_use_lora: true", "unknown key `no_use_lora` in `FILE` (nearest: `use_lora` or `use_qlora`)"),
        ("- seed", "`FILE` must hold `flag: value` lines"),
        ("", "`FILE` must hold `flag: value` lines"),
        ("seed: 1\n---\nseed: 2", "`FILE`, line 2 is not YAML: but found another document"),
        (
            "exp_name: !!python/object/apply:os.system [ls]",
            "`FILE`, line 1 holds the tag `tag:yaml.org,2002:python/object/apply:os.system`, which is not accepted",
        ),
        ("seed: 1\nexp_name: !env HOME", "`FILE`, line 2 holds the tag `!env`, which is not accepted"),
        ("<<: {seed: 1}", "`FILE`, line 1 holds a merge key (`<<`), which is not accepted"),
        ("seed: !!int ''", "`seed` in `FILE` takes an int, not ``"),
        ("exp_name: *nothing", "`FILE`, line 1 is not YAML: found undefined alias 'nothing'"),
        ("exp_name: 'a", "`FILE`, line 1 is not YAML: found unexpected end of stream"),
        ("exp_name: a\x00b", "`FILE` is not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("a: " + "[" * 500, "`FILE` is nested too deeply"),
        ("a: &a [*a]", "`FILE` holds more than 10000 values, counting what its aliases repeat"),
    ],
)
def test_what_yaml_cannot_mean(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    yaml_file(tmp_path, text, "r.yaml")
    assert refusal(["r.yaml"]).message == message.replace("FILE", "r.yaml")


def test_aliases_that_expand_without_measure(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "holds more than 10000 values" in refusal([yaml_file(tmp_path, bomb)]).message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    assert refusal([missing]).message == f"`{missing}` can't be read: no such file or directory"
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert refusal([str(folder)]).message == f"`{folder}` can't be read: is a directory"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"exp_name: caf\xe9\n")
    assert refusal([str(latin)]).message == f"`{latin}` is not UTF-8 text: byte 13 can't be decoded"
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    assert refusal([str(large)]).message == f"`{large}` is larger than 128 KiB, too large for the flags of a run"
    assert refusal(["a\0.yaml"]).message == r"`a\x00.yaml` can't be read: not a path"


# At random

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
RANGES: dict[str, st.SearchStrategy[Any]] = {
    "lora_rank": st.integers(1, 4096),
    "lora_alpha": st.floats(allow_nan=False, allow_infinity=False),
    "lora_dropout": st.floats(0, 1, exclude_max=True),
    "seed": st.integers(0, 2**32 - 1),
    "max_shard_size": st.builds("{}{}".format, st.integers(1, 999), st.sampled_from(["KB", "MiB", "GB"])),
    "max_memory": st.sampled_from(["64MB", "2GB"]),
    "min_quantized": st.floats(0, 100),
    "lora_experts": st.integers(1, 64),
    "init_lora_weights": st.sampled_from(["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]),
    "trainable_token_indices": st.lists(st.integers(0, 10**6).map(str), min_size=1, max_size=4, unique=True),
}
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int": st.integers(),
    "float": st.floats(allow_nan=False),
    "str": TEXT,
    "list": st.lists(TEXT, min_size=1, max_size=4),
    "str or list": st.lists(TEXT, min_size=1, max_size=4),
    "json": st.dictionaries(TEXT, TEXT | st.integers() | st.booleans() | st.none(), max_size=3),
}


def values(flag: Flag) -> st.SearchStrategy[Any]:
    if flag.choices:
        return st.sampled_from(flag.choices)
    strategy = RANGES[flag.name] if flag.name in RANGES else KINDS[flag.kind]
    # `none` means None for some: the rules above have it
    return strategy.filter(lambda value: str(value).strip("[]'").lower() not in ("none", "null"))


RUNS = st.lists(st.sampled_from(list(all_flags().values())), unique_by=lambda flag: flag.name, max_size=8).flatmap(
    lambda flags: st.fixed_dictionaries({flag.name: values(flag) for flag in flags})
)


def as_words(name: str, value: Any, dashes: bool, equals: bool) -> list[str]:
    flag = f"--{name.replace('_', '-') if dashes else name}"
    if value is True and equals:
        return [flag]
    items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
    if len(items) == 1 and (equals or items[0].startswith("-")):
        return [f"{flag}={items[0]}"]
    return [flag, *("x" + item if item.startswith("-") else item for item in items)]


@given(run=RUNS, dashes=st.booleans(), equals=st.booleans())
@settings(max_examples=150, deadline=None)
def test_random_command_lines(run: dict[str, Any], dashes: bool, equals: bool) -> None:
    expected = {
        name: ["x" + item if item.startswith("-") else item for item in value]
        if isinstance(value, list) and len(value) > 1
        else value
        for name, value in run.items()
    }
    words = [word for name, value in run.items() for word in as_words(name, value, dashes, equals)]
    assert given_values(parse_arguments(words)) == expected


@given(run=RUNS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_yaml_files(run: dict[str, Any], tmp_path: Path) -> None:
    name = yaml_file(tmp_path, yaml.safe_dump(run, allow_unicode=False))
    assert given_values(parse_arguments([name])) == run


@given(
    words=st.lists(st.sampled_from(["--seed", "--no_seed", "--x", "-", "--", "=", "--=", "a.yaml", "1", "-1"]) | TEXT)
)
@settings(max_examples=150, deadline=None)
def test_any_words_give_arguments_or_a_usage_error(words: list[str]) -> None:
    try:
        arguments = parse_arguments(words)
    except UsageError as error:
        assert error.message.isprintable()
    else:
        assert len(arguments.origins) == len(all_flags())
