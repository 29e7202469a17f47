"""The chat templates that have a name, as Jinja; and rendering of any template, within bounds.

A template gets `messages` (dicts with `role` and `content`), `add_generation_prompt`, `bos_token` and `eos_token`.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONCATENATION = """\
{%- for message in messages -%}
    {%- if not loop.first -%}{{ '<separator>' }}{%- endif -%}
    {{- message['content'] -}}
{%- endfor -%}
{%- if not add_generation_prompt -%}{{ eos_token }}{%- endif -%}
"""

TEMPLATES: dict[str, str] = {
    "simple_concat_with_space": _CONCATENATION.replace("<separator>", " "),
    "simple_concat_with_new_line": _CONCATENATION.replace("<separator>", r"\n"),
    "simple_chat": """\
{%- for message in messages -%}
    {%- if not loop.first -%}{{ '\\n\\n' }}{%- endif -%}
    {{- message['role'] | capitalize + ': ' + message['content'] -}}
{%- endfor -%}
{%- if not add_generation_prompt -%}{{ eos_token }}{%- endif -%}
""",
    "assistant_message_only": """\
{%- for message in messages if message['role'] == 'assistant' -%}
    {{- message['content'] -}}
{%- endfor -%}
""",
    # turns of other roles, such as `tool` and `environment`, are left out, as by Open Instruct's templates so named
    "zephyr": """\
{%- for message in messages if message['role'] in ('system', 'user', 'assistant') -%}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] -}}{{ eos_token }}{{ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
""",
    "tulu": """\
{%- for message in messages -%}
    {%- if message['role'] in ('system', 'user', 'assistant') -%}
        {{- '<|' + message['role'] + '|>\\n' + message['content'] -}}
        {%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}
        {%- if not (loop.last and message['role'] == 'assistant') -%}{{ '\\n' }}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
""",
}
"""Every built-in template by the name that `--chat_template_name` takes."""


MAX_SECONDS = 4
"""What rendering one conversation may take."""
MAX_BYTES = 400_000_000
"""The memory that it may take, beyond what this process has."""


def render(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], template: str | None = None
) -> str | None:
    """Render a conversation by the tokenizer's template, or another; None where it can't or won't.

    Templates come with models. transformers renders them in Jinja's sandbox, which keeps them from attributes and from
    changing anything, but not from looping for ever or filling the memory: that is what the child process is for.
    Raises `jinja2.TemplateSyntaxError`, and `CheckpointError` when time or memory run out.
    """
    from jinja2 import TemplateSyntaxError

    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _render_and_exit(tokenizer, conversation, template, writing)
    os.close(writing)
    try:
        answer = _read_all(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:
        raise CheckpointError(
            f"the chat template does not end within {MAX_SECONDS} seconds and {MAX_BYTES // 10**6} MB of memory",
            hint="pass another with --chat_template_name",
        )
    result = json.loads(answer)
    if "line" in result:
        raise TemplateSyntaxError(result["message"], result["line"])
    return result["text"]


def _render_and_exit(tokenizer: Any, conversation: list[dict[str, str]], template: str | None, writing: int) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")  # noqa: PTH123, SIM115
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
        result: dict[str, Any] = {"text": None}
        try:
            text = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
            result["text"] = text if isinstance(text, str) else None
        except TemplateSyntaxError as error:
            result = {"message": str(error.message), "line": error.lineno}
        except MemoryError:
            os._exit(1)
        except Exception:  # templates check what they are given, and raise whatever their expressions raise
            pass
        with os.fdopen(writing, "w", encoding="utf-8", errors="replace") as file:
            json.dump(result, file)
    finally:
        os._exit(0)


def _read_all(descriptor: int) -> bytes:
    """What the other end of a pipe writes in time; nothing if it has not ended by then."""
    deadline = time.monotonic() + MAX_SECONDS
    data = bytearray()
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(descriptor, 1024 * 1024)
        if not piece:
            return bytes(data)
        data += piece
    return b""
