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
    assert {"ftload/__init__.py", "ftload/__main__.py", "ftload/register/__init__.py"} <= expected
    assert {"ftload/py.typed", "ftload/cli/show/page.html"} <= expected
    assert sources == expected
    assert held == expected
    check_package(tmp_path / "site", {name: tmp_path / "site" / "ftload" / name for name in FILES})


def test_an_editable_install_is_the_sources(tmp_path: Path) -> None:
    program = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-c", program], cwd=project, check=True, capture_output=True, timeout=600)
    (wheel,) = tmp_path.glob("ftload-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    check_package(tmp_path / "site", {name: project / place for name, place in FILES.items()})


FILES = {
    "__init__.py": "loaders/package/__init__.py",
    "cli/app.py": "cli/app.py",
    "loaders/load.py": "loaders/load.py",
    "register/__init__.py": "loaders/register/__init__.py",
}
"""Where a file of the package `ftload` lies in the repository."""

PROGRAMS = {
    "light": """
import ftload
print(ftload.__file__, ftload.__version__, sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
print(hasattr(ftload, "load"), ftload.__all__)
""",
    "load_prepared": """
from ftload import load_prepared
print(load_prepared.__code__.co_filename, load_prepared.__module__)
from ftload.loaders import load_prepared as formerly
print(formerly is load_prepared, sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
""",
    "register": """
import ftload.register
print(ftload.register.__file__)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__module__)
""",
    "main": """
import runpy
sys.argv = ["ftload", "--version"]
import ftload.cli.app
print(ftload.cli.app.__file__, flush=True)
runpy.run_module("ftload", run_name="__main__", alter_sys=True)
""",
}


def check_package(site: Path, files: dict[str, Path]) -> None:
    """Import what is installed in `site`, where the sources are not."""
    said = {
        "light": [f"{files['__init__.py']} 0.1.0 []", "False ['__version__', 'load_prepared']"],
        "load_prepared": [f"{files['loaders/load.py']} ftload.loaders.load", "True []"],
        "register": [str(files["register/__init__.py"]), "ftload.loaders.experts.quantizer"],
        "main": [str(files["cli/app.py"]), "ftload 0.1.0"],
    }
    for name, program in PROGRAMS.items():
        setup = f"""
import site, sys
site.addsitedir({str(site)!r})
site.addsitedir({site_packages()!r})
heavy = {{"torch", "transformers", "peft", "typer", "rich", "numba", "numpy", "bitsandbytes", "jsonschema"}}
"""
        command = [sys.executable, "-S", "-c", setup + program]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=site.parent)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == said[name], name


def installed(path: Path) -> str:
    """Where a file of the repository is installed: what users import by name stands beside cli and loaders."""
    return "ftload/" + path.as_posix().replace("loaders/register/", "register/").replace("loaders/package/", "")


def site_packages() -> str:
    import typer

    return str(Path(typer.__file__).parent.parent)
