"""A model on a hub, as one commit lists it; where the hub can't be asked, as its cache holds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SourceError
from ..flags.model_page import check_endpoint
from .file_names import ADAPTER_CONFIGS, CHAT_TEMPLATES
from .hub_errors import hub_errors, is_outage, not_a_hub, with_retries
from .license import license_in, license_of_card
from .local import list_adapters, list_files
from .source import Source, SourceFile

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


def resolve_hub(model: str, revision: str | None) -> Source:
    """The commit of a repository that the revision names, with its files as the hub lists them."""
    check_endpoint()
    from huggingface_hub import CardData, HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    def ask() -> ModelInfo:
        # without a timeout the library waits for an answer for ever
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
    card = info.card_data.to_dict() if isinstance(info.card_data, CardData) else {}
    folder = repo_folder_name(repo_id=model, repo_type="model")
    return Source(
        model=model,
        kind="hub",
        revision=revision,
        commit=info.sha,
        root=Path(constants.HF_HUB_CACHE, folder, "snapshots", info.sha or "").absolute(),
        files=tuple(sorted(files, key=lambda file: file.path)),
        adapters=tuple(file.rfilename for file in siblings if file.rfilename in ADAPTER_CONFIGS),
        license=license_in(card, f"{constants.ENDPOINT}/{model}/blob/{info.sha}"),
    )


def _resolve_cached(model: str, revision: str | None, reason: SourceError) -> Source | None:
    """The source that the cache holds for the revision, or None. `reason` says why the hub could not be asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        # no patterns: a snapshot that is incomplete will do
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
        files=list_files(root),
        adapters=list_adapters(root),
        license=license_of_card(root),
        from_cache=True,
        notes=() if chosen else (note,),
    )
