"""Where an output is made: a hidden directory beside it, locked, with a journal of what is finished; then one rename.

`OUT` is made in `.OUT.ftload-…/output`. Next to that lie `lock`, held while a process works there, and one journal a
process: a first line that says what is being made, then a line for each weight file that is finished and durable. A run
that was killed leaves all this behind; the next one for the same output takes the lock, proves the finished files by
their hashes, and goes on, or starts afresh where anything but the very same output was being made.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError, ResourceError, SourceError
from ..progress import Stopwatch
from ..system.durable import disk_errors, hash_files, sync_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Staging:
    """The directory in which an output is made."""

    output: Path
    """Where the result will be."""
    directory: Path

    @property
    def stage(self) -> Path:
        """The output as it grows."""
        return self.directory / "output"

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run has left something, with which the next one may go on."""
        return any(self.directory.glob("journal-*"))

    def scratch(self, rank: int) -> Path:
        """A place for what a process needs on the way; it does not outlive the run."""
        return self.directory / f"scratch-{rank}"

    def resume(self, fingerprint: str, watch: Stopwatch) -> dict[str, str]:
        """Go on where an earlier run stopped: the sha256 of each weight file that it finished, by path.

        `fingerprint` identifies the output, byte for byte. A file counts only if its contents still have the hash that
        journal gives; all else is deleted, and all of it if something else was being made.
        """
        finished: dict[str, str] = {}
        for journal in self.directory.glob("journal-*"):
            found = _read_journal(journal, fingerprint)
            if found is None:
                journal.unlink()
            finished |= found or {}
        places = {path: self.stage / path for path in finished}
        sizes = {place: place.stat().st_size for place in places.values() if place.is_file()}
        hashes: dict[Path, str | None] = {}
        if sizes:
            with watch.stage("hash"):
                hashes = hash_files(sizes, watch.progress)
        finished = {path: digest for path, digest in finished.items() if hashes.get(places[path]) == digest}
        with disk_errors(self.stage):
            self.stage.mkdir(exist_ok=True)
            _delete_all_but(finished, self.stage)
        return finished

    def publish(self, *, overwrite: bool) -> None:
        """Move the finished directory into place: one rename, and an older output is put aside until it succeeded.

        What has come to stand there in the meantime is not replaced, unless `overwrite` allows it.
        """
        with disk_errors(self.output):
            aside = self.directory / "replaced"
            try:
                if overwrite and self.output.exists():
                    self.output.rename(aside)
                self.stage.rename(self.output)  # an empty directory gives way, any other stays
            except BaseException:
                _put_back(aside, self.output)
                raise
            sync_file(self.output.parent)

    def replace(self, files: Mapping[str, str]) -> None:
        """Give files of the finished output new texts, all or none: where a run is killed, the next one goes on.

        `files`: texts by path, with at most one folder in it.
        """
        new = self.scratch(0)
        with disk_errors(self.output):
            new.mkdir()
            for name, text in files.items():
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text(text, encoding="utf-8")
                sync_file(new / name)
            for folder in _folders(new):
                sync_file(folder)
            new.rename(self.directory / "replacing")
            sync_file(self.directory)
            _replace_files(self.directory, self.output)


class Journal:
    """A process's list of the files that it has finished; every line is durable when `add` returns."""

    def __init__(self, staging: Staging, fingerprint: str, *, rank: int) -> None:
        self._path = staging.directory / f"journal-{rank}"
        self._fingerprint = fingerprint
        self._lock = threading.Lock()

    def __enter__(self) -> Journal:
        self._file = self._path.open("ab")
        if not self._file.tell():
            self._write({"fingerprint": self._fingerprint})
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, path: str, sha256: str) -> None:
        """Note a finished file; may be called from any thread."""
        self._write({"path": path, "sha256": sha256})

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._lock, disk_errors(self._path):
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Staging]:
    """Take the lock on an output and yield the place to make it in, which is gone in the end.

    It stays, for the next run to go on, only where the disk or the source failed with files already finished. Parents
    that had to be made for it are removed again when they are left empty. Raises `OutputError` when another process
    holds the lock.
    """
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            directory, lock = _lock(output)
        staging = Staging(output=output, directory=directory)
        keep = False
        try:
            with disk_errors(output):
                _put_back(directory / "replaced", output)
                _replace_files(directory, output)
                for scratch in directory.glob("scratch-*"):
                    shutil.rmtree(scratch)
                for trash in directory.parent.glob(f"{glob.escape(directory.name)}-*"):
                    shutil.rmtree(trash, ignore_errors=True)  # of a run that was killed while it tidied up
            yield staging
        except (ResourceError, SourceError):
            keep = _keep_finished(staging)
            raise
        finally:
            with contextlib.suppress(OSError):
                _replace_files(directory, output)  # where a signal came in between
            if not keep:
                _remove(directory)
            lock.close()
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _lock(output: Path) -> tuple[Path, Any]:
    """The staging directory, made if need be, and the open file that holds its lock."""
    # the name may be too long for another one to be added to it
    digest = hashlib.sha256(os.fsencode(output.name)).hexdigest()[:8]
    directory = output.parent / f".{output.name[:40]}.ftload-{digest}"
    while True:
        directory.mkdir(mode=0o700, exist_ok=True)
        try:
            file = (directory / "lock").open("w")
        except FileNotFoundError:
            continue  # whoever held it has just removed the directory
        except OSError:
            with contextlib.suppress(OSError):
                directory.rmdir()
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise OutputError(
                f"`{output}` is being prepared by another process", hint="wait for it, or choose another --output_dir"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (directory / "lock").stat()):
                return directory, file
        file.close()


def _remove(directory: Path) -> None:
    """Delete the staging directory; under another name, lest a process that takes the lock next loses what it makes."""
    trash = directory.with_name(f"{directory.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        directory.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _put_back(aside: Path, output: Path) -> None:
    """Restore an older output that was put aside for a new one that never came."""
    if aside.exists() and not output.exists():
        aside.rename(output)


def _replace_files(directory: Path, output: Path) -> None:
    """Carry out a replacement of files that was begun, to its end."""
    replacing = directory / "replacing"
    if replacing.exists():
        if output.exists():
            for folder in _folders(replacing):
                place = output / folder.relative_to(replacing)
                for path in folder.iterdir():
                    if path.is_file() and place.is_dir():
                        path.replace(place / path.name)
                if place.is_dir():
                    sync_file(place)
        shutil.rmtree(replacing)


def _folders(directory: Path) -> list[Path]:
    """A directory, and those in it."""
    return [directory, *(path for path in directory.rglob("*") if path.is_dir())]


def _keep_finished(staging: Staging) -> bool:
    """Delete all but the journals and the files that they list; whether there are any."""
    finished: dict[str, str] = {}
    for journal in staging.directory.glob("journal-*"):
        finished |= _read_journal(journal) or {}
    _delete_all_but(finished, staging.stage)
    for scratch in staging.directory.glob("scratch-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    return bool(finished)


def _delete_all_but(finished: Mapping[str, str], stage: Path) -> None:
    for path in list(stage.rglob("*")):
        if not path.is_dir() and path.relative_to(stage).as_posix() not in finished:
            path.unlink()


def _read_journal(path: Path, fingerprint: str | None = None) -> dict[str, str] | None:
    """The files that a journal lists, up to a torn line; None if it is about something else than `fingerprint`."""
    finished = {}
    try:
        first, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if fingerprint not in (None, json.loads(first)["fingerprint"]):
            return None
        for line in lines:
            entry = json.loads(line)
            finished[str(entry["path"])] = str(entry["sha256"])
    except (ValueError, KeyError, TypeError):
        pass
    return finished
