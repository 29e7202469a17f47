"""Sources: what is found where, which bytes travel, and what is said when they can't.

Tests of hub sources run the code in a process of its own: huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import CheckpointError, FtloadError, ResourceError, SourceError, UsageError
from ftload.loaders.source.file_names import config_file_names, tokenizer_file_names
from ftload.loaders.source.resolve import resolve_source
from ftload.loaders.source.source import Source, SourceFile

from ..hub import LoopbackHub

SCRIPT = """
import json, sys, time
from ftload.loaders.errors import FtloadError
from ftload.loaders.source.resolve import resolve_source

waits = []
time.sleep = waits.append  # between attempts, ours and the library's: nobody is waited for
answers = []
for job in json.loads(sys.argv[1]):
    answer = {"progress": []}
    waits.clear()
    try:
        source = resolve_source(job["model"], job.get("revision"))
        answer |= {
            "kind": source.kind, "revision": source.revision, "commit": source.commit, "root": str(source.root),
            "files": {file.path: [file.bytes, file.sha256] for file in source.files},
            "from_cache": source.from_cache, "notes": source.notes,
        }
        answer["read"] = [source.read(*part).hex() for part in job.get("read", [])]
        source.fetch(job.get("fetch", []), answer["progress"].append)
        answer["present"] = sorted(path.name for path in source.root.glob("*"))
    except FtloadError as error:
        answer["error"] = {"code": error.code, "message": error.message, "hint": error.hint}
    answers.append({**answer, "waits": waits.copy()})
print(json.dumps(answers))
"""

HEADER = json.dumps({"w": {"dtype": "U8", "shape": [200_000], "data_offsets": [0, 200_000]}}).encode()
WEIGHTS = struct.pack("<Q", len(HEADER)) + HEADER + bytes(range(250)) * 800
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "README.md": b"# a model",
    "additional_chat_templates/tool.jinja": b"{{ messages }}",
    "original/consolidated.bin": b"x" * 1000,
}

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def run(hub: LoopbackHub, tmp_path: Path) -> Run:
    """Resolve, read and fetch as the jobs say, in one new process that prints nothing else."""

    def run(
        *jobs: dict[str, Any], token: str | None = None, offline: bool = False, **variables: str
    ) -> list[dict[str, Any]]:
        env = hub.env(tmp_path / "home", token=token, offline=offline) | variables
        command = [sys.executable, "-c", SCRIPT, json.dumps(jobs)]
        process = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert (process.returncode, process.stderr) == (0, "")
        for secret in (hub.token, hub.stranger_token, "secret"):
            assert secret not in process.stdout
        return json.loads(process.stdout)

    return run


# -- on disk


def test_directory(tmp_path: Path) -> None:
    for name, data in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "model" / "dangling.json").symlink_to("nowhere")
    source = resolve_source(str(tmp_path / "model"), "v1")
    assert (source.kind, source.revision, source.commit) == ("local", "v1", None)
    assert source.root == tmp_path / "model"
    assert {file.path: file.bytes for file in source.files} == {
        "README.md": 9,
        "additional_chat_templates/tool.jinja": 14,
        "config.json": 23,
        "model.safetensors": len(WEIGHTS),
        "tokenizer.json": 2,
    }
    assert source.read("model.safetensors", 8, 8 + len(HEADER)) == HEADER
    source.fetch(["config.json", "missing"])  # nothing to do
    with pytest.raises(CheckpointError, match=r"^`config.json` ends after 23 bytes, before byte 24$"):
        source.read("config.json", 20, 24)
    with pytest.raises(SourceError, match=r"gone.json` is missing$"):
        source.read("gone.json", 0, 1)


def test_directory_relative_to_here_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("org/name", None).root == tmp_path / "org" / "name"  # what is on disk wins
    assert resolve_source("~/org/../org/name", None).root == tmp_path / "org" / "name"


def test_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF1234")
    (tmp_path / "m.GGUF").symlink_to("blob")
    source = resolve_source(str(tmp_path / "m.GGUF"), None)
    assert (source.kind, source.root, source.gguf_file) == ("gguf", tmp_path, "m.GGUF")
    changed = (tmp_path / "m.GGUF").stat().st_mtime_ns
    assert source.files == (SourceFile(path="m.GGUF", bytes=8, sha256=None, mtime_ns=changed),)
    assert source.read("m.GGUF", 0, 4) == b"GGUF"


def test_other_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match=r"is a file, but not a \.gguf file$") as caught:
        resolve_source(str(tmp_path / "model.safetensors"), None)
    assert caught.value.hint == f"give the directory: `{tmp_path}`"


@pytest.mark.parametrize(
    "model",
    ["/no/where", "./here", "../up", "~/model", "a/b/c", "org/name/", "name/", "a\\b", "missing.gguf", "x.safetensors"],
)
def test_missing_path_is_never_sent_to_a_hub(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ftload.loaders.source.resolve.resolve_hub", lambda *_: pytest.fail("asked a hub"))
    with pytest.raises(SourceError) as caught:
        resolve_source(model, None)
    assert caught.value.message == f"`{model}` does not exist"


def test_names_that_can_be_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        resolve_source("", None)
    with pytest.raises(SourceError, match=r"^can't read `x+`: File name too long"):
        resolve_source("x" * 300, None)
    with pytest.raises(SourceError, match="can't read `~nobody-has-this-name`"):
        resolve_source("~nobody-has-this-name", None)
    with pytest.raises(SourceError) as caught:
        resolve_source("https://me:password@example.org/org/name", None)
    assert caught.value.message.startswith(
        "`https://***@example.org/org/name` is not the address of a model's page on "
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_directory(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(SourceError, match=r"^can't read `.*locked`: Permission denied"):
        resolve_source(str(tmp_path / "locked"), None)


def test_a_source_that_changes(tmp_path: Path) -> None:
    for name in ("a", "b", "unused"):
        (tmp_path / name).write_bytes(b"12345678")
    source = resolve_source(str(tmp_path), None)
    (tmp_path / "unused").unlink()
    source.check_unchanged(["a", "b"])
    before = (tmp_path / "a").stat()
    (tmp_path / "a").write_bytes(b"1234567")
    os.utime(tmp_path / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="/a` changed while it was read"):
        source.check_unchanged(["b", "a"])
    (tmp_path / "a").write_bytes(b"87654321")
    os.utime(tmp_path / "a", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="/a` changed while it was read"):
        source.check_unchanged(["a"])
    (tmp_path / "b").unlink()
    with pytest.raises(SourceError, match="/b`: No such file or directory"):
        source.check_unchanged(["b"])


def test_side_files() -> None:
    sizes = {
        "added_tokens.json": 1, "additional_chat_templates/rag.jinja": 1, "chat_template.jinja": 1, "config.json": 1,
        "generation_config.json": 1, "log_history.json": 30_000_000, "merges.txt": 1, "model.safetensors": 1,
        "model.safetensors.index.json": 1, "modeling_x.py": 1, "qwen.tiktoken": 1, "README.md": 1, "LICENSE.txt": 1,
        "spiece.model": 1, "tokenizer.json": 30_000_000, "vocab.txt": 1,
    }  # fmt: skip
    files = [SourceFile(path=path, bytes=size, sha256=None) for path, size in sizes.items()]
    assert config_file_names(files) == ("config.json", "generation_config.json")
    expected = (
        "added_tokens.json", "additional_chat_templates/rag.jinja", "chat_template.jinja", "config.json",
        "generation_config.json", "merges.txt", "qwen.tiktoken", "spiece.model", "tokenizer.json", "vocab.txt",
    )  # fmt: skip
    assert tokenizer_file_names(files) == expected
    assert set(tokenizer_file_names(files, trust_remote_code=True)) == {*expected, "modeling_x.py"}


# -- on a hub


def test_revisions_become_commits(hub: LoopbackHub, run: Run) -> None:
    first = hub.add("org/m", {"config.json": b"1"}, tags=("v1.0",))
    second = hub.add("org/m", {"config.json": b"22"})
    side = hub.add("org/m", {"config.json": b"333"}, branch="refs/pr/3")
    legacy = hub.add("gpt", {"config.json": b"4444"})
    job = {"model": "org/m", "fetch": ["config.json"]}
    answers = run(
        job,
        job | {"revision": "main"},
        job | {"revision": "v1.0"},
        job | {"revision": first},
        job | {"revision": first[:8]},
        job | {"revision": "refs/pr/3"},
        job | {"model": "gpt"},
    )
    assert [answer["commit"] for answer in answers] == [second, second, first, first, first, side, legacy]
    assert [answer["files"]["config.json"][0] for answer in answers] == [2, 2, 1, 1, 1, 3, 4]
    assert answers[2]["revision"] == "v1.0"
    assert {answer["kind"] for answer in answers} == {"hub"}
    resolved = {request.path.split("/resolve/")[1] for request in hub.requests if "/resolve/" in request.path}
    assert resolved == {f"{commit}/config.json" for commit in (first, second, side, legacy)}
    # by the same names, without the hub
    offline = run(
        job, job | {"revision": "v1.0"}, job | {"revision": first}, job | {"revision": "refs/pr/3"}, offline=True
    )
    assert [answer["commit"] for answer in offline] == [second, first, first, side]
    assert [answer["from_cache"] for answer in offline] == [True] * 4
    assert [answer["notes"] for answer in offline] == [[]] * 4


def test_only_what_is_asked_for_travels(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/m", FILES)
    read = [["model.safetensors", 0, 8], ["model.safetensors", 8, 8 + len(HEADER)], ["config.json", 5, 5]]
    job = {"model": "org/m", "read": read, "fetch": ["config.json", "tokenizer.json", "config.json"]}
    (answer,) = run(job, token=hub.token)
    assert answer["files"] == {
        "README.md": [9, None],
        "additional_chat_templates/tool.jinja": [14, None],
        "config.json": [23, None],
        "model.safetensors": [len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()],
        "tokenizer.json": [2, None],
    }
    assert [bytes.fromhex(part) for part in answer["read"]] == [WEIGHTS[:8], HEADER, b""]
    assert answer["present"] == ["config.json", "tokenizer.json"]
    assert answer["progress"] == [23, 2]
    assert hub.sent("*/model.safetensors") == 8 + len(HEADER)
    assert hub.sent("*README*") == hub.sent("*consolidated*") == hub.sent("*.jinja") == 0
    assert {request.authorized for request in hub.requests if request.server == "hub"} == {True}
    assert {request.authorized for request in hub.requests if request.server == "cdn"} == {False}


def test_fetched_files_are_read_from_the_cache(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/m", FILES)
    (first,) = run({"model": "org/m", "fetch": ["model.safetensors"]})
    assert Path(first["root"], "model.safetensors").read_bytes() == WEIGHTS
    assert sum(first["progress"]) == len(WEIGHTS)
    hub.forget()
    (again,) = run({"model": "org/m", "read": [["model.safetensors", 0, 8]], "fetch": ["model.safetensors"]})
    assert (again["read"], again["progress"]) == ([WEIGHTS[:8].hex()], [len(WEIGHTS)])
    assert [request.path for request in hub.requests] == ["/api/models/org/m"]


def test_file_shared_with_another_commit_travels_once(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/m", FILES, tags=("v1",))
    hub.add("org/m", FILES | {"config.json": b"{}"})
    jobs = [{"model": "org/m", "revision": name, "fetch": ["model.safetensors"]} for name in ("v1", "main")]
    answers = run(*jobs)
    assert [sum(answer["progress"]) for answer in answers] == [len(WEIGHTS)] * 2
    assert answers[0]["root"] != answers[1]["root"]
    assert hub.sent("*/model.safetensors") == len(WEIGHTS)


def test_server_without_ranges(hub: LoopbackHub, run: Run) -> None:
    data = os.urandom(20_000_000)
    hub.add("org/m", {"model.safetensors": data})
    hub.knows_ranges = False
    (answer,) = run({"model": "org/m", "read": [["model.safetensors", 100, 200]]})
    assert bytes.fromhex(answer["read"][0]) == data[100:200]
    assert hub.sent("*/model.safetensors") < len(data)  # hung up on


def test_gated(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/gated", FILES, access="gated")
    job = {"model": "org/gated", "read": [["model.safetensors", 0, 8]]}
    fetch = {"model": "org/gated", "fetch": ["config.json"]}
    anonymous, stranger, member = run(job, fetch), run(job, fetch, token=hub.stranger_token), run(job, token=hub.token)
    for answer in (*anonymous, *stranger):
        assert (answer["error"]["code"], answer["error"]["message"]) == (3, "`org/gated` is gated")
    assert {answer["error"]["hint"] for answer in anonymous} == {
        "accept the conditions on the model's page, then set `HF_TOKEN`"
    }
    assert {answer["error"]["hint"] for answer in stranger} == {
        "log in with the token's account and accept the conditions on the model's page"
    }
    assert member[0]["read"] == [WEIGHTS[:8].hex()]


def test_unknown_and_private(hub: LoopbackHub, run: Run) -> None:
    commit = hub.add("org/private", FILES, access="private")
    jobs = [{"model": "org/none"}, {"model": "org/private"}]
    message = "`{}` is neither a directory nor on the hub, or it is private"
    for token, hint in (
        (None, "check the spelling, and set `HF_TOKEN` if it is private"),
        (hub.stranger_token, "check the spelling, and that the token may read it"),
    ):
        for job, answer in zip(jobs, run(*jobs, token=token), strict=True):
            assert answer["error"] == {"code": 3, "message": message.format(job["model"]), "hint": hint}
    (answer,) = run({"model": "org/private"}, token=hub.token)
    assert answer["commit"] == commit
    (answer,) = run({"model": "org/private"}, token="hf_expiredToken")
    assert answer["error"]["message"].startswith("the hub answers `401 Unauthorized` for `org/private`")
    assert "`HF_TOKEN`" in answer["error"]["hint"]
    assert "expired" not in json.dumps(answer)


def test_unknown_revision_file_and_name(hub: LoopbackHub, run: Run) -> None:
    commit = hub.add("org/m", FILES)
    revision, file, gone, invalid = run(
        {"model": "org/m", "revision": "v9"},
        {"model": "org/m", "fetch": ["config.json", "pytorch_model.bin"]},
        {"model": "org/m", "read": [["pytorch_model.bin", 0, 8]]},
        {"model": "my model"},
    )
    assert revision["error"]["message"] == "`org/m` has no revision `v9`"
    assert file["error"]["message"] == f"`org/m` has no file `pytorch_model.bin` at commit {commit}"
    assert gone["error"]["message"] == f"`org/m` has no file `pytorch_model.bin` at `{commit}`"
    assert invalid["error"]["message"] == "`my model` does not exist, and can't be a repository's name"
    assert {answer["error"]["code"] for answer in (revision, file, gone, invalid)} == {3}


def test_offline(hub: LoopbackHub, run: Run) -> None:
    commit = hub.add("org/m", FILES)
    (nothing,) = run({"model": "org/m"}, offline=True)
    assert nothing["error"] == {
        "code": 3,
        "message": "`org/m`, revision `main`, is not in the cache, and the hub is switched off",
        "hint": "unset `HF_HUB_OFFLINE`, or set `HF_HOME` to the cache that holds it",
    }
    assert hub.requests == []
    run({"model": "org/m", "fetch": ["config.json"]})
    cached, file, part, revision = run(
        {"model": "org/m", "read": [["config.json", 0, 1]], "fetch": ["config.json"]},
        {"model": "org/m", "fetch": ["tokenizer.json"]},
        {"model": "org/m", "read": [["tokenizer.json", 0, 1]]},
        {"model": "org/m", "revision": "v2"},
        offline=True,
    )
    assert (cached["commit"], cached["from_cache"], list(cached["files"])) == (commit, True, ["config.json"])
    assert (cached["read"], cached["progress"]) == ([b"{".hex()], [23])
    assert file["error"]["message"] == "`org/m` has no file `tokenizer.json` in the cache"
    assert part["error"]["message"].startswith("`tokenizer.json` of `org/m` is not in the cache")
    assert revision["error"]["message"].startswith("`org/m`, revision `v2`, is not in the cache")


def test_hub_out_of_reach(hub: LoopbackHub, run: Run, tmp_path: Path) -> None:
    commit = hub.add("org/m", FILES)
    run({"model": "org/m", "fetch": ["config.json"]})
    hub.stop()
    cached, unknown = run({"model": "org/m", "fetch": ["config.json"]}, {"model": "org/other"})
    assert cached["waits"] == unknown["waits"] == []  # nobody is waited for who is not there
    assert (cached["commit"], cached["from_cache"], cached["progress"]) == (commit, True, [23])
    unreachable = f"can't reach the hub at `{hub.endpoint}`: [Errno {errno.ECONNREFUSED}] Connection refused"
    assert cached["notes"] == [f"{unreachable}: using commit {commit} of `org/m` from the cache"]
    assert (unknown["error"]["code"], unknown["error"]["message"]) == (3, unreachable)
    with_password = hub.endpoint.replace("://", "://me:secret@")  # run() looks for it
    (masked,) = run({"model": "org/other"}, HF_ENDPOINT=with_password)
    assert "`http://***@127.0.0.1:" in masked["error"]["message"]
    (no_url,) = run({"model": "org/other"}, HF_ENDPOINT="http://127.0.0.1:port")
    assert no_url["error"] == {
        "code": 2,
        "message": "`HF_ENDPOINT` is `http://127.0.0.1:port`, which is not an http(s) URL",
        "hint": None,
    }


def test_hub_in_trouble(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/m", FILES)
    hub.misbehave("/api/models/org/m", status=503, times=1)
    hub.misbehave("*/config.json", status=502, times=1)
    hub.misbehave("/api/models/org/down", status=500)
    hub.misbehave("/api/models/org/portal", body=b"<html>please log in</html>")
    hub.misbehave("*/README.md", methods=("HEAD",), status=504)
    works, down, portal, file = run(
        {"model": "org/m", "read": [["config.json", 0, 1]]},
        {"model": "org/down"},
        {"model": "org/portal"},
        {"model": "org/m", "fetch": ["README.md"]},
    )
    assert works["read"] == [b"{".hex()]
    assert down["error"]["code"] == portal["error"]["code"] == 3
    assert down["error"]["message"].startswith("the hub answers `500 Internal Server Error` for `org/down`")
    assert down["error"]["hint"] == "try again later"
    assert file["error"]["message"].startswith("the hub answers `504 Gateway Timeout` for `README.md` of `org/m`")
    assert portal["error"]["message"] == f"`{hub.endpoint}` does not answer like a hub"
    assert [request.status for request in hub.requests if request.path.endswith("org/down")] == [500] * 3


def test_slow_download(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/m", FILES)
    hub.misbehave("*/model.safetensors", bytes_per_second=400_000)
    (answer,) = run({"model": "org/m", "fetch": ["model.safetensors"]})
    assert sum(answer["progress"]) == len(WEIGHTS)
    assert hub.sent("*/model.safetensors") == len(WEIGHTS)  # in one go: slow is not broken


def test_download_broken_off_once_is_resumed(hub: LoopbackHub, run: Run) -> None:
    data = os.urandom(14_000_000)  # the library keeps what arrived in pieces of 10 MiB
    hub.add("org/m", {"model.safetensors": data})
    hub.misbehave("*/model.safetensors", break_after=12_000_000, times=1)
    (answer,) = run({"model": "org/m", "fetch": ["model.safetensors"]})
    assert Path(answer["root"], "model.safetensors").read_bytes() == data
    assert sum(answer["progress"]) == len(data)
    assert hub.sent("*/model.safetensors") == 12_000_000 + len(data) - 10 * 1024 * 1024


def test_header_broken_off_once_is_read_again(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/m", FILES)
    hub.misbehave("*/model.safetensors", break_after=3, times=1)
    (answer,) = run({"model": "org/m", "read": [["model.safetensors", 0, 8]]})
    assert answer["read"] == [WEIGHTS[:8].hex()]


def test_download_that_always_breaks_off(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/m", FILES)
    hub.misbehave("*/model.safetensors", break_after=1000)
    answers = run(
        {"model": "org/m", "fetch": ["config.json", "model.safetensors"]},
        {"model": "org/m", "read": [["model.safetensors", 0, 2000]]},
    )
    for answer in answers:
        assert answer["error"]["code"] == 3
        assert answer["error"]["message"].startswith("the download of `model.safetensors` failed: ")
        assert answer["error"]["hint"] == "run the same command again: files that are complete are kept"
    root = Path(answers[0]["root"])
    assert [path.name for path in root.iterdir()] == ["config.json"]
    sizes = {path.stat().st_size for path in (root.parents[1] / "blobs").iterdir() if path.suffix != ".incomplete"}
    assert sizes == {23}
    assert sum(answers[0]["progress"]) < 23 + len(WEIGHTS)


def test_file_that_is_not_as_listed(hub: LoopbackHub, run: Run) -> None:
    hub.add("org/m", {"config.json": b"{}", "vocab.json": b"{}"})
    hub.misbehave("*/vocab.json", methods=("GET",), body=b"<html>")
    answers = run({"model": "org/m", "fetch": ["vocab.json"]}, {"model": "org/m", "read": [["vocab.json", 0, 9]]})
    assert answers[0]["error"]["message"].startswith("the download of `vocab.json` failed: Consistency check failed")
    assert answers[1]["error"] == {
        "code": 4,
        "message": "`vocab.json` ends after 6 bytes, before byte 9",
        "hint": "the file is incomplete: get it again",
    }


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_cache_that_is_a_file(variable: str, hub: LoopbackHub, run: Run, tmp_path: Path) -> None:
    hub.add("org/m", FILES)
    (tmp_path / "file").touch()
    (answer,) = run({"model": "org/m", "fetch": ["config.json"]}, **{variable: str(tmp_path / "file")})
    assert answer["error"]["code"] == 3
    assert answer["error"]["message"].startswith(f"can't use `{tmp_path}/file")
    assert "`HF_HOME` moves it" in answer["error"]["hint"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError, "no space left on the disk to download `w`"),
        (RuntimeError("IO Error: No space left on device (os error 28)"), ResourceError, "no space left on the disk"),
        (RuntimeError("CAS error\nat line 1"), SourceError, "the download of `w` failed: CAS error"),
        (PermissionError(errno.EACCES, "Permission denied", "/c/blobs"), SourceError, "can't use `/c/blobs`: Perm"),
    ],
)
def test_disk_and_library_failures(
    error: Exception, kind: type[FtloadError], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    files = (SourceFile(path="w", bytes=3, sha256=None),)
    source = Source(model="o/m", kind="hub", revision=None, commit="0" * 40, root=tmp_path, files=files)
    with pytest.raises(kind) as caught:
        source.fetch(["w"])
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message
