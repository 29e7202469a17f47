"""4-bit experts, decoded: in the layout in which transformers saves the model, whatever they were prepared from."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..cli.runs import prepare
from ..merge.adapters import decode
from ..parity.compare import assert_same_tensors
from ..tokenizers import write_llama
from .checkpoints import MODELS, reference, write_checkpoint

SIMPLE = ("--get_tokenizer_fn", "get_tokenizer_simple_v1")


@pytest.mark.parametrize("name", MODELS)
def test_four_bits_are_decoded_into_the_layout_of_transformers(tmp_path: Path, name: str) -> None:
    base = write_checkpoint(tmp_path / "base", name, vocab_size=144)
    write_llama(base)
    plain = reference(base)
    decode(plain)
    plain.save_pretrained(tmp_path / "reference")
    prepare(base, tmp_path / "output", "--dequantize", *SIMPLE)
    assert_same_tensors(tmp_path / "output", tmp_path / "reference")
