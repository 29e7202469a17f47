"""The wheel holds everything and works where the sources are not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_is_whole_and_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(build, check=True, timeout=600)
    (wheel,) = tmp_path.glob("ftload-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("ftload/")}
        archive.extractall(tmp_path / "site")
    expected = {
        f"ftload/{path.relative_to(ROOT).as_posix()}"
        for package in ("cli", "loaders")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".typed", ".json", ".html")
    }
    assert "ftload/loaders/report/report.schema.json" in expected
    assert {"ftload/cli/py.typed", "ftload/cli/show/page.html"} <= expected
    assert held == expected
    program = f"""
import site, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
site.addsitedir({site_packages()!r})
import ftload.cli.app
print(ftload.cli.app.__file__)
ftload.cli.app.main()
"""
    command = [sys.executable, "-S", "-c", program, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "site/ftload/cli/app.py"), "ftload 0.1.0"]


def site_packages() -> str:
    import typer

    return str(Path(typer.__file__).parent.parent)
