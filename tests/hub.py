"""A hub on the loopback interface, for huggingface_hub to talk to through `HF_ENDPOINT`.

It answers as the real one does as far as downloading goes: model info, file lists, and files by branch, tag
or commit, where large files are redirected to a second server (another origin, as a CDN is) that must never
see a token, by addresses that are signed and may expire. It keeps a record of every request, and misbehaves on demand.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model", ".h5", ".onnx")
SEND_BYTES = 1024 * 1024
MOST_SENT_BYTES = 4 * SEND_BYTES
TRICKLE_BYTES = 64 * 1024
ZEROS = bytes(MOST_SENT_BYTES)
"""For holes in files, from which the kernel reads no faster than from a disk."""
PIECE_SECONDS = 0.002
"""What a throttled line carries at a time."""
CATCH_UP_SECONDS = 0.02
"""A throttled line that fell behind, because the machine woke it late, may be faster for as much as this."""


@dataclass
class Request:
    """What was asked for and how it was answered."""

    method: str
    path: str
    """Without the query, percent-decoded."""
    range: str | None
    authorized: bool
    """Whether it carried a token."""
    server: Literal["hub", "cdn"]
    status: int = 0
    sent: int = 0
    """Bytes of the body that were sent."""


@dataclass
class File:
    """One file of a commit, in memory or on disk, which is not read before it is asked for."""

    content: bytes | Path
    known_size: int | None = None
    known_sha256: str | None = None
    """For files too large to be read for it."""

    @cached_property
    def size(self) -> int:
        if self.known_size is not None:
            return self.known_size
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return self.known_sha256 or self._digest("sha256")

    @cached_property
    def blob_id(self) -> str:
        """What git calls it; of one whose hash was given, git has a pointer alone."""
        if self.known_sha256:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
            return File(pointer.encode()).blob_id
        return self._digest("sha1", b"blob %d\0" % self.size)

    def read(self, begin: int, end: int | None) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[begin:end]
        with self.content.open("rb") as file:
            file.seek(begin)
            return file.read(-1 if end is None else end - begin)

    def _digest(self, algorithm: str, begin: bytes = b"") -> str:
        digest = hashlib.new(algorithm, begin)
        for position in range(0, self.size, 16 * SEND_BYTES):
            digest.update(self.read(position, position + 16 * SEND_BYTES))
        return digest.hexdigest()


@dataclass
class Repo:
    """A model repository: its commits, what names them, and who may read it."""

    access: Literal["public", "gated", "private"]
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag, or a commit's first seven or more digits."""
        named = self.branches.get(revision) or self.tags.get(revision)
        if named or len(revision) < 7:
            return named
        return next((commit for commit in self.commits if commit.startswith(revision)), None)


@dataclass(kw_only=True)
class Fault:
    """How requests that match go wrong, as `LoopbackHub.misbehave` says."""

    path: str
    methods: tuple[str, ...]
    after: int
    times: int | None
    status: int | None
    body: bytes | None
    retry_after: int | None
    break_after: int | Callable[[int], int] | None
    reset: bool
    hold: threading.Event | None
    bytes_per_second: float | None
    instead: File | None
    total: int | None

    @property
    def of_content(self) -> bool:
        return self.status is None and self.body is None


class LoopbackHub:
    """A context manager: `with LoopbackHub() as hub: hub.add("org/model", {...}); run(env=hub.env(home))`."""

    def __init__(self) -> None:
        self.token = "hf_loopbackTokenWithAccess"
        """May read everything."""
        self.stranger_token = "hf_loopbackTokenOfAStranger"
        """Valid, but may read only what is public."""
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        """Old names of repositories, and the new ones."""
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.knows_ranges = True
        self.bytes_per_second: float | None = None
        """Of all files together, as of one line; None for as fast as it goes."""
        self._line_is_free = 0.0
        self.uses_of_an_address: int | None = None
        """How often the CDN serves a signed address before that has expired; None for as often as one likes."""
        self._signatures = 0
        self._expired_until = 0
        self._uses: Counter[int] = Counter()
        self.lock = threading.Lock()
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self._ports = [server.server_port for server in self._servers]
        self.endpoint, self.cdn = [f"http://127.0.0.1:{port}" for port in self._ports]

    def __enter__(self) -> LoopbackHub:
        self._serve()
        return self

    def _serve(self) -> None:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Switch it off: connections end, and from now on are refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.hang_up()
        self._servers = []

    def start_again(self) -> None:
        """Switch it on after `stop`, where it was before."""
        names: tuple[Literal["hub"], Literal["cdn"]] = ("hub", "cdn")
        self._servers = [_Server(self, name, port) for name, port in zip(names, self._ports, strict=True)]
        self._serve()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path | File] | Path,
        *,
        branch: str = "main",
        tags: tuple[str, ...] = (),
        access: Literal["public", "gated", "private"] = "public",
    ) -> str:
        """Commit files (all of them, or a directory) to a branch; returns the commit."""
        if isinstance(files, Path):
            found = sorted(path for path in files.rglob("*") if path.is_file())
            content = {path.relative_to(files).as_posix(): File(path) for path in found}
        else:
            content = {name: data if isinstance(data, File) else File(data) for name, data in files.items()}
        repo = self.repos.setdefault(repo_id, Repo(access=access))
        state = json.dumps([repo_id, len(repo.commits), sorted((n, f.sha256) for n, f in content.items())])
        commit = hashlib.sha1(state.encode()).hexdigest()
        repo.commits[commit] = content
        repo.branches[branch] = commit
        repo.tags.update(dict.fromkeys(tags, commit))
        return commit

    def misbehave(
        self,
        path: str,
        *,
        methods: tuple[str, ...] = ("GET",),
        after: int = 0,
        times: int | None = None,
        status: int | None = None,
        body: bytes | None = None,
        retry_after: int | None = None,
        break_after: int | Callable[[int], int] | None = None,
        reset: bool = False,
        hold: threading.Event | None = None,
        bytes_per_second: float | None = None,
        instead: bytes | Path | None = None,
        total: int | None = None,
    ) -> None:
        """Make requests whose path matches the pattern go wrong: all of them but the first `after`, `times` times.

        They are answered with `status` (and `retry_after` seconds in its header), or with `body`. Or, where a file's
        content is sent: the connection ends after `break_after` bytes, or what this says of the bytes asked for, in
        good order or with a `reset`; there, or else before the first byte, it waits until `hold` is set, and then goes
        on; bytes trickle; other content is sent `instead`, with its own ETag; or Content-Range tells another `total`.

        The content of a large file comes from the CDN, at `/<sha256>/<path>`: `*/model.safetensors` matches on both
        servers.
        """
        self.faults.append(
            Fault(
                path=path,
                methods=methods,
                after=after,
                times=times,
                status=status,
                body=body,
                retry_after=retry_after,
                break_after=break_after,
                reset=reset,
                hold=hold,
                bytes_per_second=bytes_per_second,
                instead=None if instead is None else File(instead),
                total=total,
            )
        )

    def expire_addresses(self) -> None:
        """Signed addresses that were given out so far are refused from now on."""
        with self.lock:
            self._expired_until = self._signatures

    def sign(self) -> str:
        """The signature of a new address."""
        with self.lock:
            self._signatures += 1
            return f"secret-{self._signatures}"

    def is_valid(self, signature: str) -> bool:
        """Whether an address with this signature is served once more."""
        match = re.fullmatch(r"secret-(\d+)", signature)
        if not match:
            return False
        number = int(match[1])
        with self.lock:
            self._uses[number] += 1
            allowed = self.uses_of_an_address
            return number > self._expired_until and (allowed is None or self._uses[number] <= allowed)

    def forget(self) -> None:
        """Drop the record of requests and the faults."""
        self.requests.clear()
        self.faults.clear()

    def sent(self, path: str = "*") -> int:
        """Bytes of bodies sent so far for paths that match the pattern."""
        return sum(request.sent for request in list(self.requests) if fnmatch(request.path, path))

    def wait_until_sent(self, path: str, count: int) -> None:
        """Until so many bytes have been sent for paths that match the pattern."""
        give_up = time.monotonic() + 120
        while self.sent(path) < count:
            assert time.monotonic() < give_up, self.requests
            time.sleep(0.01)

    def env(self, home: Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """The whole environment of a process that knows this hub only, with its cache in `home`."""
        unwanted = re.compile(r"(HF_|HUGGING|TRANSFORMERS_|.*_PROXY$)", re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not unwanted.match(name)}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # this hub speaks plain HTTP
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        if token:
            env["HF_TOKEN"] = token
        if offline:
            env["HF_HUB_OFFLINE"] = "1"
        return env

    def wait_for_line(self, count: int) -> None:
        """Let so many bytes take their time."""
        if self.bytes_per_second is None:
            return
        with self.lock:
            begin = max(self._line_is_free, time.monotonic() - CATCH_UP_SECONDS)
            end = self._line_is_free = begin + count / self.bytes_per_second
        time.sleep(max(0.0, end - time.monotonic()))

    @property
    def piece_bytes(self) -> int:
        """How many bytes are sent at a time."""
        if self.bytes_per_second is None:
            return SEND_BYTES
        return max(4096, min(MOST_SENT_BYTES, int(self.bytes_per_second * PIECE_SECONDS)))

    def fault_for(self, method: str, path: str, *, content: bool) -> Fault | None:
        """The first fault of the request as a whole, or of the content that answers it; counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.of_content is not content or method not in fault.methods or fault.times == 0:
                    continue
                if fnmatch(path, fault.path):
                    if fault.after:
                        fault.after -= 1
                        continue
                    if fault.times:
                        fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, name: Literal["hub", "cdn"], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self.name: Literal["hub", "cdn"] = name
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that has been served."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End all connections that there are."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of a test's business."""


class _Refusal(Exception):
    """An error answer, with the headers by which huggingface_hub tells the kinds apart."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    headers: Message

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        """Requests are recorded, not printed."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, hub = unquote(url.path), self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.record = Request(
            method=self.command,
            path=path,
            range=self.headers.get("Range"),
            authorized="Authorization" in self.headers,
            server=self.server.name,
        )
        with hub.lock:
            hub.requests.append(self.record)
        self.fault: Fault | None = None
        fault = hub.fault_for(self.command, path, content=False)
        try:
            if fault:
                headers = {"Content-Type": "text/html"}
                if fault.retry_after is not None:
                    headers["Retry-After"] = str(fault.retry_after)
                self.send(fault.status or 200, fault.body or b"told to fail", headers)
            elif self.server.name == "cdn":
                self.send_cdn(path)
            elif moved := next((old for old in hub.moved if f"/{old}/" in f"{url.path}/"), None):
                self.send(307, b"", {"Location": self.path.replace(moved, hub.moved[moved], 1)})
            elif url.path.startswith("/api/"):
                self.send_api(url.path.removeprefix("/api/"))
            else:
                self.send_file(url.path.removeprefix("/"))
        except _Refusal as refusal:
            self.send(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers)

    def send_api(self, path: str) -> None:
        """`models/<id>[/revision|tree|paths-info/<revision>[/<folder>]]` and `models/<id>/refs`."""
        pattern = r"models/(?P<id>[^/]+(?:/[^/]+)?)(?:/(?P<verb>revision|tree|paths-info|refs)(?:/(?P<rest>.+))?)?"
        match = re.fullmatch(pattern, path)
        if not match:
            raise _Refusal(404, None, "no such page")
        repo_id, verb = match["id"], match["verb"] or "revision"
        repo = self.find_repo(repo_id)
        if verb == "refs":
            self.send_json({kind: self.refs(getattr(repo, kind)) for kind in ("branches", "tags")} | {"converts": []})
            return
        revision, _, folder = (match["rest"] or "main").partition("/")
        commit, files = self.find_commit(repo, unquote(revision))
        if verb == "tree":
            self.send_json(list(self.tree(files, unquote(folder))))
        elif verb == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths", [])
            self.send_json([entry for name, file in files.items() if name in wanted for entry in [_entry(name, file)]])
        else:
            with_blobs = parse_qs(urlsplit(self.path).query).get("blobs") in (["True"], ["true"])
            siblings = [_sibling(name, file, with_blobs=with_blobs) for name, file in files.items()]
            gated = "manual" if repo.access == "gated" else False
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
            card = _metadata(files.get("README.md"))
            self.send_json(info | card | {"gated": gated, "private": repo.access == "private"})

    def send_file(self, path: str) -> None:
        """`<id>/resolve/<revision>/<path>`: the file itself, or where the CDN has it."""
        match = re.fullmatch(r"(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", path)
        if not match:
            raise _Refusal(404, None, "no such page")
        repo = self.find_repo(match["id"])
        if repo.access == "gated" and self.token() != self.server.hub.token:
            status = 403 if self.token() else 401
            raise _Refusal(status, "GatedRepo", f"Access to model {match['id']} is restricted")
        commit, files = self.find_commit(repo, unquote(match["revision"]))
        name = unquote(match["name"])
        if name not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        file = files[name]
        if not name.endswith(LFS_SUFFIXES):
            self.send_content(file, {"X-Repo-Commit": commit, "ETag": f'"{file.blob_id}"'})
            return
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(file.size),
            "X-Linked-Etag": f'"{file.sha256}"',
            "Location": f"{self.server.hub.cdn}/{file.sha256}/{match['name']}?Signature={self.server.hub.sign()}",
        }
        self.send(302, b"", headers)

    def send_cdn(self, path: str) -> None:
        (signature,) = parse_qs(urlsplit(self.path).query).get("Signature", [""])
        if not self.server.hub.is_valid(signature):
            self.send(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", {})
            return
        sha256 = path.split("/")[1]
        repos = self.server.hub.repos.values()
        for file in (file for repo in repos for files in repo.commits.values() for file in files.values()):
            if file.sha256 == sha256:
                self.send_content(file, {"ETag": f'"{sha256}"'})
                return
        raise _Refusal(404, None, "no such object")

    def token(self) -> str | None:
        """The token sent, if any; one that nobody gave out is refused as the hub does."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub = self.server.hub
        if token and token not in (hub.token, hub.stranger_token):
            raise _Refusal(401, None, "Invalid credentials in Authorization header")
        return token or None

    def find_repo(self, repo_id: str) -> Repo:
        repo, token = self.server.hub.repos.get(repo_id), self.token()
        if repo is None or (repo.access == "private" and token != self.server.hub.token):
            if token:
                raise _Refusal(404, "RepoNotFound", "Repository not found")
            raise _Refusal(401, "RepoNotFound", "Invalid username or password.")
        return repo

    def find_commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        commit = repo.resolve(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def refs(self, named: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in named.items()]

    def tree(self, files: dict[str, File], folder: str) -> Iterator[dict[str, Any]]:
        prefix = folder + "/" if folder else ""
        recursive = parse_qs(urlsplit(self.path).query).get("recursive") in (["True"], ["true"])
        inside = {name: file for name, file in files.items() if name.startswith(prefix)}
        if folder and not inside:
            raise _Refusal(404, "EntryNotFound", f"{folder} does not exist")
        folders = set()
        for name, file in inside.items():
            below, _, rest = name.removeprefix(prefix).partition("/")
            if not rest or recursive:
                yield _entry(name, file)
            elif below not in folders:
                folders.add(below)
                yield {"type": "directory", "path": prefix + below, "oid": "0" * 40, "size": 0}

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_content(self, file: File, headers: dict[str, str]) -> None:
        self.fault = self.server.hub.fault_for(self.command, self.record.path, content=True)
        if self.fault and self.fault.instead:
            file = self.fault.instead
            headers |= {"ETag": f'"{file.sha256}"'}
        total = self.fault.total if self.fault and self.fault.total is not None else file.size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not match or not self.server.hub.knows_ranges:
            self.send(200, file, headers | {"Accept-Ranges": "bytes"}, end=file.size)
            return
        begin, end = int(match[1]), min(int(match[2] or file.size - 1) + 1, file.size)
        if begin >= end:
            raise _Refusal(416, None, "Range not satisfiable", **{"Content-Range": f"bytes */{file.size}"})
        headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{total}"}
        self.send(206, file, headers, begin=begin, end=end)

    def send(
        self,
        status: int,
        body: bytes | File,
        headers: Mapping[str, str],
        *,
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        """The answer, `begin` to `end` of the body, as well or as badly as the fault allows."""
        file = File(body) if isinstance(body, bytes) else body
        end = file.size if end is None else end
        self.record.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(end - begin), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault, stop = self.fault, end
        if fault and fault.break_after is not None:
            after = fault.break_after if isinstance(fault.break_after, int) else fault.break_after(end - begin)
            stop = min(end, begin + after)
        elif fault and fault.hold:
            stop = begin
        self.send_bytes(file, begin, stop)
        if fault and fault.hold:
            fault.hold.wait()
            self.send_bytes(file, stop, end)
        elif stop < end:
            self.close_connection = True
            if fault and fault.reset:  # closed with nothing to linger for
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def send_bytes(self, file: File, begin: int, end: int) -> None:
        """The bytes `begin` to `end`, no faster than the line and the fault allow."""
        trickle = self.fault.bytes_per_second if self.fault else None
        opened = nullcontext() if isinstance(file.content, bytes) else file.content.open("rb")
        with opened as on_disk:
            while begin < end:
                count = min(TRICKLE_BYTES if trickle else self.server.hub.piece_bytes, end - begin)
                self.server.hub.wait_for_line(count)
                if on_disk is None:
                    self.wfile.write(file.read(begin, begin + count))
                elif _is_hole(on_disk.fileno(), begin, begin + count):
                    self.wfile.write(memoryview(ZEROS)[:count])
                else:
                    count = os.sendfile(self.connection.fileno(), on_disk.fileno(), begin, count)
                    if not count:
                        raise OSError(f"{file.content} has become shorter")
                begin += count
                self.record.sent += count
                if trickle:
                    time.sleep(count / trickle)


def _is_hole(file: int, begin: int, end: int) -> bool:
    """Whether a file holds nothing but a hole between two of its positions."""
    try:
        return os.lseek(file, begin, os.SEEK_DATA) >= end
    except OSError as error:
        return error.errno == errno.ENXIO  # nothing but a hole to its end


def _metadata(card: File | None) -> dict[str, Any]:
    """What model info tells of a model card: its front matter."""
    parts = card.read(0, None).decode().split("---\n", 2) if card else []
    return {"cardData": yaml.safe_load(parts[1])} if len(parts) == 3 and not parts[0] else {}


def _sibling(name: str, file: File, *, with_blobs: bool) -> dict[str, Any]:
    """A file as model info lists it."""
    if not with_blobs:
        return {"rfilename": name}
    sibling: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": file.blob_id}
    if name.endswith(LFS_SUFFIXES):
        sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return sibling


def _entry(name: str, file: File) -> dict[str, Any]:
    """A file as the tree lists it."""
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": file.blob_id, "size": file.size}
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry
