"""Several processes that prepare one output together, as `torchrun` starts them.

Every process plans on its own and comes to the same plan; each writes some of its files into one staging directory, and
the first, rank 0, does the rest. They talk through the key-value store that torch.distributed's rendezvous gives.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..errors import FtloadError, ResourceError, UsageError, said_by
from ..plan.output_files import OutputFile

_POLL_SECONDS = 0.05
_BEAT_SECONDS = 2
_SILENCE_SECONDS = 60
"""A process that has given no sign of life for so long was killed."""
_FAREWELL_SECONDS = 30
"""How long rank 0 waits for the others, which may have been killed, once it has nothing more to do."""
_MEETING_SECONDS = 300
"""How long the processes wait for each other at the start."""


class OtherProcessError(FtloadError):
    """Another process failed; its code and kind become those of this one."""

    def __init__(self, rank: int, failure: dict[str, Any]) -> None:
        super().__init__(f"process {rank} failed: {failure['message']}", hint=failure["hint"])
        self.code = failure["code"]
        self.kind = failure["kind"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that work together; on its own, it is all there are."""

    rank: int = 0
    count: int = 1
    store: Any = None
    """A torch.distributed `Store`; None for a process on its own."""

    def share(self, files: Iterable[OutputFile]) -> tuple[OutputFile, ...]:
        """The files that this process writes: largest first, each to the process with the least to do so far."""
        loads = [0] * self.count
        mine = []
        for file in sorted(files, key=lambda file: (-file.size, file.path)):
            rank = loads.index(min(loads))
            loads[rank] += file.size
            if rank == self.rank:
                mine.append(file)
        return tuple(mine)

    def agree_on(self, what: str, value: Any) -> Any:
        """The value (of JSON) that rank 0 gives, for all; what the others give does not count."""
        if self.count == 1:
            return value
        if self.rank == 0:
            self._tell(what, value)
        return self._hear(what, 0)

    def gather(self, what: str, value: Any) -> list[Any]:
        """Every process's value (of JSON), in order of rank, for all; none goes on before all have given theirs."""
        if self.count == 1:
            return [value]
        self._tell(f"{what} {self.rank}", value)
        return [self._hear(f"{what} {rank}", rank) for rank in range(self.count)]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let the others know if this process fails, so that none of them waits for it."""
        done = threading.Event()
        if self.store is not None:
            threading.Thread(target=self._beat, args=(done,), name="ftload-beat", daemon=True).start()
        try:
            yield
        except OtherProcessError:
            raise
        except BaseException as error:
            known = isinstance(error, FtloadError)
            failure = {
                "code": getattr(error, "code", FtloadError.code),
                "kind": error.kind if known else FtloadError.kind,
                "message": error.message if known else f"{type(error).__name__}: {error}",
                "hint": error.hint if known else None,
            }
            # with the store gone no process can be reached, and the error that counts is this one
            with contextlib.suppress(RuntimeError):
                self._tell("failure", {"rank": self.rank, **failure})
            raise
        finally:
            self._leave()
            done.set()

    def _beat(self, done: threading.Event) -> None:
        """Give signs of life."""
        with contextlib.suppress(RuntimeError):  # the store is gone: whoever waits for something will say so
            while not done.wait(_BEAT_SECONDS):
                self.store.add(f"alive {self.rank}", 1)

    def _leave(self) -> None:
        """Rank 0 goes last: without torchrun it is the one that holds the store."""
        if self.rank:
            with contextlib.suppress(RuntimeError):
                self._tell(f"left {self.rank}", True)
        elif self.store is not None:
            deadline = time.monotonic() + _FAREWELL_SECONDS
            others = [f"left {rank}" for rank in range(1, self.count)]
            with contextlib.suppress(RuntimeError):
                while not self.store.check(others) and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)

    def _tell(self, key: str, value: Any) -> None:
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def _hear(self, key: str, rank: int) -> Any:
        """Wait for a process's value. Raises `ResourceError` when the process has died."""
        beats, since = -1, time.monotonic()
        try:
            while not self.store.check([key]):
                if self.store.check(["failure"]):
                    failure = json.loads(self.store.get("failure"))
                    raise OtherProcessError(failure["rank"], failure)
                if (count := self.store.add(f"alive {rank}", 0)) != beats:
                    beats, since = count, time.monotonic()
                elif time.monotonic() - since > _SILENCE_SECONDS:
                    raise ResourceError(
                        f"process {rank} has given no sign of life for {_SILENCE_SECONDS} s", hint=_KILLED
                    )
                time.sleep(_POLL_SECONDS)
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise ResourceError(f"the other processes can't be reached: {said_by(error)}", hint=_KILLED) from error


_KILLED = "it may have been killed for its use of memory: see its log, and run it again"


def join_processes() -> Processes:
    """The processes of a `torchrun`, by its environment (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`)."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return Processes()
    values = {name: os.environ.get(name, "") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    wrong = [name for name, value in values.items() if not value or (name != "MASTER_ADDR" and not value.isdigit())]
    if wrong or not count.isdigit():
        raise UsageError(
            f"`WORLD_SIZE` is `{count}`, but {', '.join(f'`{name}`' for name in wrong) or 'it'} can't be used",
            hint="start several processes with torchrun, or unset WORLD_SIZE",
        )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is reported in our own words
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=_MEETING_SECONDS)))
    except (RuntimeError, ValueError) as error:
        address = f"{values['MASTER_ADDR']}:{values['MASTER_PORT']}"
        raise ResourceError(
            f"the processes don't find each other at `{address}`: {said_by(error)}",
            hint="start all of them with torchrun, which chooses address and port",
        ) from error
    return Processes(rank=rank, count=size, store=PrefixStore("ftload", store))
