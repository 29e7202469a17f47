"""docs/trainers.md is what the recipes are made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "scripts" / "trainers_page"], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8") == printed
