"""Where a model comes from: a local directory, a repository on a hub, or a GGUF file.

All that talks to a hub is in this file, through huggingface_hub, which honours `HF_TOKEN`, `HF_HOME`,
`HF_ENDPOINT` and `HF_HUB_OFFLINE` itself; hub_errors.py wraps each call, with the repository and the file.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import CheckpointError, SourceError, UsageError, said_by
from ..flags.model_page import check_endpoint, repository_of
from ..system.safe_text import masked
from .hub_errors import hub_errors, is_outage, not_a_hub, with_retries

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


CHAT_TEMPLATES = "additional_chat_templates"
"""The one sub-folder that a tokenizer is made of; all others are left alone."""


TOKENIZER_PATTERNS = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*vocab*.txt", "*merges*.txt", f"{CHAT_TEMPLATES}/*.jinja",
)  # fmt: skip


ADAPTER_FILE = "adapter_model.safetensors"
"""An adapter's weights, as PEFT calls them."""


ADAPTER_CONFIGS = ("adapter_config.json", "adapter/adapter_config.json")
"""Where an adapter lies beside a model, or in a directory that ftload prepared."""


MAX_SIDE_FILE_BYTES = 16 * 1024 * 1024
"""A JSON file that is larger and not the tokenizer's own is a log or data, not configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a model."""

    path: str
    """Relative to the root, with `/`."""
    bytes: int
    sha256: str | None
    """As the hub states it, which it does for large files only; not checked here."""
    mtime_ns: int | None = None
    """When a local file was last changed, as it was listed; what a hub's cache holds never changes."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's files, and the way to have them or parts of them."""

    model: str
    """As the user gave it."""
    kind: Literal["local", "hub", "gguf"]
    revision: str | None
    """As the user asked for it. It means nothing for a local model."""
    commit: str | None
    """40 hex digits; None unless on a hub."""
    root: Path
    """The directory, absolute. On a hub: the cache's snapshot of the commit, where fetched files appear."""
    files: tuple[SourceFile, ...]
    """The top level and `additional_chat_templates/`, sorted; of a GGUF model, that file alone."""
    gguf_file: str | None = None
    """The name of the GGUF file in `root`."""
    adapters: tuple[str, ...] = ()
    """Where the directory or repository holds adapters too: the paths of their adapter_config.json."""
    from_cache: bool = False
    """The hub could not be asked, so `files` is what the cache happens to hold."""
    notes: tuple[str, ...] = ()
    """What the user should be warned of."""

    def fetch(self, names: Iterable[str], on_progress: Callable[[int], None] | None = None) -> None:
        """Make the files exist under `root`; those of a local model do already.

        `on_progress` gets the bytes that arrived since its last call, perhaps in another thread. They add up
        to the sizes of the files: one in the cache counts at once, one that begins anew counts negative.
        Raises `SourceError`, or `ResourceError` when the disk is full; complete files stay.
        """
        if self.kind != "hub":
            return
        files = {file.path: file for file in self.files}
        for name in dict.fromkeys(names):
            if name not in files:
                where = "in the cache" if self.from_cache else f"at commit {self.commit}"
                raise SourceError(f"`{self.model}` has no file `{name}` {where}")
            if not (self.root / name).exists():
                self._download(files[name], on_progress)
            elif on_progress:
                on_progress(files[name].bytes)

    def is_here(self, names: Iterable[str]) -> bool:
        """Whether nothing of these files would have to travel."""
        return all((self.root / name).exists() for name in names)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """The bytes `begin` (first) to `end` (exclusive) of a file.

        Of a file that was not fetched only these bytes travel. Raises `SourceError`, or `CheckpointError` if
        the file is shorter.
        """
        path = self.root / name
        try:
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read(end - begin)
        except FileNotFoundError as error:
            if self.kind != "hub":
                raise SourceError(f"`{path}` is missing") from error
            data = self._download_range(name, begin, end)
        except OSError as error:
            raise SourceError(f"can't read `{path}`: {error.strerror or error}") from error
        if len(data) != end - begin:
            raise CheckpointError(
                f"`{name}` ends after {begin + len(data)} bytes, before byte {end}",
                hint="the file is incomplete: get it again",
            )
        return data

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise `CheckpointError` for a file whose size or time of modification is not what it was when listed.

        To be asked after the last read: what was read before it is of one state then.
        """
        files = {file.path: file for file in self.files}
        for name in names:
            path, listed = self.root / name, files[name]
            try:
                found = path.stat()
            except OSError as error:
                raise SourceError(f"can't read `{path}`: {error.strerror or error}") from error
            if found.st_size != listed.bytes or listed.mtime_ns not in (None, found.st_mtime_ns):
                raise CheckpointError(
                    f"`{path}` changed while it was read", hint="run it again when nothing writes to it"
                )

    def _download(self, file: SourceFile, on_progress: Callable[[int], None] | None) -> None:
        from huggingface_hub import hf_hub_download

        arrived = 0

        def count(number: int) -> None:
            nonlocal arrived
            arrived += number
            if on_progress and number:
                on_progress(number)

        def get() -> None:
            count(-arrived)
            hf_hub_download(self.model, file.path, revision=self.commit, tqdm_class=_progress_class(count))

        with hub_errors(self.model, self.commit, file.path):
            with_retries(get)
        count(file.bytes - arrived)  # what another commit has in the cache too did not travel
        size = (self.root / file.path).stat().st_size
        if size != file.bytes:
            raise SourceError(f"`{file.path}` has {size} bytes, the hub lists it with {file.bytes}")
        self._remember_revision()

    def _remember_revision(self) -> None:
        """Note the commit under the revision's name, so that it is found offline.

        The layout is huggingface_hub's (its guide "Understand caching"): `refs/<revision>` holds the commit.
        The library writes it only for downloads by name, where each file could be of another commit.
        """
        revision = self.revision or "main"
        if revision == self.commit or not self.commit:
            return
        ref = self.root.parent.parent / "refs" / revision
        try:
            if ref.is_file() and ref.read_text() == self.commit:
                return
            ref.parent.mkdir(parents=True, exist_ok=True)
            # renamed into place: another process may be reading it
            temporary = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
            temporary.write_text(self.commit)
            temporary.replace(ref)
        except OSError:
            return  # a convenience: a cache that can't be written still serves this run

    def _download_range(self, name: str, begin: int, end: int) -> bytes:
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        if begin == end:
            return b""
        url = hf_hub_url(self.model, name, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}

        def get() -> bytes:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                # a server that knows no ranges sends the file from its start: stop where the range ends
                skip = 0 if response.status_code == 206 else begin
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) >= skip + end - begin:
                        break
                return bytes(data[skip : skip + end - begin])

        with hub_errors(self.model, self.commit, name):
            return with_retries(get)


def resolve_source(model: str, revision: str | None) -> Source:
    """Find the model: a directory, a `.gguf` file, or a repository on the hub, by name or by its page's address.

    What is on disk wins. Raises `SourceError` when there is nothing to be found or no way to it, `UsageError`
    when `model` is empty.
    """
    if not model:
        raise UsageError("the name of the model is empty")
    model, revision = repository_of(model, revision)
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            path = path.resolve()
            files = _list_files(path)
            _check_links(path, files)
            return Source(
                model=model, kind="local", revision=revision, commit=None, root=path, files=files,
                adapters=_list_adapters(path),
            )  # fmt: skip
        if path.is_file():
            return _resolve_file(model, revision, path.parent.resolve() / path.name)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        reason = error.strerror if isinstance(error, OSError) else said_by(error)
        raise SourceError(f"can't read `{masked(model)}`: {reason}") from error
    if _looks_like_path(model):
        hint = "check the path; a repository on the hub is given as `organisation/name`"
        raise SourceError(f"`{masked(model)}` does not exist", hint=hint)
    return _resolve_hub(model, revision)


def config_file_names(files: Iterable[SourceFile]) -> tuple[str, ...]:
    """The files that describe the model."""
    return tuple(file.path for file in files if file.path in ("config.json", "generation_config.json"))


def tokenizer_file_names(files: Iterable[SourceFile], *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """The files that a tokenizer may need; with `trust_remote_code`, the Python files too."""

    def is_needed(file: SourceFile) -> bool:
        if file.path.endswith(".py"):
            return trust_remote_code
        if file.path.endswith(".index.json") or not any(fnmatch(file.path, p) for p in TOKENIZER_PATTERNS):
            return False
        own = "token" in file.path or "vocab" in file.path or not file.path.endswith(".json")
        return own or file.bytes <= MAX_SIDE_FILE_BYTES

    return tuple(file.path for file in files if is_needed(file))


def _resolve_file(model: str, revision: str | None, path: Path) -> Source:
    if path.suffix.lower() != ".gguf":
        hint = f"give the directory: `{path.parent}`"
        raise SourceError(f"`{model}` is a file, but not a .gguf file", hint=hint)
    return Source(
        model=model,
        kind="gguf",
        revision=revision,
        commit=None,
        root=path.parent,
        files=(_local_file(path, path.parent),),
        gguf_file=path.name,
    )


def _list_files(root: Path) -> tuple[SourceFile, ...]:
    templates = root / CHAT_TEMPLATES
    paths = [*root.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    # is_file is false for a link to nothing, such as the cache leaves when a blob is deleted
    files = [_local_file(path, root) for path in paths if path.is_file()]
    return tuple(sorted(files, key=lambda file: file.path))


def _check_links(root: Path, files: Iterable[SourceFile]) -> None:
    """Refuse links that lead out of a model: a template or a configuration is copied, and could be anybody's file.

    Weights may be links, since nothing but tensors is read from them; so may what a hub's cache links to its blobs.
    """
    allowed = (root, root.parent.parent / "blobs")
    for file in files:
        path = root / file.path
        target = path.resolve()
        if file.path.endswith((".safetensors", ".bin", ".gguf")) or any(target.is_relative_to(p) for p in allowed):
            continue
        raise CheckpointError(
            f"`{path}` is a link to `{target}`, out of the model's directory", hint="put the file itself there"
        )


def _local_file(path: Path, root: Path) -> SourceFile:
    found = path.stat()
    return SourceFile(
        path=path.relative_to(root).as_posix(), bytes=found.st_size, sha256=None, mtime_ns=found.st_mtime_ns
    )


def _looks_like_path(model: str) -> bool:
    """Whether a name that is not on disk was meant to be: such a name is never sent to a hub."""
    is_file_name = "/" not in model and model.lower().endswith((".gguf", ".safetensors", ".bin"))
    is_path = model.startswith(("/", "./", "../", "~")) or model.endswith("/") or "\\" in model
    return is_path or is_file_name or model.count("/") > 1


def _resolve_hub(model: str, revision: str | None) -> Source:
    check_endpoint()
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    def ask() -> ModelInfo:
        # the library itself would wait for an answer without limit
        return HfApi().model_info(model, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    try:
        with hub_errors(model, revision):
            info = with_retries(ask)
    except SourceError as error:
        cached = _resolve_cached(model, revision, error) if is_outage(error.__cause__) else None
        if cached is None:
            raise
        return cached
    except HFValidationError as error:
        hint = "give an existing directory, a .gguf file, or a repository as `organisation/name`"
        raise SourceError(f"`{model}` does not exist, and can't be a repository's name", hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_a_hub() from error
    siblings = info.siblings or []
    if not re.fullmatch("[0-9a-f]{40}", info.sha or "") or any(file.size is None for file in siblings):
        raise not_a_hub()
    files = [
        SourceFile(path=file.rfilename, bytes=file.size or 0, sha256=file.lfs.sha256 if file.lfs else None)
        for file in siblings
        if file.rfilename.rpartition("/")[0] in ("", CHAT_TEMPLATES)
    ]
    folder = repo_folder_name(repo_id=model, repo_type="model")
    return Source(
        model=model,
        kind="hub",
        revision=revision,
        commit=info.sha,
        root=Path(constants.HF_HUB_CACHE, folder, "snapshots", info.sha or "").absolute(),
        files=tuple(sorted(files, key=lambda file: file.path)),
        adapters=tuple(file.rfilename for file in siblings if file.rfilename in ADAPTER_CONFIGS),
    )


def _list_adapters(root: Path) -> tuple[str, ...]:
    return tuple(name for name in ADAPTER_CONFIGS if (root / name).is_file())


def _resolve_cached(model: str, revision: str | None, reason: SourceError) -> Source | None:
    """The revision as the cache knows it, or None. `reason` says why the hub was not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        # no patterns: a snapshot that is there in part will do
        root = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None
    chosen = isinstance(reason.__cause__, OfflineModeIsEnabled)
    note = f"{reason.message}: using commit {root.name} of `{model}` from the cache"
    return Source(
        model=model,
        kind="hub",
        revision=revision,
        commit=root.name,
        root=root,
        files=_list_files(root),
        adapters=_list_adapters(root),
        from_cache=True,
        notes=() if chosen else (note,),
    )


def _progress_class(on_progress: Callable[[int], None]) -> type[Any]:
    """What the library takes for a progress bar: draws nothing, hands on the bytes."""
    from tqdm import tqdm

    class Progress(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # huggingface_hub's own, which tqdm refuses
            super().__init__(*args, **{**options, "disable": True})
            self.update(options.get("initial"))  # there from an earlier run

        def update(self, n: float | None = 1) -> None:
            on_progress(int(n or 0))

        # having these, hf_xet's download makes one bar, not one for the line and one for the disk
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, postfix: str, refresh: bool = False) -> None:
            pass

    return Progress
