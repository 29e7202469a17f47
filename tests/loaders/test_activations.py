"""The simulated training step against real ones: what is saved for the backward pass, and the peak."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ftload.loaders import load_prepared
from ftload.loaders.memory.step import simulation
from ftload.loaders.memory.step.cut_model import cut_model
from ftload.loaders.memory.step.recorded_step import record_step
from ftload.loaders.memory.step.setting import Batch, LoraSetting, Setting, training_setting
from ftload.loaders.memory.step.simulation import Simulation
from ftload.loaders.memory.training_run import MixedPrecision, TrainingRun

from ..cli.runs import FLAGS, prepare
from ..parity.models import ARCHITECTURES
from ..tokenizers import write_llama
from .plans import make_plan

VOCABULARY = 144
LAYERS = 5
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ARCHITECTURES["llama"],
    "gpt2": ("GPT2Config", {**ARCHITECTURES["gpt2"][1], "n_layer": LAYERS}),
    "qwen3": ARCHITECTURES["qwen3"],
    # sliding and full attention in turn, and a window that is shorter than some sequences
    "gemma2": ("Gemma2Config", {**ARCHITECTURES["gemma2"][1], "sliding_window": 24}),
    "gemma3": ("Gemma3TextConfig", {**ARCHITECTURES["gemma3"][1], "sliding_window": 24, "sliding_window_pattern": 3}),
    "phi3": ARCHITECTURES["phi3"],
    "olmoe": ARCHITECTURES["olmoe"],
    # the first layers dense, every second of the others of experts
    "qwen3_moe": ("Qwen3MoeConfig", {**ARCHITECTURES["qwen3_moe"][1], "decoder_sparse_step": 2}),
}
BATCHES = (
    Batch(size=1, length=16),
    Batch(size=2, length=40, padded=True),
    Batch(size=3, length=64),
)


def write_model(directory: Path, architecture: str) -> None:
    name, arguments = TINY[architecture]
    depth = {} if architecture == "gpt2" else {"num_hidden_layers": LAYERS}
    config = getattr(transformers, name)(**{**arguments, **depth}, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    write_llama(directory)


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, VOCABULARY - 8, (batch.size, batch.length))
    inputs = {"input_ids": tokens, "labels": tokens}
    if batch.padded:
        mask = torch.ones_like(tokens)
        mask[0, batch.length // 2 :] = 0
        inputs["attention_mask"] = mask
    return inputs


def statistics_of(parameter: torch.Tensor) -> list[torch.Tensor]:
    """What bitsandbytes holds beside the codes of a 4-bit weight."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    if state.state2 is None:
        return [state.absmax, state.code]
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def saved_by(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of all storages that a real forward pass saves, parameters, buffers and inputs aside."""
    kept: dict[int, torch.Tensor] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = model(**inputs, use_cache=False)
    own = [*model.parameters(), *model.buffers(), *inputs.values()]
    own += [part for parameter in model.parameters() for part in statistics_of(parameter)]
    del output
    left_out = {value.untyped_storage().data_ptr() for value in own}
    return sum(value.untyped_storage().nbytes() for key, value in kept.items() if key not in left_out)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def source(architecture: str) -> Path:
        if architecture not in written:
            written[architecture] = tmp_path_factory.mktemp(architecture) / "model"
            write_model(written[architecture], architecture)
        return written[architecture]

    return source


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("strategy", ["standard", "lora", "qlora"])
@pytest.mark.parametrize("architecture", TINY)
def test_saved_bytes_are_those_of_real_steps(
    sources: Callable[[str], Path],
    tmp_path: Path,
    architecture: str,
    strategy: str,
    checkpointing: bool,
    precision: MixedPrecision,
) -> None:
    flags = [*FLAGS[strategy], *(["--gradient_checkpointing"] if checkpointing else []), "--lora_rank", "8"]
    flags += ["--min_quantized", "0"] if strategy == "qlora" else []  # of mixtures as tiny as these, routers are much
    if architecture == "gemma2":
        flags.append("--no_use_flash_attn")  # it soft-caps its scores, which sdpa can't
    prepare(sources(architecture), tmp_path / "out", *flags)
    model, _ = load_prepared(tmp_path / "out")
    plan, arguments = make_plan(sources(architecture), tmp_path / "plan", *flags)
    attention = model.config._attn_implementation
    run = TrainingRun(mixed_precision=precision)
    setting = replace(training_setting(plan, arguments, run), attention=attention, device="cpu")
    simulation = Simulation(plan.skeleton.model, setting)
    for batch in BATCHES:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            real = saved_by(model, inputs_of(batch))
        assert simulation.run(batch).saved == pytest.approx(real, rel=0.03), batch


def pair(architecture: str, *, vocabulary: int, **other: Any) -> tuple[Any, Any]:
    """A real model, and the same on `meta`."""
    name, arguments = TINY[architecture]
    config = getattr(transformers, name)(**{**arguments, "num_hidden_layers": LAYERS, **other}, vocab_size=vocabulary)

    def build(attention: str) -> Any:
        return transformers.AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=torch.bfloat16, attn_implementation=attention
        )

    with torch.device("meta"):
        meta = build("eager")
    return build("sdpa").train(), meta


def measured_peak(step: Callable[[], None]) -> int:
    """The largest sum of what PyTorch's CPU allocator gave out and had not got back, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("accumulate", "autocast"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "olmoe"])
def test_peak_is_that_of_real_steps(
    architecture: str, lora: bool, checkpointing: bool, accumulate: bool, autocast: bool
) -> None:
    from accelerate.utils import convert_to_fp32
    from peft import LoraConfig, get_peft_model

    peaks = set()
    # the loss is the peak of the one, what the layers' gradients come to that of the other
    wide = {"hidden_size": 512, "intermediate_size": 768}
    for vocabulary, batch, other in ((1000, Batch(size=4, length=128), {}), (32, Batch(size=1, length=32), wide)):
        model, meta = pair(architecture, vocabulary=vocabulary, **other)
        setting = Setting(attention="sdpa", checkpointing=checkpointing, device="cpu", autocast=autocast)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            if checkpointing:
                model.enable_input_require_grads()
            targets = ["q_proj", "v_proj"]
            config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
            layers = frozenset(name for name, _ in meta.named_modules() if name.endswith(tuple(targets)))
            setting = replace(setting, lora=LoraSetting(layers=layers, rank=8, alpha=16, dropout=0.1))
        tokens = torch.randint(3, 30, (batch.size, batch.length))

        def step(model: Any = model, tokens: torch.Tensor = tokens) -> None:
            # oneDNN's bfloat16 kernels, where a processor has them, take room that has to do with the processor alone
            with torch.backends.mkldnn.flags(enabled=False):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    output = model(input_ids=tokens, labels=tokens, use_cache=False)
                if autocast:
                    output = convert_to_fp32(output)
                output["loss"].backward()

        step()
        if accumulate:
            left = sum(value.grad.nbytes for value in model.parameters() if value.grad is not None)
        else:
            left = 0
            model.zero_grad()
        footprint = Simulation(meta, setting).run(batch, accumulate=accumulate)
        # checkpointing keeps the generator's state of each layer, on a GPU in the host's memory
        states = LAYERS * torch.get_rng_state().nbytes if checkpointing else 0
        real = measured_peak(step) + left
        # beside tensors, kernels have room to work in: a few per cent of tensors as small as these
        assert footprint.peak.total + states == pytest.approx(real, rel=0.05)
        peaks.add(footprint.peak.name)
    assert "loss" in peaks
    if not lora and not accumulate:
        assert len(peaks) == 2


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_extended_from_a_few_layers_or_simulated_with_all(
    architecture: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, meta = pair(architecture, vocabulary=144)
    # without the blocks of a GPU's allocator, which are larger than some of these tensors
    setting = Setting(attention="flash_attention_2", checkpointing=checkpointing, device="cpu")
    batch = Batch(size=2, length=48)
    extended = Simulation(meta, setting).run(batch)
    monkeypatch.setattr(simulation, "layer_kinds", lambda *_: list(range(LAYERS)))
    whole = Simulation(meta, setting).run(batch)
    assert extended.saved == whole.saved
    assert [moment.name for moment in extended.moments] == [moment.name for moment in whole.moments]
    for moment, true in zip(extended.moments, whole.moments, strict=True):
        assert moment.total == pytest.approx(true.total, rel=0.01), moment.name
        assert moment.gradients == true.gradients
    assert extended.peak.name == whole.peak.name


@pytest.mark.parametrize("accumulate", [False, True], ids=["", "accumulate"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_moe"])
def test_each_layers_peak_is_that_of_a_step_with_all_layers(
    architecture: str, checkpointing: bool, accumulate: bool
) -> None:
    _, meta = pair(architecture, vocabulary=144)
    setting = Setting(attention="flash_attention_2", checkpointing=checkpointing, device="cpu")
    batch = Batch(size=2, length=48)
    extended = Simulation(meta, setting)
    loss, *backward, _ = extended.run(batch, accumulate=accumulate).moments
    whole = record_step(cut_model(meta, list(range(LAYERS)), setting), setting, batch, accumulate=accumulate)
    given = extended.gradients if accumulate else 0
    assert loss.total - given == whole.loss_peak
    assert [moment.total - given for moment in reversed(backward)] == pytest.approx(whole.backward_peaks, rel=0.01)


def test_attention_on_a_gpu_saves_scores_only_where_it_is_eager() -> None:
    _, meta = pair("llama", vocabulary=144)

    def quadratic(attention: str, *, padded: bool) -> float:
        """Bytes for each pair of positions."""
        simulation = Simulation(meta, Setting(attention=attention, checkpointing=False))
        once, twice, thrice = (
            simulation.run(Batch(size=2, length=length, padded=padded)).saved for length in (512, 1024, 1536)
        )
        return (thrice - 2 * twice + once) / (2 * 512**2)

    heads, size = meta.config.num_attention_heads, 2
    assert quadratic("flash_attention_2", padded=True) == 0
    assert quadratic("sdpa", padded=False) == 0
    # the mask as a bias in bfloat16, one for all heads
    assert quadratic("sdpa", padded=True) == LAYERS * size * 2
    # the softmax in float32 and in bfloat16
    assert quadratic("eager", padded=False) == LAYERS * size * heads * (4 + 2)


@pytest.mark.parametrize(
    ("dtype", "device", "scores"),
    [
        # softmax, its gradient and the result in float32; on a GPU a product of the first two as well
        (torch.bfloat16, "cpu", 4 + 4 + 4),
        (torch.bfloat16, "cuda", 4 + 4 + 4 + 4),
        # of float16 the kernel itself makes float32, and of float32 float16
        (torch.float16, "cuda", 4 + 4 + 4 + 2),
    ],
    ids=str,
)
def test_softmax_on_a_gpu_multiplies_before_its_backward_pass(dtype: torch.dtype, device: Any, scores: int) -> None:
    _, meta = pair("llama", vocabulary=144)
    simulation = Simulation(meta.to(dtype), Setting(attention="eager", checkpointing=True, device=device))
    heads, size, base = meta.config.num_attention_heads, 2, 2048
    once, twice, thrice = (
        simulation.run(Batch(size=size, length=length)).moments[1].total for length in (base, 2 * base, 3 * base)
    )
    mask = 2 * size
    assert (thrice - 2 * twice + once) / (2 * base**2) == size * heads * scores + mask


def test_dropout_on_a_gpu_keeps_a_byte_an_element() -> None:
    _, meta = pair("llama", vocabulary=144)
    layers = frozenset(name for name, _ in meta.named_modules() if name.endswith("down_proj"))
    batch = Batch(size=2, length=32)

    def saved(dropout: float, device: Any) -> int:
        lora = LoraSetting(layers=layers, rank=4, alpha=8, dropout=dropout)
        setting = Setting(attention="eager", checkpointing=True, lora=lora, device=device)
        # recomputed one layer at a time, so look at the whole without checkpointing
        return Simulation(meta, replace(setting, checkpointing=False)).run(batch).saved

    # nothing is trained before the first of these layers: its input needs no gradient
    elements = (LAYERS - 1) * batch.size * batch.length * meta.config.intermediate_size
    assert saved(0.1, "cuda") - saved(0.0, "cuda") == elements
    assert saved(0.1, "cpu") - saved(0.0, "cpu") == 4 * elements


def test_liger_keeps_no_logits() -> None:
    import transformers.models.llama.modeling_llama as llama

    rotary = llama.apply_rotary_pos_emb
    vocabulary, batch = 4096, Batch(size=4, length=64)
    _, meta = pair("llama", vocabulary=vocabulary)
    plain = Setting(attention="flash_attention_2", checkpointing=False)
    tokens, hidden = batch.size * batch.length, meta.config.hidden_size
    loss = Simulation(meta, plain).run(batch).moments[0]
    # bfloat16 logits, then float32: themselves, their log-softmax and its gradient
    assert loss.logits == pytest.approx(tokens * vocabulary * (2 + 4 + 4 + 4), rel=0.02)
    fused = Simulation(meta, replace(plain, liger=True)).run(batch)
    chunk = 4  # ceil(256 tokens / (4096 / 64)), a power of two
    expected = chunk * vocabulary * 2 + vocabulary * hidden * 2 + tokens * hidden * 2
    assert fused.moments[0].logits == pytest.approx(expected, rel=0.02)
    assert fused.moments[1].logits == 0
    # gate and up are kept, silu(gate) is not; norms keep their input alone
    assert fused.moments[0].activations < 0.75 * Simulation(meta, plain).run(batch).moments[0].activations
    assert llama.apply_rotary_pos_emb is rotary


def test_the_model_stays_as_it_was() -> None:
    _, meta = pair("gemma3", vocabulary=144)
    before = deepcopy(meta.config.to_dict()), [(name, value.dtype) for name, value in meta.named_parameters()]
    layers = frozenset(name for name, _ in meta.named_modules() if name.endswith("q_proj"))
    lora = LoraSetting(layers=layers, rank=4, alpha=8, dropout=0.1)
    setting = Setting(attention="flash_attention_2", checkpointing=True, lora=lora, quantised=layers)
    Simulation(meta, setting).run(Batch(size=1, length=8))
    assert (meta.config.to_dict(), [(name, value.dtype) for name, value in meta.named_parameters()]) == before
    assert meta.config._attn_implementation == "eager"
    assert all(value.requires_grad for value in meta.parameters())
