"""What happens before the first weight: nothing twice.

Work is counted; how long it takes is for `scripts/bench_prepare --start_up`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders import prepare
from ftload.loaders.model import skeleton
from ftload.loaders.plan import configuration
from ftload.loaders.tokenizer import tokenizer

from ..conftest import Result

Ftload = Callable[..., Result]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a configuration, a tokenizer and a model are read, headers too, and a process is forked."""
    counted = Counter[str]()

    def count(owner: Any, name: str, called: str) -> None:
        own = getattr(owner, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counted[called] += 1
            return own(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    count(configuration, "load_config", "configuration")
    count(tokenizer, "load_tokenizer", "tokenizer")
    count(prepare, "open_checkpoint", "headers")
    count(skeleton, "load_on_meta", "model")
    count(os, "fork", "rendering")
    return counted


@pytest.mark.parametrize("flags", [(), ("--use_lora",), ("--use_qlora",)])
def test_everything_is_read_once(
    ftload: Ftload, llama: Path, tmp_path: Path, calls: Counter[str], flags: tuple[str, ...]
) -> None:
    words = "--model", llama, *flags, "--output_dir", tmp_path / "out", "--chat_template_name", "tulu"
    assert ftload("prepare", *words).code == 0
    once = {"configuration": 1, "tokenizer": 1, "model": 1, "headers": 1, "rendering": 1}
    assert calls == once
