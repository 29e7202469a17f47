"""Weights that never lie on this disk: read from a hub in blocks, ahead of those who need them, in bounded memory.

Several requests run at once, each for one block, in the order in which the blocks will be needed. A block is held until
all that was wanted of it has been read, and hashed in its turn; when it is needed again, it is asked for again. Who
reads ahead of the others waits for the turn of a block, unless all who are at work wait.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from ..errors import CheckpointError
from ..progress import Progress
from .remote_file import RemoteFile
from .source import Source, SourceFile

Piece: TypeAlias = tuple[str, int, int]
"""A file's name, and the first byte and the end of what is read of it."""

_REQUESTS = 8
"""That run at once; as many blocks fill what may be held."""
_MOST_BLOCK_BYTES = 32 * 1024 * 1024
_LEAST_BLOCK_BYTES = 256 * 1024


@dataclass(eq=False, slots=True)
class _Block:
    file: str
    begin: int
    end: int
    turn: int = 0
    """Its place among those that are read ahead."""
    wanted: int = 0
    """Bytes that are still to be read."""
    data: bytearray | None = None
    received: int = 0
    is_hashed: bool = False
    readers: int = 0
    used: int = 0
    """When it was last read: what is larger was later."""

    @property
    def is_here(self) -> bool:
        return self.has(self.end - self.begin)

    def has(self, received: int) -> bool:
        """Whether so many bytes of it are held."""
        return self.data is not None and self.received >= received


@dataclass(eq=False, slots=True)
class _Digest:
    """The hash of a file, as far as its blocks came in order."""

    blocks: tuple[_Block, ...]
    sha256: str
    value: hashlib._Hash = field(default_factory=hashlib.sha256)
    done: int = 0
    is_busy: bool = False
    is_right: bool = False

    @property
    def next(self) -> _Block | None:
        """The block to be hashed next, or being hashed."""
        return self.blocks[self.done] if self.done < len(self.blocks) else None


class Blocks:
    """Reads files of a repository while a block runs.

    `pieces` says what will be read, in the order in which it will be: at most `held_bytes` are held at a time, but for
    a block that somebody waits for.
    """

    def __init__(self, source: Source, pieces: Iterable[Piece], held_bytes: int, progress: Progress) -> None:
        assert source.commit is not None
        self._progress = progress
        self._block_bytes = max(_LEAST_BLOCK_BYTES, min(_MOST_BLOCK_BYTES, held_bytes // _REQUESTS))
        self._most = max(_REQUESTS, held_bytes // self._block_bytes)
        self._files = {file.path: RemoteFile(source.model, source.commit, file) for file in source.files}
        self._blocks = {file.path: self._divided(file) for file in source.files}
        self._ahead = list(self._in_order(pieces))
        """Those that nobody has asked for yet, the next one last."""
        self._buffer_bytes = min(self._block_bytes, max((file.bytes for file in source.files), default=0))
        self._digests = {
            file.path: _Digest(self._blocks[file.path], file.sha256)
            for file in source.files
            if file.sha256 is not None and file.bytes and all(block.wanted for block in self._blocks[file.path])
        }
        for blocks in (blocks for name, blocks in self._blocks.items() if name not in self._digests):
            for block in blocks:
                block.is_hashed = True
        self._size = sum(block.end - block.begin for block in self._ahead)
        self.received_bytes = 0
        """All that came: more than is wanted where something is asked for again."""
        self._wished: list[_Block] = []
        """Those that somebody waits for and that are not held, in the order in which they were wished for."""
        self._at_work = 0
        self._waiting: list[tuple[_Block, int]] = []
        """For how much of which block."""
        self._held: set[_Block] = set()
        self._spare: list[bytearray] = []
        self._lock = threading.Lock()
        self._work_changed = threading.Condition(self._lock)
        """For those who fetch: a block is urgent, there is room, or it is over."""
        self._arrived = threading.Condition(self._lock)
        """For those who wait for bytes, or for the end."""
        self._error: Exception | None = None
        self._stopped = False
        self._clock = 0
        self.seconds = 0.0
        """From the first byte that was asked for to the last that came."""

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Read ahead until the end of the block; what was read whole is then compared with the hub's sha256.

        Raises `CheckpointError` for a file that is not what the hub listed.
        """
        self._begin = time.monotonic()
        for _ in range(_REQUESTS):
            threading.Thread(target=self._fetch_blocks, name="ftload-ranges", daemon=True).start()
        try:
            yield
            self._check()
        finally:
            self.abandon()

    @property
    def compared(self) -> tuple[str, ...]:
        """The files whose sha256 was the hub's."""
        with self._lock:
            return tuple(sorted(name for name, digest in self._digests.items() if digest.is_right))

    def abandon(self) -> None:
        """Fetch nothing any more, and let nobody wait."""
        with self._lock:
            self._stopped = True
            self._work_changed.notify_all()
            self._arrived.notify_all()

    def read_into(self, view: memoryview, name: str, begin: int) -> None:
        """Fill `view` with the bytes of a file from `begin` on. Raises what getting them raised."""
        while view:
            block = self._blocks[name][begin // self._block_bytes]
            count = min(len(view), block.end - begin)
            first = begin - block.begin
            with self._lock:
                block.readers += 1  # who waits for it counts: it is not let go of before it was seen
                data = self._obtain(block, first + count)
            view[:count] = memoryview(data)[first : first + count]
            with self._lock:
                block.readers -= 1
                block.wanted -= count
                self._clock += 1
                block.used = self._clock
                self._drop_if_done(block)
            view, begin = view[count:], begin + count

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around what reads and then does something with it: others who wait may hope that it reads on."""
        with self._lock:
            self._at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work -= 1
                self._work_changed.notify()

    def _obtain(self, block: _Block, received: int) -> bytearray:
        """Wait until so many bytes of a block are here."""
        if block.data is not None and block.has(received):
            return block.data
        if block.data is None and block not in self._wished:
            self._wished.append(block)
        self._waiting.append((block, received))
        self._work_changed.notify()
        try:
            self._arrived.wait_for(lambda: self._stopped or self._error or block.has(received))
        finally:
            self._waiting.remove((block, received))
        if block.data is None or not block.has(received):
            raise self._error or _Abandoned
        return block.data

    def _check(self) -> None:
        """Hash what is left of files that are read whole, and compare."""
        with self._lock:
            left = (block for block in self._ahead if not block.is_hashed)
            self._ahead = sorted(left, key=lambda block: (block.file, block.begin), reverse=True)
            for block in (*self._held, *self._ahead):
                block.wanted = 0
                self._drop_if_done(block)
            self._work_changed.notify_all()
            self._arrived.wait_for(
                lambda: self._error or self._stopped or all(digest.is_right for digest in self._digests.values())
            )
            if self._error or self._stopped:
                raise self._error or _Abandoned

    # -- by the threads that fetch

    def _fetch_blocks(self) -> None:
        while True:
            try:
                block = self._next()
                if block is None:
                    return
                assert block.data is not None
                view = memoryview(block.data)[: block.end - block.begin]
                self._files[block.file].fill(view, block.begin, lambda count, block=block: self._count(block, count))
                self._hash(block.file)
                with self._lock:
                    self._drop_if_done(block)  # nobody may want it any more
            except _Abandoned:
                return
            except Exception as error:  # whoever waits raises it
                with self._lock:
                    self._error = self._error or error
                    self._arrived.notify_all()
                return

    def _next(self) -> _Block | None:
        """The next block to fetch, with memory for it; None when it is over."""
        with self._lock:
            chosen = None

            def choose() -> bool:
                nonlocal chosen
                chosen = self._choose()
                return self._stopped or self._error is not None or chosen is not None

            self._work_changed.wait_for(choose)
            if self._stopped or self._error is not None or chosen is None:
                return None
            if chosen in self._ahead:
                self._ahead.remove(chosen)
            else:
                chosen.wanted = chosen.end - chosen.begin  # a second time: as if all of it were wanted
            if chosen in self._wished:
                self._wished.remove(chosen)
            chosen.data = self._spare.pop() if self._spare else bytearray(self._buffer_bytes)
            chosen.received = 0
            self._held.add(chosen)
            return chosen

    def _choose(self) -> _Block | None:
        """What to fetch now: what comes next, or what is missing to go on."""
        if self._ahead and (len(self._held) < self._most or self._is_due(self._ahead[-1])):
            return self._ahead[-1]
        # what was dropped has no turn any more; and if all wait for a turn, it may never come
        again = next((block for block in self._wished if block not in self._ahead), None)
        waiting = sum(not block.has(received) for block, received in self._waiting)  # some were not woken yet
        is_stalled = waiting >= self._at_work and all(block.is_here for block in self._held)
        if again is None and not (self._wished and is_stalled):
            return None
        if not self._make_room():
            return None
        return again or self._wished[0]

    def _is_due(self, block: _Block) -> bool:
        """Whether those that are held can't be hashed before this one, and are held for nothing else."""
        return self._is_next(block) and all(block.wanted <= 0 and not block.is_hashed for block in self._held)

    def _make_room(self) -> bool:
        """If there are too many, let go of the block that nobody has read for the longest time.

        False while one is being hashed, so that some may be let go of in a moment.
        """
        if len(self._held) < self._most:
            return True
        idle = [block for block in self._held if block.is_here and not block.readers]
        if idle and not any(block.is_hashed for block in idle):
            if any(block.is_here and self._is_next(block) for block in self._held):
                return False
            # they come in an order in which no file can be hashed in memory
            for name in {block.file for block in idle}:
                self._digests.pop(name, None)
                for block in self._blocks[name]:
                    block.is_hashed = True
                    self._drop_if_done(block)
        idle = [block for block in idle if block in self._held and block.is_hashed]
        if idle and len(self._held) >= self._most:
            block = min(idle, key=lambda block: (not block.used, block.used, -block.turn))
            self._drop(block)
            if not block.used:
                self._ahead.append(block)  # the last that was read ahead: it has its turn once more
        return True

    def _count(self, block: _Block, count: int) -> None:
        with self._lock:
            if self._stopped or self._error is not None:
                raise _Abandoned
            block.received += count
            self.received_bytes += count
            self.seconds = time.monotonic() - self._begin
            self._progress.arriving(bytes=min(self.received_bytes, self._size), of=self._size)
            self._arrived.notify_all()

    def _hash(self, name: str) -> None:
        """Hash what has come in order, unless another thread is at it: that one goes on to what came meanwhile."""
        with self._lock:
            digest = self._digests.get(name)
            if digest is None or digest.is_busy:
                return
            block = self._begin_next(digest)
        while block is not None:
            assert block.data is not None
            digest.value.update(memoryview(block.data)[: block.end - block.begin])
            with self._lock:
                digest.done += 1
                block.is_hashed = True
                self._drop_if_done(block)
                self._work_changed.notify()  # the next one may be due
                block = self._begin_next(digest)
        if digest.next is not None:
            return
        found = digest.value.hexdigest()
        if found != digest.sha256:
            raise CheckpointError(
                f"`{name}` did not arrive as the hub lists it: its sha256 is {found}, not {digest.sha256}",
                hint="run it again; if it happens again, something between here and the hub changes files",
            )
        with self._lock:
            digest.is_right = True
            self._arrived.notify_all()

    # -- under the lock

    def _begin_next(self, digest: _Digest) -> _Block | None:
        """The next block to hash, if it is here: as long as it is hashed it is held, and its hash is not given up."""
        block = digest.next
        digest.is_busy = block is not None and block.is_here
        return block if digest.is_busy else None

    def _is_next(self, block: _Block) -> bool:
        digest = self._digests.get(block.file)
        return digest is not None and digest.next is block

    def _drop_if_done(self, block: _Block) -> None:
        if block in self._held and block.wanted <= 0 and block.is_here and block.is_hashed and not block.readers:
            self._drop(block)

    def _drop(self, block: _Block) -> None:
        assert block.data is not None
        self._spare.append(block.data)
        block.data = None
        self._held.remove(block)
        self._work_changed.notify()

    # -- at the beginning

    def _divided(self, file: SourceFile) -> tuple[_Block, ...]:
        step = self._block_bytes
        return tuple(_Block(file.path, begin, min(begin + step, file.bytes)) for begin in range(0, file.bytes, step))

    def _in_order(self, pieces: Iterable[Piece]) -> Iterator[_Block]:
        """The blocks that pieces lie in, the last one first; each is told how much of it is wanted."""
        order: dict[_Block, None] = {}
        until: dict[str, int] = {}
        pieces = [piece for piece in pieces if piece[1] < piece[2]]
        for name, begin, end in pieces:
            for block in self._blocks[name][begin // self._block_bytes : -(-end // self._block_bytes)]:
                order.setdefault(block)
        for name, begin, end in sorted(pieces):
            first = max(begin, until.get(name, 0))  # what several pieces share is counted once
            for block in self._blocks[name][first // self._block_bytes : -(-end // self._block_bytes)]:
                block.wanted += max(0, min(end, block.end) - max(first, block.begin))
            until[name] = max(end, until.get(name, 0))
        for turn, block in enumerate(order):
            block.turn = turn
        return reversed(order)


class _Abandoned(Exception):
    """It is over: nobody waits any longer, or nothing comes any more."""
