"""Stored formats: what is decoded, and that a new one is one file and its line in the registry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ftload.loaders.checkpoint.formats import registry
from ftload.loaders.checkpoint.formats.interface import Headers, PackedTensor, Read
from ftload.loaders.checkpoint.tensors import DTYPE_CODES
from ftload.loaders.errors import CheckpointError
from ftload.loaders.source.resolve import resolve_source
from ftload.loaders.steps.plain import Cast
from safetensors.torch import load_file, save_file

from ..conftest import Result
from .plans import make_plan

Ftload = Callable[..., Result]


def opened(directory: Path) -> Checkpoint:
    return open_checkpoint(resolve_source(str(directory), None), allow_pickle=False)


# -- 4-bit


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((128, 128), 64), ((600, 512), 64), ((10, 256), 256), ((10, 96), 64), ((7, 33), 64), ((3, 2), 64)],
)
def test_4_bit_weights_are_decoded_as_bitsandbytes_does(
    tmp_path: Path, shape: tuple[int, int], block: int, dtype: torch.dtype, nested: bool, quant_type: str
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = quantize_4bit(weight, blocksize=block, quant_type=quant_type, compress_statistics=nested)
    save_file({"W": codes, **{f"W.{key}": part for key, part in state.as_dict(packed=True).items()}}, tmp_path / FILE)
    # one row: where a block does not end with a row, its kernel for CPUs (0.50) takes the absmax of another block
    state.shape = torch.Size((1, weight.numel()))
    # + 0.0: FP4's second zero is -0 for its kernels for GPUs and for CPUs without AVX-512, +0 for the others
    expected = dequantize_4bit(codes, state).reshape(-1) + 0.0
    checkpoint = open_checkpoint(resolve_source(str(tmp_path), None), allow_pickle=False)
    (tensor,) = checkpoint.tensors.values()
    assert (tensor.name, tensor.shape, tensor.dtype) == ("W", shape, DTYPE_CODES[str(dtype).removeprefix("torch.")])
    assert torch.equal(checkpoint.read(tensor), expected.reshape(shape))
    assert torch.equal(checkpoint.read(tensor).signbit(), expected.reshape(shape).signbit())
    for elements in (1, 63, 64, 100, 640, 10**6):
        if len(expected) < 500 * elements:
            chunks = list(checkpoint.chunks(tensor, elements))
            assert all(len(chunk) == elements for chunk in chunks[:-1])
            assert torch.equal(torch.cat(chunks), expected)
    for begin, end in ((0, 1), (1, 5), (len(expected) - 3, len(expected)), (0, len(expected)), (2, 2)):
        assert torch.equal(checkpoint.values(tensor, begin, end), expected[begin:end])


FILE = "model.safetensors"


# -- a format that ftload does not have: one byte a weight, one float32 scale a row


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteTensor(PackedTensor):
    def values(self, begin: int, end: int, read: Read) -> torch.Tensor:
        codes = read(self.parts[0], begin, end).float().reshape(-1, self.tile)
        scales = read(self.parts[1], begin // self.tile, end // self.tile)
        return (codes * scales[:, None]).bfloat16().flatten()

    def reading_bytes(self, elements: int) -> int:
        return 10 * max(elements, self.tile)


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteFormat:
    name: str = "bytes"
    method: str = "bytes"
    kind: str = "byte-wise"

    def find(self, headers: Headers, *, strict: bool) -> Iterator[PackedTensor]:
        for name, scale in headers.tensors.items():
            if not name.endswith("_scale"):
                continue
            assert headers.section["quant_method"] == self.method
            codes = headers.tensors[name.removesuffix("_scale")]
            yield ByteTensor(
                name=codes.name, shape=codes.shape, dtype="BF16", file=codes.file, begin=codes.begin, end=codes.end,
                format=self, parts=(codes, scale), tag="byte", tile=codes.shape[1],
            )  # fmt: skip

    def claims(self, section: Mapping[str, Any], *, found: bool) -> bool:
        return section.get("quant_method") == self.method

    def kept_settings(self, section: Mapping[str, Any]) -> None:
        return None


@pytest.fixture
def pair(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The tiny Llama in that format, and decoded."""
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, ByteFormat()))
    directories = tmp_path / "bytes", tmp_path / "decoded"
    tensors: dict[str, torch.Tensor] = {}
    decoded: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(llama / FILE).items():
        if tensor.dim() < 2 or "embed" in name or "head" in name:
            tensors[name] = decoded[name] = tensor
            continue
        scales = tensor.float().abs().amax(dim=1) / 127
        tensors[name] = (tensor.float() / scales[:, None]).round().to(torch.int8)
        tensors[f"{name}_scale"] = scales
        decoded[name] = (tensors[name].float() * scales[:, None]).bfloat16()
    for directory, content in zip(directories, (tensors, decoded), strict=True):
        directory.mkdir()
        for file in llama.iterdir():
            if file.name != FILE:
                (directory / file.name).write_bytes(file.read_bytes())
        save_file(content, directory / FILE, metadata={"format": "pt"})
    edit_config(directories[0], quantization_config={"quant_method": "bytes"})
    return directories


def edit_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("flags", [(), ("--use_lora", "--base", "copy"), ("--use_qlora",)])
def test_a_new_format_needs_one_file(
    ftload: Ftload, pair: tuple[Path, Path], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    outs = []
    for source in pair:
        out = tmp_path / f"out of {source.name}"
        result = ftload("prepare", "--model", source, "--output_dir", out, *flags)
        assert result.code == 0, result.err
        outs.append(out)
    files = [{path.name: path for path in out.rglob("*") if path.is_file()} for out in outs]
    assert files[0].keys() == files[1].keys()
    for name in (FILE, "config.json", *(["adapter_model.safetensors"] if flags else [])):
        assert files[0][name].read_bytes() == files[1][name].read_bytes(), name
    reports = [json.loads(found["ftload_report.json"].read_text()) for found in files]
    for section in ("parameters", "embeddings", "quantization"):
        assert reports[0][section] == reports[1][section]
    assert ftload("verify", outs[0]).code == 0


def test_a_new_format_is_planned_and_shown(ftload: Ftload, pair: tuple[Path, Path], tmp_path: Path) -> None:
    plans = [make_plan(source, tmp_path)[0] for source in pair]
    assert plans[0].skeleton.stored_quantization is None
    assert not plans[0].copied_files
    assert plans[1].copied_files
    packed, plain = plans[0].checkpoint, plans[1].checkpoint
    # one stored tensor by the same name in the dtype of its values would still not be what is written
    casts = [Cast(source=tensor, name=tensor.name, dtype=tensor.dtype) for tensor in packed.tensors.values()]
    assert [cast.source for cast in casts if not cast.changes_nothing] == list(packed.packed)
    assert packed.tensors.keys() == plain.tensors.keys() < packed.stored.keys()
    found, expected = (json.loads(ftload("inspect", source, "--json").out) for source in pair)
    assert found["total"]["parameters"] == expected["total"]["parameters"]
    assert found["by_dtype"]["byte"]["tensors"] == len(packed.packed) > 0


def test_config_and_tensors_that_contradict_each_other(pair: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = pair
    edit_config(plain, quantization_config={"quant_method": "bytes"})
    with pytest.raises(CheckpointError, match=r"says bytes, but no tensor is stored so: `model\.layers\.0\.mlp\.down"):
        make_plan(plain, tmp_path)
    edit_config(
        packed, quantization_config={"quant_method": "bytes", "bnb_4bit_quant_type": "nf4", "load_in_4bit": True}
    )
    with pytest.raises(CheckpointError, match=r"says `bytes`, but tensor `model\.layers\.0.*` is stored as bytes"):
        make_plan(packed, tmp_path)
    edit_config(packed, quantization_config={"quant_method": "ternary"})
    with pytest.raises(CheckpointError, match=r"is already quantised \(`ternary`\)") as raised:
        registry.claimed_format(resolve_source(str(plain), None), {"quant_method": "ternary"}, ())
    assert raised.value.hint is not None
    names = ", ".join(form.name for form in registry.FORMATS)
    assert raised.value.hint.endswith(f"of quantised ones, {names} can be used")


def test_packed_tensors_that_config_does_not_know(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Headers, "section", {"quant_method": "bytes"})
    edit_config(pair[0], quantization_config=None)
    with pytest.raises(
        CheckpointError, match=r"holds byte-wise tensors \(`model\.layers\.0.*`\), but its config\.json has no `quant"
    ):
        make_plan(pair[0], tmp_path)


# -- where 4 bits are known


WHERE = ("loaders/nf4/", "loaders/experts/", "loaders/qlora.py", "loaders/checkpoint/formats/nf4.py")


def test_one_format_one_package_and_one_strategy_know_of_4_bits() -> None:
    root = Path(__file__).parent.parent.parent
    found = {}
    for path in sorted([*root.glob("cli/**/*.py"), *root.glob("loaders/**/*.py")]):
        name = path.relative_to(root).as_posix()
        lines = [line for line in path.read_text().splitlines() if "nf4" in line or "four_bit" in line]
        if lines and not name.startswith(WHERE):
            found[name] = lines
    flags = found.pop("loaders/flags/declared.py")
    assert [line.strip() for line in flags] == [
        '"4-bit type of weights; unset takes nf4, or the checkpoint\'s",', 'choices=("nf4", "fp4"),'
    ]  # fmt: skip
    assert found == {"loaders/checkpoint/formats/registry.py": ["from .nf4 import Bitsandbytes4Bit"]}
