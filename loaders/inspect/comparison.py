"""What differs between two checkpoints: names, dtypes, shapes, and on request the tensors' contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import CheckpointError, SourceError
from .inspection import Inspection
from .inventory import StoredTensor

_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Something of one tensor that is not alike: dtype, shape, or sha256 of the contents."""

    name: str
    what: str
    first: Any
    second: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two checkpoints side by side. Where tensors lie, and in which file, does not count."""

    models: tuple[str, str]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Names that one of them has and the other has not."""
    changes: tuple[Change, ...]
    common: int
    """Tensors that both have."""
    hashed: int | None
    """Tensors whose contents were compared; None where that was not asked for."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs, of what was compared."""
        return not (self.changes or any(self.only))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "equal": self.equal,
            "models": list(self.models),
            "only_in_first": list(self.only[0]),
            "only_in_second": list(self.only[1]),
            "changes": [asdict(change) for change in self.changes],
            "common": self.common,
            "hashed": self.hashed,
        }


def compare(first: Inspection, second: Inspection, *, contents: bool) -> Comparison:
    """Compare tensor by tensor, in the order of their names.

    With `contents`, those of one dtype and shape are hashed, in chunks, on two threads. Raises `SourceError` where the
    weights are not on this machine, `CheckpointError` where a file ends early.
    """
    ours, theirs = ({tensor.name: tensor for tensor in found.tensors} for found in (first, second))
    common = [name for name in ours if name in theirs]
    changes = [change for name in common for change in _changes(ours[name], theirs[name])]
    changed = {change.name for change in changes}
    alike = [name for name in common if name not in changed]
    if contents:
        with ThreadPoolExecutor(2) as pool:
            left, right = pool.map(_hashes, ([ours[name] for name in alike], [theirs[name] for name in alike]))
        changes += [
            Change(name=name, what="contents", first=left[name], second=right[name])
            for name in alike
            if left[name] != right[name]
        ]
    return Comparison(
        models=(first.model, second.model),
        only=(
            tuple(name for name in ours if name not in theirs),
            tuple(name for name in theirs if name not in ours),
        ),
        changes=tuple(changes),
        common=len(common),
        hashed=len(alike) if contents else None,
    )


def _changes(first: StoredTensor, second: StoredTensor) -> Iterable[Change]:
    for what in ("dtype", "shape"):
        ours, theirs = getattr(first, what), getattr(second, what)
        if ours != theirs:
            yield Change(name=first.name, what=what, first=ours, second=theirs)


def _hashes(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    return {tensor.name: _sha256(tensor) for tensor in tensors}


def _sha256(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for path, begin, end in tensor.parts:
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(begin)
                left = end - begin
                while left:
                    chunk = file.read(min(_CHUNK_BYTES, left))
                    if not chunk:
                        raise CheckpointError(f"`{path}` ends within tensor `{tensor.name}`")
                    digest.update(chunk)
                    left -= len(chunk)
        except FileNotFoundError as error:
            raise SourceError(
                f"the weights in `{path.name}` are not on this machine", hint="`--bytes` compares what is downloaded"
            ) from error
        except OSError as error:
            raise SourceError(f"can't read `{path}`: {error.strerror or error}") from error
    return digest.hexdigest()
