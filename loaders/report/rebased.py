"""The base that a prepared adapter names: whether it is still where the directory lies, and changed where it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError, SourceError, UsageError, VerificationError, said_by
from ..flags.model_page import repository_of
from ..source.file_names import PREPARED_ADAPTER_CONFIG as ADAPTER_CONFIG
from ..source.file_names import REPORT_FILE
from ..source.license import CARD_FILE
from ..system.durable import hash_or_none
from ..write.staging import staged
from .document import Report
from .metadata_files import json_text
from .model_card import model_card
from .outputs import as_report, read_document


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedBase:
    """What an adapter names as its base."""

    base: str
    """A hub id, or an absolute path."""
    revision: str | None = None

    def __str__(self) -> str:
        return self.base + (f" @ {self.revision}" if self.revision else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebased:
    """What was done to make an adapter name another base."""

    before: NamedBase
    after: NamedBase
    files: tuple[str, ...]
    """All that were rewritten."""


def hub_base(text: str) -> NamedBase:
    """The base that `ORG/NAME[@REVISION]`, or the address of its page, names. It need not exist yet: nobody is asked.

    Raises `UsageError` for what can't be a repository's name, and for what is a directory here.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    hint = "give a repository as `organisation/name`, with `@` and a commit behind it if you like"
    name, _, revision = text.partition("@")
    if Path(name).exists():
        raise UsageError(f"`--base`: `{name}` is on this machine, and would be taken for that", hint=hint)
    try:
        model, revision = repository_of(name, revision or None)
        validate_repo_id(model)
    except (HFValidationError, SourceError) as error:
        raise UsageError(f"`--base`: {said_by(error)}", hint=hint) from error
    if model.count("/") != 1 or text.endswith("@") or not re.fullmatch(r"[\w./-]*", revision or ""):
        raise UsageError(f"`--base`: `{text}` does not name a repository", hint=hint)
    return NamedBase(base=model, revision=revision)


def stale_base(report: Report, root: Path) -> str | None:
    """The place that the adapter names as its base though that lies in `root`, a directory that was moved there."""
    if report.adapter is None or report.base != "copy" or not Path(report.adapter.base).is_absolute():
        return None
    return None if os.path.realpath(report.adapter.base) == os.path.realpath(root) else report.adapter.base


def name_base(directory: Path, base: NamedBase | None) -> Rebased | None:
    """Make the adapter name `base`, or the directory's present place: all files or none; None where it does already.

    adapter_config.json gets other values for `base_model_name_or_path` and `revision`; the report follows in `adapter`
    and in the files' hashes, and the model card where it tells of the base. An adapter whose base is not in the
    directory is left alone.

    Raises `UsageError` where there is nothing that could name `base`, `VerificationError` where adapter_config.json was
    changed in anything else since it was written.
    """
    root = directory.resolve()
    if not root.is_dir():
        return None  # which `verify` has words for
    try:
        return _name_base(directory, root, base)
    except UnicodeError as error:
        raise VerificationError(f"`{root / REPORT_FILE}` holds what is no text") from error
    except OutputError as error:
        hint = "the directory and its parent have to be writable, and no other run may be at work there"
        raise OutputError(error.message, hint=hint) from error


def _name_base(directory: Path, root: Path, base: NamedBase | None) -> Rebased | None:
    with staged(root) as staging:
        document = read_document(root)
        report = as_report(document, str(root / REPORT_FILE))
        adapter = report.adapter
        if adapter is None or report.base != "copy":
            if base is None:
                return None
            what = "has no adapter" if adapter is None else f"has an adapter of another model, `{adapter.base}`"
            raise UsageError(f"`--base`: `{directory}` {what}", hint="leave it out")
        before = NamedBase(base=adapter.base, revision=adapter.revision)
        after = base or NamedBase(base=str(root))
        files = {file["path"]: file for file in document["files"]}
        config = _config_as_written(root, before, files.get(ADAPTER_CONFIG, {}).get("sha256"))
        text = _with_base(config, after)
        if before == after and (root / ADAPTER_CONFIG).read_text(encoding="utf-8") == text:
            return None
        rebased = dataclasses.replace(adapter, base=after.base, revision=after.revision)
        card = model_card(dataclasses.replace(report, adapter=rebased))
        texts = {ADAPTER_CONFIG: text}
        # one that somebody has written on is theirs
        as_written = hash_or_none(root / CARD_FILE) == files.get(CARD_FILE, {}).get("sha256")
        if as_written and card != model_card(report):
            texts[CARD_FILE] = card
        for name, new in texts.items():
            files[name] |= {"bytes": len(new.encode()), "sha256": hashlib.sha256(new.encode()).hexdigest()}
        document["adapter"] |= {"base": after.base, "revision": after.revision}
        texts[REPORT_FILE] = json_text(document)
        texts[REPORT_FILE].encode()
        staging.replace(texts)
        return Rebased(before=before, after=after, files=tuple(texts))


def _config_as_written(root: Path, named: NamedBase, sha256: str | None) -> dict[str, Any]:
    """adapter_config.json, in which nothing but the base was changed since it was written."""
    try:
        config = json.loads((root / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        written = hashlib.sha256(_with_base(config, named).encode()).hexdigest()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise VerificationError(f"`{root / ADAPTER_CONFIG}` can't be read") from error
    if written != sha256:
        raise VerificationError(
            f"`{root / ADAPTER_CONFIG}` is not what was written, and not in its base alone",
            hint="prepare it again with --overwrite",
        )
    return config


def _with_base(config: dict[str, Any], named: NamedBase) -> str:
    return json_text({**config, "base_model_name_or_path": named.base, "revision": named.revision})
