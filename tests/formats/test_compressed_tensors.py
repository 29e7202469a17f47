"""Checkpoints of compressed-tensors, quantised by the package itself: decoded as it and transformers decode them."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_targets
from ftload.loaders.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ftload.loaders.checkpoint.compressed_schemes import read_groups, scheme_of
from ftload.loaders.checkpoint.formats import compressed_tensors
from ftload.loaders.checkpoint.formats.compressed_tensors import CompressedTensors, CompressedWeight
from ftload.loaders.checkpoint.formats.interface import Headers
from ftload.loaders.checkpoint.tensors import TensorMeta
from ftload.loaders.errors import CheckpointError
from ftload.loaders.source.resolve import resolve_source
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ..conftest import Result
from ..fuzz.cases import VALUES
from ..hub import LoopbackHub
from ..loaders.test_activations import measured_peak
from ..parity.compare import assert_same_output, assert_same_tensors, read_tensors
from ..parity.models import write_model
from ..parity.reference import REFERENCE_TARGETS, run_reference
from ..tokenizers import write_llama
from .compressed import compress, compress_checkpoint, decompress, scheme, set_config

Ftload = Callable[..., Result]
FILE = "model.safetensors"
VOCABULARY = 128

SCHEMES = {
    "FP8 per tensor": scheme("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "FP8 per channel": scheme("naive-quantized", num_bits=8, type="float", strategy="channel"),
    "FP8 in blocks": scheme("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[40, 32]),
    "INT8": scheme("int-quantized", num_bits=8, strategy="channel"),
    "INT8, asymmetric": scheme("int-quantized", num_bits=8, strategy="tensor", symmetric=False),
    "INT4 in groups": scheme("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "INT4 in groups, asymmetric": scheme(
        "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    "INT8 packed, asymmetric": scheme("pack-quantized", num_bits=8, strategy="channel", symmetric=False),
    "3 bits": scheme("pack-quantized", num_bits=3, strategy="tensor"),
}
ALSO_EXPERTS = ("FP8 per tensor", "FP8 per channel", "INT4 in groups", "3 bits")
"""What transformers 5.24 decodes where experts are merged; it raises for the others."""


def write_compressed(
    directory: Path, kind: str, architecture: str = "llama", *, dtype: str = "bfloat16", shards: int = 1
) -> None:
    write_model(directory, architecture, vocab_size=VOCABULARY, dtype=dtype)
    write_llama(directory, vocab_size=VOCABULARY)
    compress_checkpoint(directory, {"group_0": SCHEMES[kind]}, shards=shards)


def write_plain(source: Path, directory: Path) -> None:
    """The model as transformers decodes it, in bfloat16."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(directory)
    write_llama(directory, vocab_size=VOCABULARY)


def write_decompressed(source: Path, directory: Path, kind: str) -> None:
    """The checkpoint with each weight as the package decodes it."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    stored, plain, modules = read_tensors(source), {}, {}
    for name, value in stored.items():
        module, _, part = name.rpartition(".")
        if f"{module}.weight_scale" in stored:
            modules.setdefault(module, {})[part] = value
        else:
            plain[name] = value
    assert modules
    for module, state in modules.items():
        plain[f"{module}.weight"] = decompress(state, SCHEMES[kind]).contiguous()
    save_file(plain, directory / FILE, metadata={"format": "pt"})
    edit_config(directory, lambda config: config.pop("quantization_config"))


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def opened(directory: Path) -> Checkpoint:
    return open_checkpoint(resolve_source(str(directory), None), allow_pickle=False)


# -- parity


def assert_all_strategies_equal(
    ftload: Ftload, source: Path, plain: Path, root: Path, *, targets: list[str], strategies: tuple[str, ...]
) -> None:
    flags = {
        "standard": [],
        "lora": ["--use_lora", "--base", "copy"],
        "qlora": ["--use_qlora", "--min_quantized", "0"],
    }
    for strategy in strategies:
        out, reference = root / strategy, root / f"reference-{strategy}"
        words = ["--embedding_init", "reference", "--lora_rank", "8", *flags[strategy]]
        result = ftload("prepare", "--model", source, "--output_dir", out, *words, "--json")
        assert result.code == 0, result.err
        # there is no way of transformers' from these to NF4: its own decoding, saved, then quantised
        run_reference(plain, reference, strategy=strategy, tokenizer_size=VOCABULARY + 1, targets=targets)
        assert json.loads(result.out)["embeddings"]["rows_after"] == 136
        assert_same_output(out, reference, strategy, pad_token_id=VOCABULARY)


@pytest.mark.parametrize("kind", ["FP8 per channel", "INT4 in groups"])
@pytest.mark.parametrize(
    ("architecture", "shards", "targets"),
    [("llama", 1, REFERENCE_TARGETS), ("qwen3_moe", 3, ["q_proj", "k_proj", "v_proj", "o_proj"])],
)
def test_every_strategy_equals_the_reference(
    ftload: Ftload, tmp_path: Path, kind: str, architecture: str, shards: int, targets: list[str]
) -> None:
    source, plain = tmp_path / "source", tmp_path / "plain"
    write_compressed(source, kind, architecture, shards=shards)
    assert len(list(source.glob("*.safetensors"))) == shards
    write_plain(source, plain)
    assert_all_strategies_equal(
        ftload, source, plain, tmp_path, targets=targets, strategies=("standard", "lora", "qlora")
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_every_scheme_is_decoded_as_transformers_does(ftload: Ftload, tmp_path: Path, kind: str, dtype: str) -> None:
    source, plain, out = (tmp_path / name for name in ("source", "plain", "out"))
    write_compressed(source, kind, dtype=dtype, shards=2)
    write_plain(source, plain)
    result = ftload("prepare", "--model", source, "--output_dir", out)
    assert result.code == 0, result.err
    found, expected = read_tensors(out), read_tensors(plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == torch.bfloat16
        assert torch.equal(found[name][: value.shape[0]], value), name  # the embeddings have grown


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
@pytest.mark.parametrize("kind", ["FP8 in blocks", "INT4 in groups"])
def test_compressed_embeddings_grow(ftload: Ftload, tmp_path: Path, kind: str, architecture: str) -> None:
    source, plain = tmp_path / "source", tmp_path / "plain"
    write_model(source, architecture, vocab_size=VOCABULARY, dtype="bfloat16")
    write_llama(source, vocab_size=VOCABULARY)
    compress_checkpoint(source, {"group_0": SCHEMES[kind]}, ignored=["re:.*norm"])
    assert any("embed_tokens.weight_scale" in name for name in load_file(source / FILE))
    write_plain(source, plain)
    assert_all_strategies_equal(
        ftload, source, plain, tmp_path, targets=REFERENCE_TARGETS, strategies=("standard", "qlora")
    )


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_experts_are_decoded_as_the_package_does(ftload: Ftload, tmp_path: Path, kind: str, architecture: str) -> None:
    source, plain = tmp_path / "source", tmp_path / "plain"
    write_compressed(source, kind, architecture)
    (write_plain(source, plain) if kind in ALSO_EXPERTS else write_decompressed(source, plain, kind))
    assert_all_strategies_equal(ftload, source, plain, tmp_path, targets=[], strategies=("standard",))


# -- the decoder


@st.composite
def schemes(draw: st.DrawFn) -> tuple[Any, int, int]:
    """A scheme, and a shape that it can store."""
    form = draw(st.sampled_from(["float-quantized", "int-quantized", "pack-quantized"]))
    strategy = draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    bits = draw(st.integers(1, 8)) if form == "pack-quantized" else 8
    symmetric = draw(st.booleans())
    # in 4 bits the package itself unpacks no zero points that lie in one word (0.20)
    rows = draw(st.integers(9 if bits == 4 and not symmetric else 1, 75))
    columns = draw(st.integers(1, 75))
    more: dict[str, Any] = {}
    if strategy == "group":
        more["group_size"] = draw(st.sampled_from([size for size in range(1, columns + 1) if columns % size == 0]))
    if strategy == "block":
        more["block_structure"] = [draw(st.integers(1, 80)), draw(st.integers(1, 80))]
    kind = "float" if form == "float-quantized" else "int"
    made = scheme(form, num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, **more)
    return made, rows, columns


@settings(max_examples=150, deadline=None)
@given(
    case=schemes(),
    data=st.data(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_rows_are_decoded_as_the_package_decodes_all(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[Any, int, int],
    data: st.DataObject,
    dtype: torch.dtype,
    seed: int,
) -> None:
    made, rows, columns = case
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.5
    state = compress(weight.to(dtype), made)
    if made.weights.symmetric and data.draw(st.booleans()):  # as older releases wrote them, all zero
        state["weight_zero_point"] = torch.randint_like(state["weight_scale"], -9, 9).to(made.weights.zp_dtype)
    directory = tmp_path_factory.mktemp("compressed")
    save_file({f"X.{name}": part.contiguous() for name, part in state.items()}, directory / FILE)
    (directory / "config.json").write_text("{}")
    set_config(directory, {"group_0": made})
    expected = decompress(state, made)
    checkpoint = opened(directory)
    (tensor,) = checkpoint.tensors.values()
    assert (tensor.name, tensor.shape, tensor.parameters) == ("X.weight", (rows, columns), rows * columns)
    assert checkpoint.read(tensor).dtype == expected.dtype == dtype
    assert torch.equal(checkpoint.read(tensor), expected)
    begin = data.draw(st.integers(0, rows * columns))
    end = data.draw(st.integers(begin, rows * columns))
    assert torch.equal(checkpoint.values(tensor, begin, end), expected.flatten()[begin:end])
    elements = data.draw(st.integers(max(1, columns // 2), 20 * columns))
    chunks = list(checkpoint.chunks(tensor, elements))
    assert all(len(chunk) == elements for chunk in chunks[:-1])
    assert torch.equal(torch.cat(chunks), expected.flatten())


MEASURED = {
    **SCHEMES,
    "blocks that end within": scheme(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[100, 100]
    ),
    "5 bits": scheme("pack-quantized", num_bits=5, strategy="group", group_size=32, symmetric=False),
    "INT8 packed in groups": scheme("pack-quantized", num_bits=8, strategy="group", group_size=32),
    "FP8, asymmetric": scheme("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=False),
    "groups of 2": scheme("pack-quantized", num_bits=4, strategy="group", group_size=2, symmetric=False),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", MEASURED)
def test_decoding_takes_the_memory_that_it_tells(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    rows, columns = 320, 512
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = compress(weight, MEASURED[kind])
    save_file({f"X.{name}": part.contiguous() for name, part in state.items()}, tmp_path / FILE)
    (tmp_path / "config.json").write_text("{}")
    set_config(tmp_path, {"group_0": MEASURED[kind]})
    checkpoint = opened(tmp_path)
    (tensor,) = checkpoint.packed
    read = 0

    def counted(part: Any, begin: int, end: int) -> torch.Tensor:
        nonlocal read
        values = checkpoint._reader.values(part, begin, end)
        read += values.nbytes  # of a file's own memory, which torch's allocator does not count
        return values

    for elements in (rows * columns, 200 * columns):
        end = -(-elements // tensor.tile) * tensor.tile
        end, read = min(end, tensor.parameters), 0
        tensor.values(0, end, counted)
        peak = read + measured_peak(lambda end=end: tensor.values(0, end, checkpoint._reader.values))
        told = tensor.reading_bytes(elements) + end * dtype.itemsize
        assert 0.6 * told < peak <= told, (peak / end, told / end)


def test_a_run_keeps_within_its_memory(ftload: Ftload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    source, plain, out, expected = (tmp_path / name for name in ("source", "plain", "out", "expected"))
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=4, vocab_size=144,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    write_llama(source)
    compress_checkpoint(source, {"group_0": SCHEMES["INT4 in groups, asymmetric"]})
    decoded: list[int] = []
    decode = CompressedWeight.values

    def counted(tensor: CompressedWeight, begin: int, end: int, read: Any) -> torch.Tensor:
        decoded.append(end - begin)
        return decode(tensor, begin, end, read)

    monkeypatch.setattr(CompressedWeight, "values", counted)
    write_decompressed(source, plain, "INT4 in groups, asymmetric")
    for model, output in ((source, out), (plain, expected)):
        result = ftload("prepare", "--model", model, "--output_dir", output, "--use_qlora", "--max_memory", "64MB")
        assert result.code == 0, result.err
    assert 0 < max(decoded) <= 512 * 8192 // 4
    assert sum(decoded) == 512 * (4 * 512 + 3 * 8192)
    assert_same_tensors(out, expected)


# -- what else a checkpoint holds


def test_scales_of_activations_are_left_out(ftload: Ftload, tmp_path: Path) -> None:
    source, plain, out = (tmp_path / name for name in ("source", "plain", "out"))
    write_compressed(source, "FP8 per tensor")
    tensors = load_file(source / FILE)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name.replace(".weight_scale", ".input_scale")] = torch.ones(1)
        tensors[name.replace(".weight_scale", ".output_scale")] = torch.ones(1)
        tensors[name.replace(".weight_scale", ".input_zero_point")] = torch.zeros(1, dtype=torch.int8)
    for layer in range(2):
        for name in ("q", "k", "v"):
            tensors[f"model.layers.{layer}.self_attn.{name}_scale"] = torch.ones(1)
    for name in ("k_scale", "model.layers.0.self_attn.attn.v_scale"):
        tensors[name] = torch.ones(1)
    save_file(tensors, source / FILE)
    write_plain(source, plain)
    result = ftload("prepare", "--model", source, "--output_dir", out)
    assert result.code == 0, result.err
    found, expected = read_tensors(out), read_tensors(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name][: value.shape[0]], value) for name, value in expected.items())
    inspected = json.loads(ftload("inspect", source, "--json").out)
    assert inspected["by_dtype"].keys() == {"fp8", "bfloat16"}
    # a byte a weight, and a scale of two bytes for each of them
    assert inspected["by_dtype"]["fp8"]["bytes"] == 61_440 + 14 * 2


GROUPS = {
    "attention": scheme(
        "float-quantized", targets=(r"re:.*self_attn\..*",), num_bits=8, type="float", strategy="channel"
    ),
    "one layer": scheme("int-quantized", targets=("model.layers.1.self_attn.q_proj",), num_bits=8, strategy="channel"),
    "the rest": scheme("pack-quantized", num_bits=4, strategy="group", group_size=32),
}


def test_each_group_is_decoded_by_its_own_scheme(ftload: Ftload, tmp_path: Path) -> None:
    """transformers 5.24 decodes all layers of such a checkpoint by one scheme: here the package tells, by each name."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, "llama", vocab_size=VOCABULARY, dtype="bfloat16")
    write_llama(source, vocab_size=VOCABULARY)
    weights = {name: value for name, value in load_file(source / FILE).items() if name.endswith("_proj.weight")}
    # the exact name comes before the pattern, whichever group is first
    compress_checkpoint(source, {name: GROUPS[name] for name in ("one layer", "attention", "the rest")})
    set_config(source, GROUPS)
    assert json.loads((source / "config.json").read_text())["quantization_config"]["format"] == "mixed-precision"
    result = ftload("prepare", "--model", source, "--output_dir", out, "--json")
    assert result.code == 0, result.err
    found = read_tensors(out)
    for name, weight in weights.items():
        group = "attention" if "self_attn" in name else "the rest"
        group = "one layer" if name == "model.layers.1.self_attn.q_proj.weight" else group
        assert torch.equal(found[name], decompress(compress(weight, GROUPS[group]), GROUPS[group])), name
    rows = json.loads(result.out)["source"]["stored"]
    assert {(row["component"], row["dtype"], row["tensors"]) for row in rows if row["format"] is not None} == {
        ("attention", "fp8", 7), ("attention", "int8", 1), ("mlp", "int4", 6),
    }  # fmt: skip
    stored = json.loads(ftload("inspect", source, "--json").out)["by_dtype"]
    assert {dtype: row["tensors"] for dtype, row in stored.items()} == {"bfloat16": 7, "fp8": 7, "int4": 6, "int8": 1}


def test_experts_and_attention_may_differ(ftload: Ftload, tmp_path: Path) -> None:
    """As in Kimi K2: this much of a mixture transformers decodes itself."""
    source, plain = tmp_path / "source", tmp_path / "plain"
    write_model(source, "qwen3_moe", vocab_size=VOCABULARY, dtype="bfloat16")
    write_llama(source, vocab_size=VOCABULARY)
    groups = {
        "attention": scheme(
            "float-quantized", targets=("re:.*self_attn.*",), num_bits=8, type="float", strategy="tensor"
        ),
        "experts": scheme("pack-quantized", targets=("re:.*experts.*",), num_bits=4, strategy="group", group_size=32),
    }
    compress_checkpoint(source, groups, shards=2)
    write_plain(source, plain)
    assert_all_strategies_equal(ftload, source, plain, tmp_path, targets=[], strategies=("standard",))


TARGETS = [
    "Linear", "lm_head", "model.layers.0.self_attn.q_proj", "re:.*q_proj", "re:.*self_attn.*", r"re:.*layers\.1\..*",
    "re:model", "re:proj",
]  # fmt: skip
MODULES = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]


@settings(max_examples=200, deadline=None)
@given(
    targets=st.permutations(TARGETS).flatmap(lambda all_: st.integers(2, len(all_)).map(lambda n: all_[:n])),
    module=st.sampled_from([*MODULES, "lm_head"]),
)
def test_a_module_belongs_to_the_group_that_the_package_finds(targets: list[str], module: str) -> None:
    weights = {"num_bits": 4, "strategy": "group"}
    groups = {
        f"group_{n}": {"targets": [target], "weights": {**weights, "group_size": n + 1}}
        for n, target in enumerate(targets)
    }
    matched = match_targets(module, torch.nn.Linear(1, 1), targets)
    found = scheme_of(module, read_groups({"format": "pack-quantized", "config_groups": groups}, "a model"))
    assert (found and found.group_size) == (targets.index(matched[0]) + 1 if matched else None)


def test_plan_and_inspect_count_weights_not_codes(ftload: Ftload, tmp_path: Path) -> None:
    source, plain = tmp_path / "source", tmp_path / "plain"
    write_compressed(source, "INT4 in groups, asymmetric")
    write_plain(source, plain)
    found, expected = (json.loads(ftload("inspect", directory, "--json").out) for directory in (source, plain))
    assert found["total"]["parameters"] == expected["total"]["parameters"]
    assert found["by_dtype"]["int4"]["parameters"] == 61_440
    assert (found["quantization"]["method"], found["quantization"]["coverage_percent"]) == ("compressed-tensors", 100.0)
    plans = [
        json.loads(ftload("plan", "--model", directory, "--use_qlora", "--json").out) for directory in (source, plain)
    ]
    assert plans[0]["parameters"] == plans[1]["parameters"]


# -- what it needs


@pytest.mark.parametrize("version", [None, "0.15.0"])
def test_without_the_package(
    ftload: Ftload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    write_compressed(tmp_path / "model", "INT4 in groups")
    monkeypatch.setattr(compressed_tensors, "installed_version", lambda _: version)
    for command in ("prepare", "plan"):
        result = ftload(command, "--model", tmp_path / "model", "--output_dir", tmp_path / "out")
        assert result.code == 5
        assert "reading compressed-tensors needs the `compressed-tensors` package, 0.20 or later" in result.err
        assert ("0.15.0 is installed" in result.err) == (version is not None)
        assert "hint: pip install 'ftload[compressed-tensors]'" in result.err
    assert ftload("inspect", tmp_path / "model").code == 0


def test_headers_are_shown_without_torch_and_without_the_package(tmp_path: Path) -> None:
    write_compressed(tmp_path / "model", "INT4 in groups, asymmetric")
    code = (
        "import sys\n"
        "from ftload.cli.app import run\n"
        "code = run(['inspect', sys.argv[1], '--json'])\n"
        "sys.exit(code or len({'torch', 'compressed_tensors', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["by_dtype"]["int4"]["parameters"] == 61_440


@pytest.mark.parametrize(("kind", "asked"), [("INT4 in groups", 0), ("INT8 packed, asymmetric", 14)])
def test_of_a_hub_no_shape_is_asked_for_that_groups_tell(tmp_path: Path, kind: str, asked: int) -> None:
    write_compressed(tmp_path / "model", kind)
    with LoopbackHub() as hub:
        hub.add("org/model", tmp_path / "model")
        command = [sys.executable, "-m", "ftload.cli", "inspect", "org/model", "--json"]
        done = subprocess.run(command, env=hub.env(tmp_path / "home"), capture_output=True, check=True)
        ranges = {request.range for request in hub.requests if request.path.endswith(FILE)} - {None}
    assert len(ranges) == asked + 1  # that of the header
    by_dtype = json.loads(done.stdout)["by_dtype"]
    assert sum(row["parameters"] for dtype, row in by_dtype.items() if dtype.startswith("int")) == 61_440


# -- spoilt

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def scale_of_nan(tensors: Tensors) -> None:
    tensors[f"{Q}.weight_scale"][3] = math.nan


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{Q}.{name}": value})


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{Q}.{name}")


G4, G4A, F8 = "INT4 in groups", "INT4 in groups, asymmetric", "FP8 per channel"
SPOILT: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scale": (G4, drop("weight_scale"), f"tensor `{Q}.weight_scale` is missing: `{Q}.weight_packed` needs it"),
    "no scale of FP8": (F8, drop("weight_scale"), f"tensor `{Q}.weight_scale` is missing: `{Q}.weight` needs it"),
    "no codes": (G4, drop("weight_packed"), f"tensor `{Q}.weight_packed` is missing: `{Q}.weight_scale` needs it"),
    "no shape": (G4, drop("weight_shape"), f"tensor `{Q}.weight_shape` is missing"),
    "no zero point": (G4A, drop("weight_zero_point"), f"tensor `{Q}.weight_zero_point` is missing"),
    "a zero point where none can be": (
        G4, put("weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)),
        f"tensor `{Q}.weight_zero_point` of `{FILE}` is I32 [8, 2], where I8 [64, 2] is needed",
    ),
    "a scale of another shape": (
        G4, put("weight_scale", torch.ones(64, 3, dtype=torch.bfloat16)),
        f"tensor `{Q}.weight_scale` of `{FILE}` is BF16 [64, 3], where BF16 or F16 or F32 [64, 2] is needed",
    ),
    "a scale of integers": (F8, put("weight_scale", torch.ones(64, 1, dtype=torch.int32)), "is I32 [64, 1], where"),
    "a scale without its last dimension": (F8, put("weight_scale", torch.ones(64)), "is F32 [64], where"),
    "NaN in a scale": (G4, scale_of_nan, f"tensor `{Q}.weight_scale` of `{FILE}` holds NaN or infinity"),
    "NaN in FP8": (
        F8, lambda t: t[f"{Q}.weight"].view(torch.uint8)[5, 7:8].fill_(0x7F),
        f"tensor `{Q}.weight` of `{FILE}` holds NaN or infinity",
    ),
    "codes cut short": (
        G4, lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:, :-1]}),
        f"tensor `{Q}.weight_packed` of `{FILE}` is [64, 7]: 4 bits of [64, 64] weights, which `{Q}.weight_sh",
    ),
    "another shape": (G4, put("weight_shape", torch.tensor([64, 32])), "4 bits of [64, 32] weights"),
    "a negative shape": (G4, put("weight_shape", torch.tensor([64, -64])), "4 bits of [64, -64] weights"),
    "a shape of three": (G4, put("weight_shape", torch.tensor([64, 8, 8])), "is I64 [3], where I64 or I32 [2] is"),
    "columns in another order": (
        G4, put("weight_g_idx", torch.zeros(64, dtype=torch.int32)),
        f"tensor `{Q}.weight_g_idx` of `{FILE}` is no part of `pack-quantized`, as which config.json says that `{Q}`",
    ),
    "INT8 where FP8 is said": (
        F8, put("weight", torch.zeros(64, 64, dtype=torch.int8)),
        f"tensor `{Q}.weight` of `{FILE}` is I8 [64, 64], where F8_E4M3 is needed",
    ),
    "bfloat16 with a scale": (F8, put("weight", torch.zeros(64, 64, dtype=torch.bfloat16)), "is BF16 [64, 64]"),
    "a weight that is no matrix": (
        F8, put("weight", torch.zeros(8, 8, 64).to(torch.float8_e4m3fn)),
        f"tensor `{Q}.weight` of `{FILE}` has the shape [8, 8, 64]: no matrix",
    ),
    "packed and not": (
        G4, put("weight", torch.zeros(64, 64, dtype=torch.int8)),
        f"tensor `{Q}.weight` of `{FILE}` is no part of `pack-quantized`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files_are_told(ftload: Ftload, tmp_path: Path, case: str) -> None:
    kind, change, words = SPOILT[case]
    write_compressed(tmp_path / "model", kind)
    tensors = load_file(tmp_path / "model" / FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model" / FILE)
    result = ftload("prepare", "--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--use_qlora")
    assert result.code == 4, result.err
    assert words in result.err
    assert not (tmp_path / "out").exists()
    assert ftload("inspect", tmp_path / "model").code == 0


def group(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda section: section["config_groups"]["group_0"].update(changes)


def weights(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda section: section["config_groups"]["group_0"]["weights"].update(changes)


OTHER = "is stored by compressed-tensors with"
PATHS = [
    ("config_groups",), ("config_groups", "group_0"), ("sparsity_config",), ("transform_config",), ("format",),
    *(("config_groups", "group_0", key) for key in ("targets", "weights", "format")),
    *(("config_groups", "group_0", "targets", n) for n in range(2)),
    *(
        ("config_groups", "group_0", "weights", key)
        for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder")
    ),
    *(("config_groups", "group_0", "weights", "block_structure", n) for n in range(2)),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3),
    strategy=st.sampled_from(["group", "block"]),
)
def test_any_settings_are_understood_or_refused(changes: list[tuple[tuple[Any, ...], Any]], strategy: str) -> None:
    own = {"group_size": 32} if strategy == "group" else {"block_structure": [32, 32]}
    first = {"targets": ["Linear", "re:.*q_proj"], "weights": {"num_bits": 8, "strategy": strategy, **own}}
    second = {"targets": ["lm_head"], "weights": {"num_bits": 4, "strategy": "channel"}}
    section: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    section["config_groups"] = {"group_0": first, "group_1": second}
    for path, value in changes:
        *above, last = path
        place: Any = section
        try:
            for key in above:
                place = place[key]
            place[last] = value
        except (TypeError, LookupError):
            continue
    parts = {"weight_packed": ("I32", (64, 16)), "weight_shape": ("I64", (2,)), "weight_scale": ("BF16", (2, 2))}
    tensors = {
        f"{module}.{part}": TensorMeta(name=f"{module}.{part}", shape=shape, dtype=dtype, file=FILE, begin=0, end=16)
        for module in ("a.q_proj", "lm_head")
        for part, (dtype, shape) in parts.items()
    }
    headers = Headers(source=NoFiles(), tensors=tensors)
    headers.__dict__["section"] = section
    try:
        for tensor in CompressedTensors().find(headers, strict=True):
            assert tensor.shape == (64, 64)
            assert tensor.reading_bytes(1000) > 0
    except CheckpointError as error:
        assert "\n" not in error.message
    list(CompressedTensors().find(headers, strict=False))


class NoFiles:
    """A source of shapes alone: (64, 64)."""

    kind, model, files = "local", "a model", ()

    def read(self, file: str, begin: int, end: int) -> bytes:
        return struct.pack("<2q", 64, 64)


ODD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "NVFP4": (group(format="nvfp4-pack-quantized"), f"{OTHER} the format `nvfp4-pack-quantized`"),
    "Marlin": (group(format="marlin-24"), f"{OTHER} the format `marlin-24`"),
    "no format": (lambda s: (group(format=None)(s), s.pop("format")), f"{OTHER} the format `None`"),
    "mixed, but not said how": (
        lambda s: (group(format=None)(s), s.update(format="mixed-precision")), f"{OTHER} the format `mixed-precision`"
    ),
    "a format of its own type": (group(format=["pack-quantized"]), f"{OTHER} the format `['pack-quantized']`"),
    "sparse": (lambda s: s.update(sparsity_config={"format": "sparse-24-bitmask"}), f"{OTHER} a `sparsity_config`"),
    "rotated": (
        lambda s: s.update(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        f"{OTHER} a `transform_config`",
    ),
    "another form of weights": (group(format="int-quantized"), f"proj.weight_packed` of `{FILE}` is no part of `int-"),
    "no groups": (lambda s: s.pop("config_groups"), "`quantization_config.config_groups` is None"),
    "empty groups": (lambda s: s.update(config_groups={}), "proj.weight_packed` is compressed, but no group"),
    "a list of groups": (lambda s: s.update(config_groups=[1]), "`quantization_config.config_groups` is [1], which"),
    "a preset": (lambda s: s.update(config_groups={"W4A16": ["Linear"]}), "config_groups.W4A16` is ['Linear'], which"),
    "weights of its own type": (group(weights=[4]), "config_groups.group_0.weights` is [4]"),
    "no targets": (group(targets=None), "config_groups.group_0.targets` is None"),
    "a pattern that is none": (group(targets=["re:("]), "config_groups.group_0.targets` is ['re:(']"),
    "bits as text": (weights(num_bits="4"), "weights.num_bits` is '4', which can't be decoded"),
    "a truth value of bits": (weights(num_bits=True), "weights.num_bits` is True"),
    "16 bits": (weights(num_bits=16), "weights.num_bits` is 16"),
    "more bits than there are": (weights(num_bits=8), "8 bits of [64, 96] weights"),
    "FP4": (weights(type="float"), "weights.type` is 'float'"),
    "no type": (weights(type={}), "weights.type` is {}"),
    "a strategy of activations": (weights(strategy="token"), "weights.strategy` is 'token'"),
    "an empty group": (weights(group_size=0), "weights.group_size` is 0"),
    "a group of its own type": (weights(group_size=32.0), "weights.group_size` is 32.0"),
    "a group that does not divide": (weights(group_size=36), "has 96 columns, which groups of 36 do not divide"),
    "blocks in groups": (weights(block_structure=[1, 32]), "weights.block_structure` is [1, 32]"),
    "blocks of nothing": (
        weights(strategy="block", group_size=None, block_structure=[0, 32]), "weights.block_structure` is [0, 32]"
    ),
    "the order of activations": (weights(actorder="group"), "weights.actorder` is 'group'"),
    "asymmetric, it says": (weights(symmetric=False), "proj.weight_zero_point` is missing: `model.layers.0.mlp.down_"),
    "symmetric as text": (weights(symmetric="yes"), "weights.symmetric` is 'yes'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_settings_that_fit_nothing_are_told(ftload: Ftload, tmp_path: Path, case: str) -> None:
    change, words = ODD[case]
    write_compressed(tmp_path / "model", "INT4 in groups")
    edit_config(tmp_path / "model", lambda config: change(config["quantization_config"]))
    result = ftload("prepare", "--model", tmp_path / "model", "--output_dir", tmp_path / "out")
    assert result.code == 4, result.err
    assert words in result.err
    assert not (tmp_path / "out").exists()
    assert ftload("inspect", tmp_path / "model").code == 0
