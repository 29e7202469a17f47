"""`ftload prepare` from a hub that fails: the output is whole or absent, and what has arrived is not fetched again.

Whole is: as a run that nothing disturbed writes it, which is as from the same directory on this disk.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

import pytest

from ..conftest import ROWS
from ..hub import LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama
from .forks import GUARD_SECONDS, Forks, Run
from .kill_trials import finished_files, hash_all, is_whole

CACHES = ["hub", "none"]
"""What `--source_cache` may be."""
QLORA = ["--use_qlora", "--max_shard_size", "40KB"]
STRATEGIES = {
    "qlora": QLORA,
    "cast": ["--max_shard_size", "30KB"],
    "copied": [],
    "lora": ["--use_lora", "--base", "copy"],
    "grown": ["--use_lora", "--base", "copy", "--embedding_init", "reference"],
    "pissa": ["--use_lora", "--base", "copy", "--init_lora_weights", "pissa"],
}
MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Place:
    """A hub that has a model, and where runs work."""

    hub: LoopbackHub
    forks: Forks
    model: Path
    home: Path
    work: Path

    @property
    def out(self) -> Path:
        return self.work / "out"

    @property
    def weights(self) -> dict[str, int]:
        """Size by name of the model's files of weights."""
        return {path.name: path.stat().st_size for path in sorted(self.model.glob("*.safetensors"))}

    def begin(self, cache: str, *flags: str, model: str | Path = "org/model") -> Run:
        words = ["prepare", "--model", model, "--output_dir", self.out, "--lora_rank", "8", "--quiet"]
        return self.forks.run(*words, *(["--source_cache", cache] if cache != "hub" else []), *flags)

    def run(self, cache: str, *flags: str, model: str | Path = "org/model") -> tuple[int, str]:
        return self.begin(cache, *flags, model=model).end()

    def from_disk(self, *flags: str) -> dict[str, str]:
        """The hashes of what is written from the same files on this disk."""
        assert self.run("hub", *flags, model=self.model) == (0, "")
        hashes = hash_all(self.out)
        shutil.rmtree(self.out)
        return hashes

    def assert_whole(self, expected: dict[str, str]) -> None:
        assert is_whole(self.out)
        assert hash_all(self.out) == expected
        assert [path.name for path in self.work.iterdir()] == ["out"]

    def start_over(self) -> None:
        """An empty cache, no output, a hub that works."""
        self.hub.forget()
        for path in (self.work, self.home):
            shutil.rmtree(path, ignore_errors=True)
        self.work.mkdir()

    def times_sent_whole(self) -> dict[str, int]:
        """How often the content of each file of weights was sent to its end, from its beginning."""
        whole = [
            request.path.rpartition("/")[2]
            for request in self.hub.requests
            if request.server == "cdn" and request.range is None
            for size in [self.weights.get(request.path.rpartition("/")[2])]
            if request.sent == size
        ]
        return {name: whole.count(name) for name in self.weights}


def write_shards(directory: Path) -> None:
    """A tiny Llama in files of at most 40 kB."""
    from transformers import AutoModelForCausalLM

    write_model(directory, "llama", vocab_size=ROWS, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="bfloat16")
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")
    write_llama(directory)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A model of five files, small, and one of a single file of which huggingface_hub keeps parts."""
    directory = tmp_path_factory.mktemp("faults")
    model = directory / "model"
    write_shards(model)
    with LoopbackHub() as hub:
        hub.add("org/model", model)
        home = directory / "home"
        env = hub.env(home) | {"HF_HUB_DOWNLOAD_TIMEOUT": str(5 * GUARD_SECONDS)}  # what is held back stays away
        with Forks(model, env, directory) as forks:
            yield Place(hub=hub, forks=forks, model=model, home=home, work=directory / "work")


@pytest.fixture
def place(there: Place) -> Place:
    there.start_over()
    return there


@pytest.fixture(scope="module")
def whole(there: Place) -> dict[str, str]:
    """The hashes of QLoRA's output."""
    there.start_over()
    return there.from_disk(*QLORA)


def begin_and_hold(place: Place, cache: str) -> tuple[Run, threading.Event]:
    """A run that has finished a file, while most of the last file that it needs waits for an event.

    With a cache, all other files are in it.
    """
    index = json.loads((place.model / "model.safetensors.index.json").read_text())
    last = index["weight_map"]["model.layers.1.mlp.gate_proj.weight"]
    goes_on = threading.Event()
    place.hub.misbehave(f"*{last}", after=1, times=1, break_after=1000, hold=goes_on)
    run = place.begin(cache, *QLORA)
    place.hub.wait_until_sent(f"*{last}", sent_for_header(place, last) + 1000)
    give_up = time.monotonic() + GUARD_SECONDS
    while not finished_files(place.work) or (
        cache == "hub"
        and {path.name for path in place.home.rglob("snapshots/*/*.safetensors")} != place.weights.keys() - {last}
    ):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    return run, goes_on


def sent_for_header(place: Place, path: str) -> int:
    """How many bytes of a file a run has been sent before its weights are asked for."""
    (size,) = (size for name, size in place.weights.items() if fnmatch(name, path))
    return min(size, 65536)


def second(place: Place) -> tuple[str, bytes]:
    """The second file of weights and its content."""
    name = list(place.weights)[1]
    return name, (place.model / name).read_bytes()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_written_is_what_is_written_from_a_directory(place: Place, cache: str, strategy: str) -> None:
    flags = STRATEGIES[strategy]
    expected = place.from_disk(*flags)
    assert place.run(cache, *flags) == (0, "")
    place.assert_whole(expected)


@pytest.mark.parametrize("cache", CACHES)
def test_connections_cut_at_random_moments(place: Place, whole: dict[str, str], cache: str) -> None:
    """Forty runs: each request for weights breaks off somewhere, the first few, or half of them, or all."""
    chance = random.Random(19)
    ended = {0: 0, 3: 0}
    for trial in range(40):
        place.start_over()
        place.hub.misbehave(
            "*.safetensors",
            after=chance.randrange(6),
            times=chance.choice((1, 3, 8, None)),
            break_after=lambda count: chance.randrange(count + 1),
            reset=chance.random() < 0.5,
        )
        code, err = place.run(cache, *QLORA)
        ended[code] += 1
        if code:
            assert err.startswith("error: the download of `model-0000"), (trial, err)
            assert not place.out.exists()
            finished = finished_files(place.work)
            place.hub.forget()
            assert place.run(cache, *QLORA) == (0, ""), trial
            kept = {path for path, inode in finished.items() if (place.out / path).stat().st_ino == inode}
            assert kept == finished.keys(), trial
        place.assert_whole(whole)
        if cache == "hub":
            assert max(place.times_sent_whole().values()) <= 1, trial
    assert min(ended.values()) > 3


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("status", "retry_after"), [(429, 0), (429, None), (503, None), (500, None)])
@pytest.mark.parametrize("path", ["/org/model/resolve/*.safetensors", "/*/model-0000*.safetensors"])
def test_a_server_in_trouble_for_a_moment(
    place: Place, whole: dict[str, str], cache: str, status: int, retry_after: int | None, path: str
) -> None:
    for methods in (("GET",), ("HEAD",)):
        place.hub.misbehave(path, methods=methods, after=1, times=2, status=status, retry_after=retry_after)
    assert place.run(cache, *QLORA) == (0, "")
    assert [request.status for request in place.hub.requests].count(status) >= 2
    place.assert_whole(whole)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_in_trouble_for_long(place: Place, whole: dict[str, str], cache: str, status: int) -> None:
    place.hub.misbehave("*-00003-of-*", methods=("GET", "HEAD"), after=2, status=status)
    code, err = place.run(cache, *QLORA)
    reason = {429: "Too Many Requests", 503: "Service Unavailable"}[status]
    (file,) = (name for name in place.weights if "-00003-of-" in name)
    assert (code, err.splitlines()) == (
        3,
        [f"error: the hub answers `{status} {reason}` for `{file}` of `org/model`", "hint: try again later"],
    )
    assert not place.out.exists()
    place.hub.forget()
    assert place.run(cache, *QLORA) == (0, "")
    place.assert_whole(whole)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("broken", [True, False])
def test_a_redirect_that_expires(place: Place, whole: dict[str, str], cache: str, broken: bool) -> None:
    """Each signed address serves one request; what is left is asked for under a new one."""
    place.hub.uses_of_an_address = 1
    try:
        if broken:
            place.hub.misbehave("*.safetensors", after=6, times=2, break_after=10_000)
        assert place.run(cache, *QLORA) == (0, "")
        place.assert_whole(whole)
    finally:
        place.hub.uses_of_an_address = None


@pytest.mark.parametrize("cache", CACHES)
def test_all_addresses_expire_midway(place: Place, whole: dict[str, str], cache: str) -> None:
    goes_on = threading.Event()
    header = sent_for_header(place, "*-00002-of-*")
    place.hub.misbehave("*-00002-of-*", after=1, times=1, break_after=10_000, hold=goes_on)
    run = place.begin(cache, *QLORA)
    place.hub.wait_until_sent("*-00002-of-*", header + 10_000)
    place.hub.expire_addresses()
    place.hub.misbehave("*.safetensors", break_after=5000, times=1)
    goes_on.set()
    assert run.end() == (0, "")
    place.assert_whole(whole)


@pytest.mark.parametrize("cache", CACHES)
def test_the_hub_stops_midway(place: Place, whole: dict[str, str], cache: str) -> None:
    run, goes_on = begin_and_hold(place, cache)
    place.hub.stop()
    goes_on.set()
    code, err = run.end()
    place.hub.start_again()
    assert code == 3
    assert err.startswith(f"error: can't reach the hub at `{place.hub.endpoint}`: ")
    assert not place.out.exists()
    finished = finished_files(place.work)
    assert finished
    assert place.run(cache, *QLORA) == (0, "")
    assert {path for path, inode in finished.items() if (place.out / path).stat().st_ino == inode} == finished.keys()
    place.assert_whole(whole)
    if cache == "hub":
        assert place.times_sent_whole() == dict.fromkeys(place.weights, 1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_midway(place: Place, whole: dict[str, str], cache: str, name: str, code: int) -> None:
    """It ends at once, though a file is on its way; nothing of ftload's stays, and what came does not come again."""
    run, never = begin_and_hold(place, cache)
    os.kill(run.pid, getattr(signal, name))
    assert run.end() == (code, "error: interrupted\n")
    assert not never.is_set()
    assert list(place.work.iterdir()) == []
    assert place.run(cache, *QLORA) == (0, "")
    place.assert_whole(whole)
    if cache == "hub":
        assert place.times_sent_whole() == dict.fromkeys(place.weights, 1)
    never.set()


@pytest.mark.parametrize("cache", CACHES)
def test_a_signal_that_another_thread_takes(place: Place, cache: str) -> None:
    """The main thread, which waits for the others, is told: by itself it would sleep on."""
    run, never = begin_and_hold(place, cache)
    others = {int(thread.name) for thread in Path(f"/proc/{run.pid}/task").iterdir()} - {run.pid}
    assert any(ctypes.CDLL(None).tgkill(run.pid, thread, signal.SIGINT) == 0 for thread in sorted(others, reverse=True))
    assert run.end() == (130, "error: interrupted\n")
    assert not never.is_set()
    never.set()


# -- servers that answer otherwise than they should


def test_a_file_that_changes_under_its_commit(place: Place, whole: dict[str, str]) -> None:
    """From some moment on the server has other bytes, as many: what is read whole is compared with the hub's hash."""
    name, data = second(place)
    changed = data[:-100] + bytes(100)
    place.hub.misbehave(f"*{name}", after=1, instead=changed)
    assert place.run("none", *QLORA) == (
        4,
        f"error: `{name}` did not arrive as the hub lists it: its sha256 is {sha256(changed).hexdigest()}, "
        f"not {sha256(data).hexdigest()}\n"
        "hint: run it again; if it happens again, something between here and the hub changes files\n",
    )
    assert not place.out.exists()
    place.hub.forget()
    assert place.run("none", *QLORA) == (0, "")
    place.assert_whole(whole)


@pytest.mark.parametrize("cache", CACHES)
def test_a_file_that_is_shorter_than_it_is_listed(place: Place, whole: dict[str, str], cache: str) -> None:
    name, data = second(place)
    size = len(data)
    place.hub.misbehave(f"*{name}", after=1, instead=data[:-1])
    code, err = place.run(cache, *QLORA)
    ends = {
        "hub": (
            3,
            f"error: the download of `{name}` failed: "
            f"Consistency check failed: file should be of size {size} but has size {size - 1}\n"
            "hint: run the same command again: files that are complete are kept\n",
        ),
        "none": (
            4,
            f"error: `{name}` changed on the hub: "
            f"the server sends `bytes 0-{size - 2}/{size - 1}` of a file of {size} bytes\n"
            "hint: run it again\n",
        ),
    }
    assert (code, err) == ends[cache]
    assert not place.out.exists()
    place.hub.forget()
    assert place.run(cache, *QLORA) == (0, "")
    place.assert_whole(whole)


@pytest.mark.parametrize("cache", CACHES)
def test_a_total_that_is_not_the_listed_size(place: Place, whole: dict[str, str], cache: str) -> None:
    """It matters where ranges are asked for: for every block, and where a broken download goes on."""
    name, data = second(place)
    size = len(data)
    place.hub.misbehave(f"*{name}", after=1, total=size + 1)
    code, err = place.run(cache, *QLORA)
    if cache == "hub":
        assert (code, err) == (0, "")
        place.assert_whole(whole)
    else:
        assert (code, err) == (
            4,
            f"error: `{name}` changed on the hub: "
            f"the server sends `bytes 0-{size - 1}/{size + 1}` of a file of {size} bytes\n"
            "hint: run it again\n",
        )
        assert not place.out.exists()


# -- what has arrived of a large file


@pytest.fixture(scope="module")
def large(there: Place, tmp_path_factory: pytest.TempPathFactory) -> int:
    """`org/large` is a model of one file, of which huggingface_hub keeps parts: 10 MiB. Returns the file's size."""
    directory = tmp_path_factory.mktemp("large")
    write_model(directory, "llama_tied", vocab_size=200_000, dtype="bfloat16")
    write_llama(directory)
    there.hub.add("org/large", directory)
    return (directory / "model.safetensors").stat().st_size


@pytest.mark.parametrize("cache", CACHES)
def test_a_broken_transfer_goes_on_from_where_it_was(place: Place, large: int, cache: str) -> None:
    header = 65536
    assert place.run(cache, *QLORA, model="org/large") == (0, "")
    expected = hash_all(place.out)
    undisturbed = place.hub.sent("*.safetensors")
    assert undisturbed == header + large
    place.start_over()
    place.hub.misbehave("*.safetensors", after=1, times=1, break_after=15_000_000)
    assert place.run(cache, *QLORA, model="org/large") == (0, "")
    place.assert_whole(expected)
    again = place.hub.sent("*.safetensors") - undisturbed
    # of a download, the library keeps whole pieces of 10 MiB
    assert again == {"hub": 15_000_000 - 10 * MIB, "none": 0}[cache]


@pytest.mark.usefixtures("large")
def test_a_server_without_ranges(place: Place, whole: dict[str, str]) -> None:
    """Whole files need none, even where a transfer breaks; where a part is needed, that is said in one line."""
    refused = (
        "error: the server that has `{}` sends no ranges of it\n"
        "hint: leave out --source_cache none: the whole file is downloaded then\n"
    )
    name, _ = second(place)
    place.hub.knows_ranges = False
    try:
        assert place.run("none", *QLORA) == (0, "")  # small files are asked for whole
        place.assert_whole(whole)
        for cache, end in (("hub", (0, "")), ("none", (3, refused.format(name)))):
            place.start_over()
            place.hub.misbehave(f"*{name}", after=1, times=1, break_after=10_000)
            assert place.run(cache, *QLORA) == end
            if cache == "hub":
                place.assert_whole(whole)
        assert not place.out.exists()
        place.start_over()
        end = place.run("none", *QLORA, "--max_memory", "100MB", model="org/large")
    finally:
        place.hub.knows_ranges = True
    assert end == (3, refused.format("model.safetensors"))
    assert not place.out.exists()
