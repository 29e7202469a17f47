"""GGUF files: what transformers would make up or drop without a word is refused, what it can use is prepared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ..conftest import Result
from ..gguf import TOKENS, gguf_tensors, write_gguf
from ..parity.models import write_model

Ftload = Callable[..., Result]
Tensors = dict[str, np.ndarray]
HINT = "hint: the file is incomplete, or transformers does not know all that this architecture has in GGUF files\n"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for architecture in ("llama", "qwen2", "qwen3_moe"):
        write_model(root / architecture, architecture, vocab_size=TOKENS, dtype="bfloat16")
    return root


def without(*beginnings: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(beginnings)]:
            del tensors[name]

    return change


def without_biases(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".bias")]:
        del tensors[name]


def widen_experts(tensors: Tensors) -> None:
    """To the width that transformers' configuration of this type has whatever the metadata say."""
    for name, values in tensors.items():
        if "_exps" in name:
            tensors[name] = np.repeat(values, 768 // 32, axis=2 if "down" in name else 1)


def without_half_of_the_experts(tensors: Tensors) -> None:
    widen_experts(tensors)
    del tensors["blk.1.ffn_up_exps.weight"]


@pytest.mark.parametrize(
    ("architecture", "change", "problem"),
    [
        ("llama", without("blk.0.attn_q."), "lacks tensor `blk.0.attn_q.weight`"),
        ("llama", without("blk.1."), "lacks tensor `blk.1.attn_k.weight` and 8 more"),
        ("llama", without("token_embd."), "lacks tensor `token_embd.weight`"),
        ("qwen2", without_biases, "lacks tensor `blk.0.attn_k.bias` and 5 more"),
        ("qwen3_moe", without_half_of_the_experts, "lacks tensor `blk.1.ffn_up_exps`"),
        (
            "llama",
            lambda t: t.update({"blk.2.attn_q.weight": t["blk.1.attn_q.weight"]}),
            "has the unexpected tensor `blk.2.attn_q.weight`",
        ),
        (
            "llama",
            lambda t: t.update({"stray.weight": t.pop("output_norm.weight")}),
            "lacks tensor `output_norm.weight`; has the unexpected tensor `stray.weight`",
        ),
        (
            "llama",
            lambda t: t.update({"output.weight": t["output.weight"][:100]}),
            "tensor `lm_head.weight` has shape [100, 64], the metadata ask for [144, 64]",
        ),
    ],
)
def test_a_file_whose_tensors_are_not_those_of_its_model(
    ftload: Ftload,
    originals: Path,
    llama: Path,
    tmp_path: Path,
    architecture: str,
    change: Callable[[Tensors], None],
    problem: str,
) -> None:
    tensors = gguf_tensors(originals / architecture, architecture)
    change(tensors)
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, tensors)
    words = ["--model", path, "--tokenizer_name_or_path", llama]
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3_moe": "Qwen3Moe"}[architecture]
    said = f"error: `{path}` does not fit `{name}ForCausalLM`: {problem}\n{HINT}"
    for command in (["plan", *words], ["prepare", *words, "--output_dir", tmp_path / "out"]):
        result = ftload(*command)
        assert (result.code, result.err, result.out) == (4, said, "")
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_computed_is_left_out_and_what_is_tied_need_not_be_there(
    ftload: Ftload, originals: Path, llama: Path, tmp_path: Path
) -> None:
    tensors = gguf_tensors(originals / "llama", "llama")
    del tensors["output.weight"]
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    write_gguf(tmp_path / "model.gguf", "llama", tensors)
    words = ["--model", tmp_path / "model.gguf", "--tokenizer_name_or_path", llama, "--output_dir", tmp_path / "out"]
    result = ftload("prepare", *words, "--json")
    assert result.code == 0, result.err
    said = "`rope_freqs.weight` is not part of the model and is left out, as transformers does"
    assert json.loads(result.out)["warnings"][0] == said
    assert_equal(tmp_path / "out", originals / "llama", but=frozenset({"lm_head.weight"}))


def test_a_part_of_a_split_file(ftload: Ftload, originals: Path, llama: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", gguf_tensors(originals / "llama", "llama"), most_tensors=7)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        result = ftload("plan", "--model", part, "--tokenizer_name_or_path", llama)
        assert (result.code, result.out, result.err) == (
            4,
            "",
            f"error: `{part}` is one of the 3 files that a GGUF file was split into: whole ones are read\n"
            "hint: join them, by llama.cpp's `llama-gguf-split --merge FIRST_FILE JOINED_FILE`, and give that\n",
        )


def test_a_directory_of_gguf_files(ftload: Ftload, tmp_path: Path) -> None:
    for name in ("mmproj-F16.gguf", "tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    result = ftload("plan", "--model", tmp_path)
    assert (result.code, result.err) == (
        4,
        f"error: `{tmp_path}` holds no `config.json`\nhint: give a GGUF file itself: `tiny-Q4_K_M.gguf`\n",
    )


def test_experts_that_are_all_there(ftload: Ftload, originals: Path, llama: Path, tmp_path: Path) -> None:
    tensors = gguf_tensors(originals / "qwen3_moe", "qwen3_moe")
    widen_experts(tensors)
    write_gguf(tmp_path / "model.gguf", "qwen3_moe", tensors)
    words = ["--model", tmp_path / "model.gguf", "--tokenizer_name_or_path", llama, "--output_dir", tmp_path / "out"]
    assert ftload("prepare", *words).code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert torch.equal(written.float(), torch.from_numpy(tensors["blk.1.ffn_up_exps.weight"][3]))


def test_a_pad_token_beyond_the_vocabulary(ftload: Ftload, originals: Path, llama: Path, tmp_path: Path) -> None:
    """It is the tokenizer's pad token that counts: where the file's own tokenizer is not used, its ids mean nothing."""
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", gguf_tensors(originals / "llama", "llama"), pad=TOKENS)
    words = ["--model", path, "--output_dir", tmp_path / "out"]
    result = ftload("prepare", *words)
    assert result.code == 4
    assert result.err.startswith(f"error: no tokenizer can be loaded from `{path}`: ")
    result = ftload("prepare", *words, "--tokenizer_name_or_path", llama)
    assert result.code == 0, result.err
    assert_equal(tmp_path / "out", originals / "llama")


def assert_equal(output: Path, original: Path, but: frozenset[str] = frozenset()) -> None:
    written, expected = (load_file(directory / "model.safetensors") for directory in (output, original))
    assert written.keys() == expected.keys() - but
    assert [name for name, value in written.items() if not torch.equal(value, expected[name])] == []
