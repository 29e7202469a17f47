"""Ranges of a file on a hub: which bytes travel, by which address, and what is said when they can't.

As in test_source.py, the code runs in a process of its own, where nobody is waited for.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ..hub import LoopbackHub

SCRIPT = """
import dataclasses, hashlib, json, sys, time
from ftload.loaders.errors import FtloadError
from ftload.loaders.source import remote_file
from ftload.loaders.source.resolve import resolve_source

job = json.loads(sys.argv[1])
waits, direct = [], []
time.sleep = waits.append

def body(answer, count, body=remote_file._body):
    connection = answer.extensions.pop("network_stream")
    class Counted:
        def read(self, *arguments, **options):
            data = connection.read(*arguments, **options)
            direct.append(len(data))
            return data
    if job["direct"]:
        answer.extensions["network_stream"] = Counted()
    return body(answer, count)

remote_file._body = body
source = resolve_source("org/m", None)
file = next(file for file in source.files if file.path == job["name"])
file = dataclasses.replace(file, **job["listed"])
remote = remote_file.RemoteFile("org/m", source.commit, file)
answer = {"read": []}
try:
    for begin, end in job["ranges"]:
        data, received = bytearray(end - begin), []
        remote.fill(memoryview(data), begin, received.append)
        assert sum(received) == end - begin, received
        answer["read"].append(hashlib.sha256(data).hexdigest())
except FtloadError as error:
    answer["error"] = {"code": error.code, "message": error.message, "hint": error.hint}
print(json.dumps({**answer, "waits": waits, "direct": sum(direct)}))
"""

NAME = "model.safetensors"
WEIGHTS = random.Random(1).randbytes(700_000)
RANGES = [(0, 300_000), (300_000, 300_001), (650_000, 700_000), (123_456, 654_321)]

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add("org/m", {NAME: WEIGHTS, "vocab.json": WEIGHTS[:9999]})
        yield hub


@pytest.fixture
def run(hub: LoopbackHub, tmp_path: Path) -> Run:
    def run(
        ranges: list[tuple[int, int]],
        *,
        name: str = NAME,
        direct: bool = True,
        listed: dict[str, Any] | None = None,
        token: str | None = None,
    ) -> dict[str, Any]:
        """Read ranges of a file, one after another; what was read is checked, if it ended well."""
        job = {"name": name, "ranges": ranges, "direct": direct, "listed": listed or {}}
        command = [sys.executable, "-c", SCRIPT, json.dumps(job)]
        env = hub.env(tmp_path / "home", token=token)
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        for secret in (hub.token, "secret"):
            assert secret not in done.stdout
        answer = json.loads(done.stdout)
        if "error" in answer:
            assert "\n" not in answer["error"]["message"]
        else:
            assert answer["read"] == [hashlib.sha256(WEIGHTS[begin:end]).hexdigest() for begin, end in ranges]
        return answer

    return run


def asked(hub: LoopbackHub, server: str, name: str = NAME) -> list[str | None]:
    """The ranges that were asked for of a file."""
    return [request.range for request in hub.requests if request.server == server and request.path.endswith(name)]


def sent(hub: LoopbackHub) -> int:
    return sum(request.sent for request in hub.requests if request.server == "cdn" and request.status < 400)


def of(*ranges: tuple[int, int]) -> list[str]:
    return [f"bytes={begin}-{end - 1}" for begin, end in ranges]


# -- addresses


def test_a_signed_address_is_used_again_and_sees_no_token(hub: LoopbackHub, run: Run) -> None:
    hub.repos["org/m"].access = "private"
    run(RANGES, token=hub.token)
    assert asked(hub, "hub") == of(RANGES[0])
    assert asked(hub, "cdn") == of(*RANGES)
    assert sent(hub) == sum(end - begin for begin, end in RANGES)
    assert {request.authorized for request in hub.requests if request.server == "hub"} == {True}
    assert {request.authorized for request in hub.requests if request.server == "cdn"} == {False}


def test_an_address_that_has_expired_is_renewed(hub: LoopbackHub, run: Run) -> None:
    hub.uses_of_an_address = 3
    answer = run([*RANGES, *RANGES], token=hub.token)
    assert answer["waits"] == []
    assert asked(hub, "hub") == of(RANGES[0], RANGES[3], RANGES[2])
    # those where one was renewed were refused first
    assert asked(hub, "cdn") == of(*RANGES[:3], RANGES[3], RANGES[3], *RANGES[:2], RANGES[2], RANGES[2], RANGES[3])
    assert {request.authorized for request in hub.requests if request.server == "cdn"} == {False}


def test_an_address_that_never_works_is_an_error(hub: LoopbackHub, run: Run) -> None:
    hub.uses_of_an_address = 0
    answer = run(RANGES)
    assert answer["error"]["code"] == 3
    assert answer["error"]["message"].startswith(f"the hub answers `403 Forbidden` for `{NAME}` of `org/m`")
    assert answer["waits"] == [1, 2]
    assert (len(asked(hub, "hub")), len(asked(hub, "cdn"))) == (3, 3)  # each time by a new one


def test_a_small_file_has_no_other_address(hub: LoopbackHub, run: Run) -> None:
    hub.repos["org/m"].access = "private"
    run([(0, 500), (500, 9999)], name="vocab.json", token=hub.token)
    assert asked(hub, "hub", "vocab.json") == of((0, 500), (500, 9999))
    assert asked(hub, "cdn", "vocab.json") == []


# -- bodies


@pytest.mark.parametrize("direct", [True, False], ids=["from the connection", "from the response"])
def test_a_cut_connection_goes_on_where_it_was(hub: LoopbackHub, run: Run, direct: bool) -> None:
    hub.misbehave(f"*/{NAME}", break_after=lambda count: count // 3, times=4)
    answer = run([(1000, 701_000 - 1000), (0, 10)], direct=direct)
    assert answer["waits"] == []
    begins = [1000]
    for _ in range(4):
        begins.append(begins[-1] + (700_000 - begins[-1]) // 3)
    assert asked(hub, "cdn") == of(*((begin, 700_000) for begin in begins), (0, 10))
    assert sent(hub) == 699_000 + 10  # nothing twice
    assert (answer["direct"] > 300_000) is direct


@pytest.mark.parametrize("direct", [True, False], ids=["from the connection", "from the response"])
def test_a_connection_that_is_reset_goes_on(hub: LoopbackHub, run: Run, direct: bool) -> None:
    hub.misbehave(f"*/{NAME}", break_after=200_000, times=3, reset=True)
    run([(0, 700_000)], direct=direct)


@pytest.mark.parametrize("direct", [True, False], ids=["from the connection", "from the response"])
def test_one_that_never_gets_on_is_an_error(hub: LoopbackHub, run: Run, direct: bool) -> None:
    hub.misbehave(f"*/{NAME}", after=1, break_after=0)
    answer = run([(0, 1000), (1000, 2000)], direct=direct)
    assert len(answer["read"]) == 1
    assert answer["error"]["code"] == 3
    assert answer["error"]["message"].startswith(f"the download of `{NAME}` failed: ")
    assert answer["waits"] == [1, 2]
    assert asked(hub, "cdn") == of((0, 1000), *[(1000, 2000)] * 3)


class Odd(BaseHTTPRequestHandler):
    """Answers for a range in its own way, as servers may."""

    how: ClassVar[str]

    def do_GET(self) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match
        begin, end = int(match[1]), int(match[2]) + 1
        data = WEIGHTS[begin:end]
        self.send_response(200 if "whole" in self.how else 206)
        self.send_header("ETag", '"the same"')
        if "whole" not in self.how:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(WEIGHTS)}")
        if "more" in self.how:
            data += bytes(70_000)
        if "length" in self.how:
            self.send_header("Content-Length", str(len(data)))
        if "chunked" in self.how:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for at in range(0, len(data), 65_536):
            piece = data[at : at + 65_536]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if "chunked" in self.how else piece)
        self.wfile.write(b"0\r\n\r\n" if "chunked" in self.how else b"")
        self.close_connection = "1.0" in self.how or "closed" in self.how

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def other_cdn(hub: LoopbackHub, how: str) -> Iterator[None]:
    """Redirect to a server that answers in its own way."""
    protocol = "HTTP/1.0" if "1.0" in how else "HTTP/1.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Other", (Odd,), {"how": how, "protocol_version": protocol}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hub.cdn = f"http://127.0.0.1:{server.server_port}"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("direct", [True, False], ids=["from the connection", "from the response"])
@pytest.mark.parametrize("how", ["length", "chunked", "closed", "1.0", "1.0 length", "more length", "more chunked"])
def test_answers_that_servers_may_give(hub: LoopbackHub, run: Run, how: str, direct: bool) -> None:
    with other_cdn(hub, how):
        answer = run([(0, 500_000), (500_000, 700_000), (1, 2)], direct=direct)
    assert (answer["waits"], len(answer["read"])) == ([], 3)
    assert (answer["direct"] > 0) is (direct and how in ("length", "closed", "more length"))


@pytest.mark.parametrize("how", ["whole length", "whole chunked"])
def test_the_whole_file_may_come_without_a_range(hub: LoopbackHub, run: Run, how: str) -> None:
    with other_cdn(hub, how):
        assert len(run([(0, 700_000)])["read"]) == 1


# -- what is refused


def test_a_server_without_ranges_is_refused(hub: LoopbackHub, run: Run) -> None:
    hub.knows_ranges = False
    answer = run([(0, 700_000), (0, 699_999)])
    assert len(answer["read"]) == 1  # all of it is one range
    assert answer["error"] == {
        "code": 3,
        "message": f"the server that has `{NAME}` sends no ranges of it",
        "hint": "leave out --source_cache none: the whole file is downloaded then",
    }


def test_a_login_page_is_no_hub(hub: LoopbackHub, run: Run) -> None:
    hub.misbehave(f"/org/m/resolve/*/{NAME}", body=b"<html>")
    answer = run([(0, 6)])
    assert answer["error"]["code"] == 3
    assert answer["error"]["message"] == f"`{hub.endpoint}` does not answer like a hub"


def changed(how: str) -> dict[str, Any]:
    return {"code": 4, "message": f"`{NAME}` changed on the hub: {how}", "hint": "run it again"}


def test_a_file_of_another_size_has_changed(hub: LoopbackHub, run: Run) -> None:
    hub.misbehave(f"*/{NAME}", after=1, total=700_001)
    answer = run([(0, 10), (10, 30)])
    assert len(answer["read"]) == 1
    assert answer["error"] == changed("the server sends `bytes 10-29/700001` of a file of 700000 bytes")
    hub.forget()
    answer = run([(699_000, 700_100)], listed={"bytes": 700_100})
    assert answer["error"] == changed("the server sends `bytes 699000-699999/700000` of a file of 700100 bytes")
    assert answer["read"] == []


def test_a_file_of_another_hash_has_changed(hub: LoopbackHub, run: Run) -> None:
    answer = run([(0, 10)], listed={"sha256": "0" * 64})
    assert answer["error"] == changed("its sha256 is another one than the hub listed")
    assert sent(hub) <= 10
    assert answer["waits"] == []


def test_a_repository_may_have_another_name_now(hub: LoopbackHub, run: Run) -> None:
    hub.repos["org/new"] = hub.repos.pop("org/m")
    hub.moved["org/m"] = "org/new"
    run(RANGES, token=hub.token)
    assert asked(hub, "hub") == of(RANGES[0], RANGES[0])
    assert asked(hub, "cdn") == of(*RANGES)
    answer = run([(0, 10)], listed={"sha256": "0" * 64})
    assert answer["error"] == changed("its sha256 is another one than the hub listed")


def test_a_file_that_changes_while_it_is_read_has_changed(hub: LoopbackHub, run: Run) -> None:
    hub.misbehave(f"*/{NAME}", after=2, instead=bytes(700_000))
    answer = run([(0, 10), (10, 20), (20, 30)])
    assert len(answer["read"]) == 2
    assert answer["error"] == changed("the server has another state of it than before")


# -- what passes


def test_a_server_that_asks_for_time_is_given_it(hub: LoopbackHub, run: Run) -> None:
    hub.misbehave(f"/*/{NAME}", status=429, retry_after=7, times=1)
    answer = run([(0, 10), (10, 20)])
    assert (answer["waits"], len(answer["read"])) == ([7], 2)


def test_a_server_that_is_out_of_order_is_asked_three_times(hub: LoopbackHub, run: Run) -> None:
    hub.misbehave(f"/*/{NAME}", after=2, status=503)  # the hub and the CDN have answered once
    answer = run([(0, 10), (10, 20)])
    assert (answer["waits"], len(answer["read"])) == ([1, 2], 1)
    assert answer["error"]["code"] == 3
    assert answer["error"]["message"].startswith(f"the hub answers `503 Service Unavailable` for `{NAME}` of `org/m`")
    hub.forget()
    hub.misbehave(f"/*/{NAME}", status=503, times=2)
    assert run([(0, 10)])["waits"] == [1, 2]
