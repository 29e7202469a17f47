"""The frozen set of flags, the report of them, sizes, and what training would refuse."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import UsageError
from ftload.loaders.flags.declared import (
    PANELS,
    Arguments,
    FlatArguments,
    OwnOptions,
    TokenizerConfig,
    all_flags,
    merge_flags,
    parse_size,
    plan_flags,
)
from ftload.loaders.flags.training_refusals import training_warnings
from ftload.loaders.system.safe_text import masked
from ftload.loaders.trainers.registry import TRAINERS

CONTRACT: list[dict[str, Any]] = json.loads(
    Path(__file__).parents[1].joinpath("data", "flags.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(("group", "count"), [(FlatArguments, 75), (TokenizerConfig, 12)])
def test_the_dataclasses_are_the_contract(group: type, count: int) -> None:
    defaults = group()
    declared = [
        {
            "name": field.name,
            "type": field.type,
            "default": getattr(defaults, field.name),
            "choices": list(field.metadata["choices"]) or None,
        }
        for field in dataclasses.fields(group)
    ]
    contract = [
        {key: flag[key] for key in ("name", "type", "default", "choices")}
        for flag in CONTRACT
        if flag["group"] == group.__name__
    ]
    assert declared == contract
    assert len(declared) == count
    for ours, theirs in zip(declared, contract, strict=True):
        assert type(ours["default"]) is type(theirs["default"]), ours["name"]


def test_own_flags_are_these_and_no_others() -> None:
    declared = [(flag.name, flag.type, flag.default, flag.choices) for flag in all_flags().values()]
    assert declared[len(CONTRACT) :] == [
        ("json", "bool", False, ()),
        ("strict", "bool", False, ()),
        ("overwrite", "bool", False, ()),
        ("base", "str", "auto", ("auto", "copy", "link", "reference")),
        ("embedding_init", "str", "mean", ("mean", "reference")),
        ("lora_target_modules", "list[str] | None", None, ()),
        ("lora_target_parameters", "list[str] | None", None, ()),
        ("lora_modules_to_save", "list[str] | None", None, ()),
        ("trainable_token_indices", "list[str] | None", None, ()),
        ("use_dora", "bool", False, ()),
        ("use_rslora", "bool", False, ()),
        ("init_lora_weights", "bool | str", True, ()),
        ("lora_config", "str | None", None, ()),
        ("min_quantized", "float", 90.0, ()),
        ("quantize_experts", "bool", True, ()),
        ("bnb_4bit_quant_storage", "str | None", None, ("uint8", "bfloat16", "float16")),
        ("bnb_4bit_compute_dtype", "str | None", None, ("bfloat16", "float16", "float32")),
        ("bnb_4bit_quant_type", "str | None", None, ("nf4", "fp4")),
        ("bnb_4bit_use_double_quant", "bool | None", None, ()),
        ("lora_experts", "int | None", None, ()),
        ("device", "str", "cpu", ("cpu", "cuda")),
        ("max_shard_size", "str", "5GB", ()),
        ("max_memory", "str", "2GB", ()),
        ("source_cache", "str", "hub", ("hub", "none")),
        ("allow_pickle", "bool", False, ()),
        ("merge_adapter", "list[str] | None", None, ()),
        ("dequantize", "bool", False, ()),
        ("quiet", "bool", False, ()),
        ("debug", "bool", False, ()),
    ]
    assert len(all_flags()) == 116


def test_what_plan_takes_beside_them() -> None:
    declared = [(flag.name, flag.type, flag.default, flag.choices) for flag in plan_flags().values()]
    assert declared == [
        ("for", "str", "open-instruct", tuple(TRAINERS)),
        ("mixed_precision", "str", "bf16", ("bf16", "no")),
        ("html", "str | None", None, ()),
        ("fsdp", "int | None", None, ()),
        ("zero", "int | None", None, ()),
        ("gpus", "int", 8, ()),
        ("fit", "list[str] | None", None, ()),
    ]
    assert not plan_flags().keys() & all_flags().keys()


def test_what_merge_takes_beside_them() -> None:
    declared = [(flag.name, flag.type, flag.default, flag.choices) for flag in merge_flags().values()]
    assert declared == [("adapter_only", "bool", False, ())]
    assert not merge_flags().keys() & all_flags().keys()


def test_every_flag_has_a_panel_and_one_sentence_of_help() -> None:
    for flag in all_flags().values():
        assert flag.panel in PANELS, flag.name
        assert 10 <= len(flag.help) <= 110, flag.name
        assert not flag.help.endswith("."), flag.name
        assert "\n" not in flag.help, flag.name


def test_what_is_prepared_is_not_called_recorded_only() -> None:
    recorded = {flag.name for flag in all_flags().values() if flag.panel == PANELS[-1]}
    for flag in CONTRACT:
        if flag["effect"] == "prepare":
            assert flag["name"] not in recorded
        if flag["effect"] == "publish":
            assert flag["name"] in recorded


def test_mutable_defaults_are_not_shared() -> None:
    FlatArguments().dataset_mixer_list.append("x")
    assert FlatArguments().dataset_mixer_list == ["allenai/tulu-3-sft-personas-algebra", "1.0"]
    assert FlatArguments().additional_model_arguments is not FlatArguments().additional_model_arguments


def test_arguments_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FlatArguments().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_report_holds_every_flag_in_order_and_is_json() -> None:
    arguments = Arguments(
        flat=FlatArguments(
            seed=7,
            clip_grad_norm=float("inf"),
            hf_repo_url="https://me:hf_secret@huggingface.co/me/x",
            dataset_mixer_list=["https://me:hf_secret@host/data", "1.0"],
            additional_model_arguments={"proxy": {"url": "http://me:hf_secret@host:80/"}, "n": 1},
        ),
        tokenizer=TokenizerConfig(),
        own=OwnOptions(),
        origins=dict.fromkeys(all_flags(), "default") | {"seed": "cli"},
    )
    report = arguments.report()
    assert list(report) == list(all_flags())
    assert report["seed"] == {"value": 7, "origin": "cli"}
    assert report["base"] == {"value": "auto", "origin": "default"}
    assert report["clip_grad_norm"]["value"] == "inf"
    assert report["hf_repo_url"]["value"] == "https://***@huggingface.co/me/x"
    assert report["dataset_mixer_list"]["value"] == ["https://***@host/data", "1.0"]
    assert report["additional_model_arguments"]["value"] == {
        "proxy": {"url": "http://***@host:80/"},
        "n": 1,
    }
    assert "hf_secret" not in json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/path?token=abc&x=1 b?c", "https://host/path?*** b?c"),
        ("`https://u:p@host/?X-Amz-Signature=abc` and hf_abcdefghijklmnopq", "`https://***@host/?***` and hf_***"),
        ("org/hf_small-model?", "org/hf_small-model?"),
        ("s3://key:p@ss@bucket/x", "s3://***@bucket/x"),
        ("https://token@host", "https://***@host"),
        ("a https://u:p@one b http://v:q@two/@x", "a https://***@one b http://***@two/@x"),
        ("https://host/path@v1", "https://host/path@v1"),
        ("me@host", "me@host"),
    ],
)
def test_credentials_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_secret_that_is_known_is_masked_whatever_it_looks_like() -> None:
    assert masked("`a1b2c3` is no valid token: a1b2c3", "a1b2c3") == "`***` is no valid token: ***"
    assert masked("nothing is known", None) == masked("nothing is known", "") == "nothing is known"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("1.1GB", 1_100_000_000),
        ("500mb", 500_000_000),
        ("10 KB", 10_000),
        ("2TB", 2_000_000_000_000),
        ("2GiB", 2_147_483_648),
        ("1.5KiB", 1536),
        ("1MiB", 1_048_576),
        ("1tib", 1_099_511_627_776),
        ("4096", 4096),
        ("7B", 7),
        ("3G", 3_000_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "0GB", "0.1B", "-1GB", "5XB", "5iB", "1e9", "5GB x", "nan", "٣GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert caught.value.hint == "write a number and a unit, e.g. `500MB` or `2GiB`"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, []),
        ({"final_lr_ratio": 0.0}, []),
        ({"final_lr_ratio": 1.0}, []),
        ({"final_lr_ratio": 0.1, "lr_scheduler_type": "cosine"}, ["`lr_scheduler_type` to be `linear`"]),
        ({"final_lr_ratio": -0.1}, ["between 0 and 1, not -0.1"]),
        ({"final_lr_ratio": float("nan")}, ["between 0 and 1, not nan"]),
        ({"final_lr_ratio": 2.0, "lr_scheduler_type": "constant"}, ["not `constant`", "not 2.0"]),
        ({"lr_scheduler_type": "cosine"}, []),
        ({"dataset_mixer_list": ["a", "1.0"]}, []),
        ({"dataset_name": "a"}, ["`dataset_name` and `dataset_mixer_list` (whose default counts): "]),
        ({"dataset_mixer": {"a": 1}}, ["`dataset_mixer` and `dataset_mixer_list` (whose default counts): "]),
        ({"dataset_mixer": {}}, ["`dataset_mixer` and `dataset_mixer_list` (whose default counts): "]),
        (
            {"dataset_name": "a", "dataset_mixer": {"a": 1}},
            ["`dataset_name` and `dataset_mixer` and `dataset_mixer_list` (whose default counts): "],
        ),
        (
            {"dataset_name": "a", "dataset_mixer_list": ["a", "1.0"]},
            ["`dataset_name` and `dataset_mixer_list`: "],
        ),
        (
            {"dataset_mixer": {"a": 1}, "dataset_mixer_list": ["a", "1.0"]},
            ["`dataset_mixer` and `dataset_mixer_list`: "],
        ),
        ({"push_to_hub": False}, ["`try_launch_beaker_eval_jobs` is true, which needs `push_to_hub`: "]),
        ({"push_to_hub": False, "try_launch_beaker_eval_jobs": False}, []),
        ({"try_launch_beaker_eval_jobs": False}, []),
        (
            {"sequence_parallel_size": 2, "use_flash_attn": False},
            ["`sequence_parallel_size` is 2, which needs `use_flash_attn`: "],
        ),
        ({"sequence_parallel_size": 2}, []),
        ({"use_flash_attn": False}, []),
    ],
)
def test_what_training_would_refuse(values: dict[str, Any], named: list[str]) -> None:
    warnings = training_warnings(FlatArguments(**values))
    assert len(warnings) == len(named)
    for warning, words in zip(warnings, named, strict=True):
        assert words in warning
        assert warning.endswith("training will refuse to start")


def test_importing_is_light() -> None:
    """Loaded as files, without the packages around them: only what these modules import themselves counts."""
    program = (
        "import sys, types, ftload.cli\n"
        "package = types.ModuleType('ftload.loaders')\n"
        "package.__path__ = [p + '/loaders' for p in [sys.argv[1]]]\n"
        "sys.modules['ftload.loaders'] = package\n"
        "import ftload.loaders.flags.command_line\n"
        "heavy = {'torch', 'transformers', 'typer', 'rich', 'yaml', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)\n"
    )
    loaders = Path(sys.modules["ftload.loaders.flags.declared"].__file__ or "").parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(loaders.parent)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
