"""The license of a model, as the metadata of its model card tells it: the front matter of README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..system.safe_text import masked

CARD_FILE = "README.md"
"""The model card, of a model as of an output."""
_MOST_BYTES = 32 * 1024
"""Of a front matter; longer ones hold results of evaluations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class License:
    """A license, in the three keys that the hub's model cards have for it (huggingface.co/docs/hub/model-cards)."""

    id: str
    """One of the hub's own, such as `apache-2.0`; `other` for what has a name."""
    name: str | None
    link: str | None
    """An address."""


def license_in(metadata: Mapping[str, Any], page: str | None) -> License | None:
    """The license that a model card's metadata tells; None where there is none, or what can't be one.

    `page` is where the repository's files are shown, for a link to one of them; a file that is nowhere to be seen is
    no address, and left out.
    """
    found = metadata.get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", found):
        return None
    name, link = metadata.get("license_name"), metadata.get("license_link")
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
        name = None
    if not isinstance(link, str) or not re.fullmatch(r"[!-~]{1,500}", link) or re.search(r"[<>\"'`\\]", link):
        link = None
    elif not link.startswith(("https://", "http://")):
        is_file = page is not None and re.fullmatch(r"(?!.*\.\.)[\w.][\w./-]*", link)
        link = f"{page}/{link}" if is_file else None
    return License(id=found, name=None if name is None else masked(name), link=None if link is None else masked(link))


def license_of_card(root: Path) -> License | None:
    """The license in the front matter of a directory's README.md, if it has one.

    Nothing is built from what is written there: keys and values are taken as text.
    """
    try:
        with (root / CARD_FILE).open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8-sig", errors="replace")
    except OSError:
        return None
    front = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    if front is None:
        return None
    import yaml

    try:
        node = yaml.compose(front[1], Loader=yaml.SafeLoader)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None
    if not isinstance(node, yaml.MappingNode):
        return None
    return license_in({key.value: _text(value) for key, value in node.value if isinstance(key.value, str)}, None)


def _text(node: Any) -> Any:
    """A string as it is written, or a list of such."""
    if isinstance(node.value, list):
        return [item.value for item in node.value if not isinstance(item, tuple)]
    return node.value
