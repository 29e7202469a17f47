"""Whether a prepared tokenizer and its chat template fit the model, the report, and what generation stops at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .chat_templates import render
from .environment import quiet_transformers
from .model_config import load_generation_config
from .tokenizer import template_hash
from .verify_files import Context
from .vocabulary import stored_padding

QUESTION = "What do you get if you multiply six by nine?"
ANSWER = "Forty-two"


def check_tokenizer(context: Context) -> Iterator[str]:
    """Whether the ids fit the embeddings, and texts can be padded and ended."""
    tokenizer: Any = context.tokenizer
    expected = context.report["tokenizer"]
    rows = context.report["embeddings"]["rows_after"]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        yield f"token id {highest} does not fit {rows} embedding rows"
    if len(tokenizer) != expected["size"]:
        yield f"{len(tokenizer)} tokens, the report says {expected['size']}"
    for what in ("pad_token", "pad_token_id", "eos_token", "eos_token_id", "bos_token"):
        if getattr(tokenizer, what) != expected[what]:
            yield f"{what} is `{getattr(tokenizer, what)}`, the report says `{expected[what]}`"
    pad = context.report["embeddings"].get("pad_token_id")  # not in the reports of ftload 0.1
    if pad is not None and context.report["base"] == "copy":
        stored = {"generation_config.json": load_generation_config(context.root).pad_token_id}
        if hasattr(context.config.get_text_config(), "pad_token_id"):
            stored["config.json"] = stored_padding(context.config)
        for file, number in stored.items():
            if number != pad:
                yield f"`pad_token_id` of {file} is {number}, the report says {pad}"
    if tokenizer.pad_token is None:
        yield "there is no pad token"
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield f"pad and eos are the same token, `{tokenizer.eos_token}`: the model would not learn to stop"
    context.found = f"{len(tokenizer):,} tokens, pad `{tokenizer.pad_token}`, eos `{tokenizer.eos_token}`"


def check_chat_template(context: Context) -> Iterator[str]:
    """Whether the template renders, and ends an assistant's turn with a token that generation stops at."""
    from jinja2 import TemplateSyntaxError

    tokenizer: Any = context.tokenizer
    digest = template_hash(tokenizer.chat_template)
    if digest != context.report["tokenizer"]["chat_template_sha256"]:
        yield "the chat template is not the one in the report" if digest else "the chat template is gone"
    if digest is None:
        context.found = "none"
        return
    try:
        text = render(tokenizer, [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}])
    except TemplateSyntaxError as error:
        yield f"it is not valid, line {error.lineno}: {error.message}"
        return
    if text is None:
        yield "it does not render a question and its answer"
        return
    stops = _stop_tokens(context)
    _, answer, end = text.rpartition(ANSWER)
    context.found = f"turns end with {end.strip()!r}"
    if not answer:
        yield "it leaves out what the assistant says"
    elif text == ANSWER:
        context.found = "it marks no turns at all"  # as was asked for: what ends them is up to the training script
    elif not any(stop in end for stop in stops):
        yield f"an assistant's turn ends with {end!r}, which has none of the tokens that generation stops at: {stops}"


def _stop_tokens(context: Context) -> list[str]:
    """The tokenizer's eos, and what the generation settings of the base name: Llama 3 ends its turns with another."""
    tokenizer: Any = context.tokenizer
    with quiet_transformers():
        stored: Any = load_generation_config(context.base_source.root).eos_token_id
    ids = {tokenizer.eos_token_id, *(stored if isinstance(stored, list) else [stored])} - {None}
    tokens = (tokenizer.convert_ids_to_tokens(number) for number in sorted(ids))
    return [token for token in tokens if token]
