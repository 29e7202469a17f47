"""What happens before the first weight: nothing twice, nothing in vain, and what can go on at the same time does.

Work is counted; how long it takes is for `scripts/bench_prepare --start_up`.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders import prepare
from ftload.loaders.tokenizer import tokenizer

from ..conftest import Result

Ftload = Callable[..., Result]
WAIT_SECONDS = 60


@pytest.fixture
def loading_waits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The tokenizer is loaded once the model's class was asked for; for each load, whether that was so."""
    begun, waited = threading.Event(), list[bool]()
    load, import_class = tokenizer.load_tokenizer, prepare.import_class

    def load_later(*arguments: Any, **options: Any) -> Any:
        waited.append(begun.wait(WAIT_SECONDS))
        return load(*arguments, **options)

    def import_and_tell(config: Any) -> None:
        begun.set()
        import_class(config)

    monkeypatch.setattr(tokenizer, "load_tokenizer", load_later)
    monkeypatch.setattr(prepare, "import_class", import_and_tell)
    return waited


def test_the_class_is_imported_while_the_tokenizer_is_loaded(
    ftload: Ftload, llama: Path, tmp_path: Path, loading_waits: list[bool]
) -> None:
    assert ftload("prepare", "--model", llama, "--use_qlora", "--output_dir", tmp_path / "out").code == 0
    assert loading_waits == [True]


def test_code_of_its_own_is_loaded_alone(
    ftload: Ftload, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "import_class", lambda _: pytest.fail("imported at the same time"))
    words = "prepare", "--model", llama, "--output_dir", tmp_path / "out", "--trust_remote_code"
    assert ftload(*words).code == 0


def test_a_class_that_cannot_be_imported_is_told_after_the_tokenizer(
    ftload: Ftload, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise ImportError("no module of this kind")

    monkeypatch.setattr("ftload.loaders.model.model_class.causal_class", fail)
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    broken = ftload("prepare", "--model", model, "--output_dir", tmp_path / "out")
    assert broken.code == 4
    assert "tokenizer.json" in broken.err
