"""What `ftload doctor` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from .tables import harmless, make_console, print_table

if TYPE_CHECKING:
    from ...loaders.doctor.diagnosis import Ability, Diagnosis

_STYLES = {"ok": "green", "absent": "yellow", "broken": "bold red", "untried": "dim"}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """A line for each finding, below it the command that fixes it, and what that means for each strategy."""
    console = make_console()
    state_width = max(len(state) for state in _STYLES)
    name_width = max(len(finding.name) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(style=_STYLES[finding.state], width=state_width)
        line.add_column(style="bold", width=name_width)
        line.add_column(overflow="fold")
        line.add_row(finding.state, finding.name, harmless(finding.detail))
        print_table(console, line)
        if finding.mend is not None:
            # not in the table: a command that is folded can't be copied
            margin = " " * (state_width + 2 + name_width + 2)
            console.print(f"{margin}[cyan]{harmless(finding.mend)}[/]", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("strategy", style="bold", no_wrap=True)
    table.add_column("prepare", overflow="fold")
    table.add_column("train", overflow="fold")
    for name in diagnosis.preparing:
        table.add_row(name, _ability(diagnosis.preparing[name]), _ability(diagnosis.training[name]))
    console.print()
    print_table(console, table)


def _ability(ability: Ability) -> str:
    if ability.works:
        return "[green]yes[/]" + (f", {harmless(ability.detail)}" if ability.detail else "")
    return f"[red]no[/]: {harmless(ability.detail)}"
