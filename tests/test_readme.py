"""The README's smoke check runs as it stands, as a shell script and as a workflow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .parity.models import write_model
from .tokenizers import write_llama

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
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


def test_every_file_has_its_line() -> None:
    """A file of the code that docs/architecture.md does not name, or one that it names and that is gone."""
    root = Path(__file__).parent.parent
    rooms = (root / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n## `")[1:]
    named = {
        room.partition("`")[0] + path
        for room in rooms
        for path in re.findall(r"^\| `([^`]+\.py)` \|", room, re.MULTILINE)
    }
    files = {
        path.relative_to(root).as_posix()
        for folder in ("cli", "loaders")
        for path in (root / folder).rglob("*.py")
        if not path.name.startswith("__")
    }
    assert named == files
