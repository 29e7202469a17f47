"""The four functions that `--get_tokenizer_fn` names: which special tokens they set, which chat templates they accept.

They are those of Open Instruct (`dataset_transformation.py`), and work on what transformers has loaded: a class that
brings special tokens of its own, as GPT-NeoX's does, has them already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import UsageError
from .template_choice import OWN, prefix_with_bos, set_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .loading import TokenizerKind


PAD = "<pad>"
"""The pad token that is added where there is none to use."""
PAD_IS_EOS = "training that masks padding ignores where texts end"
"""What is wrong with a pad token that is the eos token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerOptions:
    """What the tokenizer flags ask for."""

    function: str
    name: str
    """The tokenizer's name as the user gave it."""
    use_fast: bool
    template: str | None
    """Value of `--chat_template_name`."""
    add_bos: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What a function has done to a tokenizer."""

    template: str | None
    """The built-in name or the file of the chat template that was set; None for the tokenizer's own."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]


def _simple_v1(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: TokenizerOptions) -> Changes:
    reason = f"`{options.function}` leaves the chat template as it was loaded"
    decisions = []
    if options.template is not None:
        decisions.append(Decision(what="chat_template_name", requested=options.template, effective=OWN, reason=reason))
    if options.add_bos:
        decisions.append(Decision(what="add_bos", requested="true", effective="false", reason=reason))
    return Changes(template=None, decisions=tuple(decisions), warnings=())


def _tulu_v1(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: TokenizerOptions) -> Changes:
    if kind.is_llama:
        wanted: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": PAD}
        lacking = sorted(set(wanted.values()) - tokenizer.get_vocab().keys())
        if len(lacking) > 1:
            raise UsageError(
                f"`{options.function}` does not fit the tokenizer of `{options.name}`: it is a {kind.words} whose "
                f"vocabulary lacks {', '.join(f'`{token}`' for token in lacking)}",
                hint=f"leave out --get_tokenizer_fn, which is `{DEFAULT_FUNCTION}` then",
            )
        tokenizer.add_special_tokens(wanted)
    elif kind.is_gpt_neox:
        _set_gpt_neox_tokens(tokenizer, options, needs_add_bos=True)
    elif kind.is_fast and tokenizer.pad_token is None:
        _add_pad(tokenizer)
    return _with_template(tokenizer, kind, options, unknown_is_own=True)


def _tulu_v2_1(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: TokenizerOptions) -> Changes:
    return _tulu_v2(tokenizer, kind, options, needs_add_bos=True)


def _tulu_v2_2(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: TokenizerOptions) -> Changes:
    # a template is a name or a file: the directories that lead to a file don't name it
    template_is_olmo = options.template is not None and "olmo" in Path(options.template).name.lower()
    if "olmo" in options.name.lower():
        _check_olmo(options, template_is_olmo=template_is_olmo)
    return _tulu_v2(tokenizer, kind, options, needs_add_bos=not template_is_olmo)


def _check_olmo(options: TokenizerOptions, *, template_is_olmo: bool) -> None:
    subject = f"the tokenizer's name, `{options.name}`, contains `olmo`"
    if not options.use_fast:
        raise UsageError(f"{subject}: it needs the fast tokenizer", hint="leave out --use_fast false")
    if options.template is None:
        return
    if template_is_olmo and options.add_bos:
        raise UsageError(
            f"{subject}, and so does `{options.template}`: such chat templates write the bos token themselves",
            hint="leave out --add_bos",
        )
    if not template_is_olmo and not options.add_bos:
        raise UsageError(
            f"{subject}: the chat template `{options.template}` needs `--add_bos`",
            hint="pass --add_bos, or leave out --chat_template_name to keep the tokenizer's own",
        )


def _tulu_v2(
    tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: TokenizerOptions, *, needs_add_bos: bool
) -> Changes:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if kind.is_gpt_neox:
            _set_gpt_neox_tokens(tokenizer, options, needs_add_bos=needs_add_bos)
        elif kind.is_llama or kind.is_fast:
            _add_pad(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UsageError(
            f"`{options.function}` leaves pad and eos of `{options.name}` the same token, "
            f"`{tokenizer.eos_token}`: {PAD_IS_EOS}",
            hint="give its tokenizer_config.json a pad token of its own, or pass another --get_tokenizer_fn",
        )
    return _with_template(tokenizer, kind, options, unknown_is_own=False)


DEFAULT_FUNCTION = "get_tokenizer_tulu_v2_2"
FUNCTIONS: dict[str, Callable[[PreTrainedTokenizerBase, TokenizerKind, TokenizerOptions], Changes]] = {
    "get_tokenizer_simple_v1": _simple_v1,
    "get_tokenizer_tulu_v1": _tulu_v1,
    "get_tokenizer_tulu_v2_1": _tulu_v2_1,
    DEFAULT_FUNCTION: _tulu_v2_2,
}
"""Each changes the tokenizer in place. Raises `UsageError` where flags don't fit the tokenizer or each other."""


def set_up(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: TokenizerOptions) -> Changes:
    """Have the function that is asked for change a tokenizer in place; every special token that changes is a decision.

    Raises `UsageError` where flags don't fit the tokenizer or each other.
    """
    before, size = _special_tokens(tokenizer), len(tokenizer)
    changes = FUNCTIONS[options.function](tokenizer, kind, options)
    decisions = []
    for name, token in _special_tokens(tokenizer).items():
        old = before[name]
        if token is None or token == old:
            continue
        reason = f"`{options.function}` sets it"
        if old is None:
            reason = "batches need one" if name == "pad" else "there was none"
        elif name == "pad" and old == before["eos"]:
            reason = f"it was the eos token: {PAD_IS_EOS}"
        if name == "bos" and token == before["eos"]:
            reason += ", and the eos token becomes it"
        elif name == "pad" and len(tokenizer) == size:
            reason += f"; the vocabulary had `{token}` already"
        decisions.append(
            Decision(
                what=f"{name} token",
                requested="none" if old is None else old,
                effective=f"{token} (id {tokenizer.convert_tokens_to_ids(token)})",
                reason=reason,
            )
        )
    return replace(changes, decisions=(*decisions, *changes.decisions))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    return {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}


def _set_gpt_neox_tokens(tokenizer: PreTrainedTokenizerBase, options: TokenizerOptions, *, needs_add_bos: bool) -> None:
    if tokenizer.bos_token is not None:
        _add_pad(tokenizer)
        return
    if needs_add_bos and not options.add_bos:
        raise UsageError(
            f"`{options.function}` needs `--add_bos` for `{options.name}`, a GPT-NeoX tokenizer without a bos token",
            hint="pass --add_bos",
        )
    tokenizer.bos_token = tokenizer.eos_token


def _add_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"pad_token": PAD})


def _with_template(
    tokenizer: PreTrainedTokenizerBase,
    kind: TokenizerKind,
    options: TokenizerOptions,
    *,
    unknown_is_own: bool,
) -> Changes:
    name, decisions = set_template(
        tokenizer, options.template, function=options.function, unknown_is_own=unknown_is_own
    )
    warnings = prefix_with_bos(tokenizer, kind) if options.add_bos else []
    return Changes(template=name, decisions=tuple(decisions), warnings=tuple(warnings))
