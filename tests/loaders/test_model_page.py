"""Addresses of models' pages: which repository and revision they show."""

from __future__ import annotations

import pytest
from ftload.loaders.errors import SourceError, UsageError
from ftload.loaders.flags.model_page import repository_of
from huggingface_hub import constants

HUB = constants.ENDPOINT


@pytest.mark.parametrize(
    ("page", "revision", "repository"),
    [
        (f"{HUB}/org/name", None, ("org/name", None)),
        (f"{HUB}/org/name/", "v1", ("org/name", "v1")),
        (f"{HUB}/name", None, ("name", None)),
        (f"{HUB}/org/name/tree/main", None, ("org/name", "main")),
        (f"{HUB}/name/tree/v1/", "v1", ("name", "v1")),
        (f"{HUB}/org/name/tree/refs%2Fpr%2F1?show=all#files", None, ("org/name", "refs/pr/1")),
        (HUB.replace("https:", "http:").upper().replace("HTTP:", "http:") + "/Org/Name", None, ("Org/Name", None)),
        ("org/name", "v1", ("org/name", "v1")),
        ("https", None, ("https", None)),
        ("/https://x", None, ("/https://x", None)),
    ],
)
def test_what_is_taken(page: str, revision: str | None, repository: tuple[str, str | None]) -> None:
    assert repository_of(page, revision) == repository


@pytest.mark.parametrize(
    "page",
    [
        "https://elsewhere.example/org/name",
        HUB,
        f"{HUB}/",
        f"{HUB}x/org/name",
        f"{HUB}/datasets/org/name",
        f"{HUB}/org/name/blob/main/config.json",
        f"{HUB}/org/name/resolve/main/model.safetensors",
        f"{HUB}/org/name/tree/main/folder",
        f"{HUB}/org/name/tree/",
        "https://[",
    ],
)
def test_other_addresses_are_refused(page: str) -> None:
    with pytest.raises(SourceError) as caught:
        repository_of(page, None)
    assert caught.value.message == f"`{page}` is not the address of a model's page on `{HUB}`"
    assert caught.value.hint == "give `organisation/name`, a directory or a .gguf file"


def test_a_hub_below_another_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example:8443/hub")
    assert repository_of("https://mirror.example:8443/hub/org/name/tree/v1", None) == ("org/name", "v1")
    for page in ("https://mirror.example:8443/org/name", "https://mirror.example/hub/org/name"):
        with pytest.raises(SourceError):
            repository_of(page, None)


def test_two_revisions_and_credentials() -> None:
    with pytest.raises(UsageError) as caught:
        repository_of(f"{HUB}/org/name/tree/v1", "v2")
    assert caught.value.message == f"`{HUB}/org/name/tree/v1` and the revision `v2` are of two revisions"
    assert caught.value.hint == "give one of them"
    with pytest.raises(SourceError, match=r"`https://\*\*\*@h/org/name` is not") as refused:
        repository_of("https://me:secret@h/org/name", None)
    assert "secret" not in str(refused.value)
