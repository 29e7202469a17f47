"""One type of model through ftload and through the libraries: what `scripts/parity_all` does with all of them."""

from __future__ import annotations

import json
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftload.loaders.errors import FtloadError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json
from ftload.loaders.verify.verify import verify

from ..tokenizers import write_llama
from .compare import assert_same_adapter_config, assert_same_json, assert_same_tensors
from .reference import run_reference
from .zoo import write_tiny

TOKENS = 129
"""Of the tokenizer, with the pad token that ftload adds."""
ROWS = {False: 144, True: 128}
"""Of the embeddings as made, by whether they are to be resized (to 136)."""
FLAGS = {
    "standard": [],
    "lora": ["--use_lora", "--base", "copy"],
    "qlora": ["--use_qlora", "--min_quantized", "0"],
}
"""What chooses each strategy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of one type under one strategy."""

    model_type: str
    strategy: str
    resized: bool
    whole: bool
    """Whether a multimodal type was taken as published."""
    outcome: Literal["equal", "refused", "unverified", "different", "crashed", "no model"]
    """`unverified`: equal, but `verify` fails; `no model`: the libraries themselves can't make one."""
    reason: str = ""
    """ftload's message, or what differs."""


def compare(model_type: str, directory: Path, *, resized: bool, whole: bool = False) -> Iterator[Result]:
    """Prepare a tiny model of this type with every strategy, compare it with the reference, and verify it.

    `whole` takes a multimodal type's model as it is published. All files are made in `directory`.
    """

    def result(strategy: str, outcome: Any, reason: str = "") -> Result:
        return Result(
            model_type=model_type, strategy=strategy, resized=resized, whole=whole, outcome=outcome, reason=reason
        )

    source = directory / "source"
    try:
        write_tiny(source, model_type, vocab_size=ROWS[resized], whole=whole)
    except Exception as error:  # the libraries raise whatever they like
        yield from (result(strategy, "no model", _said_by(error)) for strategy in FLAGS)
        return
    write_llama(source, vocab_size=TOKENS - 1)
    for strategy, flags in FLAGS.items():
        ours = directory / strategy
        words = ["--model", source, "--output_dir", ours, "--lora_rank", "8", "--embedding_init", "reference", *flags]
        try:
            outcome = prepare(parse_arguments([str(word) for word in words]), Silent())
        except FtloadError as error:
            yield result(strategy, "refused", error.message)
            continue
        except Exception as error:
            yield result(strategy, "crashed", _said_by(error))
            continue
        assert outcome is not None
        try:
            _assert_equal(source, ours, directory / f"reference-{strategy}", strategy, to_json(outcome.report))
        except Exception as error:
            yield result(strategy, "different", _said_by(error))
            continue
        verification = verify(ours, quick=strategy != "qlora", trust_remote_code=False, progress=Silent())
        if verification.error is None:
            yield result(strategy, "equal")
        else:
            yield result(strategy, "unverified", verification.error.message.replace(str(ours), strategy))


def _assert_equal(source: Path, ours: Path, theirs: Path, strategy: str, report: dict[str, Any]) -> None:
    targets = list(report["adapter"]["targets"]) if report["adapter"] else None
    run_reference(source, theirs, strategy=strategy, tokenizer_size=TOKENS, targets=targets)
    assert_same_tensors(ours, theirs)
    pad = report["embeddings"]["pad_token_id"]
    assert_same_json(ours / "config.json", theirs / "config.json", **_padding(theirs, pad))
    name = "generation_config.json"
    if (theirs / name).exists() or (ours / name).exists():
        assert_same_json(ours / name, theirs / name, **({} if pad is None else {"pad_token_id": pad}))
    if targets is not None:
        assert_same_tensors(ours / "adapter", theirs / "adapter")
        assert_same_adapter_config(ours / "adapter", theirs / "adapter")


def _padding(directory: Path, pad: int | None) -> dict[str, Any]:
    """What of a config.json is otherwise on purpose: the pad token, where the report and the class have one."""
    from transformers import AutoConfig

    if pad is None or not hasattr(AutoConfig.from_pretrained(directory).get_text_config(), "pad_token_id"):
        return {}
    settings = json.loads((directory / "config.json").read_text())
    whole = {"pad_token_id": pad} if "text_config" not in settings or "pad_token_id" in settings else {}
    text = {"text_config": settings["text_config"] | {"pad_token_id": pad}} if "text_config" in settings else {}
    return whole | text


def _said_by(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:300]
    if isinstance(error, AssertionError) and said:
        return said
    return f"{type(error).__name__}: {said} ({place.name}, {Path(place.filename).name})"


def read_expected() -> list[dict[str, Any]]:
    """What is rightly not equal: `says` is a part of the message, `strategies` and `types` tell where it is said."""
    return tomllib.loads((Path(__file__).parent / "refused.toml").read_text())["refused"]


def problem_of(result: Result, expected: list[dict[str, Any]]) -> str | None:
    """What is wrong with a result: it is different or crashed, or not equal, or equal, against the list; else None."""
    listed = [
        entry["says"]
        for entry in expected
        if result.model_type in entry["types"]
        and result.strategy in entry["strategies"]
        and entry.get("resized", result.resized) == result.resized
        and entry.get("whole", result.whole) == result.whole
    ]
    if result.outcome == "equal":
        return f"equal, though listed: {listed[0]}" if listed else None
    right = result.outcome not in ("different", "crashed") and any(says in result.reason for says in listed)
    return None if right else result.reason
