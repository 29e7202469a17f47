"""The encoder against bitsandbytes' own, bit for bit, on whatever finite numbers a weight can hold."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import ftload.loaders.nf4
import pytest
import torch
from ftload.cli.errors import Interrupted
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.nf4 import encode as nf4
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ..parity.models import write_model
from ..tokenizers import write_llama

many = settings(max_examples=100, deadline=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A floating-point type, and its non-negative values as integers: they are in the same order."""

    dtype: torch.dtype
    bits: torch.dtype
    mantissa: int
    """Bits."""

    @property
    def sign(self) -> int:
        return torch.iinfo(self.bits).min

    @property
    def smallest_normal(self) -> int:
        return 1 << self.mantissa

    @property
    def largest(self) -> int:
        return self.infinity - 1

    @property
    def infinity(self) -> int:
        return int(torch.tensor(torch.inf, dtype=self.dtype).view(self.bits))


BF16 = Format(dtype=torch.bfloat16, bits=torch.int16, mantissa=7)
FP16 = Format(dtype=torch.float16, bits=torch.int16, mantissa=10)
FP32 = Format(dtype=torch.float32, bits=torch.int32, mantissa=23)
FORMATS = pytest.mark.parametrize("form", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
TYPES = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def midpoints(quant_type: str) -> torch.Tensor:
    """Of the sorted code book; FP4 has two zeros, and one between them."""
    values = bnb.get_4bit_type(quant_type, device="cpu").sort().values
    return (values[:-1] + values[1:]) / 2


KINDS = ("normal", "any", "zeros", "denormal", "huge", "one value", "spike", "thresholds")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_block(form: Format, kind: str, size: int, generator: torch.Generator, quant_type: str = "nf4") -> torch.Tensor:
    """Up to 64 weights of one kind."""

    def draw(low: int, high: int, count: int = size) -> torch.Tensor:
        return torch.randint(low, high + 1, (count,), generator=generator).to(form.bits)

    if kind == "normal":
        return (torch.randn(size, generator=generator) * 0.02).to(form.dtype)
    if kind == "zeros":
        bits = draw(0, 0)
    elif kind == "denormal":
        bits = draw(0, form.smallest_normal)
    elif kind == "huge":
        bits = draw(form.largest - form.smallest_normal, form.largest)
    elif kind == "one value":
        bits = draw(0, form.largest, 1).expand(size).clone()
    elif kind == "spike":
        bits = draw(0, 2 * form.smallest_normal)
        bits[draw(0, size - 1, 1).long()] = form.largest - draw(0, form.smallest_normal, 1)
    elif kind == "thresholds":
        top = draw(1, form.largest, 1)
        near = (midpoints(quant_type).abs() * top.view(form.dtype).float()).to(form.dtype).view(form.bits)
        bits = (near[draw(0, 14).long()] + draw(-1, 1)).clamp(torch.zeros_like(top), top)
        bits[draw(0, size - 1, 1).long()] = top
    else:
        bits = draw(0, form.largest)
    return (bits | draw(0, 1) * form.sign).view(form.dtype)


def make_weight(form: Format, size: int, kinds: list[str], seed: int, quant_type: str = "nf4") -> torch.Tensor:
    """Blocks of these kinds in turn, the last perhaps incomplete."""
    generator = torch.Generator().manual_seed(seed)
    begins = range(0, size, nf4.BLOCK)
    return torch.cat(
        [
            make_block(form, kinds[i % len(kinds)], min(nf4.BLOCK, size - begin), generator, quant_type)
            for i, begin in enumerate(begins)
        ]
    )


def encode(values: torch.Tensor, quant_type: str = "nf4") -> tuple[torch.Tensor, torch.Tensor]:
    codes, absmax = nf4.encode(values, quant_type)
    return codes.clone(), absmax  # the next call writes into the same memory


def encode_as_bitsandbytes(values: torch.Tensor, quant_type: str = "nf4") -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = bnb.quantize_4bit(values, blocksize=64, quant_type=quant_type, compress_statistics=False)
    return codes.reshape(-1), state.absmax


def assert_same_bits(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_encoded_alike(values: torch.Tensor, quant_type: str) -> None:
    assert_same_bits(encode(values, quant_type), encode_as_bitsandbytes(values, quant_type))


weights = {
    "size": st.integers(1, 4000),
    "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=8),
    "seed": st.integers(0, 2**32),
}


@TYPES
@FORMATS
@many
@given(**weights)
def test_blocks_of_all_kinds(form: Format, size: int, kinds: list[str], seed: int, quant_type: str) -> None:
    assert_encoded_alike(make_weight(form, size, kinds, seed, quant_type), quant_type)


@TYPES
@FORMATS
@many
@given(data=st.binary(min_size=4, max_size=4 * 200))
@example(data=bytes(4 * 64))
@example(data=b"\x00\x80" * 2 * 65)
def test_any_bits(form: Format, data: bytes, quant_type: str) -> None:
    bits = torch.frombuffer(bytearray(data[: len(data) // 4 * 4]), dtype=form.bits)
    # what isn't finite loses the lowest bit of its exponent
    bits = torch.where(bits & form.infinity == form.infinity, bits & ~form.smallest_normal, bits)
    assert_encoded_alike(bits.view(form.dtype), quant_type)


@TYPES
@FORMATS
@pytest.mark.parametrize("kind", KINDS)
def test_every_remainder(form: Format, kind: str, quant_type: str) -> None:
    for size in range(1, 2 * nf4.BLOCK + 2):
        assert_encoded_alike(make_weight(form, size, [kind], size, quant_type), quant_type)


@TYPES
@pytest.mark.parametrize("form", [BF16, FP16], ids=["bf16", "fp16"])
def test_thresholds_of_every_absolute_maximum(form: Format, quant_type: str) -> None:
    """Codes rise with the weight: where the neighbours on both sides of a threshold are right, all are."""
    maxima = torch.arange(1, form.infinity, dtype=form.bits)
    assert_thresholds_alike(form, maxima, quant_type)


@TYPES
def test_thresholds_of_float32(quant_type: str) -> None:
    exponents = torch.arange(255).repeat_interleave(64) << 23
    mantissas = torch.randint(0, 2**23, exponents.shape, generator=torch.Generator().manual_seed(0))
    edges = [1, 2, 3, 2**23 - 1, 2**23, 2**23 + 1, 0x006CE3EE, 0x006CE3EF, 0x7F7FFFFE, 0x7F7FFFFF]  # 1e-38 is 6CE3EE
    assert_thresholds_alike(
        FP32, torch.cat([(exponents | mantissas).clamp_min(1), torch.tensor(edges)]).to(FP32.bits), quant_type
    )


def assert_thresholds_alike(form: Format, maxima: torch.Tensor, quant_type: str) -> None:
    """One block for each: the four values about each threshold, and the maximum with either sign or zero."""
    scale, between = 1 / maxima.view(form.dtype).float().clamp_min(1e-38), midpoints(quant_type)
    negative = (between < 0).to(form.bits)[None, :, None]
    # one step below to two above: there the product, once rounded, may still equal the midpoint
    steps = torch.arange(-1, 3, dtype=form.bits) * (1 - 2 * negative)
    middle = (between.abs().double() / scale.double()[:, None]).to(form.dtype).view(form.bits)[:, :, None]
    magnitudes = (middle + steps).clamp(torch.zeros_like(maxima)[:, None, None], maxima[:, None, None])
    ends = torch.stack([maxima, maxima | form.sign, torch.zeros_like(maxima), torch.full_like(maxima, form.sign)], 1)
    blocks = torch.cat([(magnitudes | negative * form.sign).reshape(len(maxima), 60), ends], 1).view(form.dtype)
    assert_encoded_alike(blocks, quant_type)
    codes, _ = encode(blocks, quant_type)
    counts = torch.stack([codes >> 4, codes & 15], 1).reshape(len(maxima), nf4.BLOCK)[:, :60].reshape(-1, 15, 4)
    counts = bnb.get_4bit_type(quant_type, device="cpu").argsort().argsort()[counts.long()]
    # from a few steps of the type on, the four lie on both sides: the test does reach the thresholds
    wide = maxima > {"nf4": 2, "fp4": 5}[quant_type] * form.smallest_normal
    # but for that between two zeros: products of what is next to zero vanish
    reached = counts[wide][:, between != 0]
    assert (reached.amax(2) - reached.amin(2) == 1).all()


@TYPES
@pytest.mark.parametrize(
    "top", [1, 2, 63, 127, 128, 129, 0x00D9, 0x0100, 0x3C23, 0x3F7F, 0x3F80, 0x4049, 0x7F00, 0x7F7F]
)
def test_every_bfloat16_under_an_absolute_maximum(top: int, quant_type: str) -> None:
    magnitudes = torch.arange(top + 1, dtype=torch.int16)
    bits = torch.cat([magnitudes, magnitudes | BF16.sign])
    pad = -len(bits) % (nf4.BLOCK - 1)
    rows = torch.cat([bits, bits[:pad] if len(bits) >= pad else bits.repeat(pad)[:pad]]).reshape(-1, nf4.BLOCK - 1)
    blocks = torch.cat([rows, torch.full((len(rows), 1), top, dtype=torch.int16)], 1)
    assert_encoded_alike(blocks.view(torch.bfloat16), quant_type)


@FORMATS
@many
@given(**weights, where=st.integers(0, 3999), value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_what_is_not_finite_is_refused(
    form: Format, size: int, kinds: list[str], seed: int, where: int, value: float
) -> None:
    weight = make_weight(form, size, kinds, seed)
    weight[where % size] = value
    for encoder in (nf4.encode, nf4.encode_with_bitsandbytes):
        with pytest.raises(ValueError, match=r"^NaN or infinity$"):
            encoder(weight)


@pytest.mark.parametrize("form", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_every_bit_pattern_that_is_not_finite_is_refused(form: Format) -> None:
    high = torch.iinfo(form.bits).max
    patterns = range(form.infinity, high + 1, max(1, (high - form.infinity) // 128))
    for magnitude in (*patterns, high):
        for bits in (magnitude, magnitude | form.sign):
            for size in (nf4.BLOCK, nf4.BLOCK - 1):
                weight = torch.ones(size, dtype=form.dtype)
                weight.view(form.bits)[-1] = bits
                with pytest.raises(ValueError, match="NaN or infinity"):
                    nf4.encode(weight)


@FORMATS
@many
@given(**weights, pieces=st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_pieces_equal_the_whole(form: Format, size: int, kinds: list[str], seed: int, pieces: list[int]) -> None:
    weight = make_weight(form, size, kinds, seed)
    found, begin = [], 0
    for blocks in [*pieces, size]:
        if begin < size:
            found.append(encode(weight[begin : begin + blocks * nf4.BLOCK]))
            begin += blocks * nf4.BLOCK
    joined = torch.cat([codes for codes, _ in found]), torch.cat([absmax for _, absmax in found])
    assert_same_bits(joined, encode(weight))


@FORMATS
@many
@given(**weights)
def test_the_encoder_without_numba(form: Format, size: int, kinds: list[str], seed: int) -> None:
    weight = make_weight(form, size, kinds, seed)
    assert_same_bits(nf4.encode_with_bitsandbytes(weight), encode(weight))


@pytest.mark.parametrize("layout", ["transposed", "strided", "shifted", "three dimensions", "parameter"])
@FORMATS
def test_however_it_lies_in_memory(form: Format, layout: str) -> None:
    weight = make_weight(form, 6000, list(KINDS), seed=0)
    laid = {
        "transposed": weight.reshape(60, 100).T,
        "strided": weight[::2],
        "shifted": weight[1:],
        "three dimensions": weight.reshape(3, 20, 100),
        "parameter": torch.nn.Parameter(weight),
    }[layout]
    assert_same_bits(encode(laid), encode_as_bitsandbytes(laid.detach()))


@pytest.mark.parametrize(
    "kind",
    [nf4.FourBits(quant_type=name, double_quant=both) for name in ("nf4", "fp4") for both in (True, False)],
    ids=str,
)
@FORMATS
@settings(max_examples=50, deadline=None)
@given(**{**weights, "size": st.integers(1, 100_000)})
@example(size=64 * 256 * 2, kinds=["zeros"], seed=0)
@example(size=64 * 256 + 64, kinds=["one value"], seed=0)
def test_all_that_is_stored(form: Format, size: int, kinds: list[str], seed: int, kind: nf4.FourBits) -> None:
    weight = make_weight(form, size, kinds, seed)
    data, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=kind.quant_type, compress_statistics=kind.double_quant
    )
    expected = {f".{name}": value for name, value in state.as_dict(packed=True).items()}
    codes, absmax = encode(weight, kind.quant_type)
    found = nf4.statistics(absmax, tuple(weight.shape), str(weight.dtype).removeprefix("torch."), kind)
    assert_same_bits((codes,), (data.reshape(-1),))
    assert found.keys() == expected.keys()
    texts = [json.loads(bytes(tensors.pop(kind.state_suffix).tolist())) for tensors in (found, expected)]
    # NaN, from an overflowing mean, equals itself as text
    assert json.dumps(texts[0]) == json.dumps(texts[1])
    assert_same_bits(tuple(found[name] for name in expected), tuple(expected.values()))


@many
@given(**weights)
def test_maxima_through_the_library_and_through_the_package(size: int, kinds: list[str], seed: int) -> None:
    maxima = make_weight(FP32, size, kinds, seed)
    assert nf4._library_function() is not None
    found = nf4._quantize_blockwise(maxima)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "_library_function", lambda: None)
        assert_same_bits(nf4._quantize_blockwise(maxima), found)
    codes, state = bnb.quantize_blockwise(maxima, blocksize=256)
    assert_same_bits(found, (codes, state.absmax))


def test_tables_are_those_of_bitsandbytes() -> None:
    assert_same_bits((nf4.dynamic_map(),), (bnb.create_dynamic_map(),))
    for quant_type, book in nf4.CODE_BOOKS.items():
        assert_same_bits((torch.tensor(book).abs(),), (bnb.get_4bit_type(quant_type, device="cpu").abs(),))
        assert torch.equal(torch.tensor(book), bnb.get_4bit_type(quant_type, device="cpu"))


def test_four_threads_at_once() -> None:
    pieces = [make_weight((BF16, FP16, FP32)[i % 3], 5000 + 997 * i, list(KINDS), seed=i) for i in range(12)]
    expected = [encode(piece) for piece in pieces]
    turns = [index for _ in range(40) for index in range(len(pieces))]
    with ThreadPoolExecutor(4) as pool:
        for index, found in zip(turns, pool.map(lambda index: encode(pieces[index]), turns), strict=True):
            assert_same_bits(found, expected[index])


def test_threads_that_quantise_maxima_first_at_once() -> None:
    """Each makes a map of the codes, and one map is kept: the others must last as long as they are used."""
    maxima = torch.rand(3000, generator=torch.Generator().manual_seed(0)) - 0.5
    expected = nf4._quantize_blockwise(maxima)
    start = threading.Barrier(3)

    def quantise(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        start.wait(60)
        return nf4._quantize_blockwise(maxima)

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3000):  # without that, it went wrong in one of 250
            nf4.dynamic_map.cache_clear()
            for found in pool.map(quantise, range(3)):
                assert_same_bits(found, expected)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "ftload.loaders.nf4.kernel", raising=False)
    monkeypatch.delattr(ftload.loaders.nf4, "kernel", raising=False)


def test_numba_works_here() -> None:
    assert nf4.numba_problem() is None


def test_a_signal_is_not_an_answer_to_whether_numba_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(values: torch.Tensor) -> None:
        raise Interrupted(130)

    monkeypatch.setattr(nf4, "encode", interrupted)
    with pytest.raises(Interrupted):
        nf4.numba_problem()


def test_numba_that_does_not_import(without_numba: None) -> None:
    problem = nf4.numba_problem()
    assert problem is not None
    assert problem.startswith("numba can't be used: ")
    assert "numba" in problem.removeprefix("numba can't be used: ")


def test_qlora_without_numba_is_the_same(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = tmp_path / "source"
    write_model(source, "llama", vocab_size=144, dtype="bfloat16")
    write_llama(source, vocab_size=128)
    report = _prepare(source, tmp_path / "with")
    assert "4-bit encoder" not in {decision["what"] for decision in report["decisions"]}
    request.getfixturevalue("without_numba")
    report = _prepare(source, tmp_path / "without")
    (decision,) = (decision for decision in report["decisions"] if decision["what"] == "4-bit encoder")
    assert (decision["requested"], decision["effective"]) == ("numba", "bitsandbytes")
    assert decision["reason"].startswith("numba can't be used: ")
    files = sorted(path.relative_to(tmp_path / "with") for path in (tmp_path / "with").rglob("*.safetensors"))
    assert files
    for path in files:
        assert (tmp_path / "without" / path).read_bytes() == (tmp_path / "with" / path).read_bytes(), path


def _prepare(source: Path, output: Path) -> dict[str, Any]:
    words = ["--model", str(source), "--output_dir", str(output), "--lora_rank", "8", "--use_qlora"]
    outcome = prepare(parse_arguments(words), Silent())
    assert outcome is not None
    return to_json(outcome.report)
