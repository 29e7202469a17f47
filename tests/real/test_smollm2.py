"""The real SmolLM2-135M-Instruct through all four strategies: what is written, counted, loaded, trained and said.

Expected counts are taken from the written safetensors headers and from the loaded model, never from ftload.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders import load_prepared
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from safetensors import safe_open

from ..conftest import Result
from ..parity.compare import assert_same_adapter_config, assert_same_json, assert_same_tensors, read_tensors
from ..parity.reference import run_reference

# said by load_prepared on every machine without FlashAttention; the report's words on it are tested elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:attention is sdpa")

STRATEGIES = {"standard": [], "liger": ["--use_liger_kernel"], "lora": ["--use_lora"], "qlora": ["--use_qlora"]}

ROWS, WIDTH = 49_152, 576
"""Of the original's embedding; `<pad>` is token 49,152, and the next multiple of 8 is 49,160."""
BASE = 134_515_008 + 8 * WIDTH
"""Parameters: the published 134,515,008 and eight rows, once, as the head is tied."""
ADAPTER = 30 * 64 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
"""Parameters of rank 64 on the seven linear layers of 30 blocks."""
LINEAR = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
"""Parameters of those layers."""

PROMPTS = ["What is the capital of France?", "Name three primary colours."]
CONVERSATION = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "What do bees make?"},
    {"role": "assistant", "content": "Honey."},
]
"""Short: without bfloat16 instructions a token takes 0.2 s forward and back."""


@pytest.fixture(scope="module")
def prepared(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint, prepared once under each strategy with the default settings."""
    root = tmp_path_factory.mktemp("prepared")
    for strategy, flags in STRATEGIES.items():
        words = ["--model", str(smollm2), "--output_dir", str(root / strategy), *flags]
        prepare(parse_arguments(words), Silent())
    return {strategy: root / strategy for strategy in STRATEGIES}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A stored tensor, as far as it is counted."""

    name: str
    dtype: str
    """torch's name, or nf4."""
    parameters: int
    nbytes: int


def test_qlora_from_gguf_equals_the_reference(
    ftload: Callable[..., Result], smollm2_gguf: Path, smollm2: Path, tmp_path: Path
) -> None:
    """transformers can't dequantise a GGUF file and quantise it in one call: the reference starts from its own copy."""
    out = tmp_path / "out"
    words = ["--use-qlora", "--embedding_init", "reference", "--output_dir", out, "--json"]
    result = ftload("prepare", "--model", smollm2_gguf, *words)
    assert result.code == 0, result.err
    run_reference(smollm2, tmp_path / "reference", strategy="qlora", tokenizer_size=ROWS + 1, rank=64)
    assert_same_tensors(out, tmp_path / "reference")
    assert_same_tensors(out / "adapter", tmp_path / "reference" / "adapter")
    assert_same_adapter_config(out / "adapter", tmp_path / "reference" / "adapter")
    for name in ("config.json", "generation_config.json"):
        assert_same_json(out / name, tmp_path / "reference" / name, pad_token_id=ROWS)

    report = read_report(out)
    assert json.loads(result.out) == report
    assert report["source"]["kind"] == "gguf"
    assert report["source"]["files"] == [
        {"path": smollm2_gguf.name, "bytes": smollm2_gguf.stat().st_size, "sha256": None}
    ]
    assert_files_are_reported(out, report)
    assert_tensors_are_reported(out, report)
    assert_pad_is_a_token_of_its_own(out, report)
    # what the tokenizer is must not depend on the way that it came
    assert (out / "chat_template.jinja").read_bytes() == (smollm2 / "chat_template.jinja").read_bytes()


@pytest.mark.parametrize("strategy", ["standard", "lora", "qlora"])
def test_from_gguf_as_from_what_transformers_made_of_it(
    ftload: Callable[..., Result], prepared: dict[str, Path], smollm2_gguf: Path, tmp_path: Path, strategy: str
) -> None:
    """In 64 MB, and nothing is written but the output."""
    out = tmp_path / "out"
    words = ["--max_memory", "64MB", "--output_dir", out, *STRATEGIES[strategy]]
    before = set(smollm2_gguf.parent.iterdir())
    result = ftload("prepare", "--model", smollm2_gguf, *words)
    assert result.code == 0, result.err
    assert list(tmp_path.iterdir()) == [out]
    assert set(smollm2_gguf.parent.iterdir()) == before
    assert_same_tensors(out, prepared[strategy])
    if strategy != "standard":
        assert_same_tensors(out / "adapter", prepared[strategy] / "adapter")
    result = ftload("verify", out)
    assert result.code == 0, result.err


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_report_counts_what_was_written(prepared: dict[str, Path], strategy: str) -> None:
    directory = prepared[strategy]
    report = read_report(directory)
    assert report["strategy"] == strategy
    assert report["base"] == "copy"
    assert_files_are_reported(directory, report)
    assert_tensors_are_reported(directory, report)

    parameters = report["parameters"]
    adapter = ADAPTER if strategy in ("lora", "qlora") else 0
    assert adapter in (0, 19_537_920)
    assert parameters["total"] == BASE + adapter
    assert parameters["trainable"] == (adapter or BASE)
    assert parameters["frozen"] == (BASE if adapter else 0)
    assert parameters["trainable_percent"] == round(100 * parameters["trainable"] / parameters["total"], 4)
    if adapter:
        assert report["adapter"]["parameters"] == adapter
        assert set(report["adapter"]["targets"].values()) == {30}
        assert len(report["adapter"]["targets"]) == 7
    else:
        assert report["adapter"] is None
    if strategy == "qlora":
        assert parameters["by_dtype"]["nf4"]["parameters"] == LINEAR
        assert report["quantization"]["coverage_percent"] == 100.0
        assert report["quantization"]["not_quantized"] == []
    else:
        assert report["quantization"] is None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore:Liger kernels are not applied")
def test_report_counts_what_is_loaded(prepared: dict[str, Path], strategy: str) -> None:
    model, tokenizer = load_prepared(prepared[strategy])
    report = read_report(prepared[strategy])
    live = [
        Tensor(name=name, dtype=dtype, parameters=count, nbytes=nbytes)
        for name, parameter in model.named_parameters()
        for dtype, count, nbytes in [measure(parameter)]
    ]
    assert by_dtype(live) == report["parameters"]["in_training"]
    assert sum(tensor.parameters for tensor in live) == report["parameters"]["total"]
    assert (
        sum(measure(parameter)[1] for parameter in model.parameters() if parameter.requires_grad)
        == report["parameters"]["trainable"]
    )
    assert model.training
    assert len(tokenizer) == report["embeddings"]["tokenizer_size"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pad_is_a_token_of_its_own(prepared: dict[str, Path], smollm2: Path, strategy: str) -> None:
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(smollm2)
    assert original.pad_token == original.eos_token == "<|im_end|>"
    assert len(original) == ROWS
    assert_pad_is_a_token_of_its_own(prepared[strategy], read_report(prepared[strategy]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_embeddings_grow_by_eight_rows_of_the_mean_and_stay_tied(
    prepared: dict[str, Path], smollm2: Path, strategy: str
) -> None:
    from transformers import AutoModelForCausalLM

    before = read_tensors(smollm2)["model.embed_tokens.weight"]
    tensors = read_tensors(prepared[strategy])
    after = tensors["model.embed_tokens.weight"]
    assert before.shape == (ROWS, WIDTH)
    assert after.shape == (ROWS + 8, WIDTH)
    assert after.dtype == before.dtype == torch.bfloat16
    assert torch.equal(after[:ROWS], before)
    mean = before.double().mean(dim=0).bfloat16()
    assert torch.equal(after[ROWS:], mean.expand(8, WIDTH))
    assert not [name for name in tensors if name.startswith("lm_head")]
    assert read_report(prepared[strategy])["embeddings"] == {
        "tokenizer_size": ROWS + 1, "rows_before": ROWS, "rows_after": ROWS + 8, "resized": True, "tied": True,
        "init": "mean", "pad_token_id": ROWS,
    }  # fmt: skip
    if strategy == "standard":
        # as a user without ftload loads it
        model = AutoModelForCausalLM.from_pretrained(prepared[strategy])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight.cpu(), after)


@pytest.mark.parametrize("strategy", ["standard", "lora", "qlora"])
def test_training_starts_with_gradients_on_exactly_the_trainable_parameters(
    prepared: dict[str, Path], smollm2: Path, strategy: str
) -> None:
    directory = prepared[strategy]
    model, tokenizer = load_prepared(directory)
    batch = training_batch(tokenizer).to(model.device)
    assert (batch["input_ids"] == ROWS).sum() == (batch["labels"] == -100).sum() > 0
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert loss.item() == pytest.approx(expected_loss(smollm2, directory, batch), rel=0.02)

    # what trains is what is in the file that training starts from
    stored = set(read_tensors(directory if strategy == "standard" else directory / "adapter"))
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert {saved_name(name) for name in trainable} == stored
    assert {saved_name(name) for name in gradients} == stored
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    # B starts at zero, so A's first gradient is exactly zero
    first = {name for name in trainable if "lora_A" not in name}
    assert {name for name, gradient in gradients.items() if gradient.any()} == first
    if strategy == "standard":
        return

    assert len(trainable) == 2 * len(first) == 2 * 7 * 30
    assert {value.dtype for value in trainable.values()} == {torch.float32}
    start = {name: value.detach().clone() for name, value in trainable.items()}
    # weight decay would move A at once
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, weight_decay=0.0)
    optimizer.step()
    assert changed(trainable, start) == first
    optimizer.zero_grad()
    second_loss = model(**batch).loss
    second_loss.backward()
    optimizer.step()
    assert changed(trainable, start) == set(trainable)
    assert second_loss.item() < loss.item()
    assert_base_is_untouched(model, directory)


def test_small_steps_are_lost_in_bfloat16(prepared: dict[str, Path]) -> None:
    """The figures of README and card: two steps of AdamW at 2e-5 on one sentence each."""
    texts = (
        "The sun is a star, and the planets turn around it, each on its own path.",
        "To bake bread one needs flour, water, salt, yeast and some patience.",
    )
    share = {}
    for dtype in ("bfloat16", "float32"):
        model, tokenizer = load_prepared(prepared["standard"], dtype=dtype)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = sum(int((value != before[name]).sum()) for name, value in model.named_parameters())
        share[dtype] = moved / sum(value.numel() for value in before.values())
    assert share["bfloat16"] == pytest.approx(0.036, abs=0.002)
    assert share["float32"] > 0.999


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_liger_is_loaded_only_and_says_so_without_a_gpu(prepared: dict[str, Path]) -> None:
    """Liger's kernels run on a GPU alone: here the model is loaded, with the plain modules, and not trained."""
    with pytest.warns(UserWarning, match="Liger kernels are not applied: Liger's Triton kernels need a GPU"):
        model, _ = load_prepared(prepared["liger"])
    assert not [name for name, module in model.named_modules() if "Liger" in type(module).__name__]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    values = model.state_dict()
    stored = read_tensors(prepared["liger"])
    assert all(torch.equal(values[name], value) for name, value in stored.items())
    # the weights are those of the standard strategy, to the byte; what differs is recorded
    assert (prepared["liger"] / "model.safetensors").read_bytes() == (
        prepared["standard"] / "model.safetensors"
    ).read_bytes()
    assert read_report(prepared["standard"])["kernels"] is None
    kernels = read_report(prepared["liger"])["kernels"]["liger"]
    assert kernels["supported"]
    assert set(kernels["applied"]) == {"rope", "rms_norm", "swiglu", "fused_linear_cross_entropy"}


def test_standard_says_what_the_original_says(prepared: dict[str, Path], smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load_prepared(prepared["standard"])
    original = AutoModelForCausalLM.from_pretrained(
        smollm2,
        dtype=torch.bfloat16,
        attn_implementation=model.config._attn_implementation,
        device_map={"": model.device},
    )
    original_tokenizer = AutoTokenizer.from_pretrained(smollm2)
    said = [greedy(model, tokenizer, prompt)[0] for prompt in PROMPTS]
    assert said == [greedy(original, original_tokenizer, prompt)[0] for prompt in PROMPTS]
    assert "Paris" in said[0]
    assert len(said[1]) > 20


def test_qlora_says_something(prepared: dict[str, Path]) -> None:
    model, tokenizer = load_prepared(prepared["qlora"])
    text, scores = greedy(model, tokenizer, PROMPTS[0])
    assert len(text.split()) > 1
    assert scores.shape[1] == ROWS + 8
    assert scores.isfinite().all()


def read_report(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "ftload_report.json").read_text())


def assert_files_are_reported(directory: Path, report: dict[str, Any]) -> None:
    """Every file but the report: its path, size and hash."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "ftload_report.json"]
    assert report["files"] == sorted(
        (
            {
                "path": path.relative_to(directory).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        ),
        key=lambda entry: entry["path"],
    )


def assert_tensors_are_reported(directory: Path, report: dict[str, Any]) -> None:
    """Totals, by dtype and by component, from the headers of the written files."""
    base = list(stored_tensors(directory / "model.safetensors"))
    path = directory / "adapter" / "adapter_model.safetensors"
    adapter = list(stored_tensors(path)) if path.exists() else []
    counts = report["parameters"]
    assert counts["by_dtype"] == by_dtype([*base, *adapter])
    components: dict[str, Counter[str]] = {}
    for tensor in (*base, *adapter):
        component = components.setdefault(component_of(tensor.name), Counter())
        component.update(parameters=tensor.parameters, bytes=tensor.nbytes)
    assert counts["by_component"] == components
    total, trainable = (
        sum(tensor.parameters for tensor in tensors) for tensors in ([*base, *adapter], adapter or base)
    )
    assert (counts["total"], counts["trainable"], counts["frozen"]) == (total, trainable, total - trainable)


def assert_pad_is_a_token_of_its_own(directory: Path, report: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", ROWS)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer("<pad>")["input_ids"] == [ROWS]
    assert len(tokenizer) == ROWS + 1
    found = report["tokenizer"]
    assert (found["size"], found["pad_token"], found["pad_token_id"]) == (ROWS + 1, "<pad>", ROWS)
    assert (found["eos_token"], found["eos_token_id"], found["bos_token"]) == ("<|im_end|>", 2, "<|im_start|>")
    assert found["chat_template_sha256"] == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == ROWS + 8


def stored_tensors(path: Path) -> Iterator[Tensor]:
    """What a file holds; a 4-bit weight is one tensor, of the shape that its JSON state gives."""
    sizes = {"BF16": ("bfloat16", 2), "F32": ("float32", 4), "U8": ("uint8", 1)}
    suffix = ".quant_state.bitsandbytes__nf4"
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        weights = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
        parts = {name: [part for part in names if part.startswith(name)] for name in weights}
        for name in names - {part for group in parts.values() for part in group}:
            found = file.get_slice(name)
            dtype, size = sizes[found.get_dtype()]
            count = math.prod(found.get_shape())
            yield Tensor(name=name, dtype=dtype, parameters=count, nbytes=count * size)
        for name, group in parts.items():
            state = json.loads(bytes(file.get_tensor(name + suffix).tolist()))
            count = math.prod(state["shape"])
            data = {part: file.get_slice(part) for part in group if not part.endswith(suffix)}
            assert math.prod(data[name].get_shape()) * 2 == count
            nbytes = sum(math.prod(part.get_shape()) * sizes[part.get_dtype()][1] for part in data.values())
            yield Tensor(name=name, dtype="nf4", parameters=count, nbytes=nbytes)


def measure(parameter: torch.nn.Parameter) -> tuple[str, int, int]:
    """Dtype, logical parameters and bytes of a live parameter, the statistics of a 4-bit one included."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return str(parameter.dtype).removeprefix("torch."), parameter.numel(), parameter.nbytes
    parts = (parameter, state.absmax, state.code, state.state2.absmax, state.state2.code)
    return state.quant_type, math.prod(state.shape), sum(part.nbytes for part in parts)


def by_dtype(tensors: list[Tensor]) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        group = groups.setdefault(tensor.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        group["tensors"] += 1
        group["parameters"] += tensor.parameters
        group["bytes"] += tensor.nbytes
    return groups


def component_of(name: str) -> str:
    """By the names of Llama's modules."""
    words = {"lora_": "adapter", "embed_tokens": "embedding", "self_attn": "attention", "mlp": "mlp", "norm": "norm"}
    return next(component for word, component in words.items() if word in name)


def saved_name(live: str) -> str:
    """PEFT writes the one adapter's weights without its name."""
    return live.replace(".default.", ".")


def changed(values: dict[str, torch.nn.Parameter], start: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in values.items() if not torch.equal(value.detach(), start[name])}


def training_batch(tokenizer: Any) -> Any:
    """A conversation and some padding, as tokens and as labels that leave out the padding."""
    batch = tokenizer.apply_chat_template(
        [CONVERSATION], padding="max_length", max_length=28, return_dict=True, return_tensors="pt"
    )
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def expected_loss(checkpoint: Path, directory: Path, batch: Any) -> float:
    """The original's loss in float32; for a 4-bit base, that of the weights which bitsandbytes decodes from it."""
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    stored = read_tensors(directory)
    suffix = ".quant_state.bitsandbytes__nf4"
    for name in [key.removesuffix(suffix) for key in stored if key.endswith(suffix)]:
        parts = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
        decoded = dequantize_4bit(stored[name], QuantState.from_dict(parts, device=torch.device("cpu")))
        model.get_parameter(name).data.copy_(decoded)
    # there is no row for the pad token; what stands in its place is masked
    batch = {name: value.cpu() for name, value in batch.items()}
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    with torch.no_grad():
        return model(**batch).loss.item()


def assert_base_is_untouched(model: Any, directory: Path) -> None:
    """Training changed nothing but the adapter: the base holds the bytes of the file (float32 ones as bfloat16)."""
    stored = read_tensors(directory)
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value.detach().cpu()
        for name, value in model.named_parameters()
        if not value.requires_grad
    }
    assert len(frozen) == 272
    for name, value in frozen.items():
        expected = stored[name]
        assert torch.equal(value.to(expected.dtype), expected), name


def greedy(model: Any, tokenizer: Any, prompt: str) -> tuple[str, torch.Tensor]:
    """The likeliest 16 tokens after a prompt, as text, and the scores (tokens × vocabulary) that they were taken by."""
    model.eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), torch.cat(output.logits)
