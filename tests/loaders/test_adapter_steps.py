"""How adapters that are other than the default are carried out: in any order and share, each weight read once."""

from __future__ import annotations

import ctypes
import gc
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from ftload.loaders.adapter.draws import Draws
from ftload.loaders.checkpoint.checkpoint import Checkpoint
from ftload.loaders.errors import ResourceError, UsageError
from ftload.loaders.plan.plan import Plan
from ftload.loaders.progress import Silent, Stopwatch
from ftload.loaders.steps.step import Inputs
from ftload.loaders.system.limits import give_back_large_blocks
from ftload.loaders.write.stream import in_order, write_tensors

from ..conftest import Result
from ..parity.models import write_model
from ..tokenizers import write_llama
from .plans import make_plan

PISSA = ("--init_lora_weights", "pissa_niter_2")
DORA = ("--use_dora", "true")
ROWS = ("--lora_modules_to_save", "lm_head", "--trainable_token_indices", "new", "--embedding_init", "reference")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose embedding has one row too few for its tokenizer."""
    directory = tmp_path_factory.mktemp("grown")
    write_model(directory, "llama", vocab_size=128, dtype="bfloat16", shards=True)
    write_llama(directory, vocab_size=128)
    return directory


def write(plan: Plan, names: set[str], directory: Path, *, workers: int = 2) -> dict[str, str]:
    """sha256 of the files of these names, written alone."""
    quantisation = plan.strategy.quantisation
    encode = quantisation.choose_encoder("cpu")[0] if quantisation is not None else None
    files = tuple(file for file in plan.files if file.path in names)
    directory.mkdir()
    done = write_tensors(replace(plan, workers=workers), files, encode, directory, Stopwatch(Silent()), lambda *_: None)
    assert done.hashes.keys() == names
    return done.hashes


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_qlora", *PISSA, *ROWS),
        ("--use_qlora", *DORA, *ROWS),
        ("--use_lora", *PISSA, *DORA),
        ("--use_lora", *DORA, *ROWS),
        ("--use_lora", "--base", "copy", "--init_lora_weights", "orthogonal", *ROWS),
    ],
    ids=" ".join,
)
def test_every_share_of_the_files_has_the_same_bytes(grown: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """What a run that goes on finds missing, and what one of several processes writes."""
    plan, _ = make_plan(grown, tmp_path, *flags, "--lora_rank", "4", "--max_shard_size", "30KB")
    names = {file.path for file in plan.files}
    assert len(names) > 3
    whole = write(plan, names, tmp_path / "whole", workers=3)
    assert write(plan, names, tmp_path / "one by one", workers=1) == whole
    for name in names:
        assert write(plan, {name}, tmp_path / name.replace("/", " ")) == {name: whole[name]}
    without = names - {"adapter/adapter_model.safetensors"}
    assert write(plan, without, tmp_path / "without") == {name: whole[name] for name in without}


@pytest.mark.parametrize(
    ("flags", "reads"),
    [
        (("--use_qlora", *DORA), 1),
        (("--use_qlora", *PISSA), 2),  # as it is, and what is left of it, which is not read but counted here
        (("--use_lora", *DORA), 1),
        (("--use_lora", "--use_rslora", "true"), 0),
    ],
)
def test_a_weight_is_read_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], reads: int
) -> None:
    plan, _ = make_plan(llama, tmp_path, *flags, "--lora_rank", "4")
    found: Counter[str] = Counter()
    chunks = Checkpoint.chunks

    def counted(self: Checkpoint, tensor: Any, *arguments: Any) -> Any:
        found[tensor.name] += 1
        return chunks(self, tensor, *arguments)

    monkeypatch.setattr(Checkpoint, "chunks", counted)
    write(plan, {file.path for file in plan.files}, tmp_path / "out")
    adapted = [f"{layer.name}.weight" for layer in plan.targets.layers] if plan.targets else []
    assert len(adapted) == 14
    assert {name: found[name] for name in adapted} == dict.fromkeys(adapted, min(reads, 1))
    assert plan.files_read == (("model.safetensors",) if reads else ())


def test_a_step_and_the_bases_are_one_task(llama: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(llama, tmp_path, "--use_qlora", *PISSA, "--lora_rank", "4", "--max_shard_size", "30KB")
    adapter = plan.adapter_file
    assert adapter is not None
    order = in_order(plan.files, adapter, 2)
    together = [files for files, (step,) in order if step in adapter.steps]
    assert len(together) == len(adapter.steps) == 14
    assert all(files[0] is adapter and files[1] in plan.model_files for files in together)
    done = Counter(file.path for files, steps in order for file in files for _ in steps)
    assert done == {file.path: len(file.steps) for file in plan.files}


def test_draws_follow_each_other_and_leave_the_generator_alone() -> None:
    def draw() -> list[torch.Tensor]:
        return [
            torch.randn(3, 5),
            torch.empty(40).uniform_(),
            torch.nn.Linear(4, 3).weight,
            torch.empty(2, 9).normal_(),
        ]

    torch.manual_seed(5)
    begin = torch.get_rng_state()
    wanted = [draw() for _ in range(3)]
    torch.set_rng_state(begin)
    draws = Draws([draw] * 3)
    for number in (2, 0, 1):
        with draws.of(number):
            values = draw()
        assert all(torch.equal(a, b) for a, b in zip(values, wanted[number], strict=True))
    assert torch.equal(torch.get_rng_state(), begin)


def test_a_layer_that_draws_otherwise_than_rehearsed_is_a_bug() -> None:
    draws = Draws([lambda: torch.randn(3)])
    with pytest.raises(AssertionError, match="the rehearsal drew other numbers than the layer took"), draws.of(0):
        torch.randn(4)
    unknown = Draws([lambda: torch.randperm(3)])
    with pytest.raises(NotImplementedError, match=r"PEFT draws by `aten\.randperm"), unknown.of(0):
        pass


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--use_qlora", "--init_lora_weights", "orthogonal"),
            "PEFT's `orthogonal` takes the dtype of the weight, which is uint8 where it is 4-bit: "
            "`only Tensors of floating point and complex dtype can require gradients`",
        ),
        (
            ("--use_lora", "--init_lora_weights", "olora", "--lora_rank", "40"),
            "PEFT's `olora` makes `model.layers.0.self_attn.k_proj.lora_A.weight` [32, 64], its layer takes [40, 64]: "
            "it can't be trained",
        ),
        (
            ("--use_lora", "--lora_modules_to_save", "embed"),
            "`--lora_modules_to_save`: PEFT finds no module `embed` to save",
        ),
        (
            ("--use_qlora", "--lora_modules_to_save", "q_proj"),
            "`model.layers.0.self_attn.q_proj.weight` can't be trained beside the adapter: it is 4-bit",
        ),
        (
            ("--use_lora", "--lora_target_parameters", "mlp.experts.down_proj"),
            "`--lora_target_parameters`: this model has no parameter `mlp.experts.down_proj`",
        ),
        (
            ("--use_lora", "--trainable_token_indices", "new"),
            "`--trainable_token_indices new`: the embedding has a row for every token, and none is added",
        ),
        (
            ("--use_lora", "--trainable_token_indices", "144"),
            "`--trainable_token_indices`: 144 is none of the 144 rows of `model.embed_tokens.weight`",
        ),
        (
            ("--use_lora", "--init_lora_weights", "pissa", "--base", "reference"),
            None,
        ),
    ],
)
def test_what_is_refused(llama: Path, tmp_path: Path, flags: tuple[str, ...], message: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(llama, tmp_path, "--lora_rank", "4", *flags)
    if message is not None:
        assert caught.value.message == message
    else:
        assert "`--base reference`" in caught.value.message


def test_warnings_are_of_what_peft_does_without_a_word(llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "lora.yaml"
    config.write_text("modules_to_save: [norm, lm_head]\nrank_pattern: {q_proj: 4, nothing: 2}\nr: 8\n")
    plan, _ = make_plan(llama, tmp_path, "--use_lora", "--lora_config", str(config))
    assert [text for text in plan.warnings if "`" in text] == [
        "`norm` saves `model.layers.0.input_layernorm` as well, 5 modules in all: PEFT takes all that end so",
        "`nothing` of `rank_pattern` matches nothing that is adapted",
    ]


def test_planning_initialises_nothing(llama: Path, tmp_path: Path) -> None:
    """A rank that no machine could initialise is refused for its memory, and until then nothing is allocated."""
    flags = ("--use_lora", "--init_lora_weights", "orthogonal", "--lora_rank", str(10**7))
    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes at once, `--max_memory` allows 2,000,000,000"):
        make_plan(llama, tmp_path, *flags)


def test_copies_are_in_the_dtype_of_training(ftload: Callable[..., Result], grown: Path, tmp_path: Path) -> None:
    """After k-bit preparation too, though PiSSA starts from the base before it; the row of padding has no gradient."""
    warned = "the only row that is trained, 128, is that of padding, which gets no gradient"
    for flags, dtype in (
        (("--use_qlora", *PISSA), "F32"),
        (("--use_qlora", *DORA), "F32"),
        (("--use_lora", *PISSA), "BF16"),
    ):
        plan, _ = make_plan(grown, tmp_path, *flags, *ROWS, "--lora_rank", "4")
        assert {tensor.name: tensor.dtype for tensor in plan.adapter_tensors() if "lm_head" in tensor.name} == {
            "base_model.model.lm_head.weight": dtype
        }
        assert warned in plan.warnings
        out = tmp_path / " ".join(flags)
        words = ("prepare", "--model", grown, "--output_dir", out, "--lora_rank", "4")
        assert ftload(*words, *flags, *ROWS).code == 0
        checked = ftload("verify", out)
        assert checked.code == 0, checked.out


def test_what_peft_lists_is_in_order(llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "lora.yaml"
    config.write_text("target_modules: [v_proj, q_proj]\nlayers_to_transform: 7\n")
    with pytest.raises(UsageError) as caught:
        make_plan(llama, tmp_path, "--use_lora", "--lora_config", str(config))
    assert caught.value.message == (
        "PEFT refuses this adapter: Target modules {'q_proj', 'v_proj'} not found in the base model"
    )


def test_of_conv1d_peft_warns_of_nothing_that_matters(tmp_path: Path) -> None:
    write_model(tmp_path / "gpt2", "gpt2", vocab_size=144, dtype="bfloat16")
    write_llama(tmp_path / "gpt2")
    plan, _ = make_plan(tmp_path / "gpt2", tmp_path, "--use_lora", "--use_rslora", "true")
    assert plan.warnings == ("the tokenizer has no chat template: training on conversations needs one",)


def test_olora_of_conv1d_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "gpt2", "gpt2", vocab_size=144, dtype="bfloat16")
    write_llama(tmp_path / "gpt2")
    with pytest.raises(UsageError) as caught:
        make_plan(tmp_path / "gpt2", tmp_path, "--use_lora", "--init_lora_weights", "olora", "--lora_rank", "4")
    assert caught.value.message == (
        "PEFT's `olora` makes `transformer.h.0.attn.c_attn.lora_A.weight` [4, 192], its layer takes [4, 64]: "
        "it can't be trained"
    )


def test_experts_in_4_bits_are_no_parameters(tmp_path: Path) -> None:
    write_model(tmp_path / "experts", "qwen3_moe", vocab_size=144, dtype="bfloat16")
    write_llama(tmp_path / "experts")
    for flags, message in (
        (
            ("--lora_target_parameters", "mlp.experts.down_proj"),
            "`--lora_target_parameters`: `mlp.experts.down_proj` is 4-bit, and PEFT adapts floating-point parameters",
        ),
        (
            ("--lora_experts", "2", "--use_dora", "true"),
            "`DoRA` starts from the weight of `model.layers.0.mlp.experts.0.gate_up`, which is no tensor of its own in "
            "the base",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            make_plan(tmp_path / "experts", tmp_path, "--use_qlora", "--min_quantized", "0", *flags)
        assert caught.value.message == message


def test_rows_and_the_whole_of_a_tied_embedding_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "tied", "llama_tied", vocab_size=144, dtype="bfloat16")
    write_llama(tmp_path / "tied")
    flags = ("--use_lora", "--lora_modules_to_save", "lm_head", "--trainable_token_indices", "3")
    with pytest.raises(UsageError) as caught:
        make_plan(tmp_path / "tied", tmp_path, *flags)
    assert caught.value.message == (
        "`lm_head` can't be saved while single rows of its weight are trained: PEFT's forward pass raises "
        "`TrainableTokensLayer wraps an unknown layer type`"
    )


def peak_of(run: Callable[[], object]) -> int:
    """Bytes that the process held at most beyond those before (proc(5): VmHWM, which clear_refs resets)."""

    def status(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return status("VmHWM") - before


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        (("--use_lora", "--base", "copy", "--init_lora_weights", "pissa_niter_2"), (1024, 4096)),
        (("--use_qlora", "--init_lora_weights", "pissa_niter_2"), (4096, 1024)),
        (("--use_lora", "--init_lora_weights", "pissa"), (1536, 1536)),
        (("--use_qlora", "--init_lora_weights", "olora"), (1536, 1536)),
        (("--use_lora", "--use_dora", "true"), (4096, 2048)),
        (("--use_qlora", "--use_dora", "true"), (2048, 4096)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_layer_keeps_within_its_memory(tmp_path: Path, flags: tuple[str, ...], shape: tuple[int, int]) -> None:
    rows, columns = shape
    config = {"hidden_size": columns, "intermediate_size": rows, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, vocab_size=144)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    write_llama(tmp_path / "model")
    plan, _ = make_plan(tmp_path / "model", tmp_path, *flags, "--lora_rank", "16", "--lora_target_modules", "gate_proj")
    assert plan.adapter_file is not None
    (step,) = plan.adapter_file.steps
    quantisation = plan.strategy.quantisation
    encode = quantisation.choose_encoder("cpu")[0] if quantisation is not None else None
    inputs = Inputs(checkpoint=plan.checkpoint, chunk_bytes=plan.chunk_bytes, encode=encode)
    nothing = SimpleNamespace(write=lambda name, values: None)
    give_back_large_blocks()  # as every run does: else glibc keeps up to two matrices, as chance has it
    step.operation.run(inputs, nothing)  # imports, threads, and what libraries keep
    peak, allowed = peak_of(lambda: step.operation.run(inputs, nothing)), step.operation.memory(plan.chunk_bytes)
    assert peak <= allowed
    assert allowed < 60 * rows * columns
