"""The command that takes every flag: what it passes on, and what its help shows."""

from __future__ import annotations

import re

import pytest
import typer
from ftload.cli.app import app as ftload_app
from ftload.cli.options import FlagsCommand
from ftload.loaders.flags.declared import PANELS, all_flags
from typer.testing import CliRunner

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
seen: list[tuple[str, ...]] = []


@app.callback()
def root() -> None:
    pass


@app.command("prepare", cls=FlagsCommand)
def prepare(ctx: typer.Context) -> None:
    """Turn a model
    into a directory.
    """
    seen.append(ctx.obj)


def help_at(width: int, word: str = "--help") -> str:
    result = CliRunner().invoke(app, ["prepare", word], env={"COLUMNS": str(width), "NO_COLOR": "1"})
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run.yaml", "--lora_rank", "16"],
        ["--dataset_mixer_list", "a", "1.0", "--use-lora", "False", "--clip_grad_norm", "-1", "--exp_name=--x"],
        ["--unknown", "--", "-v", "--version"],
    ],
)
def test_words_reach_the_command_as_typed(words: list[str]) -> None:
    seen.clear()
    result = CliRunner().invoke(app, ["prepare", *words])
    assert (result.exit_code, result.output) == (0, "")
    assert seen == [tuple(words)]


def test_help_is_shown_wherever_it_is_asked_for() -> None:
    seen.clear()
    result = CliRunner().invoke(app, ["prepare", "--lora_rank", "16", "-h", "--nonsense"])
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert seen == []


@pytest.mark.parametrize("width", [80, 120])
def test_help_names_every_flag_in_full_and_fits(width: int) -> None:
    shown = help_at(width)
    assert max(map(len, shown.splitlines())) == width
    assert "…" not in shown
    assert re.findall(r"^│ --(\w+)", shown, re.MULTILINE) == [
        flag.name for panel in PANELS for flag in all_flags().values() if flag.panel == panel
    ]


def test_help_is_no_wider_than_can_be_read() -> None:
    assert max(map(len, help_at(300).splitlines())) == 120


def test_panels_are_in_order() -> None:
    assert re.findall(r"^╭─ ([^─]+) ─", help_at(80), re.MULTILINE) == list(PANELS)


def test_help_tells_usage_types_choices_and_defaults() -> None:
    lines = [" ".join(line.strip("│ ").split()) for line in help_at(120).splitlines()]
    assert lines[1] == "Usage: root prepare [MODEL] [RUN.yaml] [--FLAG [VALUE ...]] ..."
    assert "Turn a model into a directory." in lines
    assert "root prepare run.yaml --lora_rank 16 --output_dir prepared" in lines
    assert "--lora_rank INT Rank of the LoRA matrices [default: 64]" in lines
    assert "--weight_decay FLOAT Weight decay of AdamW [default: 0.0]" in lines
    assert "--use_fast Use the fast tokenizer [default: true]" in lines
    assert "--use_lora Prepare a LoRA adapter" in lines
    assert "--dataset_name TEXT Data set to train on, by name" in lines
    assert "--dataset_mixer JSON Data sets and their shares, as a JSON object" in lines
    assert "--dataset_mixer_list_splits LIST Splits of the data sets to train on [default: train]" in lines
    assert "--dataset_cache_mode TEXT Where the processed data set is cached: hf, local [default: local]" in lines


@pytest.mark.parametrize(
    ("command", "panel", "flags"),
    [
        ("plan", "Plan", ["for", "mixed_precision", "html", "fsdp", "zero", "gpus", "fit"]),
        ("merge", "Merge", ["adapter_only"]),
    ],
)
def test_a_commands_own_flags_come_first(command: str, panel: str, flags: list[str]) -> None:
    result = CliRunner().invoke(ftload_app, [command, "--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert re.findall(r"^╭─ ([^─]+) ─", result.stdout, re.MULTILINE) == [panel, *PANELS]
    assert re.findall(r"^│ --(\w+)", result.stdout, re.MULTILINE)[: len(flags) + 1] == [*flags, "model_name_or_path"]


OPTIONS = {
    "": ["--version, -V", "--install-completion", "--show-completion", "--help, -h"],
    "verify": ["--quick", "--trust_remote_code", "--fix", "--base", "--json", "--quiet", "--debug", "--help, -h"],
    "inspect": ["--tensors", "--bytes", "--html", "--revision", "--json", "--debug", "--help, -h"],
    "recipe": ["--for", "--data", "--output", "--json", "--debug", "--help, -h"],
    "doctor": ["--for", "--quick", "--json", "--debug", "--help, -h"],
}
USAGE = {
    "": "ftload COMMAND ...",
    "verify": "ftload verify DIRECTORY [OPTIONS]",
    "inspect": "ftload inspect CHECKPOINT [OTHER] [OPTIONS]",
    "recipe": "ftload recipe DIRECTORY --for TRAINER [OPTIONS]",
    "doctor": "ftload doctor [OPTIONS]",
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_of_every_other_command_is_whole_and_fits(command: str, width: int) -> None:
    environment = {"COLUMNS": str(width), "NO_COLOR": "1"}
    shown = CliRunner().invoke(ftload_app, [*command.split(), "-h"], env=environment, prog_name="ftload").stdout
    assert max(map(len, shown.splitlines())) == width
    assert shown.splitlines()[1].strip() == f"Usage: {USAGE[command]}"
    options = shown.partition("─ Options ─")[2]
    assert re.findall(r"^│ (-[^\s,]+(?:, -\w)?)", options, re.MULTILINE) == OPTIONS[command]
    assert "…" not in options
    if command == "":
        commands = re.findall(r"^│ (\w+)", shown.partition("─ Commands ─")[2].partition("╭")[0], re.MULTILINE)
        assert commands == ["prepare", "plan", "merge", "verify", "inspect", "recipe", "doctor"]
    if command == "verify":
        assert "│ DIRECTORY  What `ftload prepare` wrote [required]" in shown
        assert "is loaded and takes one training step." in " ".join(shown.split())
    if (command, width) == ("verify", 80):  # paragraphs are filled, wherever their lines end in the source
        assert " against the report; then the model is loaded and takes one training step. Exit \n" in shown
