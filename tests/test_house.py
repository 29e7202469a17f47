"""The rules of the house: who may import whom, how many files a folder holds, and how long they are."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT).as_posix() for top in ("cli", "loaders") for path in (ROOT / top).rglob("*.py"))
MOST_FILES, MOST_LINES = 12, 400


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the code, with the contracts beside it."""
    for top in ("cli", "loaders"):
        shutil.copytree(ROOT / top, tmp_path / top, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(house: Path) -> tuple[int, str]:
    """The exit code of import-linter and what it says of the copy."""
    command = [sys.executable, ROOT / "scripts" / "lint_imports", "--no-logo", "--no-cache"]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout


def test_the_contracts_are_kept(house: Path) -> None:
    code, said = lint(house)
    assert code == 0, said
    assert re.search(r"Contracts: \d+ kept, 0 broken", said)


@pytest.mark.parametrize(
    ("package", "line", "named"),
    [
        ("system", "from .. import report", "ftload.loaders.system -> ftload.loaders.report"),
        ("verify", "from .. import inspect", "ftload.loaders.verify -> ftload.loaders.inspect"),
        ("plan", "def f(): from .. import write", "ftload.loaders.plan -> ftload.loaders.write"),
        ("write", "import ftload.cli", "ftload.loaders.write -> ftload.cli"),
        ("report", "import rich.table", "ftload.loaders.report -> rich"),
        ("flags", "from typer import echo", "ftload.loaders.flags -> typer"),
    ],
    ids=["up", "between leaves", "within a function", "the command line", "rich", "typer"],
)
def test_a_forbidden_import_is_caught(house: Path, package: str, line: str, named: str) -> None:
    with (house / "loaders" / package / "__init__.py").open("a") as file:
        file.write(f"\n{line}\n")
    code, said = lint(house)
    assert code == 1
    assert named in said


def test_every_package_and_file_of_loaders_has_its_place() -> None:
    """What the contract does not name may import, and be imported by, anything."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    named = {name for layer in layers for name in re.findall(r"ftload\.loaders\.(\w+)", layer)}
    assert named == {path.split("/")[1].removesuffix(".py") for path in FILES if path.startswith("loaders/")} - {
        "__init__"
    }


def test_no_folder_is_crowded() -> None:
    folders = [Path(path).parent.as_posix() for path in FILES]
    assert {folder: folders.count(folder) for folder in folders if folders.count(folder) > MOST_FILES} == {}


def test_a_long_file_has_its_reason() -> None:
    long = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {path: lines for path, lines in long.items() if lines > MOST_LINES}
    words = {path: ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "" for path in long}
    assert {path: lines for path, lines in long.items() if "The file is long because" not in words[path]} == {}


def test_no_file_uses_what_another_keeps_to_itself() -> None:
    used = {path: list(private_imports(ast.parse((ROOT / path).read_text(encoding="utf-8")))) for path in FILES}
    assert {path: names for path, names in used.items() if names} == {}


def private_imports(tree: ast.Module) -> Iterator[str]:
    """The underscore names that are imported from elsewhere in ftload."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == "ftload"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (name for name in names if re.match(r"_(?!_)", name))


def test_private_imports_are_found() -> None:
    source = "from .a import b, _c\nfrom ftload.loaders._d import e\nfrom torch import _f\nfrom . import __version__"
    assert list(private_imports(ast.parse(source))) == ["_c", "_d"]
