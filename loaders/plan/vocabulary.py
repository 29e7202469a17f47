"""Whether the tokenizer and the model belong together: a row for each token, one for padding, and an end of turns."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..flags.request import Request
    from ..model.skeleton import Skeleton
    from ..tokenizer.tokenizer import PreparedTokenizer
    from .configuration import Configuration


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """What the model takes for padding, and what is to be said of it."""

    id: int | None
    """`pad_token_id` of both configurations from now on; None where they stay as they are."""
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[str, ...] = ()


_MANY_ROWS = 256
"""Rows for added tokens: chat markers and reserved tokens stay below."""


def check_rows(*, tokenizer_size: int, before: int, after: int, tokenizer_is_named: bool) -> tuple[str, ...]:
    """Whether an embedding that grows from `before` to `after` rows still is the model's; returns warnings.

    Raises when most rows would be new, and so nearly equal: the tokenizer is another model's. `UsageError` where the
    user named the tokenizer (`tokenizer_is_named`), `CheckpointError` where it came with the model.
    """
    new = after - before
    told = f"the tokenizer has {tokenizer_size:,} tokens, the embedding {before:,} rows: {new:,} of {after:,} rows"
    if new > before:
        error = UsageError if tokenizer_is_named else CheckpointError
        raise error(
            f"{told} would be new, with nothing learnt in them",
            hint="name the model's own tokenizer with --tokenizer_name_or_path",
        )
    if new > _MANY_ROWS and 100 * new >= before:
        return (f"{told} are new: does the tokenizer belong to this model?",)
    return ()


def check_turns(tokenizer: PreparedTokenizer, eos: int | list[int] | None) -> tuple[str, ...]:
    """Whether conversations can be trained on with the chat template, and end where generation stops; warnings.

    `eos` is that of generation_config.json. Raises for a template that fails: `UsageError` where the user named it,
    `CheckpointError` where it came with the tokenizer.
    """
    turns, name = tokenizer.turns, tokenizer.chat_template_name
    if turns is None:
        return ()
    if turns.problem is not None and name is not None:
        raise UsageError(f"the chat template `{name}`: {turns.problem}", hint="pass another --chat_template_name")
    if turns.problem is not None:
        raise CheckpointError(
            f"the tokenizer's chat template: {turns.problem}", hint="pass another with --chat_template_name"
        )
    problem = None if turns.end is None else stop_problem(tokenizer.tokenizer, turns.end, eos)
    return () if problem is None else (f"chat template: {problem}",)


def stop_problem(tokenizer: PreTrainedTokenizerBase, end: str, eos: int | list[int] | None) -> str | None:
    """What is wrong with an assistant's turn that ends with `end`, if generation does not stop there.

    It stops at the ids of generation_config.json (`eos`); where it names none, at the tokenizer's eos.
    """
    named: Any = tokenizer.eos_token_id if eos is None else eos
    ids = named if isinstance(named, list) else [named]
    tokens: Any = [tokenizer.convert_ids_to_tokens(number) for number in ids if number is not None]
    stops = [token for token in tokens if token]
    if any(stop in end for stop in stops):
        return None
    return f"an assistant's turn ends with {end!r}, which has none of the tokens that generation stops at: {stops}"


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the model should take for padding; None where there is none, or where it would be the eos token.

    A model's padding row gets no gradient: if that were eos, it would not learn where texts end.
    """
    pad: Any = tokenizer.pad_token_id
    return None if pad == tokenizer.eos_token_id else pad


def set_padding(config: PretrainedConfig, pad: int | None) -> None:
    """Set `pad_token_id` wherever the configuration has one: for the whole model, for its text model, or both."""
    for one in (config, config.get_text_config()):
        if hasattr(one, "pad_token_id"):
            one.pad_token_id = pad


def stored_padding(config: PretrainedConfig) -> int | None:
    """`pad_token_id` as the configuration has it: its text model's, or else the whole model's."""
    return getattr(config.get_text_config(), "pad_token_id", getattr(config, "pad_token_id", None))


def without_impossible_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration without a padding id that no embedding row has: the model can't be built with it.

    It stays where the tokenizer has no id that takes its place: then it is an error.
    """
    pad, rows = stored_padding(config), getattr(config.get_text_config(), "vocab_size", None)
    if padding_id(tokenizer) is None or pad is None or not isinstance(rows, int) or -rows <= pad < rows:
        return config
    config = deepcopy(config)
    set_padding(config, None)
    return config


def follow_tokenizer(
    tokenizer: PreTrainedTokenizerBase, skeleton: Skeleton, configuration: Configuration, request: Request, base: str
) -> Padding:
    """The tokenizer's padding id for the model, where the model allows it; `base` is the plan's.

    Raises `CheckpointError` for an id without a row.
    """
    pad, stored = padding_id(tokenizer), stored_padding(configuration.config)
    if pad is None:
        return Padding(id=None)
    if pad >= skeleton.rows_after:
        raise CheckpointError(
            f"the tokenizer's pad token `{tokenizer.pad_token}` has the id {pad}, the embedding {skeleton.rows_after} "
            "rows",
            hint="does the tokenizer belong to this model? --tokenizer_name_or_path takes another",
        )
    other = None if pad == stored else _depends_on_padding(skeleton)
    if other is not None:
        kept = f"the tokenizer pads with {pad}, the model's `pad_token_id` stays {stored}: `{other}` depends on it too"
        return Padding(id=None, warnings=(kept,))
    found = {"config.json": stored, "generation_config.json": configuration.generation.pad_token_id}
    others = {file: _in_words(tokenizer, number) for file, number in found.items() if number != pad}
    if not others:
        return Padding(id=pad)
    reason = f"{' and '.join(others)} {'follow' if len(others) > 1 else 'follows'} the tokenizer"
    if base == "reference":
        reason += "; the base keeps its files, `load_prepared` sets it"
    asked = request.config_overrides.get("pad_token_id", pad)
    decision = Decision(
        what="pad token of the model" if asked == pad else "pad_token_id",
        requested=" and ".join(dict.fromkeys(others.values())) if asked == pad else str(asked),
        effective=str(pad),
        reason=reason,
    )
    return Padding(id=pad, decisions=(decision,))


def _depends_on_padding(skeleton: Skeleton) -> str | None:
    """A module beside the token embedding that the padding id has a meaning for.

    RoBERTa's kin count positions from it; others have further tables, of other sizes, with a padding row.
    """
    from transformers import PreTrainedModel

    for name, module in skeleton.model.named_modules():
        known = not isinstance(module, PreTrainedModel) and getattr(module, "padding_idx", None) is not None
        if known and getattr(module, "num_embeddings", None) != skeleton.rows_after:
            return name
    return None


def _in_words(tokenizer: PreTrainedTokenizerBase, number: int | None) -> str:
    if number is None:
        return "none"
    return f"{number} (the eos token)" if number == tokenizer.eos_token_id else str(number)
