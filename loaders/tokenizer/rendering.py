"""What a chat template makes of conversations, within bounds.

Templates come with models. transformers renders them in Jinja's sandbox, which keeps them from attributes and from
changing anything, but not from looping for ever or filling the memory: that is what a child process is for.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ResourceError, said_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Conversation = Sequence[dict[str, str]]

MAX_SECONDS = 4
"""The processor time that rendering may take: on a machine that is busy, more time passes on the clock."""
MAX_BYTES = 400_000_000
"""The memory that it may take, beyond what this process has."""
PATIENCE_SECONDS = 600
"""Time on the clock after which rendering is given up, as the fault of a busy machine rather than the template's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A conversation as text."""

    text: str | None
    """None where the template raises."""
    problem: str
    """What it raises then; empty otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """What a chat template makes of a question and its answer."""

    problem: str | None
    """Why nobody could be trained on conversations with it, in words that follow a colon; None if one can."""
    end: str | None
    """What follows an answer; None where there is a problem, or where the template marks no turns at all."""


QUESTION, ANSWER = "What do you get if you multiply six by nine?", "Forty-two"


_TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
_OTHER_TURNS = [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "No, snowing"}]
_SYSTEM = {"role": "system", "content": "Be brief."}


def look_at_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Render a question and its answer by the tokenizer's chat template; with a system message if it raises without.

    Raises `jinja2.TemplateSyntaxError`, and what `render` raises.
    """
    templates: Any = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(f"`{name}`" for name in sorted(templates))
        return Turns(problem=f"there are only templates with names ({names}), and none is the default", end=None)
    pairs = [[_TURNS, _OTHER_TURNS], [[_SYSTEM, *_TURNS], [_SYSTEM, *_OTHER_TURNS]]]
    rendered = render(tokenizer, [conversation for pair in pairs for conversation in pair])
    first, second = rendered[:2] if rendered[0].text is not None else rendered[2:]
    if first.text is None:
        return Turns(problem=f"it does not render a question and its answer: {rendered[0].problem}", end=None)
    if first.text == second.text:
        return Turns(problem="it renders the same text whatever is said", end=None)
    _, answer, end = first.text.rpartition(ANSWER)
    if not answer:
        return Turns(problem="it leaves out what the assistant says", end=None)
    # a template of the answer alone: what ends it is up to the training script
    return Turns(problem=None, end=None if first.text == ANSWER else end)


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], template: str | None = None
) -> list[Rendered]:
    """Render conversations by the tokenizer's template, or another.

    Raises `jinja2.TemplateSyntaxError`; `CheckpointError` when processor time or memory run out; `ResourceError` when
    the machine gives it no time.
    """
    from jinja2 import TemplateSyntaxError

    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _render_and_exit(tokenizer, conversations, template, writing)
    os.close(writing)
    answer: bytes | None = None
    try:
        answer = _read_all(reading)
    finally:
        os.close(reading)
        if answer is None:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    if answer is None:
        raise ResourceError(
            f"in {PATIENCE_SECONDS} seconds the machine gave the chat template {usage.ru_utime + usage.ru_stime:.1f} "
            "seconds of processor time, and it has not ended",
            hint="try again when the machine is less busy",
        )
    if os.waitstatus_to_exitcode(status) == _NO_ROOM:
        raise ResourceError("no memory is left to render the chat template", hint="raise the limit (ulimit -v)")
    if status:
        raise CheckpointError(
            f"the chat template does not end within {MAX_SECONDS} seconds and {MAX_BYTES // 10**6} MB of memory",
            hint="pass another with --chat_template_name",
        )
    result = json.loads(answer)
    if "line" in result:
        raise TemplateSyntaxError(result["message"], result["line"])
    return [Rendered(**one) for one in result["rendered"]]


_NO_ROOM = 3
"""The child's exit code where the limits that ftload was started with leave less memory than a template may take."""


def _render_and_exit(tokenizer: Any, conversations: Sequence[Conversation], template: str | None, writing: int) -> None:
    from jinja2 import TemplateSyntaxError

    code = 1
    try:
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")  # noqa: PTH123, SIM115
        if not _limit(resource.RLIMIT_AS, used + MAX_BYTES):
            code = _NO_ROOM
        _limit(resource.RLIMIT_CPU, MAX_SECONDS)  # counted from the fork on
        rendered = []
        result: dict[str, Any] = {"rendered": rendered}
        for conversation in conversations:
            try:
                text = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
                rendered.append({"text": str(text), "problem": ""})
            except TemplateSyntaxError as error:
                result = {"message": str(error.message), "line": error.lineno}
                break
            except MemoryError:
                os._exit(code)
            except Exception as error:  # templates check what they get, and raise whatever their expressions raise
                rendered.append({"text": None, "problem": said_by(error)[:200]})
        with os.fdopen(writing, "w", encoding="utf-8", errors="replace") as file:
            json.dump(result, file)
        code = 0
    finally:
        os._exit(code)


def _limit(what: int, most: int) -> bool:
    """Limit this process to `most`. False where a lower limit holds already, which stays."""
    _, hard = resource.getrlimit(what)
    lower = hard != resource.RLIM_INFINITY and hard < most
    value = hard if lower else most
    resource.setrlimit(what, (value, value))
    return not lower


def _read_all(descriptor: int) -> bytes | None:
    """All that the other end of a pipe writes; None if it has not ended after `PATIENCE_SECONDS`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    data = bytearray()
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(descriptor, 1024 * 1024)
        if not piece:
            return bytes(data)
        data += piece
    return None
