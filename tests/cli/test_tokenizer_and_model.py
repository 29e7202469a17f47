"""A tokenizer that is not the model's, or a chat template that nobody could be trained with, is told at once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import CheckpointError, UsageError
from ftload.loaders.plan.vocabulary import check_rows

from ..conftest import Result
from ..parity.models import write_model
from ..tokenizers import CHATML_TEMPLATE, write_llama, write_smollm2
from .runs import prepare
from .spoilt import edit_json

Ftload = Callable[..., Result]


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows, and a tokenizer of 128."""
    directory = tmp_path_factory.mktemp("few") / "model"
    write_model(directory, "llama", vocab_size=48, dtype="bfloat16")
    write_llama(directory, vocab_size=128)
    return directory


@pytest.mark.parametrize("command", ["plan", "prepare"])
def test_a_tokenizer_of_another_model(ftload: Ftload, few_rows: Path, tmp_path: Path, command: str) -> None:
    result = ftload(command, "--model", few_rows, "--output_dir", tmp_path / "out")
    assert result.code == 4
    assert result.err == (
        "error: the tokenizer has 129 tokens, the embedding 48 rows: 88 of 136 rows would be new, with nothing learnt "
        "in them\nhint: name the model's own tokenizer with --tokenizer_name_or_path\n"
    )
    assert not (tmp_path / "out").exists()


def test_one_that_was_named_is_a_matter_of_usage(ftload: Ftload, few_rows: Path, tmp_path: Path) -> None:
    write_llama(tmp_path / "tokenizer", vocab_size=128)
    result = ftload("plan", "--model", few_rows, "--tokenizer_name_or_path", tmp_path / "tokenizer")
    assert result.code == 2
    assert "88 of 136 rows would be new" in result.err


def test_where_growing_becomes_odd() -> None:
    def warnings(before: int, after: int) -> tuple[str, ...]:
        return check_rows(tokenizer_size=after, before=before, after=after, tokenizer_is_named=False)

    assert warnings(49152, 49152) == warnings(128, 136) == warnings(1000, 1256) == warnings(30_000, 30_296) == ()
    assert warnings(30_000, 30_304) == (
        "the tokenizer has 30,304 tokens, the embedding 30,000 rows: 304 of 30,304 rows are new: does the tokenizer "
        "belong to this model?",
    )
    assert len(warnings(1000, 1264)) == len(warnings(1000, 2000)) == 1
    with pytest.raises(CheckpointError, match=r"1,008 of 2,008 rows would be new"):
        warnings(1000, 2008)
    with pytest.raises(UsageError):
        check_rows(tokenizer_size=49_153, before=100, after=49_160, tokenizer_is_named=True)


def test_the_warning_reaches_the_report(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", vocab_size=400, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=700)
    report = prepare(tmp_path / "model", tmp_path / "out")
    assert (
        "the tokenizer has 701 tokens, the embedding 400 rows: 304 of 704 rows are new: does the tokenizer belong to "
        "this model?"
    ) in report["warnings"]


FAILING: dict[str, tuple[Any, str]] = {
    "raises": ("{{ raise_exception('no') }}", "it does not render a question and its answer: no"),
    "ignores messages": ("Hello", "it renders the same text whatever is said"),
    "forgets the answer": ("{{ messages[0]['content'] }}", "it leaves out what the assistant says"),
    "only under names": (
        [{"name": "rag", "template": CHATML_TEMPLATE}, {"name": "tool_use", "template": CHATML_TEMPLATE}],
        "there are only templates with names (`rag`, `tool_use`), and none is the default",
    ),
}


@pytest.mark.parametrize("command", ["plan", "prepare"])
@pytest.mark.parametrize("how", FAILING)
def test_a_template_that_fails(ftload: Ftload, llama: Path, tmp_path: Path, how: str, command: str) -> None:
    template, words = FAILING[how]
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    edit_json(model / "tokenizer_config.json", chat_template=template)
    result = ftload(command, "--model", model, "--output_dir", tmp_path / "out")
    assert result.code == 4
    assert result.err == (
        f"error: the tokenizer's chat template: {words}\nhint: pass another with --chat_template_name\n"
    )
    assert not (tmp_path / "out").exists()
    # another one mends it
    assert ftload("plan", "--model", model, "--chat_template_name", "tulu").code == 0


def test_a_template_file_that_fails_is_a_matter_of_usage(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("Hello")
    result = ftload("plan", "--model", llama, "--chat_template_name", tmp_path / "own.jinja")
    assert result.code == 2
    assert f"the chat template `{tmp_path / 'own.jinja'}`: it renders the same text whatever is said" in result.err


@pytest.mark.parametrize(
    ("eos", "stops"),
    [
        (0, ["<|endoftext|>"]),  # though the template ends turns with the tokenizer's eos: generation would not stop
        ([0, 1], ["<|endoftext|>", "<|im_start|>"]),
        (2, None),
        ([0, 2], None),
        (None, None),
    ],
)
def test_where_generation_does_not_stop(
    ftload: Ftload, tmp_path: Path, eos: int | list[int] | None, stops: list[str] | None
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    write_model(model, "llama", vocab_size=136, dtype="bfloat16")
    write_smollm2(model)
    edit_json(model / "generation_config.json", eos_token_id=eos)
    report = prepare(model, out)
    words = (
        f"an assistant's turn ends with '<|im_end|>\\n', which has none of the tokens that generation stops at: {stops}"
    )
    assert [warning for warning in report["warnings"] if "generation" in warning] == (
        [] if stops is None else [f"chat template: {words}"]
    )
    result = ftload("verify", out, "--quick", "--json")
    assert result.code == (0 if stops is None else 7)
    checks = {row["name"]: row["problems"] for row in json.loads(result.out)["checks"]}
    assert checks["chat template"] == ([] if stops is None else [words])


def test_verify_finds_an_end_that_was_changed(ftload: Ftload, tmp_path: Path) -> None:
    """With hashes that fit: the generation settings alone are changed."""
    model, out = tmp_path / "model", tmp_path / "out"
    write_model(model, "llama", vocab_size=136, dtype="bfloat16")
    write_smollm2(model)
    prepare(model, out)
    edit_json(out / "generation_config.json", eos_token_id=0)
    report = json.loads((out / "ftload_report.json").read_text())
    for entry in report["files"]:
        data = (out / entry["path"]).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (out / "ftload_report.json").write_text(json.dumps(report))
    result = ftload("verify", out, "--quick", "--json")
    assert result.code == 7
    assert "tokens that generation stops at: ['<|endoftext|>']" in result.out
