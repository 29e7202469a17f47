"""The disk that a model on a hub takes, in the hub's cache and in the output: planned, reported, known too small."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ..headers import write_headers
from ..hub import File, LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama

FILE = "model.safetensors"
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QLORA = ("--use_qlora", "--lora_rank", "8")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | File]:
    """The files of a model of 3.5 GB, of which the headers alone are there."""
    directory = write_headers(tmp_path_factory.mktemp("large"), "LlamaConfig", LARGE)
    files: dict[str, Path | File] = {path.name: path for path in directory.iterdir()}
    return files | {FILE: File(directory / FILE, known_sha256="0" * 64)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    write_model(directory, "llama", vocab_size=4096, dtype="float32")
    write_llama(directory, vocab_size=128)
    return directory


@contextmanager
def disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of this size in memory, which takes none before it is filled."""
    directory.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "ftload-test", directory]
    mount = subprocess.run(words, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"can't mount a file system: {mount.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def run(hub: LoopbackHub, home: Path, *words: str | Path, offline: bool = False) -> tuple[int, dict[str, Any]]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    command = [sys.executable, "-m", "ftload.cli", *words, "--json"]
    env = {**hub.env(home, offline=offline), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], env=env, cwd=home.parent, capture_output=True, text=True, timeout=600
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def leave_room(place: Path, size: int) -> None:
    """Fill a disk but for so many bytes."""
    with (place / "filler").open("ab") as filler:
        filler.write(bytes(shutil.disk_usage(place).free - size))


def weights_in(home: Path) -> int:
    return sum(path.stat().st_size for path in home.rglob("blobs/*") if path.stat().st_size > 65536)


@pytest.mark.parametrize(
    ("cache", "output", "message", "hint"),
    [
        (
            "4g/home", "4g/out",
            "`{}/4g` has 4.3 GB free, the output takes 0.9 GB, what is fetched 3.5 GB in the hub's cache",
            "pass --source_cache none, which keeps nothing in the cache, or free some disk space",
        ),
        (
            "3g/home", "elsewhere/out",
            "`{}/3g/home/hub/models--org--model/blobs` has 3.2 GB free, "
            "the output takes 0.9 GB, what is fetched 3.5 GB in the hub's cache",
            "pass --source_cache none, which keeps nothing in the cache, or free some disk space",
        ),
        (
            "elsewhere/home", "800m/out",
            "`{}/800m` has 0.8 GB free, the output takes 0.9 GB, what is fetched 3.5 GB in the hub's cache",
            "free some disk space, or choose another --output_dir",
        ),
    ],
    ids=["one disk", "the cache's", "the output's"],
)  # fmt: skip
def test_too_little_room_for_both_is_known_before_anything_is_fetched(
    large: dict[str, Path | File], tmp_path: Path, cache: str, output: str, message: str, hint: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    size = next(name for name in (cache.split("/")[0], output.split("/")[0]) if name != "elsewhere")
    with disk(tmp_path / size, size), LoopbackHub() as hub:
        hub.add("org/model", large)
        words = ["prepare", "--model", "org/model", "--output_dir", tmp_path / output, *QLORA]
        code, answer = run(hub, tmp_path / cache, *words)
        # the header travels, from a request that ends with it
        assert hub.sent("*.safetensors") == 65536
        assert weights_in(tmp_path / cache) == 0
        assert not list((tmp_path / output).parent.glob("*.safetensors"))
    assert (code, answer["error"]["message"]) == (6, message.format(tmp_path))
    assert answer["error"]["hint"] == hint


def test_what_is_in_the_cache_takes_no_more_room(small: Path, tmp_path: Path) -> None:
    size = (small / FILE).stat().st_size
    with disk(tmp_path / "8m", "8m") as place, LoopbackHub() as hub:
        hub.add("org/model", small)
        prepare = ["prepare", "--model", "org/model", "--output_dir", place / "out"]
        assert run(hub, place / "home", *prepare)[0] == 0
        shutil.rmtree(place / "out")
        leave_room(place, size // 2 + 400_000)  # the output is half of the source
        assert run(hub, place / "home", *prepare)[0] == 0
        shutil.rmtree(place / "out")
        # another commit, with the same weights
        hub.add("org/model", {**{path.name: path for path in small.iterdir()}, "other": b"here"})
        assert run(hub, place / "home", *prepare)[0] == 0
        assert hub.sent("*.safetensors") == 2 * 65536 + size
        shutil.rmtree(place / "out")
        shutil.rmtree(place / "home")
        leave_room(place, size // 2 + 400_000)
        code, answer = run(hub, place / "home", *prepare)
        assert (code, answer["error"]["kind"]) == (6, "resource")
        assert answer["error"]["message"].endswith(", what is fetched 0.0 GB in the hub's cache")
