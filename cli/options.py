"""The kinds of commands: those that take a training command line, and those whose options typer parses.

typer can't parse a training command line: it has no lists that end at the next flag, no booleans with or without a
value, and no YAML file or model before the flags. `read_command_line` has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from ..loaders.flags.completion import completions
from ..loaders.flags.declared import MERGE, PANELS, PLAN, Flag, all_flags, merge_flags, plan_flags
from .show.help import Row, print_help

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")]

USAGE = "[MODEL] [RUN.yaml] [--FLAG [VALUE ...]] ..."
NOTES = (
    "MODEL is a hub id, a directory or a .gguf file. The flags are those of a training command line, which works here "
    "unchanged, and so does its YAML file: flags override it.",
    "In names `-` and `_` are alike. A flag without a type is a boolean: it stands alone, takes true or "
    "false, or is turned off with --no_ before its name. A LIST goes on to the next flag. The beginning of a name is "
    "enough where it is unique.",
)
EXAMPLES = ("Qwen/Qwen3-8B --use_qlora", "run.yaml --lora_rank 16 --output_dir prepared")
REQUIRED = "required"
ROOT_NOTES = ("`ftload COMMAND --help` tells more of a command.",)
ROOT_EXAMPLES = (
    "ftload prepare Qwen/Qwen3-8B --use_qlora --output_dir prepared",
    "ftload verify prepared",
)

_TYPES = {
    "bool": "",
    "int": "INT",
    "float": "FLOAT",
    "str": "TEXT",
    "bool or str": "TEXT",
    "list": "LIST",
    "str or list": "LIST",
}


@dataclass(frozen=True, slots=True)
class Completion:
    """A word that the shell may put in: click's `CompletionItem`, of which some versions of typer have their own."""

    value: str
    help: str | None = None
    type: str = "plain"


class OptionsCommand(TyperCommand):
    """A command whose options typer parses."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print what it does, its arguments and its options."""
        arguments, options = _parameters(self.get_params(ctx))
        usage = [row.name if row.note == REQUIRED else f"[{row.name}]" for row in arguments]
        usage += [f"{row.name} {row.type}" for row in options if row.note == REQUIRED]
        panels = {title: rows for title, rows in (("Arguments", arguments), ("Options", options)) if rows}
        print_help(" ".join((ctx.command_path, *usage, "[OPTIONS]")), self.help or "", panels)


class RootCommand(TyperGroup):
    """`ftload` itself: the commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print what each of them does in a sentence, and the options."""
        commands = [
            Row(name=name, help=" ".join((command.help or "").partition("\n\n")[0].split()))
            for name, command in self.commands.items()
        ]
        panels = {"Commands": commands, "Options": _parameters(self.get_params(ctx))[1]}
        usage = f"{ctx.command_path} COMMAND ..."
        print_help(usage, self.help or "", panels, notes=ROOT_NOTES, examples=ROOT_EXAMPLES)


class FlagsCommand(TyperCommand):
    """A command that takes every flag. Its function finds the words, not yet parsed, in `ctx.obj`: a tuple."""

    flags: ClassVar[Mapping[str, Flag]] = all_flags()
    panels: ClassVar[tuple[str, ...]] = PANELS
    usage: ClassVar[str] = USAGE
    notes: ClassVar[tuple[str, ...]] = NOTES
    examples: ClassVar[tuple[str, ...]] = EXAMPLES

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep `args` for the command's function, or show the help if it is asked for anywhere among them."""
        if not ctx.resilient_parsing and not set(args).isdisjoint(self.get_help_option_names(ctx)):
            self.format_help(ctx, ctx.make_formatter())
            raise typer.Exit
        ctx.obj = tuple(args)
        return []

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return what the word that is being typed can become: flags, or values of the one before it."""
        from ..loaders.flags.lora_config import INITIALISATIONS
        from ..loaders.tokenizer.chat_templates import TEMPLATES
        from ..loaders.tokenizer.tokenizer_functions import FUNCTIONS

        known = {
            "chat_template_name": tuple(TEMPLATES),
            "get_tokenizer_fn": tuple(FUNCTIONS),
            "init_lora_weights": INITIALISATIONS,
        }
        found = completions(ctx.obj, incomplete, self.flags, known)
        return [*(Completion(value, help) for value, help in found), *super().shell_complete(ctx, incomplete)]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the usage line shows after the command's name."""
        return [self.usage]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, notes, examples and a panel for each group of flags."""
        panels = {title: [_flag(flag) for flag in self.flags.values() if flag.panel == title] for title in self.panels}
        examples = [f"{ctx.command_path} {example}" for example in self.examples]
        usage = f"{ctx.command_path} {self.usage}"
        print_help(usage, self.help or "", panels, notes=self.notes, examples=examples)


class PlanCommand(FlagsCommand):
    """`ftload plan`: every flag, and some of its own."""

    flags: ClassVar[Mapping[str, Flag]] = {**plan_flags(), **all_flags()}
    panels: ClassVar[tuple[str, ...]] = (PLAN, *PANELS)


class MergeCommand(FlagsCommand):
    """`ftload merge`: adapters come first, then every flag, and one of its own."""

    flags: ClassVar[Mapping[str, Flag]] = {**merge_flags(), **all_flags()}
    panels: ClassVar[tuple[str, ...]] = (MERGE, *PANELS)
    usage: ClassVar[str] = "ADAPTER [ADAPTER ...] [--FLAG [VALUE ...]] ..."
    notes: ClassVar[tuple[str, ...]] = NOTES[1:]  # there is no YAML file
    examples: ClassVar[tuple[str, ...]] = (
        "runs/checkpoint-500 --output_dir merged",
        "prepared --output_dir merged --max_shard_size 2GB",
        "runs/checkpoint-500 --adapter_only --model Qwen/Qwen3-30B-A3B --output_dir adapter",
    )


def _flag(flag: Flag) -> Row:
    """Return what help says of a flag."""
    choices = f": {', '.join(flag.choices)}" if flag.choices else ""
    default = "" if flag.default in (None, {}) or flag.default is False else f"default: {_as_typed(flag.default)}"
    return Row(name=f"--{flag.name}", type=_TYPES.get(flag.kind, "JSON"), help=f"{flag.help}{choices}", note=default)


def _parameters(parameters: list[Any]) -> tuple[list[Row], list[Row]]:
    """Return what help says of typer's arguments and options; of a name spelled with `_` and with `-`, the first."""
    rows: dict[str, list[Row]] = {"argument": [], "option": []}
    for parameter in parameters:
        is_option = parameter.param_type_name == "option"
        names = {name.replace("-", "_"): name for name in reversed(parameter.opts)} if is_option else {}
        row = Row(
            name=", ".join(sorted(names.values(), key=len, reverse=True)) or parameter.name.upper(),
            type="" if not is_option or parameter.is_flag else parameter.metavar or "TEXT",
            help=(parameter.help or "").rstrip("."),
            note=REQUIRED if parameter.required else "",
        )
        rows[parameter.param_type_name].append(row)
    return rows["argument"], rows["option"]


def _as_typed(default: Any) -> str:
    """Return a default value as one would type it."""
    if isinstance(default, list):
        return " ".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)
