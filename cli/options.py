"""The commands that take a training command line, and the options that the others have in common.

typer can't parse these flags or print their help. Its parser has no lists that end at the next flag, no booleans
with or without a value, and no YAML file or model before the flags: `read_command_line` has. Its help takes half a
second for a hundred options, cuts off long names at 80 columns, and can't order its panels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from ..loaders.flags.completion import completions
from ..loaders.flags.declared import MERGE, PANELS, PLAN, Flag, all_flags, merge_flags, plan_flags

if TYPE_CHECKING:
    from rich.table import Table

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
WIDEST = 120
"""Columns beyond which lines of help are no easier to read."""

_TYPES = {"bool": "", "int": "INT", "float": "FLOAT", "str": "TEXT", "list": "LIST", "str or list": "LIST"}


@dataclass(frozen=True, slots=True)
class Completion:
    """A word that the shell may put in: click's `CompletionItem`, of which some versions of typer have their own."""

    value: str
    help: str | None = None
    type: str = "plain"


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
        from ..loaders.tokenizer.chat_templates import TEMPLATES
        from ..loaders.tokenizer.tokenizer_functions import FUNCTIONS

        known = {"chat_template_name": tuple(TEMPLATES), "get_tokenizer_fn": tuple(FUNCTIONS)}
        found = completions(ctx.obj, incomplete, self.flags, known)
        return [*(Completion(value, help) for value, help in found), *super().shell_complete(ctx, incomplete)]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the usage line shows after the command's name."""
        return [self.usage]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, notes, examples and a panel for each group of flags, as wide as the terminal."""
        from rich.console import Console
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.text import Text

        console = Console(highlight=False)
        console.width = min(console.width, WIDEST)
        usage = Text.assemble(("Usage: ", "yellow"), (f"{ctx.command_path} {self.usage}", "bold"))
        paragraphs = [" ".join(paragraph.split()) for paragraph in (self.help or "").split("\n\n")]
        examples = "\n".join(f"{ctx.command_path} {example}" for example in self.examples)
        for block in (usage, *paragraphs, *(Text(note, "dim") for note in self.notes), Text(examples, "cyan")):
            console.print(Padding(block, (1, 1, 0, 1)), markup=False)
        console.print()
        for title in self.panels:
            flags = [flag for flag in self.flags.values() if flag.panel == title]
            console.print(Panel(_table(flags), title=title, title_align="left", border_style="dim"))


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


def _table(flags: list[Flag]) -> Table:
    """Return a table of three columns: name (never cut off), type and help of each flag."""
    from rich.table import Table
    from rich.text import Text

    name_width = max(len(flag.name) for flag in flags) + len("--")
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(style="bold cyan", no_wrap=True, width=name_width)
    table.add_column(style="yellow", no_wrap=True, width=max(map(len, _TYPES.values())))
    table.add_column(ratio=1)
    for flag in flags:
        choices = f": {', '.join(flag.choices)}" if flag.choices else ""
        default = "" if flag.default in (None, {}) or flag.default is False else _as_typed(flag.default)
        help = Text.assemble(flag.help, choices, (default and f" [default: {default}]", "dim"))
        table.add_row(Text(f"--{flag.name}"), Text(_TYPES.get(flag.kind, "JSON")), help)
    return table


def _as_typed(default: Any) -> str:
    """Return a default value as one would type it."""
    if isinstance(default, list):
        return " ".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)
