"""GGUF files that are damaged or contradict themselves, through the real command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ..cli.test_bad_input import assert_one_line
from ..conftest import Result
from .gguf_models import Tensors, write_tiny

Ftload = Callable[..., Result]
Spoil = Callable[[dict[str, Any], Tensors], object]
UP = "blk.1.ffn_up.weight"


@dataclass(frozen=True, kw_only=True)
class Spoilt:
    """A file, and what is said of it."""

    spoil: Spoil
    said: str
    hint: str | None = "the file is incomplete, or transformers does not know"
    name: str = "llama"


def says(**metadata: Any) -> Spoil:
    names = {key.replace("__", "."): value for key, value in metadata.items()}
    return lambda found, tensors: found.update(names)


def stores(name: str, change: Callable[[Type, np.ndarray], tuple[Type, np.ndarray]]) -> Spoil:
    return lambda metadata, tensors: tensors.update({name: change(*tensors[name])})


def copied(name: str, to: str) -> Spoil:
    return lambda metadata, tensors: tensors.update({to: tensors[name]})


def without(*names: str) -> Spoil:
    def spoil(metadata: dict[str, Any], tensors: Tensors) -> None:
        for name in names:
            metadata.pop(name, None)
            tensors.pop(name, None)

    return spoil


def not_finite(kind: Type, values: np.ndarray) -> tuple[Type, np.ndarray]:
    """The scale of one block."""
    values = values.copy()
    values[3, :2] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    return kind, values


CASES = {
    "a type that nobody decodes": Spoilt(
        spoil=stores(UP, lambda kind, values: (Type.I32, np.zeros((512, 256), np.int32))), hint="another quantisation",
        said=f"tensor `{UP}` of `PATH` is stored as I32, which the `gguf` package can't decode",
    ),
    "no rows": Spoilt(
        spoil=stores(UP, lambda kind, values: (Type.F32, np.zeros((0, 256), np.float32))), hint=None,
        said=f"tensor `{UP}` of `PATH` has no elements",
    ),
    "a scale that is no number": Spoilt(
        spoil=stores(UP, not_finite), hint="the checkpoint is damaged",
        said="tensor `model.layers.1.mlp.up_proj.weight` of `m.gguf` holds NaN or infinity",
    ),
    "another shape": Spoilt(
        spoil=stores(UP, lambda kind, values: (kind, values[:-32])),
        said="tensor `model.layers.1.mlp.up_proj.weight` has shape [480, 256], the metadata ask for [512, 256]",
    ),
    "three dimensions": Spoilt(
        spoil=stores(UP, lambda kind, values: (kind, values.reshape(2, 256, -1))),
        said="tensor `model.layers.1.mlp.up_proj.weight` has shape [2, 256, 256], the metadata ask for [512, 256]",
    ),
    "a layer more": Spoilt(
        spoil=copied(UP, "blk.2.ffn_up.weight"), said="has the unexpected tensor `blk.2.ffn_up.weight`"
    ),
    "experts of a layer more": Spoilt(
        spoil=copied("blk.1.ffn_up_exps.weight", "blk.7.ffn_up_exps.weight"), name="qwen3_moe",
        said="has the unexpected tensor `blk.7.ffn_up_exps.weight`",
    ),
    "experts of half the width": Spoilt(
        spoil=stores("blk.1.ffn_up_exps.weight", lambda kind, values: (kind, values[:, ::2])), name="qwen3_moe",
        said="lacks tensor `model.layers.1.mlp.experts.gate_up_proj`",
    ),
    "a mapped layer more": Spoilt(
        spoil=copied(UP, "blk.9.ffn_up.weight"), name="lfm2", said="has the unexpected tensor `blk.9.ffn_up.weight`"
    ),
    "mapped and missing": Spoilt(
        spoil=without(UP), name="lfm2", said="lacks tensor `model.layers.1.feed_forward.w3.weight`"
    ),
    "no width": Spoilt(
        spoil=without("embedding_length"),
        said="`lm_head.weight` has shape [144, 256], the metadata ask for [144, 4096]",
    ),
    "layers without end": Spoilt(
        spoil=says(block_count=10**9), said="`num_hidden_layers` is more than the 2,000 of any real model", hint=None
    ),
    "words for numbers": Spoilt(
        spoil=says(attention__head_count="four"), hint="new enough a transformers",
        said="`PATH` can't be used: Validation error for field 'num_attention_heads'",
    ),
    "heads that do not divide": Spoilt(
        spoil=says(attention__head_count=3, attention__head_count_kv=3), hint="new enough a transformers",
        said="`PATH` can't be used: Class validation error",
    ),
    "no heads": Spoilt(
        spoil=says(attention__head_count=0, attention__head_count_kv=0), hint="new enough a transformers",
        said="`PATH` can't be used: integer division",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_a_spoilt_file(ftload: Ftload, llama: Path, tmp_path: Path, case: str) -> None:
    spoilt = CASES[case]
    path = tmp_path / "m.gguf"
    write_tiny(path, spoilt.name, tokens=144, types=[Type.Q8_0], spoil=spoilt.spoil)
    words = ["--model", path, "--tokenizer_name_or_path", llama, "--output_dir", tmp_path / "out"]
    result = ftload("prepare", *words)
    assert_one_line(result, code=4, culprit=spoilt.said.replace("PATH", str(path)), hint=spoilt.hint)
    assert list(tmp_path.iterdir()) == [path]
