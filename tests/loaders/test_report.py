"""The report as a value: what it is read from, what it is written as, and the schema that is made from it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import CheckpointError
from ftload.loaders.progress import Silent, Stopwatch
from ftload.loaders.report.document import Report
from ftload.loaders.report.json_values import from_json, to_json
from ftload.loaders.report.metadata_files import json_text
from ftload.loaders.report.model_card import model_card
from ftload.loaders.report.outputs import as_report, find_finished, read_document, read_report
from ftload.loaders.report.schema import published_schema, schema
from jsonschema import Draft202012Validator

from ..cli.runs import prepare
from ..parity.models import write_model
from ..tokenizers import write_llama

STRATEGIES = {
    "standard": [],
    "liger": ["--use_liger_kernel"],
    "lora": ["--use_lora"],
    "qlora": ["--use_qlora", "--base", "copy"],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    write_model(root / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(root / "model", vocab_size=128)
    for name, flags in STRATEGIES.items():
        prepare(root / "model", root / name, *flags)
    return {name: root / name for name in STRATEGIES}


def test_the_published_schema_is_what_the_dataclasses_give() -> None:
    published = Path(__file__).parents[2] / "loaders/report/report.schema.json"
    assert published.read_text(encoding="utf-8") == json_text(schema()), "write json_text(schema()) to it"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reading_and_writing_give_the_same_bytes(outputs: dict[str, Path], strategy: str) -> None:
    text = (outputs[strategy] / "ftload_report.json").read_text(encoding="utf-8")
    assert json_text(to_json(read_report(outputs[strategy]))) == text


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        *path, last = keys
        for key in path:
            document = document[key]
        document[last] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        *path, last = keys
        for key in path:
            document = document[key]
        del document[last]

    return change


TOTALS = {"parameters": 1, "bytes": 1}

SPOILT: dict[str, tuple[Callable[[Any], None], str | None]] = {
    # what: how, and what reading says of it; None where only the schema does
    "a section is gone": (drop("warnings"), "`warnings` is missing"),
    "a field is gone": (drop("adapter", "targets"), "`adapter.targets` is missing"),
    "a field of a file is gone": (drop("files", 0, "sha256"), "`files[0].sha256` is missing"),
    "a number is a word": (put("parameters", "total", value="many"), "`parameters.total` is of another type"),
    "a number is true": (put("adapter", "r", value=True), "`adapter.r` is of another type"),
    "a fraction is true": (put("adapter", "alpha", value=True), "`adapter.alpha` is of another type"),
    "a whole number is broken": (put("adapter", "r", value=8.5), "`adapter.r` is of another type"),
    "a list is an object": (put("files", value={}), "`files` is of another type"),
    "a section is null": (put("embeddings", value=None), "`embeddings` is of another type"),
    "a word is null": (put("source", "model", value=None), "`source.model` is of another type"),
    "a row of a table": (put("parameters", "towers", value={"x": []}), "`parameters.towers.x` is of another type"),
    "a side that there is not": (put("tokenizer", "padding_side", value="top"), None),
    "a word that is not one of those": (put("strategy", value="full"), None),
    "less than nothing": (put("embeddings", "rows_after", value=-1), None),
    "more than all": (put("quantization", "coverage_percent", value=101), None),
    "a component that there is not": (put("parameters", "by_component", "tail", value=TOTALS), None),
    "no hash": (put("files", 0, "sha256", value="0"), None),
    "no commit": (put("source", "commit", value="main"), None),
    "without Python": (drop("versions", "python"), None),
    "a field that there is not": (put("adapter", "more", value=1), None),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_report(outputs: dict[str, Path], what: str) -> None:
    change, words = SPOILT[what]
    document = read_document(outputs["qlora"])
    validator = Draft202012Validator(published_schema())
    assert validator.is_valid(document)
    change(document)
    assert not validator.is_valid(document)
    if words is None:
        as_report(document, "report.json")
        return
    with pytest.raises(CheckpointError) as caught:
        as_report(document, "report.json")
    assert caught.value.message == f"`report.json` is not a report of schema version 1: {words}"


def test_what_can_be_read_of_a_spoilt_report(outputs: dict[str, Path]) -> None:
    document = read_document(outputs["qlora"])
    del document["tokenizer"]["size"]
    document["work"] = document["files"][0]["bytes"] = "x"
    problems: list[str] = []
    report = from_json(Report, document, problems)
    assert problems == [
        "`tokenizer.size` is missing", "`files[0].bytes` is of another type", "`work` is of another type",
    ]  # fmt: skip
    assert report.tokenizer.pad_token == document["tokenizer"]["pad_token"]
    assert report.files[0].path == document["files"][0]["path"]
    for missing in (
        lambda: report.tokenizer.size,
        lambda: report.files[0].bytes,
        lambda: report.work,
    ):
        with pytest.raises(AttributeError):
            missing()


def test_a_report_of_release_0_1(outputs: dict[str, Path]) -> None:
    document = read_document(outputs["standard"])
    new = deepcopy(document)
    for change in (
        drop("configuration"), drop("base_scanned"), drop("parameters", "never_trained"), drop("parameters", "towers"),
        drop("embeddings", "pad_token_id"), drop("tokenizer", "padding_side"), drop("tokenizer", "model_max_length"),
    ):  # fmt: skip
        change(document)
    assert Draft202012Validator(published_schema()).is_valid(document)
    report = as_report(document, "report.json")
    assert (report.configuration, report.parameters.never_trained, report.parameters.towers) == ({}, (), {})
    unknown = (report.base_scanned, report.embeddings.pad_token_id, report.tokenizer.padding_side)
    assert (*unknown, report.tokenizer.model_max_length) == (None,) * 4
    written = to_json(report)
    assert Draft202012Validator(published_schema()).is_valid(written)
    assert written.keys() == new.keys() - {"base_scanned"}
    assert written["tokenizer"] == document["tokenizer"]


def test_fields_of_a_later_version_are_passed_over(outputs: dict[str, Path]) -> None:
    document = read_document(outputs["lora"])
    expected = as_report(document, "report.json")
    document["more"] = document["adapter"]["more"] = document["files"][0]["more"] = {"x": [1]}
    assert as_report(document, "report.json") == expected


def test_an_output_whose_report_is_spoilt_is_not_finished(outputs: dict[str, Path], tmp_path: Path) -> None:
    made = read_report(outputs["standard"])
    assert find_finished(outputs["standard"], made.fingerprint, Stopwatch(Silent()), overwrite=False) == made
    document = to_json(made)
    del document["arguments"]
    (tmp_path / "ftload_report.json").write_text(json_text(document))
    assert find_finished(tmp_path, made.fingerprint, Stopwatch(Silent()), overwrite=False) is None


@pytest.mark.parametrize("name", ["org/model", "org/yes: no", "org/- x", "org/'quoted\""])
def test_the_header_of_a_model_card(outputs: dict[str, Path], name: str) -> None:
    import yaml

    document = read_document(outputs["lora"])
    document["source"].update(kind="hub", model=name, commit="0" * 40)
    _, header, text = model_card(as_report(document, "report.json")).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "base_model": name,
        "base_model_relation": "adapter", "tags": ["ftload", "lora"],
    }  # fmt: skip
    assert text.startswith("\n# `")
