"""The sdist and the wheel hold everything, and the wheel works where the sources are not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_sdist_and_wheel_are_whole_and_the_wheel_runs(tmp_path: Path) -> None:
    # a copy: what an earlier build left behind lists files that would be missing otherwise
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    # the wheel is made from the sdist
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, project]
    subprocess.run(build, check=True, capture_output=True, timeout=600)
    (sdist,), (wheel,) = tmp_path.glob("ftload-*.tar.gz"), tmp_path.glob("ftload-*.whl")
    with tarfile.open(sdist) as archive:
        files = [Path(member.name) for member in archive.getmembers() if member.isfile()]
    sources = {installed(Path(*path.parts[1:])) for path in files if path.parts[1] in ("cli", "loaders")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("ftload/")}
        archive.extractall(tmp_path / "site")
    expected = {
        installed(path.relative_to(ROOT))
        for package in ("cli", "loaders")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".typed", ".json", ".html")
    }
    assert "ftload/loaders/report/report.schema.json" in expected
    assert "ftload/register/__init__.py" in expected
    assert {"ftload/cli/py.typed", "ftload/cli/show/page.html"} <= expected
    assert sources == expected
    assert held == expected
    program = f"""
import site, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
site.addsitedir({site_packages()!r})
import ftload.cli.app
print(ftload.cli.app.__file__)
if sys.argv[1] == "register":
    import ftload.register
    print(ftload.register.__file__)
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    print(AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__module__)
else:
    ftload.cli.app.main()
"""
    app, register = (str(tmp_path / "site/ftload" / name) for name in ("cli/app.py", "register/__init__.py"))
    for word, expected_lines in (
        ("--version", [app, "ftload 0.1.0"]),
        ("register", [app, register, "ftload.loaders.experts.quantizer"]),
    ):
        command = [sys.executable, "-S", "-c", program, word]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == expected_lines


def installed(path: Path) -> str:
    """Where a file of the repository is installed: what is imported for its effect stands beside cli and loaders."""
    return "ftload/" + path.as_posix().replace("loaders/register/", "register/")


def site_packages() -> str:
    import typer

    return str(Path(typer.__file__).parent.parent)
