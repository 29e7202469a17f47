# ruff: noqa: E501 -- a template a line
"""What a chat template makes of conversations: its bounds are processor time and memory, never the clock."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import CheckpointError, ResourceError
from ftload.loaders.tokenizer import rendering
from ftload.loaders.tokenizer.rendering import Rendered, Turns, look_at_turns, render

HI = [{"role": "user", "content": "Hi"}]


class Slow:
    """Takes time on the clock, but no processor time: as whatever runs on a machine that is busy with other things."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        time.sleep(self.seconds)
        return conversation[0]["content"]


class Endless:
    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        while True:
            pass


def test_a_busy_machine_is_not_the_templates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_SECONDS", 1)
    slow: Any = Slow(1.5)
    assert render(slow, [HI]) == [Rendered(text="Hi", problem="")]


def test_processor_time_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_SECONDS", 1)
    endless: Any = Endless()
    with pytest.raises(CheckpointError, match="does not end within 1 seconds"):
        render(endless, [HI])


def test_a_machine_that_never_gets_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "PATIENCE_SECONDS", 0.1)
    asleep: Any = Slow(10**6)
    with pytest.raises(ResourceError, match=r"in 0\.1 seconds the machine gave the chat template 0\.\d seconds"):
        render(asleep, [HI])


SMALLER_LIMIT = """
import resource, sys
from ftload.loaders.errors import ResourceError
from ftload.loaders.tokenizer.rendering import render

class Greedy:
    def apply_chat_template(self, conversation, **_):
        return "x" * 300_000_000

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
try:
    render(Greedy(), [[]])
except ResourceError as error:
    print(error.message)
"""


def test_limits_that_ftload_was_started_with() -> None:
    """Under `ulimit -v`: what is lacking is memory, and the template may be good."""
    done = subprocess.run([sys.executable, "-c", SMALLER_LIMIT], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("no memory is left to render the chat template\n", "")
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama)


TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (TURNS, Turns(problem=None, end="</s>\n")),
        ({"default": TURNS, "tool_use": "x"}, Turns(problem=None, end="</s>\n")),
        ("{% if messages[0]['role'] != 'system' %}{{ raise_exception('say who') }}{% endif %}" + TURNS, Turns(problem=None, end="</s>\n")),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS, Turns(problem=None, end="</s>\n")),
        ("{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}", Turns(problem=None, end=None)),
        ("{{ raise_exception('tools only') }}", Turns(problem="it does not render a question and its answer: tools only", end=None)),
        ("Hello", Turns(problem="it renders the same text whatever is said", end=None)),
        ("{{ messages[0]['content'] }}", Turns(problem="it leaves out what the assistant says", end=None)),
        ({"tool_use": TURNS, "rag": TURNS}, Turns(problem="there are only templates with names (`rag`, `tool_use`), and none is the default", end=None)),
    ],
)  # fmt: skip
def test_turns(tokenizer: Any, template: Any, turns: Turns) -> None:
    tokenizer.chat_template = template
    assert look_at_turns(tokenizer) == turns
