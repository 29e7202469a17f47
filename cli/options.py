"""The help of the commands that take a training command line, drawn from the dataclasses that declare it.

Neither reading nor drawing can be typer's. Its parser knows no lists up to the next flag, no booleans with
and without a value, no YAML file first: that is `parse_arguments`. And typer's own help takes half a second
for a hundred options, cuts long names off at 80 columns, and can't order its panels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from ..loaders.flags.declared import PANELS, PLAN, Flag, all_flags, plan_flags

if TYPE_CHECKING:
    from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")]
"""What commands have in common whose options are typer's."""

USAGE = "[RUN.yaml] [--FLAG [VALUE ...]] ..."
NOTES = (
    "The flags are those of a training command line, which works here unchanged, and so does its YAML file, "
    "given first: flags override it.",
    "In names `-` and `_` are alike. A flag without a type is a boolean: it stands alone, takes true or "
    "false, or is turned off with --no_ before its name. A LIST goes on to the next flag. The beginning of a name is "
    "enough where it is unique.",
)
EXAMPLES = ("--model Qwen/Qwen3-8B --use_qlora", "run.yaml --lora_rank 16 --output_dir prepared")
WIDEST = 120
"""Columns beyond which lines of help are no easier to read."""

_TYPES = {"bool": "", "int": "INT", "float": "FLOAT", "str": "TEXT", "list": "LIST", "str or list": "LIST"}


class FlagsCommand(TyperCommand):
    """A command that takes every flag: it finds its words, unparsed, in `ctx.obj` as a tuple."""

    flags: ClassVar[Mapping[str, Flag]] = all_flags()
    panels: ClassVar[tuple[str, ...]] = PANELS

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep `args` for the command function; asking for help anywhere among them shows it."""
        if not set(args).isdisjoint(self.get_help_option_names(ctx)):
            self.format_help(ctx, ctx.make_formatter())
            raise typer.Exit
        ctx.obj = tuple(args)
        return []

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the usage line shows after the command's name."""
        return [USAGE]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, notes, examples and a panel for each group of flags, as wide as the terminal."""
        from rich.console import Console
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.text import Text

        console = Console(highlight=False)
        console.width = min(console.width, WIDEST)
        usage = Text.assemble(("Usage: ", "yellow"), (f"{ctx.command_path} {USAGE}", "bold"))
        paragraphs = [" ".join(paragraph.split()) for paragraph in (self.help or "").split("\n\n")]
        examples = "\n".join(f"{ctx.command_path} {example}" for example in EXAMPLES)
        for block in (usage, *paragraphs, *(Text(note, "dim") for note in NOTES), Text(examples, "cyan")):
            console.print(Padding(block, (1, 1, 0, 1)), markup=False)
        console.print()
        for title in self.panels:
            flags = [flag for flag in self.flags.values() if flag.panel == title]
            console.print(Panel(_table(flags), title=title, title_align="left", border_style="dim"))


class PlanCommand(FlagsCommand):
    """`ftload plan`: every flag, and some of its own."""

    flags: ClassVar[Mapping[str, Flag]] = {**plan_flags(), **all_flags()}
    panels: ClassVar[tuple[str, ...]] = (PLAN, *PANELS)


def _table(flags: list[Flag]) -> Table:
    """Return name, type and help of each flag in three columns, the first never cut."""
    from rich.table import Table
    from rich.text import Text

    name_width = max(len(flag.name) for flag in flags) + len("--")
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(style="bold cyan", no_wrap=True, width=name_width)
    table.add_column(style="yellow", no_wrap=True, width=max(map(len, _TYPES.values())))
    table.add_column(ratio=1)
    for flag in flags:
        choices = f": {', '.join(flag.choices)}" if flag.choices else ""
        default = "" if flag.default in (None, {}) or flag.default is False else _shown(flag.default)
        help = Text.assemble(flag.help, choices, (default and f" [default: {default}]", "dim"))
        table.add_row(Text(f"--{flag.name}"), Text(_TYPES.get(flag.kind, "JSON")), help)
    return table


def _shown(default: Any) -> str:
    """Return a default as it would be typed."""
    if isinstance(default, list):
        return " ".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)
