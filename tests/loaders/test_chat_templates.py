"""The built-in chat templates render what the vectors in `chat_templates.json` say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.tokenizer.chat_templates import TEMPLATES

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "chat_templates.json").read_text(encoding="utf-8")
)
CASES = [(name, case, text) for name, cases in VECTORS["rendered"].items() for case, text in cases.items()]


def test_the_names_are_those_of_the_vectors() -> None:
    assert set(TEMPLATES) == set(VECTORS["rendered"])


@pytest.mark.parametrize(("name", "case", "text"), CASES, ids=[f"{name}-{case}" for name, case, _ in CASES])
def test_rendering_equals_the_vector(name: str, case: str, text: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation, _, prompt = case.partition("+")
    rendered, _ = render_jinja_template(
        [VECTORS["conversations"][conversation]],
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt == "prompt",
        bos_token=VECTORS["bos_token"],
        eos_token=VECTORS["eos_token"],
    )
    assert rendered == [text]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_content_is_rendered_as_it_is(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    content = "  {{ eos_token }}\n<b> & 'é' "
    rendered, _ = render_jinja_template(
        [[{"role": "assistant", "content": content}]], chat_template=TEMPLATES[name], eos_token="</s>"
    )
    assert content in rendered[0]


CALLS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "tool", "content": "T"},
    {"role": "environment", "content": "E"},
    {"role": "assistant", "content": "B"},
    {"role": "function", "content": "F"},
]


@pytest.mark.parametrize(
    ("name", "turns", "text"),
    [
        ("tulu", 7, "<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA</s>\n<|assistant|>\nB</s>\n"),
        ("tulu", 6, "<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA</s>\n<|assistant|>\nB</s>"),
        ("tulu", 4, "<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA</s>\n"),
        ("zephyr", 7, "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|assistant|>\nB</s>\n"),
        ("zephyr", 4, "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n"),
    ],
)
def test_turns_of_other_roles_are_left_out(name: str, turns: int, text: str) -> None:
    """As Open Instruct's templates of these names (dataset_transformation.py, e6c3044aa) render the same turns."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for prompt in ("", "<|assistant|>\n"):
        rendered, _ = render_jinja_template(
            [CALLS[:turns]], chat_template=TEMPLATES[name], add_generation_prompt=bool(prompt), eos_token="</s>"
        )
        assert rendered == [text + prompt]
