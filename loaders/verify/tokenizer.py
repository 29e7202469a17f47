"""Whether a prepared tokenizer and its chat template fit the model, the report, and what generation stops at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..model.config import load_generation_config
from ..plan.vocabulary import stop_problem, stored_padding
from ..system.quiet import quiet_transformers
from ..tokenizer.rendering import look_at_turns
from ..tokenizer.tokenizer import template_hash
from .files import PREPARE_AGAIN, Context


def check_tokenizer(context: Context) -> Iterator[str]:
    """Whether the ids fit the embeddings, and texts can be padded and ended."""
    tokenizer: Any = context.tokenizer
    expected = context.report.tokenizer
    if len(tokenizer) != expected.size:
        yield f"{len(tokenizer)} tokens, the report says {expected.size}"
    reported = ["pad_token", "pad_token_id", "eos_token", "eos_token_id", "bos_token"]
    # reports of 0.1 lack the others
    reported += [what for what in ("padding_side", "model_max_length") if getattr(expected, what) is not None]
    for what in reported:
        if getattr(tokenizer, what) != getattr(expected, what):
            yield f"{what} is `{getattr(tokenizer, what)}`, the report says `{getattr(expected, what)}`"
    pad = context.report.embeddings.pad_token_id
    if pad is not None and context.report.base == "copy":
        stored = {"generation_config.json": load_generation_config(context.root).pad_token_id}
        if hasattr(context.config.get_text_config(), "pad_token_id"):
            stored["config.json"] = stored_padding(context.config)
        for file, number in stored.items():
            if number != pad:
                yield f"`pad_token_id` of {file} is {number}, the report says {pad}"
    context.hint = "prepare it with another --tokenizer_name_or_path, or mend the model's own tokenizer first"
    rows = context.report.embeddings.rows_after
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        yield f"token id {highest} does not fit {rows} embedding rows"
    if tokenizer.pad_token is None:
        yield "there is no pad token"
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield f"pad and eos are the same token, `{tokenizer.eos_token}`: the model would not learn to stop"
    context.hint = PREPARE_AGAIN
    listed = {file.path: file.sha256 for file in context.report.files}
    for name in sorted(listed.keys() & {f"adapter/{name}" for name in listed}):
        if listed[name] != listed[name.removeprefix("adapter/")]:
            yield f"`{name}` is another than `{name.removeprefix('adapter/')}`"
    context.found = f"{len(tokenizer):,} tokens, pad `{tokenizer.pad_token}`, eos `{tokenizer.eos_token}`"


def check_chat_template(context: Context) -> Iterator[str]:
    """Whether the template renders, and ends an assistant's turn with a token that generation stops at."""
    from jinja2 import TemplateSyntaxError

    tokenizer: Any = context.tokenizer
    digest = template_hash(tokenizer.chat_template)
    if digest != context.report.tokenizer.chat_template_sha256:
        yield "the chat template is not the one in the report" if digest else "the chat template is gone"
    if digest is None:
        context.found = "none"
        return
    context.hint = "prepare it with another --chat_template_name"
    try:
        turns = look_at_turns(tokenizer)
    except TemplateSyntaxError as error:
        yield f"it is not valid, line {error.lineno}: {error.message}"
        return
    if turns.problem is not None:
        yield turns.problem
    elif turns.end is None:
        context.found = "it marks no turns at all"  # as was asked for
    else:
        context.found = f"turns end with {turns.end.strip()!r}"
        with quiet_transformers():
            generation = load_generation_config(context.base_source.root)
        problem = stop_problem(tokenizer, turns.end, generation.eos_token_id)
        if problem is not None:
            yield problem
