"""What people type by mistake, and what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ftload.loaders.decision import Decision
from ftload.loaders.errors import MissingRequirementError
from ftload.loaders.flags.strict import check_strict
from ftload.loaders.system.versions import ftload_version

from ..conftest import Result

Ftload = Callable[..., Result]
ROOT = "a command comes first: prepare, plan, merge, verify, inspect, recipe, doctor; see `ftload --help`"


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("help", "--help"),
        ("help prepare", "prepare --help"),
        ("help verify", "verify --help"),
        ("-V", "--version"),
        ("prepare --version", "--version"),
        ("prepare -V", "--version"),
        ("verify --version", "--version"),
        ("inspect x --version", "--version"),
        ("inspect x -V", "--version"),
    ],
)
def test_other_ways_to_ask(ftload: Ftload, words: str, same: str) -> None:
    asked = ftload(*words.split())
    assert asked == ftload(*same.split())
    assert (asked.code, asked.err) == (0, "")
    if same == "--version":
        assert asked.out == f"ftload {ftload_version()}\n"
    else:
        assert "Usage: ftload" in asked.out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("verify", "see `ftload verify --help`"),
        ("verify --slow x", "see `ftload verify --help`"),
        ("inspect", "see `ftload inspect --help`"),
        ("inspect a b c", "see `ftload inspect --help`"),
        ("doctor --for", "see `ftload doctor --help`"),
        ("fuse adapter", ROOT),
        ("merge --output_dir x", "ftload merge ADAPTER --output_dir DIRECTORY"),
        ("load x", ROOT),
        ("run.yaml", ROOT),
        ("--model x", ROOT),
        ("help load", ROOT),
        ("prepare --lora_rnak 8", "`--help` lists every flag"),
        ("prepare org/name --model other/name", None),
        ("prepare --use_qlora org/name", "a model comes before the flags"),
        ("prepare --model", None),
        ("prepare", "give a hub id, a directory or a .gguf file before the flags"),
    ],
)
def test_each_command_points_to_its_own_help(ftload: Ftload, words: str, hint: str | None) -> None:
    result = ftload(*words.split(), "--json") if words.startswith("prepare") else ftload(*words.split())
    assert result.code == 2
    if words.startswith("prepare"):
        assert json.loads(result.out)["error"]["hint"] == hint
    else:
        assert result.err.splitlines()[1:] == [f"hint: {hint}"]


@pytest.mark.parametrize(
    "words",
    [
        "--json verify x",
        "--json",
        "load x --json",
        "verify --slow x --json",
        "verify --json --slow x",
        "verify x --json=true",
        "inspect a b c --json",
        "doctor --json --for",
        "prepare --json --nonsense",
        "prepare --nonsense x --json=true",
        "prepare --json maybe",
        "prepare run.yaml --nonsense",
        "prepare run.yaml --model x --base reference",
        "plan --js --zero 4",
    ],
)
def test_a_bad_command_line_is_reported_as_far_as_it_is_understood(
    ftload: Ftload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """One document on stdout, wherever and however it is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("json: true\n")
    result = ftload(*words.split())
    assert result.code == 2
    assert list(json.loads(result.out)) == ["error"]
    for but in ("--json=false", "--no_json"):
        assert ftload("prepare", "run.yaml", "--nonsense", but).out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a", "`--adapter_only` needs `--model`: the model in 16 bits that the adapter is for"),
        ("a b --model m", "`--adapter_only` writes one adapter, not 2"),
        ("a --merge_adapter b --model m", "`--adapter_only` writes one adapter, not 2"),
        (
            "a --model m --use_qlora --seed 1 --overwrite",
            "`--use_qlora` has no effect with `--adapter_only`: no model is written; "
            "`--seed` has no effect with `--adapter_only`: no model is written; "
            "`--overwrite` has no effect with `--adapter_only`: no model is written",
        ),
        ("a --model m --lora-r 8", "`--lora_rank` has no effect with `--adapter_only`: no model is written"),
        ("a --model m --lora_rank x", "`--lora_rank` takes an int, not `x`; `--lora_rank` has no effect with "
         "`--adapter_only`: no model is written"),
        ("run.yaml a --model m", "`--adapter_only` writes one adapter, not 2"),
    ],
)  # fmt: skip
def test_an_adapter_alone_takes_few_flags(ftload: Ftload, words: str, message: str) -> None:
    result = ftload("merge", *words.split(), "--adapter_only", "--json")
    assert result.code == 2
    assert json.loads(result.out)["error"]["message"] == message


def test_an_adapter_alone_is_asked_of_merge(ftload: Ftload) -> None:
    for command in ("prepare", "plan"):
        assert "unknown flag `--adapter_only`" in ftload(command, "m", "--adapter_only").err
    assert "`--adapter_only` takes true or false, not `maybe`" in ftload("merge", "a", "--adapter_only=maybe").err
    # merged after all
    refused = ftload("merge", "/no/adapter", "--adapter_only", "false", "--use_qlora")
    assert (refused.code, refused.err.splitlines()[0]) == (3, "error: `/no/adapter` does not exist")


def test_debug_shows_where_an_error_in_the_flags_was_raised(ftload: Ftload) -> None:
    for words in (["verify", "--slow"], ["prepare", "--nonsense"]):
        assert "Traceback" not in ftload(*words).err
        assert ftload(*words, "--debug").err.startswith("Traceback")


@pytest.mark.parametrize(
    ("what", "requested", "effective", "way"),
    [
        ("attention", "flash_attention_2", "sdpa", "pass `--use_flash_attn false`"),
        ("use_lora", "false", "true", "pass `--use_lora`"),
        ("use_liger_kernel", "true", "false", "pass `--use_liger_kernel false`"),
        ("base", "link", "copy", "pass `--base copy`"),
        ("dtype of the base", "bfloat16", "float32", "pass `--base copy`"),
        ("add_bos", "true", "false", "pass `--add_bos false`"),
        ("use_fast", "false", "true", "pass `--use_fast true`"),
        ("LoRA targets", "q_proj", "c_attn c_proj", "pass `--lora_target_modules c_attn c_proj`"),
        ("model_revision", "v1", "none", "leave out `--model_revision`"),
        ("chat_template_name", "x", "the tokenizer's own", "leave out `--chat_template_name`"),
        ("push_to_hub hf_entity", "upload", "no upload", "leave out `--push_to_hub --hf_entity`"),
        ("4-bit encoder", "numba", "bitsandbytes", "ask for what is possible here"),
    ],
)
def test_strict_names_the_flag_that_satisfies_it(what: str, requested: str, effective: str, way: str) -> None:
    kept = Decision(what="experts", requested="x", effective="x", reason="r")
    told = Decision(what="pad token", requested="none", effective="<pad> (id 128)", reason="r")
    with pytest.raises(MissingRequirementError) as caught:
        check_strict([kept, told, Decision(what=what, requested=requested, effective=effective, reason="why")])
    assert caught.value.message == f"`--strict`: not as requested: {what}: {requested} → {effective} (why)"
    assert caught.value.hint == f"{way}, or leave out --strict"
    check_strict([kept, told])


def test_what_strict_names_satisfies_it(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    words = ["plan", "--model", llama, "--output_dir", tmp_path / "out", "--strict", "--json"]
    asked = [*words, "--use_qlora", "--no_use_lora", "--model_revision", "v1", "--save_to_hub", "a/b"]
    refused = ftload(*asked)
    assert refused.code == 5
    assert json.loads(refused.out)["error"]["hint"] == (
        "leave out `--model_revision`, pass `--use_lora`, leave out `--save_to_hub`, pass `--use_flash_attn false`, "
        "or leave out --strict"
    )
    assert ftload(*words, "--use_qlora", "--use_lora", "--use_flash_attn", "false").code == 0
