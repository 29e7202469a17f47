"""The disk that a model on a hub takes, in the hub's cache and in the output: planned, reported, known too small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.report.schema import schema
from jsonschema import Draft202012Validator

from ..headers import write_headers
from ..hub import File, LoopbackHub
from ..parity.models import write_model
from ..small_disk import small_disk
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


def run(hub: LoopbackHub, home: Path, *words: str | Path, offline: bool = False) -> tuple[int, dict[str, Any]]:
    """Its code and its JSON."""
    done = start(hub, home, *words, "--json", offline=offline)
    return done.returncode, json.loads(done.stdout)


def start(hub: LoopbackHub, home: Path, *words: str | Path, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    command = [sys.executable, "-m", "ftload.cli", *map(str, words)]
    env = {**hub.env(home, offline=offline), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=home.parent, capture_output=True, text=True, check=False, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done


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
    with small_disk(tmp_path / size, size), LoopbackHub() as hub:
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
    with small_disk(tmp_path / "8m", "8m") as place, LoopbackHub() as hub:
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
        # by ranges there is room
        code, report = run(hub, place / "home", *prepare, "--source_cache", "none")
        assert (code, report["source"]["cache"], weights_in(place / "home")) == (0, "none", 0)


def decided(document: dict[str, Any], what: str) -> list[tuple[str, str, str]]:
    return [(d["requested"], d["effective"], d["reason"]) for d in document["decisions"] if d["what"] == what]


def line(text: str, name: str) -> str | None:
    return next((line.removeprefix(name).strip() for line in text.splitlines() if line.startswith(f"{name} ")), None)


def test_the_plan_says_the_disk_both_ways(large: dict[str, Path | File], tmp_path: Path) -> None:
    home, page = tmp_path / "home", tmp_path / "page.html"
    size = large[FILE].size  # type: ignore[union-attr]
    with LoopbackHub() as hub:
        hub.add("org/model", large)
        plan = ["plan", "--model", "org/model", *QLORA, "--html", page]
        code, hubs = run(hub, home, *plan)
        assert code == 0, hubs
        needs = hubs["needs"]
        assert needs["disk_bytes"] == sum(file["bytes"] for file in hubs["files"])
        assert (needs["fetch_bytes"], needs["cached_bytes"], needs["read_bytes"]) == (size, 0, size)
        assert hubs["source"]["cache"] == "hub"
        assert "<dt>preparing: cache</dt><dd>3.49 GB</dd>" in page.read_text()
        shown = start(hub, home, *plan).stdout
        assert line(shown, "disk") == "925.54 MB for weights, beside the tokenizer"
        assert line(shown, "cache") == "3.49 GB more in the hub's cache; 0 with --source_cache none"
        shown = start(hub, home, *plan, "--source_cache", "none").stdout
        assert line(shown, "disk") == "925.54 MB for weights, beside the tokenizer"
        assert line(shown, "cache") == "0 B more in the hub's cache; 3.49 GB with --source_cache hub"
        assert "<dt>preparing: cache</dt><dd>0 B</dd>" in page.read_text()
        nones = run(hub, home, *plan, "--source_cache", "none")[1]
        # what is read ahead is held in memory
        assert nones["needs"] == {**needs, "memory_bytes": needs["memory_bytes"] + 256 * 1024**2}
        assert nones["source"]["cache"] == "none"


def test_what_is_read_ahead_is_within_the_budget_for_memory(small: Path, tmp_path: Path) -> None:
    """The hint names a budget that is enough, and a smaller one is not."""
    with LoopbackHub() as hub:
        hub.add("org/model", small)
        words = ["plan", "--model", "org/model", "--source_cache", "none", *QLORA, "--max_memory"]
        code, answer = run(hub, tmp_path / "home", *words, "8KB")
        assert code == 6
        message = r"tensor `(.+)` needs ([\d,]+) bytes at once and 2,000 for reading ahead, "
        told = re.fullmatch(message + "`--max_memory` allows 8,000", answer["error"]["message"])
        assert told is not None, answer
        need = int(told[2].replace(",", ""))
        enough = -(-(need * 4 // 3 + 1) // 10**6)
        assert answer["error"]["hint"] == f"pass --max_memory {enough}MB or more"
        assert run(hub, tmp_path / "home", *words, str(need * 4 // 3 + 1))[0] == 0
        assert run(hub, tmp_path / "home", *words, str(need * 4 // 3 - 4))[0] == 6


def test_the_plan_says_what_is_in_the_cache_already(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with LoopbackHub() as hub:
        write_model(tmp_path / "shards", "llama", vocab_size=4096, dtype="bfloat16", shards=True)
        write_llama(tmp_path / "shards", vocab_size=128)
        hub.add("org/model", tmp_path / "shards")
        sizes = {path.name: path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors")}
        code, report = run(hub, home, "prepare", "--model", "org/model", "--output_dir", tmp_path / "out")
        assert (code, report["source"]["cache"]) == (0, "hub")
        Draft202012Validator(schema()).validate(report)
        plan = ["plan", "--model", "org/model"]
        for offline in (False, True):
            whole = run(hub, home, *plan, offline=offline)[1]
            assert (whole["needs"]["fetch_bytes"], whole["needs"]["cached_bytes"]) == (0, sum(sizes.values()))
            assert line(start(hub, home, *plan, offline=offline).stdout, "cache") == (
                "0 B more in the hub's cache, which has 1.17 MB: all that is read"
            )
        (gone,) = (home / "hub").rglob("snapshots/*/model-00001-of-*.safetensors")
        gone.resolve().unlink()
        gone.unlink()
        needs = run(hub, home, *plan)[1]["needs"]
        assert needs["fetch_bytes"] == sizes[gone.name] == sum(sizes.values()) - needs["cached_bytes"]
        assert line(start(hub, home, *plan).stdout, "cache") == (
            "524.42 kB more in the hub's cache, which has 649.91 kB; 0 with --source_cache none"
        )
        # by ranges only what the cache lacks is read, and the summary says it
        words = ["prepare", "--model", "org/model", "--output_dir", tmp_path / "mixed", "--source_cache", "none"]
        shown = start(hub, home, *words).stdout
        assert line(shown, "by ranges") == "524.42 kB, files with the hub's sha256: 1"
        ranges = json.loads((tmp_path / "mixed" / "ftload_report.json").read_text())["ranges"]
        assert ranges == {"bytes": sizes[gone.name], "compared": [gone.name]}
        # offline, nothing can be read by ranges either
        words = ["prepare", "--model", "org/model", "--output_dir", tmp_path / "other", "--source_cache", "none"]
        code, answer = run(hub, home, *words, offline=True)
        assert code == 3
        assert answer["error"]["message"] == (
            f"`{gone.name}` is listed in `model.safetensors.index.json` but missing in the cache"
        )
        assert answer["error"]["hint"] == "go online and run it again"
        for path in (home / "hub").rglob("snapshots/*/model*"):
            path.unlink()
        code, answer = run(hub, home, *words, offline=True)
        assert (code, answer["error"]["message"]) == (3, "`org/model` holds no weights in the cache")


def test_nothing_is_said_of_a_cache_where_none_has_a_part(small: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with LoopbackHub() as hub:
        hub.add("org/model", small)
        for model, *flags in ([small], [small, "--source_cache", "none"], ["org/model", "--use_lora"]):
            plan = run(
                hub, home, "plan", "--model", model, "--base", "reference" if "--use_lora" in flags else "auto", *flags
            )[1]
            assert (plan["needs"]["fetch_bytes"], plan["needs"]["cached_bytes"]) == (0, 0)
            assert plan["source"]["cache"] is None
            assert not decided(plan, "source_cache")
        assert line(start(hub, home, "plan", "--model", small).stdout, "cache") is None


def test_a_base_that_is_referred_to_comes_into_the_cache_in_training(small: Path, tmp_path: Path) -> None:
    home, flags = tmp_path / "home", ["--use_lora", "--source_cache", "none", "--use_flash_attn", "false"]
    with LoopbackHub() as hub:
        hub.add("org/model", small)
        prepare = ["prepare", "--model", "org/model", "--base", "reference", "--output_dir", tmp_path / "out", *flags]
        code, report = run(hub, home, *prepare)
        reason = "the adapter refers to `org/model`, which comes into the cache when it is loaded"
        assert (code, decided(report, "source_cache")) == (0, [("none", "hub, in training", reason)])
        assert report["source"]["cache"] is None
        assert weights_in(home) == 0
        code, answer = run(hub, home, *prepare, "--strict")
        assert code == 5
        assert f"source_cache: none → hub, in training ({reason})" in answer["error"]["message"]
        assert "pass `--base copy`" in answer["error"]["hint"]


def test_what_is_not_on_this_disk_is_not_linked(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_model(tmp_path / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    with LoopbackHub() as hub:
        hub.add("org/model", tmp_path / "model")
        plan = ["plan", "--model", "org/model", "--base", "link"]
        none = run(hub, home, *plan, "--source_cache", "none")[1]
        reason = "with `--source_cache none` its files are not on this disk"
        assert decided(none, "base") == [("link", "copy", reason)]
        assert none["needs"]["disk_bytes"] == (tmp_path / "model" / FILE).stat().st_size
        hubs = run(hub, home, *plan)[1]
        assert (decided(hubs, "base"), hubs["needs"]["disk_bytes"]) == ([], 0)
        # fetched while it runs, and linked
        code, report = run(hub, home, "prepare", *plan[1:], "--output_dir", tmp_path / "out")
        (blob,) = (path for path in home.rglob("blobs/*") if path.stat().st_size > 65536)
        assert (code, decided(report, "base")) == (0, [])
        assert (tmp_path / "out" / FILE).samefile(blob)
        # there, it can be linked whatever the flag says
        none = run(hub, home, *plan, "--source_cache", "none")[1]
        assert (decided(none, "base"), none["needs"]["disk_bytes"], none["source"]["cache"]) == ([], 0, "none")


def test_how_the_source_is_read_has_no_part_in_the_output(small: Path, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    with LoopbackHub() as hub:
        hub.add("org/model", small)
        prepare = ["prepare", "--model", "org/model", "--output_dir", out, "--use_qlora", "--min_quantized", "0"]
        code, report = run(hub, home, *prepare)
        assert code == 0, report
        written = {path.name: path.stat().st_mtime_ns for path in out.rglob("*")}
        shutil.rmtree(home)
        sent = hub.sent("*.safetensors")
        # up to date: the report goes on to say how the output was made, as it does of all of ftload's own flags
        assert run(hub, home, *prepare, "--source_cache", "none") == (0, report)
        assert (report["source"]["cache"], report["arguments"]["source_cache"]["value"]) == ("hub", "hub")
        # and it is rewritten where a flag is recorded
        code, told = run(hub, home, *prepare, "--source_cache", "none", "--learning_rate", "0.5")
        assert told == {
            **report, "arguments": {**report["arguments"], "learning_rate": {"value": 0.5, "origin": "cli"}}
        }  # fmt: skip
        assert hub.sent("*.safetensors") == sent
        now = {path.name: path.stat().st_mtime_ns for path in out.rglob("*")}
        assert {name for name, time in written.items() if now[name] != time} <= {"ftload_report.json", "README.md"}
