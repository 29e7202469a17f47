"""Tiny models with SmolLM2's tokenizer and chat template, and conversations to train them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity.models import write_model
from tests.real.conftest import smollm2_gguf

__all__ = ["smollm2_gguf"]

ROWS = 49_168
"""Of the embeddings: SmolLM2's 49,152 tokens, and its new pad token, need no more."""
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [
        ("user", "What is the capital of France?"),
        ("assistant", "Paris."),
        ("user", "And of Spain?"),
        ("assistant", "Madrid, of course."),
    ],
    [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4")],
    [("user", "Say hello in three languages, please."), ("assistant", "Hello, bonjour, hola.")],
    [("user", "Name a colour."), ("assistant", "Blue")],
]


def write_conversations(path: Path, conversations: list[list[tuple[str, str]]]) -> Path:
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_gguf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="session")
def tiny_llama(smollm2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model("llama_tied", smollm2_tokenizer, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_mixture(smollm2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model("qwen3_moe", smollm2_tokenizer, tmp_path_factory)


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four, of which one has two answers and one a system prompt of its own."""
    return write_conversations(tmp_path_factory.mktemp("data") / "conversations.jsonl", CONVERSATIONS)


def _model(architecture: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(architecture) / "model"
    write_model(directory, architecture, vocab_size=ROWS, dtype="bfloat16")
    tokenizer.save_pretrained(directory)
    return directory
