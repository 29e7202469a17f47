"""The README's smoke check runs as it stands; pages lead where they say, and name every package and file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from .parity.models import write_model
from .tokenizers import write_llama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
SECTION = README.partition("## In CI\n")[2].partition("\n## ")[0]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    assert found is not None
    return found[1]


def script() -> str:
    return block("sh")


def workflow() -> str:
    """The steps after those that install, each ended by an error as a runner ends it."""
    job = yaml.safe_load(block("yaml"))["jobs"]["prepare"]
    steps = [step["run"] for step in job["steps"] if "run" in step and step["name"] != "install"]
    assert len(steps) == 2
    return "set -eo pipefail\n" + "\n".join(steps)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    return tmp_path / "model"


def run(text: str, model: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "MODEL": str(model), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "cache"),
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", text], cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.parametrize("text", [script(), workflow()], ids=["script", "workflow"])
def test_a_good_model_passes(model: Path, tmp_path: Path, text: str) -> None:
    done = run(text, model, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "true"
    assert done.stdout.splitlines()[-1] == "prepared verifies"


@pytest.mark.parametrize("text", [script(), workflow()], ids=["script", "workflow"])
def test_a_bad_model_does_not(model: Path, tmp_path: Path, text: str) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    done = run(text, model, tmp_path)
    assert done.returncode == 4
    assert "is truncated" in done.stderr


@pytest.mark.parametrize("text", [script(), workflow()], ids=["script", "workflow"])
@pytest.mark.parametrize("name", ["org/model", "/no/such/model"])
def test_a_model_that_can_not_be_had_has_its_own_code(tmp_path: Path, text: str, name: str) -> None:
    done = run(text, Path(name), tmp_path)
    assert done.returncode == 3
    assert f"`{name}`" in done.stderr


def rooms() -> dict[str, str]:
    """The sections of docs/architecture.md that list files, by folder."""
    sections = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n## `")[1:]
    return {folder: text for folder, _, text in (section.partition("`\n\n") for section in sections)}


def test_every_file_has_its_line() -> None:
    """A file of the code that docs/architecture.md does not name, or one that it names and that is gone."""
    named = {
        folder + path
        for folder, text in rooms().items()
        for path in re.findall(r"^\| `([^`]+\.py)` \|", text, re.MULTILINE)
    }
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("cli", "loaders")
        for path in (ROOT / folder).rglob("*.py")
        if not path.name.startswith("__")
    }
    assert named == files


def test_a_files_line_says_what_the_file_says() -> None:
    """Folders and files are described by the first paragraph of their docstrings."""
    for folder, text in rooms().items():
        assert text.partition("\n")[0] == first_paragraph(ROOT / folder / "__init__.py")
        lines = re.findall(r"^\| `([^`]+\.py)` \| (.*) \|$", text, re.MULTILINE)
        assert lines == sorted((path, first_paragraph(ROOT / folder / path)) for path, _ in lines)


def first_paragraph(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text is not None
    return text.partition("\n\n")[0].replace("\n", " ")


def test_the_readme_is_short_and_names_every_package() -> None:
    assert len(README.splitlines()) < 250
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = setup["package-dir"]
    rows = re.findall(r"^\| `([^`]+/)` \| (.*) \|$", README.partition("\n## The code\n")[2], re.MULTILINE)
    # a package within another than loaders is named in the outer one's row
    named = {folder for folder, _ in rows}
    named |= {folder + inner for folder, what in rows for inner in re.findall(r"`([^`]+/)`", what)}
    assert named == {
        places.get(package, package.removeprefix("ftload.").replace(".", "/")) + "/" for package in setup["packages"]
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / Path(page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {anchor_of(heading) for heading in headings}, link


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_workflow_runs_the_tests() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"pull_request", "push"} <= workflow[True].keys()  # YAML takes `on` for a boolean
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest"
    assert job["timeout-minutes"] <= 120
    (python,) = [step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@")]
    assert (python["python-version"], python["cache"]) == ("3.11", "pip")
    assert job["steps"][-1]["run"] == "scripts/test"
    assert not job["steps"][-1].keys() & {"if", "continue-on-error"}
    assert os.access(ROOT / "scripts" / "test", os.X_OK)


STATIONS = [
    "arguments", "request", "sources", "configuration", "tokenizer", "checkpoint", "skeleton", "plan", "written",
    "report",
]  # fmt: skip


def test_the_page_and_prepare_tell_the_same_way() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (way,) = re.findall(r"^arguments ─► .*$", page, re.MULTILINE)
    assert re.findall(r"\w+", way) == STATIONS
    # the module's own words, and the values of its functions
    code = (ROOT / "loaders" / "prepare.py").read_text(encoding="utf-8")
    assert way in code
    told = page.partition("\n## One run")[2].partition("\n## ")[0]
    assert re.findall(r"^\*\*([a-z, ]+)\.\*\*", told, re.MULTILINE) == [word.strip() for word in way.split("─►")]
    made = re.findall(r"\b(\w+)(?:, \w+)? = (?!None)", code)
    assert [station for station in STATIONS[1:] if station not in made] == []


def test_the_page_has_the_contract() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    listed = page.partition("\n## Who may import whom\n")[2].split("```")[1].split("\n")
    assert listed[1:-1] == [layer.replace("ftload.", "").replace("loaders.", "") for layer in layers]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("CHANGELOG.md", "BENCHMARKS.md")])
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|toml|txt|yml)|(?:[\w.-]+/)+)`", text))
    code = [path for top in ("cli", "loaders", "tests") for path in (ROOT / top).rglob("*")]
    known = {path.name for path in code} | {f"{path.name}/" for path in code if path.is_dir()} | {"utils.py"}
    places = (ROOT, ROOT / "loaders", ROOT / "docs")
    assert [name for name in sorted(names) if name not in known and not any((p / name).exists() for p in places)] == []
