"""The tokenizer of an output: where it comes from, loaded and set up for training, described and saved."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import CheckpointError, UsageError, said_by
from ..source.file_names import tokenizer_file_names
from ..source.source import Source
from ..system.quiet import quiet_transformers
from .loading import TokenizerKind, kind_of, load_tokenizer
from .rendering import Turns
from .template_choice import check_template
from .tokenizer_functions import FUNCTIONS, PAD_IS_EOS, Changes, TokenizerOptions, set_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedTokenizer:
    """A tokenizer that is set up for training, and how."""

    tokenizer: PreTrainedTokenizerBase
    chat_template_name: str | None
    """The built-in name or the file that the chat template was taken from; None for the tokenizer's own."""
    turns: Turns | None
    """What the chat template makes of conversations; None where there is no template."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return what the report says of the tokenizer: plain JSON; `size` counts all tokens, added ones too."""
        tokenizer = self.tokenizer
        return {
            "class": type(tokenizer).__name__,
            "size": len(tokenizer),
            "pad_token": tokenizer.pad_token,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token": tokenizer.eos_token,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token": tokenizer.bos_token,
            "padding_side": tokenizer.padding_side,
            "model_max_length": tokenizer.model_max_length,
            "chat_template_sha256": template_hash(tokenizer.chat_template),
            "chat_template_name": self.chat_template_name,
        }


def resolve_tokenizer_source(
    *,
    tokenizer_name_or_path: str | None,
    tokenizer_revision: str | None,
    tokenizer_name: str | None,
    model: str,
    model_revision: str | None,
) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the tokenizer's name, its revision and warnings; what is not given is the model's.

    `tokenizer_name` is the deprecated name of `tokenizer_name_or_path`. Raises `UsageError` when they disagree.
    """
    warnings: list[str] = []
    if tokenizer_name is not None:
        if tokenizer_name_or_path not in (None, tokenizer_name):
            raise UsageError(
                f"`tokenizer_name` is `{tokenizer_name}`, but `tokenizer_name_or_path` is `{tokenizer_name_or_path}`",
                hint="leave out --tokenizer_name, which is deprecated",
            )
        warnings.append("`tokenizer_name` is deprecated: use `tokenizer_name_or_path`")
    name = tokenizer_name_or_path or tokenizer_name or model
    revision = tokenizer_revision or model_revision
    if name != model and revision != model_revision:
        warnings.append(
            f"the tokenizer, `{name}` at `{revision}`, differs from the model, `{model}` at "
            f"`{model_revision or 'its default revision'}`, in name and revision"
        )
    return name, revision, tuple(warnings)


_MAX_FILE_BYTES = 100_000_000
"""Of one file of a tokenizer; the largest that are known have 35 MB, and reading takes several times as much memory."""


def fetch_tokenizer(source: Source, *, trust_remote_code: bool) -> None:
    """Have the files that a tokenizer may need. Raises `CheckpointError` for one that is too large."""
    names = tokenizer_file_names(source.files, trust_remote_code=trust_remote_code)
    for file in source.files:
        if file.path in names and file.bytes > _MAX_FILE_BYTES:
            raise CheckpointError(f"`{file.path}` of the tokenizer is {file.bytes} bytes long")
    source.fetch(names)


def prepare_tokenizer(
    root: Path,
    *,
    get_tokenizer_fn: str,
    use_fast: bool,
    trust_remote_code: bool,
    chat_template_name: str | None,
    add_bos: bool,
    name: str,
    gguf_file: str | None = None,
) -> PreparedTokenizer:
    """Load the tokenizer of the directory `root`, or of its `gguf_file`, and set it up as `get_tokenizer_fn` says.

    `name` is the tokenizer's name as the user gave it; some rules look for `olmo` in it. Nothing is fetched, printed
    or asked.

    Raises:
        UsageError: the flags are wrong, or don't fit this tokenizer or each other.
        CheckpointError: there is no tokenizer that can be loaded, or it needs `trust_remote_code`.
        MissingRequirementError: loading it takes a package that is not installed.
    """
    if get_tokenizer_fn not in FUNCTIONS:
        raise UsageError(
            f"`get_tokenizer_fn` is `{get_tokenizer_fn}`, which is not known",
            hint=f"choose one of {', '.join(FUNCTIONS)}",
        )
    options = TokenizerOptions(
        function=get_tokenizer_fn, name=name, use_fast=use_fast, template=chat_template_name, add_bos=add_bos
    )
    with quiet_transformers():
        tokenizer = load_tokenizer(root, use_fast=use_fast, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
        kind = kind_of(tokenizer, root if gguf_file is None else None)
        return _check(tokenizer, kind, options, set_up(tokenizer, kind, options))


def _check(
    tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: TokenizerOptions, changes: Changes
) -> PreparedTokenizer:
    """Look for what training would miss in a tokenizer that is set up."""
    decisions, warnings = [*changes.decisions], [*changes.warnings]
    if not options.use_fast and kind.is_fast:
        reason = "transformers 5 loads the same tokenizer, the fast one, either way"
        decisions.append(Decision(what="use_fast", requested="false", effective="true", reason=reason))
    if tokenizer.eos_token is None:
        warnings.append("the tokenizer has no eos token: a model can't learn from it where a text ends")
    if tokenizer.pad_token is None:
        warnings.append("the tokenizer has no pad token: texts of different lengths can't share a batch")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        warnings.append(f"pad and eos are the same token, `{tokenizer.eos_token}`: {PAD_IS_EOS}")
    turns = check_template(tokenizer)
    if turns is None:
        warnings.append("the tokenizer has no chat template: training on conversations needs one")
    return PreparedTokenizer(
        tokenizer=tokenizer,
        chat_template_name=changes.template,
        turns=turns,
        decisions=tuple(decisions),
        warnings=tuple(warnings),
    )


def save_tokenizer(prepared: PreparedTokenizer, directory: Path) -> tuple[str, ...]:
    """Write the tokenizer's files into `directory` and return their names, sorted, relative to it.

    The same tokenizer always gives the same bytes. Raises `CheckpointError` for settings that can't be written.
    """
    try:
        with quiet_transformers():
            paths = prepared.tokenizer.save_pretrained(directory)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the tokenizer can't be saved: {said_by(error)}", hint="is its configuration whole?"
        ) from error
    return tuple(sorted(Path(path).relative_to(directory).as_posix() for path in paths))


def template_hash(template: str | dict[str, str] | None) -> str | None:
    """The sha256 of a chat template, or of several by name; None for none."""
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
