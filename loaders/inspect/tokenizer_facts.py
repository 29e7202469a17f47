"""What a tokenizer's files say of it, without loading it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.json_files import read_json
from ..source.file_names import CHAT_TEMPLATES
from ..source.source import Source

MAX_TOKENIZER_BYTES = 100_000_000
"""Of a tokenizer.json; that of Gemma 3 has 33 MB."""

_SPECIAL = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFacts:
    """What can be known of a tokenizer from its JSON files, or from a GGUF file's metadata."""

    size: int | None
    """Tokens, added ones included; None where the vocabulary is in a format that only a library reads."""
    rows_needed: int | None
    """The largest id and one: what an embedding must have at least."""
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: bool

    @property
    def pad_is_eos(self) -> bool:
        """Whether padding can't be told from the end of a sequence."""
        return self.pad_token is not None and self.pad_token == self.eos_token


def read_tokenizer_facts(source: Source) -> TokenizerFacts | None:
    """The facts of a directory or repository, None where it holds no tokenizer.

    Raises `CheckpointError` for files that are not JSON objects.
    """
    names = {file.path for file in source.files}
    vocabulary = _vocabulary(source, names)
    config = read_json(source, "tokenizer_config.json") if "tokenizer_config.json" in names else {}
    if vocabulary is None and not config and not any(name.endswith((".model", ".tiktoken")) for name in names):
        return None
    if vocabulary is not None:
        decoder = config.get("added_tokens_decoder")
        for index, token in (decoder if isinstance(decoder, dict) else {}).items():
            content = _content(token)
            if content is not None and re.fullmatch(r"\d{1,9}", index):
                vocabulary.setdefault(content, int(index))
    special = dict.fromkeys(_SPECIAL)
    for found in (read_json(source, "special_tokens_map.json") if "special_tokens_map.json" in names else {}, config):
        special |= {key: _content(found[key]) for key in _SPECIAL if key in found}
    for token in filter(None, special.values()):
        if vocabulary is not None and token not in vocabulary:
            # transformers gives it the next id when it loads the tokenizer
            vocabulary[token] = max(vocabulary.values(), default=-1) + 1
    has_template = bool(config.get("chat_template")) or any(
        name in ("chat_template.jinja", "chat_template.json") or name.startswith(CHAT_TEMPLATES) for name in names
    )
    return TokenizerFacts(
        size=None if vocabulary is None else len(vocabulary),
        rows_needed=None if vocabulary is None else max(vocabulary.values(), default=-1) + 1,
        **special,
        chat_template=has_template,
    )


def gguf_tokenizer_facts(metadata: Mapping[str, Any]) -> TokenizerFacts | None:
    """The facts in the metadata of a GGUF file, None where it holds no tokenizer."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return None

    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None

    return TokenizerFacts(
        size=len(tokens),
        rows_needed=len(tokens),
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        chat_template="tokenizer.chat_template" in metadata,
    )


def _vocabulary(source: Source, names: set[str]) -> dict[str, int] | None:
    """Token to id, of the fast tokenizer's file or the two of a slow one."""
    if "tokenizer.json" in names:
        document = read_json(source, "tokenizer.json", most_bytes=MAX_TOKENIZER_BYTES)
        model, added = document.get("model"), document.get("added_tokens")
        vocabulary = _ids(model.get("vocab") if isinstance(model, dict) else None)
        for token in added if isinstance(added, list) else ():
            if isinstance(token, dict) and type(token.get("id")) is int:
                vocabulary[str(token.get("content"))] = token["id"]
        return vocabulary
    if "vocab.json" in names:
        vocabulary = _ids(read_json(source, "vocab.json", most_bytes=MAX_TOKENIZER_BYTES))
        return vocabulary | (_ids(read_json(source, "added_tokens.json")) if "added_tokens.json" in names else {})
    return None


def _ids(vocabulary: Any) -> dict[str, int]:
    if isinstance(vocabulary, dict):
        return {token: index for token, index in vocabulary.items() if type(index) is int}
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, in the order of their ids
        return {str(pair[0]): index for index, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    return {}


def _content(token: Any) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
