"""Weights that are read from a hub in blocks: which are asked for and when, how many are held, who is told what.

The hub is one in memory. Nothing waits for time to pass: a test says what comes, and waits until it is asked for.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from ftload.loaders.errors import CheckpointError, SourceError
from ftload.loaders.progress import Silent
from ftload.loaders.source import blocks as module
from ftload.loaders.source.blocks import Blocks, Piece
from ftload.loaders.source.source import Source, SourceFile

GUARD_SECONDS = 60
"""After which a test that would hang fails."""
BLOCK = 4
"""Bytes of a block, unless a test says otherwise."""


class Hub:
    """Sends bytes when it is told to, and records what is asked for, in which buffers."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, int]] = []
        """The file and the number of each block."""
        self.buffers: list[object] = []
        self.failing: dict[tuple[str, int], Exception] = {}
        self._sent: dict[tuple[str, int], int] = {}
        self._is_open = False
        self.changed = threading.Condition()

    def file(self, model: str, commit: str, file: SourceFile) -> _File:
        return _File(self, file.path)

    def send(self, name: str, block: int, count: int = BLOCK) -> None:
        """The first bytes of a block."""
        with self.changed:
            self._sent[name, block] = count
            self.changed.notify_all()

    def send_all(self) -> None:
        with self.changed:
            self._is_open = True
            self.changed.notify_all()

    def close(self) -> None:
        """Send nothing that was not told yet, and forget what was asked for."""
        self.asked, self._is_open = [], False

    def end(self) -> None:
        """Wait for those that fetch: all of them end, however the run did."""
        self.send_all()
        for thread in (thread for thread in threading.enumerate() if thread.name == "ftload-ranges"):
            thread.join(GUARD_SECONDS)
            assert not thread.is_alive()

    def until_asked(self, *wanted: tuple[str, int]) -> None:
        """Wait until as much has been asked for; it must be these blocks, in this order."""
        self.until_so_many(len(wanted))
        assert self.asked == list(wanted)

    def until_so_many(self, count: int) -> None:
        """Wait until so many blocks have been asked for, and no more."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, GUARD_SECONDS), self.asked
            assert len(self.asked) == count

    def fill(self, name: str, view: memoryview, begin: int, on_received: Callable[[int], None]) -> None:
        block, received, end = begin // BLOCK, 0, 0

        def more_is_sent() -> bool:
            return self._is_open or self._sent.get((name, block), 0) > received

        with self.changed:
            self.asked.append((name, block))
            if not any(view.obj is buffer for buffer in self.buffers):
                self.buffers.append(view.obj)
            self.changed.notify_all()
        while received < len(view):
            with self.changed:
                assert self.changed.wait_for(more_is_sent, GUARD_SECONDS)
                end = len(view) if self._is_open else self._sent[name, block]
            if (name, block) in self.failing:
                raise self.failing[name, block]
            view[received:end] = self.files[name][begin + received : begin + end]
            count, received = end - received, end
            on_received(count)


class _File:
    def __init__(self, hub: Hub, name: str) -> None:
        self._hub, self._name = hub, name

    def fill(self, view: memoryview, begin: int, on_received: Callable[[int], None]) -> None:
        self._hub.fill(self._name, view, begin, on_received)


class Parts(Silent):
    """Progress that keeps what arrived."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, int]] = []

    def arriving(self, *, bytes: int, of: int) -> None:
        self.arrived.append((bytes, of))


class Aside(threading.Thread):
    """Does something in a thread that holds nobody up at the end, whatever becomes of it."""

    def __init__(self, do: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._do = do
        self._value: object = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._do()
        except BaseException as error:
            self._error = error

    def result(self) -> object:
        self.join(GUARD_SECONDS)
        assert not self.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._value


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(module, "RemoteFile", hub.file)
    for name in ("_LEAST_BLOCK_BYTES", "_MOST_BLOCK_BYTES"):
        monkeypatch.setattr(module, name, BLOCK)
    yield hub
    hub.end()


@pytest.fixture
def make(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Blocks]:
    def make(
        pieces: Iterable[Piece],
        *,
        requests: int = 1,
        held: int = 8,
        sha256: dict[str, str] | None = None,
        progress: Silent | None = None,
    ) -> Blocks:
        """Blocks of the hub's files, of which `held` are held, and `requests` asked for at once."""
        monkeypatch.setattr(module, "_REQUESTS", requests)
        source = Source(
            model="org/model",
            kind="hub",
            revision=None,
            commit="0" * 40,
            root=Path("/nowhere"),
            files=tuple(
                SourceFile(path=name, bytes=len(data), sha256=(sha256 or {}).get(name))
                for name, data in sorted(hub.files.items())
            ),
        )
        return Blocks(source, pieces, held * BLOCK, progress or Silent())

    return make


Make = Callable[..., Blocks]


def read(blocks: Blocks, name: str, begin: int, end: int) -> bytes:
    data = bytearray(end - begin)
    blocks.read_into(memoryview(data), name, begin)
    return bytes(data)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def in_a_run(blocks: Blocks, body: Callable[[], object] = lambda: None) -> object:
    """What the body of `coming` returns, once all of it is over."""

    def run() -> object:
        with blocks.coming():
            return body()

    return Aside(run).result()


# -- what is asked for


def test_each_block_is_asked_for_once_in_the_order_of_pieces(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(30)), "b": bytes(range(100, 113))}
    pieces = [("b", 5, 13), ("a", 0, 9), ("a", 9, 30), ("b", 0, 5)]
    hub.send_all()
    blocks = make(pieces, held=3)
    found = in_a_run(blocks, lambda: [read(blocks, *piece) for piece in pieces])
    assert found == [hub.files[name][begin:end] for name, begin, end in pieces]
    assert hub.asked == [
        ("b", 1),
        ("b", 2),
        ("b", 3),
        *(("a", block) for block in range(8)),
        ("b", 0),
    ]


def test_what_lies_between_pieces_is_not_asked_for(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(40)), "b": b"beside"}
    hub.send_all()
    blocks = make([("a", 0, 3), ("a", 17, 19), ("a", 30, 30), ("a", 39, 40)])
    assert in_a_run(blocks, lambda: [read(blocks, "a", 17, 19), read(blocks, "a", 39, 40)]) == [b"\x11\x12", b"\x27"]
    assert set(hub.asked) <= {("a", 0), ("a", 4), ("a", 9)}
    assert {("a", 4), ("a", 9)} <= set(hub.asked)
    assert len(hub.asked) == len(set(hub.asked))


def test_several_requests_run_at_once(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(40))}
    blocks = make([("a", 0, 40)], requests=3)

    def body() -> None:
        hub.until_so_many(3)  # no byte of the first has come
        hub.send_all()
        assert read(blocks, "a", 0, 40) == hub.files["a"]

    in_a_run(blocks, body)
    assert set(hub.asked[:3]) == {("a", 0), ("a", 1), ("a", 2)}
    assert Counter(hub.asked) == Counter(("a", block) for block in range(10))


def test_no_more_is_held_than_allowed(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(160))}
    hub.send_all()
    blocks = make([("a", 0, 160)], requests=3, held=5)

    def body() -> None:
        for block in range(40):
            wanted = min(40, block + 5)
            hub.until_so_many(wanted)  # the block after them waits until one was read
            assert read(blocks, "a", block * BLOCK, block * BLOCK + 3) == hub.files["a"][block * BLOCK :][:3]
            assert len(hub.asked) == wanted  # a byte of it is still wanted
            assert read(blocks, "a", block * BLOCK + 3, block * BLOCK + 4) == hub.files["a"][block * BLOCK + 3 :][:1]

    in_a_run(blocks, body)
    assert len(hub.asked) == 40
    assert len(hub.buffers) == 5


def test_what_pieces_share_is_wanted_once(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(12))}
    hub.send_all()
    blocks = make([("a", 0, 3), ("a", 1, 4), ("a", 0, 2), ("a", 4, 12)], held=1)

    def body() -> None:
        hub.until_asked(("a", 0))
        assert read(blocks, "a", 0, 4) == b"\0\1\2\3"
        hub.until_asked(("a", 0), ("a", 1))  # the first was let go

    in_a_run(blocks, body)


def test_bytes_are_read_while_their_block_arrives(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(8))}
    blocks = make([("a", 0, 8)])

    def body() -> None:
        hub.send("a", 0, 2)
        assert read(blocks, "a", 0, 2) == b"\0\1"
        rest = Aside(lambda: read(blocks, "a", 1, 6))
        hub.send("a", 0)
        hub.send("a", 1, 1)
        assert rest.is_alive()
        hub.send("a", 1, 2)
        assert rest.result() == b"\1\2\3\4\5"

    in_a_run(blocks, body)


def test_a_block_that_was_read_while_it_came_makes_room_once_it_is_here(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(8))}
    blocks = make([("a", 0, 2), ("a", 4, 8)], held=1)

    def body() -> None:
        hub.send("a", 0, 2)
        assert read(blocks, "a", 0, 2) == b"\0\1"
        hub.send("a", 0)
        hub.until_asked(("a", 0), ("a", 1))

    in_a_run(blocks, body)


def test_a_block_far_ahead_comes_when_nobody_would_go_on_without_it(hub: Hub, make: Make) -> None:
    """It takes the place of the last that was read ahead, which is asked for again in its turn."""
    hub.files = {"a": bytes(range(40))}
    hub.send_all()
    blocks = make([("a", 0, 40)], held=3)

    def body() -> None:
        hub.until_asked(*(("a", block) for block in (0, 1, 2)))
        with blocks.at_work():
            other = blocks.at_work()
            with other:
                ahead = Aside(lambda: read(blocks, "a", 36, 40))
                assert read(blocks, "a", 0, 4) == bytes(range(4))
                hub.until_asked(*(("a", block) for block in (0, 1, 2, 3)))  # the other one is at work
            assert ahead.result() == bytes(range(36, 40))
        assert read(blocks, "a", 4, 36) == bytes(range(4, 36))

    in_a_run(blocks, body)
    assert hub.asked == [("a", block) for block in (0, 1, 2, 3, 9, 3, 4, 5, 6, 7, 8)]
    assert len(hub.buffers) == 3


def test_what_was_read_in_part_makes_room_before_what_was_not_read(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(40))}
    hub.send_all()
    blocks = make([("a", 0, 12), ("a", 36, 40)], held=3)

    def body() -> None:
        hub.until_asked(*(("a", block) for block in (0, 1, 2)))
        assert read(blocks, "a", 0, 1) + read(blocks, "a", 36, 40) == bytes([0, *range(36, 40)])
        assert read(blocks, "a", 4, 12) + read(blocks, "a", 1, 2) == bytes([*range(4, 12), 1])

    in_a_run(blocks, body)
    assert hub.asked == [("a", block) for block in (0, 1, 2, 9, 0)]


def test_where_no_file_can_be_hashed_in_memory_none_is(hub: Hub, make: Make) -> None:
    """All that may be held wait for the first block of their file, which is read after them."""
    hub.files = {"a": bytes(range(40)), "b": bytes(8)}
    hub.send_all()
    pieces = [("a", begin, begin + 4) for begin in range(36, -1, -4)] + [("b", 0, 8)]
    blocks = make(pieces, held=3, sha256={"a": "0" * 64, "b": digest(bytes(8))})

    def body() -> None:
        for place, (name, begin, end) in enumerate(pieces):
            assert read(blocks, name, begin, end) == hub.files[name][begin:end]
            if place >= 3:
                hub.until_so_many(min(12, place + 4))  # as many as may be held are read ahead

    in_a_run(blocks, body)
    assert len(hub.asked) == 12
    assert len(hub.buffers) == 3


def test_a_block_that_is_read_again_is_asked_for_again(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(8)), "b": b"of no piece"}
    hub.send_all()
    blocks = make([("a", 0, 8)], held=2)

    def body() -> None:
        for _ in range(3):
            assert read(blocks, "a", 0, 8) == bytes(range(8))
        assert read(blocks, "b", 3, 9) == b"no pie"

    in_a_run(blocks, body)
    assert hub.asked[:4] == [("a", 0), ("a", 1), ("a", 0), ("a", 1)]
    assert hub.asked[-3:] == [("b", 0), ("b", 1), ("b", 2)]


def test_one_that_is_held_for_a_second_reading_makes_room(hub: Hub, make: Make) -> None:
    """What is read again is held as if all of it were wanted: it goes when others are waited for."""
    hub.files = {"a": bytes(range(80))}
    hub.send_all()
    blocks = make([("a", 0, 4)], held=2)

    def body() -> None:
        for block in range(20):
            assert read(blocks, "a", block * BLOCK, block * BLOCK + 1) == bytes([block * BLOCK])
        assert read(blocks, "a", 77, 78) == bytes([77])  # the last one is still here

    in_a_run(blocks, body)
    assert hub.asked == [("a", block) for block in range(20)]
    assert len(hub.buffers) == 2


def test_threads_that_read_the_same_bytes_all_get_them(hub: Hub, make: Make) -> None:
    """They are wanted once: the first to have read them lets the block go."""
    hub.files = {"a": b"four"}

    def body() -> None:
        hub.until_asked(("a", 0))
        readers = [Aside(lambda: read(blocks, "a", 0, 4)) for _ in range(4)]
        hub.send_all()
        assert [reader.result() for reader in readers] == [b"four"] * 4

    for _ in range(50):
        hub.close()
        blocks = make([("a", 0, 4)])
        in_a_run(blocks, body)


# -- what is compared with the hub's hashes


def test_a_file_that_is_read_whole_is_hashed_in_its_order(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(30)), "b": bytes(range(100, 110))}
    hub.send_all()
    backwards = [("a", begin, min(begin + 4, 30)) for begin in range(28, -1, -4)] + [("b", 0, 10)]
    blocks = make(backwards, sha256={name: digest(data) for name, data in hub.files.items()}, requests=3)
    in_a_run(blocks, lambda: [read(blocks, *piece) for piece in backwards])
    assert Counter(hub.asked).most_common(1)[0][1] == 1


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "left out"])
def test_a_file_of_another_hash_is_an_error(hub: Hub, make: Make, is_read: bool) -> None:
    """Once it has come whole: also if whoever planned to read it did not."""
    hub.files = {"a": bytes(range(30)), "b": bytes(range(100, 110))}
    hub.send_all()
    blocks = make([("a", 0, 30), ("b", 0, 10)], sha256={"a": digest(hub.files["a"]), "b": "0" * 64})
    with pytest.raises(CheckpointError) as caught:
        in_a_run(blocks, lambda: [read(blocks, "a", 0, 30), read(blocks, "b", 0, 9)] if is_read else None)
    wrong = digest(hub.files["b"])
    assert caught.value.message == (f"`b` did not arrive as the hub lists it: its sha256 is {wrong}, not {'0' * 64}")
    assert caught.value.hint == "run it again; if it happens again, something between here and the hub changes files"


def test_a_file_that_is_not_read_whole_is_not_compared(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(30)), "b": bytes(10), "c": b""}
    hub.send_all()
    pieces = [("a", 0, 8), ("a", 12, 30)]  # not the third block
    blocks = make(pieces, sha256=dict.fromkeys("abc", "0" * 64))
    in_a_run(blocks, lambda: [read(blocks, *piece) for piece in pieces])
    assert hub.asked == [("a", block) for block in (0, 1, 3, 4, 5, 6, 7)]


def test_what_nobody_read_leaves_room_for_what_is_hashed(hub: Hub, make: Make) -> None:
    """At the end: blocks on their way that nobody wants any more, and one that came before its turn."""
    hub.files = {"a": bytes(range(8)), "b": bytes(range(12))}
    backwards = [("a", 0, 8), ("b", 8, 12), ("b", 4, 8), ("b", 0, 4)]
    blocks = make(backwards, sha256={"b": digest(hub.files["b"])}, held=1)

    def body() -> None:
        hub.until_asked(("a", 0))

    with pytest.MonkeyPatch.context() as patch:
        check = blocks._check  # pyright: ignore[reportPrivateUsage]
        patch.setattr(blocks, "_check", lambda: (Aside(hub.send_all), check()))
        in_a_run(blocks, body)
    assert set(hub.asked) >= {("b", 0), ("b", 1), ("b", 2)}


def test_a_block_that_came_before_its_turn_leaves_room_for_those_before_it(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(12))}
    hub.send_all()
    blocks = make([("a", 8, 12), ("a", 0, 8)], sha256={"a": digest(hub.files["a"])}, held=1)
    in_a_run(blocks, lambda: hub.until_asked(("a", 2)))
    assert hub.asked == [("a", 2), ("a", 0), ("a", 1)]


def test_what_is_hashed_already_is_not_asked_for_to_be_compared(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(40))}
    hub.send_all()
    blocks = make([("a", 0, 40)], sha256={"a": digest(hub.files["a"])}, held=3)

    def body() -> None:
        hub.until_asked(*(("a", block) for block in (0, 1, 2)))
        assert read(blocks, "a", 36, 40) == bytes(range(36, 40))  # the third makes room

    in_a_run(blocks, body)
    assert hub.asked == [("a", block) for block in (0, 1, 2, 9, 3, 4, 5, 6, 7, 8)]


class Slow:
    """A hash that takes its time."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.goes_on = threading.Event()
        self._value = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        self.begun.set()
        assert self.goes_on.wait(GUARD_SECONDS)
        self._value.update(data)

    def hexdigest(self) -> str:
        return self._value.hexdigest()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """The hash of one file."""
    slow = Slow()
    made = module._Digest  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(module, "_Digest", lambda blocks, sha256: made(blocks, sha256, slow))  # type: ignore[arg-type]
    return slow


def test_one_thread_hashes_and_the_others_go_on(hub: Hub, make: Make, slow: Slow) -> None:
    hub.files = {"a": bytes(range(16))}
    blocks = make([("a", 0, 16)], sha256={"a": digest(hub.files["a"])}, requests=2)

    def body() -> None:
        hub.until_so_many(2)
        hub.send("a", 0)
        assert slow.begun.wait(GUARD_SECONDS)
        hub.send("a", 1)
        hub.until_so_many(3)
        hub.send("a", 2)
        hub.until_so_many(4)
        hub.send("a", 3)
        assert read(blocks, "a", 0, 16) == hub.files["a"]
        slow.goes_on.set()

    in_a_run(blocks, body)


def test_a_block_is_hashed_once_all_of_it_is_here(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(12))}
    blocks = make([("a", 0, 12)], sha256={"a": digest(hub.files["a"])}, requests=2)

    def body() -> None:
        hub.until_so_many(2)
        hub.send("a", 1, 2)
        hub.send("a", 0)
        hub.until_so_many(3)  # whoever hashed the first fetches again
        hub.send_all()
        assert read(blocks, "a", 0, 12) == hub.files["a"]

    in_a_run(blocks, body)
    assert blocks.compared == ("a",)


def test_what_is_being_hashed_is_waited_for(hub: Hub, make: Make, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash is not given up for a block that comes after it."""
    hub.files = {"a": bytes(range(12))}
    blocks = make([("a", 0, 12)], sha256={"a": digest(hub.files["a"])}, requests=2, held=2)
    choose, looked = blocks._choose, threading.Event()  # pyright: ignore[reportPrivateUsage]

    def look() -> object:
        chosen = choose()
        if blocks._wished:  # pyright: ignore[reportPrivateUsage]
            looked.set()
        return chosen

    monkeypatch.setattr(blocks, "_choose", look)

    def body() -> None:
        hub.until_so_many(2)
        hub.send("a", 0)
        assert slow.begun.wait(GUARD_SECONDS)
        hub.send("a", 1)
        assert read(blocks, "a", 0, 5) == bytes(range(5))
        last = Aside(lambda: read(blocks, "a", 8, 9))
        assert looked.wait(GUARD_SECONDS)
        slow.goes_on.set()
        hub.send_all()
        assert last.result() == b"\x08"

    in_a_run(blocks, body)
    assert blocks.compared == ("a",)


# -- how it ends


def test_the_error_of_one_request_reaches_every_reader(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(40))}
    hub.failing["a", 1] = SourceError("the line is cut")
    blocks = make([("a", 0, 40)], requests=2)

    def body() -> None:
        hub.until_so_many(2)
        readers = [Aside(lambda at=at: read(blocks, "a", at, at + 2)) for at in (0, 5, 21, 38)]
        hub.send("a", 1)
        for reader in readers:
            with pytest.raises(SourceError, match=r"^the line is cut$"):
                reader.result()

    with pytest.raises(SourceError, match=r"^the line is cut$"):
        in_a_run(blocks, body)  # also who has read all that it wanted


def test_memory_that_is_not_there_is_an_error(hub: Hub, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"a": bytes(range(40))}
    blocks = make([("a", 0, 40)])

    def full(size: int) -> bytearray:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, "bytearray", full, raising=False)
        with pytest.raises(MemoryError):
            in_a_run(blocks, lambda: read(blocks, "a", 0, 40))


def test_who_waits_is_sent_away_when_it_is_abandoned(hub: Hub, make: Make) -> None:
    hub.files = {"a": bytes(range(40))}
    progress = Parts()
    blocks = make([("a", 0, 40)], requests=3, held=4, sha256={"a": digest(hub.files["a"])}, progress=progress)

    def body() -> None:
        hub.until_so_many(3)
        readers = [Aside(lambda at=at: read(blocks, "a", at, at + 2)) for at in (0, 5, 38)]
        blocks.abandon()
        for reader in readers:
            with pytest.raises(Exception) as caught:
                reader.result()
            assert type(caught.value).__name__ == "_Abandoned"

    with pytest.raises(Exception) as caught:  # the file was not compared
        in_a_run(blocks, body)
    assert type(caught.value).__name__ == "_Abandoned"
    hub.end()
    assert (len(hub.asked), progress.arrived) == (3, [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_waited_for_after_an_error(hub: Hub, make: Make, error: type[BaseException]) -> None:
    hub.files = {"a": bytes(range(40))}
    blocks = make([("a", 0, 40)], requests=2, sha256={"a": "0" * 64})

    def body() -> None:
        raise error

    with pytest.raises(error):
        in_a_run(blocks, body)  # no byte has come


# -- all of it together


@pytest.mark.parametrize("seed", range(12))
def test_many_threads_read_what_they_like(hub: Hub, make: Make, seed: int) -> None:
    """The right bytes, and no thread waits for ever; what was planned is read as well, some of it twice."""
    dice = random.Random(seed)
    hub.files = {name: dice.randbytes(dice.randrange(1, 300)) for name in "abcd"} | {"e": b""}

    def piece() -> Piece:
        name = dice.choice("abcd")
        begin = dice.randrange(len(hub.files[name]))
        return name, begin, min(len(hub.files[name]), begin + dice.randrange(1, 40))

    planned = [piece() for _ in range(60)] + [(name, 0, len(hub.files[name])) for name in "ab"]
    dice.shuffle(planned)
    others = [[piece() for _ in range(80)] for _ in range(5)]
    progress = Parts()
    blocks = make(
        planned,
        requests=dice.choice([1, 2, 8]),
        held=dice.choice([1, 2, 8, 30]),
        sha256={name: digest(hub.files[name]) for name in "abcd"} | {"e": "0" * 64},
        progress=progress,
    )
    hub.send_all()

    def body() -> None:
        def check(pieces: list[Piece]) -> None:
            for name, begin, end in pieces:
                assert read(blocks, name, begin, end) == hub.files[name][begin:end]

        for reader in [Aside(lambda pieces=pieces: check(pieces)) for pieces in (planned, *others)]:
            reader.result()

    in_a_run(blocks, body)
    assert all(0 < arrived <= size for arrived, size in progress.arrived)
    assert progress.arrived == sorted(progress.arrived)
