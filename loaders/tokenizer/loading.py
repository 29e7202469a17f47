"""Loading a tokenizer: of what kind it is, or why it can't be loaded."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.json_files import lfs_pointer_error
from ..errors import CheckpointError, FtloadError, MissingRequirementError, said_by
from ..system.versions import installed_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_TOKENS = 10_000_000
"""Every id must be smaller: when a tokenizer is saved, `tokenizers` visits every id up to the last, used or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerKind:
    """What a tokenizer is, as far as `tokenizer_functions.py` makes a difference."""

    is_llama: bool
    is_gpt_neox: bool
    is_fast: bool
    words: str
    """For people: the kind, and where that was found."""


def load_tokenizer(
    root: Path, *, use_fast: bool, trust_remote_code: bool, gguf_file: str | None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the directory `root`, or of its `gguf_file`, as transformers does, but without prompts.

    Raises `CheckpointError` when none can be loaded or it needs `trust_remote_code`, `MissingRequirementError` when
    loading it takes a package that is not installed.
    """
    from transformers import AutoTokenizer

    try:
        # `trust_remote_code` is never left out: without it, transformers asks on stdin
        if gguf_file is None:
            tokenizer = AutoTokenizer.from_pretrained(root, use_fast=use_fast, trust_remote_code=trust_remote_code)
        else:
            # in a directory of its own: transformers mixes a tokenizer.json that lies beside the file into it
            with tempfile.TemporaryDirectory() as alone:
                (Path(alone) / gguf_file).symlink_to((root / gguf_file).resolve())
                tokenizer = AutoTokenizer.from_pretrained(
                    alone, gguf_file=gguf_file, use_fast=use_fast, trust_remote_code=False
                )
    except Exception as error:  # `tokenizers` raises plain Exception, and remote code raises what it likes
        raise _loading_error(error, root, gguf_file) from error
    if tokenizer.is_fast:
        # where files are missing, transformers makes up a tokenizer that knows its special tokens and nothing else
        special = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
        vocabulary = tokenizer.get_vocab()
        if all(token in special for token in vocabulary):
            raise _no_tokenizer(root)
        last = max(vocabulary.values())
        if last >= MOST_TOKENS:
            raise CheckpointError(f"the tokenizer in `{root}` has a token of the id {last:,}", hint="is it damaged?")
    try:
        _ = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    except RecursionError:  # what is unknown is looked up as the unknown token, and that is unknown too
        raise CheckpointError(
            f"a special token of the tokenizer is not in its vocabulary, nor is the unknown `{tokenizer.unk_token}`",
            hint="fix tokenizer_config.json, or take another with --tokenizer_name_or_path",
        ) from None
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CheckpointError(
            f"`model_max_length` of the tokenizer in `{root}` is no number",
            hint="fix tokenizer_config.json, or take another with --tokenizer_name_or_path",
        )
    for key in ("is_local", "local_files_only"):
        # how it was loaded, not what it is: it would be saved, and differ between a hub and a directory
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def kind_of(tokenizer: PreTrainedTokenizerBase, root: Path | None) -> TokenizerKind:
    """The kind of a tokenizer, by its class, or else by the class that the configurations in `root` name."""
    classes = [cls.__name__ for cls in type(tokenizer).__mro__]
    shown = [(name, "class") for name in classes]
    for file in ("tokenizer_config.json", "config.json"):
        declared = _declared_class(root / file) if root is not None else None
        if declared is not None:
            shown.append((declared, f"`tokenizer_class` in {file}"))
    for family, known in (("Llama", "LlamaTokenizer"), ("GPT-NeoX", "GPTNeoXTokenizer")):
        for name, where in shown:
            if name.removesuffix("Fast") == known:
                return TokenizerKind(
                    is_llama=family == "Llama",
                    is_gpt_neox=family == "GPT-NeoX",
                    is_fast=bool(tokenizer.is_fast),
                    words=f"{family} tokenizer ({where} `{name}`)",
                )
    speed = "fast" if tokenizer.is_fast else "slow"
    return TokenizerKind(
        is_llama=False,
        is_gpt_neox=False,
        is_fast=bool(tokenizer.is_fast),
        words=f"{speed} tokenizer (class `{classes[0]}`)",
    )


def _declared_class(path: Path) -> str | None:
    if not path.is_file():
        return None
    declared = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    return declared if isinstance(declared, str) else None


_JSON_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "config.json",
)  # fmt: skip
_VOCABULARY_PATTERNS = ("tokenizer.json", "*.model", "*.tiktoken", "*vocab*", "tekken.json", "*.py")
_PACKAGES = {"*.model": ("sentencepiece", "protobuf"), "*.tiktoken": ("tiktoken",)}
"""What transformers needs to convert vocabularies of other libraries."""


def _loading_error(error: Exception, root: Path, gguf_file: str | None) -> FtloadError:
    """The error for what transformers raised; it names the file at fault where that is known."""
    reason = said_by(error)
    if "trust_remote_code" in str(error):
        return CheckpointError(
            f"the tokenizer in `{root}` needs code of its own", hint="pass --trust_remote_code if you trust it"
        )
    if gguf_file is not None:
        if installed_version("gguf") is None:
            return MissingRequirementError(
                "reading GGUF files needs the `gguf` package", hint="pip install 'ftload[gguf]'"
            )
        reason = re.sub(r"\S*/" + re.escape(gguf_file), gguf_file, reason)  # the temporary directory that it lies in
        return CheckpointError(
            f"no tokenizer can be loaded from `{root / gguf_file}`: {type(error).__name__}: {reason}",
            hint="is it a whole GGUF file of a language model? --tokenizer_name_or_path takes the tokenizer from "
            "elsewhere",
        )
    if isinstance(error, ImportError):
        return MissingRequirementError(
            f"the tokenizer in `{root}` needs a package that is not installed: {reason}",
            hint=f"pip install {error.name}" if error.name else None,
        )
    broken = _broken_json(root)
    if broken is not None:
        return broken
    if not any(path for pattern in _VOCABULARY_PATTERNS for path in root.glob(pattern)):
        return _no_tokenizer(root)
    if not (root / "tokenizer.json").is_file():
        for pattern, packages in _PACKAGES.items():
            missing = [package for package in packages if installed_version(package) is None]
            for path in sorted(root.glob(pattern)):
                if missing:
                    return MissingRequirementError(
                        f"reading `{path}` needs {' and '.join(f'`{package}`' for package in missing)}",
                        hint=f"pip install {' '.join(missing)}",
                    )
    return CheckpointError(
        f"no tokenizer can be loaded from `{root}`: {type(error).__name__}: {reason}",
        hint="are its files whole, and transformers new enough? --tokenizer_name_or_path takes it from elsewhere",
    )


def _broken_json(root: Path) -> FtloadError | None:
    for path in (root / name for name in _JSON_FILES):
        try:
            raw = path.read_bytes()
            if pointer := lfs_pointer_error(raw, str(path)):
                return pointer
            if isinstance(json.loads(raw.decode()), dict):
                continue
            problem = "it is no JSON object"
        except FileNotFoundError:
            continue
        except OSError as error:
            return CheckpointError(f"can't read `{path}`: {error.strerror}")
        except (ValueError, RecursionError) as error:
            problem = str(error)
        return CheckpointError(f"`{path}` can't be used: {problem}", hint="download the tokenizer again")
    return None


def _no_tokenizer(root: Path) -> FtloadError:
    return CheckpointError(
        f"`{root}` holds no tokenizer",
        hint="it needs tokenizer.json, tokenizer.model or the like; --tokenizer_name_or_path takes it from elsewhere",
    )
