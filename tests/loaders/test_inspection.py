"""What an inspection finds, against what the libraries that read and wrote the files say of them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from ftload.loaders.checkpoint.gguf_header import GGML_TYPES, read_gguf_header
from ftload.loaders.errors import CheckpointError, SourceError
from ftload.loaders.inspect.comparison import compare
from ftload.loaders.inspect.inspection import inspect
from ftload.loaders.inspect.tokenizer_facts import read_tokenizer_facts
from ftload.loaders.model.components import component_of
from ftload.loaders.source.resolve import resolve_source
from safetensors.torch import load_file, save_file

from ..cli.runs import FLAGS, prepare
from ..parity.models import ARCHITECTURES, write_model
from ..tokenizers import write_gpt2, write_gpt_neox, write_llama, write_llama3, write_qwen, write_smollm2

ROWS = 144
FILE = "model.safetensors"


def sums(groups: object) -> object:
    """A section of an inspection, as the report writes it."""
    return json.loads(json.dumps(groups, default=lambda found: {key: getattr(found, key) for key in found.__slots__}))


# -- prepared directories: the inspection finds what the report says


@pytest.mark.parametrize("strategy", FLAGS)
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "gpt_neox", "phi3", "qwen3_moe"])
def test_a_prepared_directory_is_what_its_report_says(tmp_path: Path, architecture: str, strategy: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, architecture, vocab_size=128, dtype="bfloat16")
    write_llama(source)
    report = prepare(source, out, *FLAGS[strategy], "--base", "copy", "--min_quantized", "0")
    found = inspect(str(out))
    assert found.kind == "prepared"
    assert found.prepared is not None
    assert (found.prepared.strategy, found.prepared.model) == (strategy, str(source))
    parameters = report["parameters"]
    assert found.total.parameters == parameters["total"]
    assert sums(found.by("dtype")) == parameters["by_dtype"]
    by_component = {
        component: {key: value for key, value in group.items() if key != "tensors"}
        for component, group in json.loads(json.dumps(sums(found.by("component")))).items()
    }
    assert by_component == parameters["by_component"]
    assert found.embeddings is not None
    assert found.embeddings.rows == report["embeddings"]["rows_after"] == 136
    assert found.embeddings.head_stored is not report["embeddings"]["tied"]
    assert found.tokenizer is not None
    assert found.tokenizer.size == report["embeddings"]["tokenizer_size"]
    assert not found.tokenizer.pad_is_eos
    if report["quantization"] is None:
        assert found.quantization is None
    else:
        assert found.quantization is not None
        assert found.quantization.coverage_percent == report["quantization"]["coverage_percent"]
        left = [{"component": name, **section} for name, section in sums(found.quantization.not_quantized).items()]
        assert left == report["quantization"]["not_quantized"]
    if report["adapter"] is None:
        assert found.adapter is None
    else:
        assert found.adapter is not None
        assert (found.adapter.r, found.adapter.alpha, found.adapter.dropout) == (8, 16, 0.1)
        assert set(found.adapter.targets) == set(report["adapter"]["targets"])
        assert found.adapter.base == str(out)


def test_a_base_that_is_elsewhere(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, "llama", vocab_size=ROWS, dtype="bfloat16")
    write_llama(source)
    prepare(source, out, "--use_lora")
    found = inspect(str(out))
    assert found.prepared is not None
    assert found.prepared.base == "reference"
    assert set(found.by("component")) == {"adapter"}
    assert found.adapter is not None
    assert found.adapter.base == str(source)
    adapter = inspect(str(out / "adapter"))
    assert adapter.kind == "adapter"
    assert adapter.total == found.total


# -- models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_is_what_transformers_makes_of_it(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    write_model(tmp_path, architecture, vocab_size=ROWS, dtype="bfloat16", shards=True)
    found = inspect(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert found.kind == "model"
    assert found.total.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.total.bytes == 2 * found.total.parameters
    rows, hidden = model.get_input_embeddings().weight.shape
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert found.embeddings is not None
    assert (found.embeddings.rows, found.embeddings.head_stored) == (rows, not tied)
    assert found.architecture is not None
    assert found.architecture.name == type(model).__name__
    assert found.architecture.model_type == model.config.model_type
    assert (found.architecture.layers, found.architecture.hidden_size) == (2, hidden)
    assert len(found.files) == len(list(tmp_path.glob("*.safetensors"))) > 1
    stored = {name: tensor.shape for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert {tensor.name: tensor.shape for tensor in found.tensors} == stored


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_weights_that_bitsandbytes_packed(tmp_path: Path, quant_type: str) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(33, 64, dtype=torch.bfloat16)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
    name = "model.layers.0.mlp.up_proj.weight"
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    plain = torch.ones(2, 3)
    save_file({name: codes, **parts, "model.layers.0.mlp.down_proj.weight": plain}, tmp_path / FILE)
    found = inspect(str(tmp_path / FILE))
    assert found.kind == "file"
    down, up = found.tensors
    assert (up.name, up.dtype, up.shape, up.parameters) == (name, quant_type, (33, 64), 33 * 64)
    data = [value for key, value in parts.items() if "quant_state" not in key]
    assert up.bytes == sum(part.numel() * part.element_size() for part in (codes, *data))
    assert (down.dtype, down.shape, down.bytes) == ("float32", (2, 3), 24)
    assert found.quantization is not None
    assert found.quantization.coverage_percent == pytest.approx(100 * 33 * 64 / (33 * 64 + 6), abs=1e-4)
    assert set(found.quantization.not_quantized) == {"mlp"}


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.embed_tokens.weight", "embedding"), ("transformer.wte.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"), ("gpt_neox.embed_in.weight", "embedding"),
        ("token_embd.weight", "embedding"), ("transformer.word_embeddings_layernorm.weight", "norm"),
        ("lm_head.weight", "head"), ("embed_out.weight", "head"), ("output.weight", "head"),
        ("model.layers.0.self_attn.o_proj.weight", "attention"), ("bert.attention.output.dense.weight", "attention"),
        ("blk.0.attn_output.weight", "attention"), ("blk.0.attn_norm.weight", "norm"), ("output_norm.weight", "norm"),
        ("transformer.h.0.ln_1.bias", "norm"), ("model.layers.0.mlp.up_proj.weight", "mlp"),
        ("blk.0.ffn_down.weight", "mlp"), ("blk.0.ffn_gate_exps.weight", "experts"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "experts"), ("blk.0.ffn_gate_inp.weight", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("base_model.model.lm_head.lora_A.weight", "adapter"),
    ],
)  # fmt: skip
def test_what_a_name_tells(name: str, component: str) -> None:
    assert component_of(name) == component


# -- what does not go together


def test_advice(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", vocab_size=ROWS, dtype="bfloat16")
    write_smollm2(tmp_path, vocab_size=160)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 150, "tie_word_embeddings": True}))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    notes = inspect(str(tmp_path)).notes
    assert len(notes) == 5
    for expected, note in zip(
        (
            "end-of-sequence",
            "needs 160 rows, the embedding has 144",
            "a head is stored",
            "150 tokens",
            "base and adapter",
        ),
        notes,
        strict=True,
    ):
        assert expected in note


# -- tokenizers


@pytest.mark.parametrize("write", [write_llama, write_llama3, write_smollm2, write_qwen, write_gpt_neox, write_gpt2])
def test_a_tokenizer_is_what_transformers_makes_of_it(tmp_path: Path, write: object) -> None:
    from transformers import AutoTokenizer

    write(tmp_path)  # pyright: ignore[reportCallIssue]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<new>"])
    for directory in (tmp_path, tmp_path / "saved"):
        facts = read_tokenizer_facts(resolve_source(str(directory), None))
        assert facts is not None
        loaded = AutoTokenizer.from_pretrained(directory)
        assert facts.size == len(loaded)
        assert facts.rows_needed == max(loaded.get_vocab().values()) + 1
        assert (facts.bos_token, facts.eos_token, facts.pad_token) == (
            loaded.bos_token, loaded.eos_token, loaded.pad_token,
        )  # fmt: skip
        assert facts.chat_template is (loaded.chat_template is not None)
        tokenizer.save_pretrained(tmp_path / "saved")


def test_a_tokenizer_whose_vocabulary_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    facts = read_tokenizer_facts(resolve_source(str(tmp_path), None))
    assert facts is not None
    assert (facts.size, facts.eos_token, facts.chat_template) == (None, None, False)
    (tmp_path / "tokenizer.model").unlink()
    assert read_tokenizer_facts(resolve_source(str(tmp_path), None)) is None


# -- GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(256)
    writer.add_head_count(4)
    writer.add_token_list([f"token{n}" for n in range(64)])
    writer.add_token_scores([0.5] * 64)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    for name, kind in (("token_embd", "Q4_0"), ("blk.0.attn_q", "Q8_0"), ("blk.0.ffn_up", "BF16")):
        dtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    writer.add_tensor("output_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_what_the_gguf_package_reads(gguf_file: Path) -> None:
    reader = gguf.GGUFReader(gguf_file)
    found = inspect(str(gguf_file))
    assert found.kind == "gguf"
    ours = {t.name: (t.dtype, t.shape, t.parameters, t.bytes, t.parts) for t in found.tensors}
    assert ours == {
        t.name: (
            t.tensor_type.name,
            tuple(int(n) for n in reversed(t.shape)),
            int(t.n_elements),
            int(t.n_bytes),
            ((gguf_file, int(t.data_offset), int(t.data_offset + t.n_bytes)),),
        )
        for t in reader.tensors
    }
    assert found.architecture is not None
    assert (found.architecture.model_type, found.architecture.layers, found.architecture.heads) == ("llama", 2, 4)
    assert found.embeddings is not None
    assert (found.embeddings.rows, found.embeddings.head_stored) == (64, False)
    assert found.tokenizer is not None
    assert (found.tokenizer.size, found.tokenizer.bos_token, found.tokenizer.eos_token) == (64, "token1", "token2")
    assert found.tokenizer.pad_is_eos
    assert found.tokenizer.chat_template


def test_the_table_of_types_is_the_gguf_packages() -> None:
    known = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {code: GGML_TYPES[code] for code in known if code in GGML_TYPES} == {
        code: entry for code, entry in known.items() if code in GGML_TYPES
    }
    assert len(GGML_TYPES.keys() & known.keys()) >= 31


def test_a_gguf_file_that_ends_early(gguf_file: Path, tmp_path: Path) -> None:
    whole = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            read_gguf_header(path)


def test_a_gguf_file_that_is_damaged(gguf_file: Path, tmp_path: Path) -> None:
    whole = gguf_file.read_bytes()
    header = 2600
    path = tmp_path / "damaged.gguf"
    draw = random.Random(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(header)] = draw.choice((0, 1, 0x7F, 0xFF, draw.randrange(256)))
        path.write_bytes(data)
        try:
            inspect(str(path))
        except CheckpointError as error:
            assert "damaged.gguf" in error.message
            refused += 1
    assert refused > 50


# -- two checkpoints


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The same model, in one file and in shards."""
    write_model(tmp_path / "one", "llama", vocab_size=ROWS, dtype="bfloat16")
    write_model(tmp_path / "two", "llama", vocab_size=ROWS, dtype="bfloat16", shards=True)
    return tmp_path / "one", tmp_path / "two"


def test_how_tensors_are_divided_does_not_count(pair: tuple[Path, Path]) -> None:
    first, second = (inspect(str(path)) for path in pair)
    comparison = compare(first, second, contents=True)
    assert comparison.equal
    assert comparison.common == comparison.hashed == len(first.tensors)


def test_what_differs(pair: tuple[Path, Path]) -> None:
    one, two = pair
    tensors = load_file(one / FILE)
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] += 1
    save_file(tensors, one / FILE)
    first, second = inspect(str(one)), inspect(str(two))
    for contents in (False, True):
        comparison = compare(first, second, contents=contents)
        assert not comparison.equal
        assert comparison.only == (("extra.weight",), ("model.norm.weight",))
        found = {(change.name, change.what): (change.first, change.second) for change in comparison.changes}
        assert found.pop(("lm_head.weight", "dtype")) == ("float32", "bfloat16")
        assert found.pop(("model.layers.0.mlp.up_proj.weight", "shape")) == ((64, 96), (96, 64))
        assert list(found) == ([("model.layers.1.mlp.up_proj.weight", "contents")] if contents else [])


def test_weights_that_went_away(pair: tuple[Path, Path]) -> None:
    first, second = (inspect(str(path)) for path in pair)
    shutil.rmtree(pair[1])
    with pytest.raises(SourceError, match="not on this machine"):
        compare(first, second, contents=True)
