"""What a command line loads before its command begins."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["prepare", "plan", "merge"])
def test_flags_are_read_without_what_typer_loads_for_options(command: str) -> None:
    code = (
        "import sys; from ftload.cli.app import run; "
        f"code = run([{command!r}, '--model', '/nowhere/at/all']); "
        "print(code, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ("2 False\n" if command == "merge" else "3 False\n")
