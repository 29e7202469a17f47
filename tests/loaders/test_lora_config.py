"""The adapter that flags and the file of `--lora_config` ask for, as fields of PEFT's `LoraConfig`."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from ftload.loaders.errors import UsageError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.flags.request import Request, resolve_request


def requested(line: str, adapter: str = "--use_lora") -> Request:
    return resolve_request(parse_arguments(["m", *adapter.split(), *shlex.split(line)]))


def refusal(line: str, adapter: str = "--use_lora") -> tuple[str, str | None]:
    with pytest.raises(UsageError) as caught:
        requested(line, adapter)
    assert "\n" not in caught.value.message
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("", {}),
        ("--lora_rank 8 --lora_alpha 32 --lora_dropout 0 --lora_target_modules q_proj", {}),
        ("--use_dora false --use_rslora=false --init_lora_weights true", {}),
        ("--use_dora --use_rslora", {"use_dora": True, "use_rslora": True}),
        ("--init_lora_weights pissa_niter_16", {"init_lora_weights": "pissa_niter_16"}),
        ("--init_lora_weights false", {"init_lora_weights": False}),
        ("--lora_modules_to_save lm_head embed_tokens", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("--lora_target_parameters mlp.experts.down_proj", {"target_parameters": ["mlp.experts.down_proj"]}),
        ("--trainable_token_indices 12 0", {"trainable_token_indices": [12, 0]}),
        ("--trainable_token_indices new", {"trainable_token_indices": "new"}),
        (
            "--use_rslora --init_lora_weights orthogonal --trainable_token_indices 5",
            {"init_lora_weights": "orthogonal", "trainable_token_indices": [5], "use_rslora": True},
        ),
    ],
)
def test_what_flags_ask_for(line: str, settings: dict[str, Any]) -> None:
    request = requested(line)
    assert request.lora_settings == settings
    assert list(request.lora_settings) == sorted(settings)
    assert request.decisions == ()


@pytest.mark.parametrize(
    "words",
    [
        "--use_dora",
        "--use_rslora",
        "--init_lora_weights olora",
        "--lora_modules_to_save lm_head",
        "--lora_target_parameters a.b",
        "--trainable_token_indices new",
    ],
)
def test_what_is_for_adapters_alone(words: str) -> None:
    message = f"`{words.partition(' ')[0]}` is for adapters"
    assert refusal(words, adapter="") == (message, "pass --use_lora or --use_qlora as well")
    assert requested(words, adapter="--use_qlora").strategy == "qlora"


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "--init_lora_weights orthogonal --lora_rank 7",
            "`init_lora_weights`: PEFT's orthogonal initialization requires the LoRA rank to be even, got 7",
            "pass --lora_rank 8",
        ),
        (
            "--init_lora_weights pissa --base reference",
            "`--base reference` can't be had with `init_lora_weights` pissa, which changes the base",
            "leave out `--base`",
        ),
        (
            "--init_lora_weights olora --base reference",
            "`--base reference` can't be had with `init_lora_weights` olora, which changes the base",
            "leave out `--base`",
        ),
        (
            "--lora_target_parameters a.b --lora_experts 4",
            "`--lora_experts` and `target_parameters` are two ways of naming what is adapted",
            "give --lora_experts RANK to adapt all experts, or --lora_target_parameters to name them",
        ),
        (
            "--lora_target_parameters a.b --use_dora",
            "`target_parameters`: PEFT's `lora.ParamWrapper does not work with use_dora=True.`",
            "leave out one of them",
        ),
    ],
)
def test_what_contradicts(line: str, message: str, hint: str) -> None:
    assert refusal(line) == (message, hint)


def test_what_leaves_the_base_alone_can_refer_to_it() -> None:
    for value in ("gaussian", "orthogonal", "true"):
        assert requested(f"--init_lora_weights {value} --base reference").base == "reference"
