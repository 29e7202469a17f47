"""Adapters of experts: bit by bit PEFT's own, whatever the experts are stored in, and what is said of them."""

from __future__ import annotations

import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.adapter.experts import Experts, check_asked
from ftload.loaders.adapter.peft_lora import PeftLora
from ftload.loaders.adapter.targets import Targets
from ftload.loaders.errors import MissingRequirementError, UsageError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.inspect.inspection import inspect
from ftload.loaders.load import load_prepared
from ftload.loaders.model.components import LinearLayer
from ftload.loaders.model.experts.fused import FusedExperts
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json
from ftload.loaders.verify.verify import Verification, verify
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..parity.compare import assert_same_adapter_config, assert_same_tensors, read_tensors
from ..parity.models import write_model
from ..parity.zoo import write_tiny
from ..tokenizers import write_llama
from .checkpoints import four_bit_config, keep_in_place, load, random_model, write_checkpoint

ARCHITECTURES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe", "nemotron_h")
WAYS = {
    "lora": ("--use_lora", "--base", "copy"),
    "qlora, experts in 16 bits": ("--use_qlora", "--quantize_experts", "false", "--min_quantized", "0"),
    "qlora": ("--use_qlora",),
    "qlora of 4 bits": ("--use_qlora",),
}
"""Strategies and their flags; of the last, the source is 4-bit already."""
IN_16_BITS = ("lora", "qlora, experts in 16 bits")
RANK, OF_EXPERTS = 8, 4


def write_source(directory: Path, name: str, way: str = "lora") -> Path:
    if way == "qlora of 4 bits":
        write_checkpoint(directory, name, vocab_size=144)
    else:
        random_model(name, vocab_size=144).save_pretrained(directory)
    write_llama(directory, vocab_size=128)
    return directory


def prepare_from(source: Path, output: Path, *flags: str) -> dict[str, Any]:
    words = ["--model", str(source), "--output_dir", str(output), "--lora_rank", str(RANK), *flags]
    outcome = prepare(parse_arguments(words), Silent())
    assert outcome is not None
    return to_json(outcome.report)


def check(output: Path) -> Verification:
    return verify(output, quick=True, trust_remote_code=False, progress=Silent())


def base_in_memory(source: Path, output: Path, way: str) -> Any:
    """The model before it gets an adapter, by the libraries' own calls."""
    if way == "lora":
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if way not in IN_16_BITS:
        model, _ = load(output)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=four_bit_config(), device_map={"": "cpu"}
        )
        keep_in_place(model)
    return model


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(("name", "way"), product(ARCHITECTURES, WAYS))
def test_what_peft_makes(tmp_path: Path, name: str, way: str) -> None:
    source, output = write_source(tmp_path / "source", name, way), tmp_path / "out"
    report = prepare_from(source, output, *WAYS[way], "--lora_experts", str(OF_EXPERTS))
    stored = json.loads((output / "adapter" / "adapter_config.json").read_text())
    first = "up" if name == "nemotron_h" else "gate_up"
    of_experts = ["experts.down_proj", f"experts.{first}_proj"] if way in IN_16_BITS else ["down", first]
    assert stored["rank_pattern"] == dict.fromkeys(of_experts, OF_EXPERTS)
    assert stored.get("target_parameters") == (of_experts if way in IN_16_BITS else None)
    assert {"down", first} & {*stored["target_modules"]} == (set() if way in IN_16_BITS else {"down", first})

    model: Any = base_in_memory(source, output, way)
    torch.manual_seed(42)
    if way != "lora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=16, lora_dropout=0.0 if way in IN_16_BITS else 0.1,
        target_modules=stored["target_modules"], target_parameters=stored.get("target_parameters"),
        rank_pattern=stored["rank_pattern"],
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert_same_tensors(output / "adapter", tmp_path / "theirs")
    assert_same_adapter_config(output / "adapter", tmp_path / "theirs")

    tensors = read_tensors(output / "adapter")
    adapter = report["adapter"]
    assert (adapter["r"], adapter["experts_r"]) == (RANK, OF_EXPERTS)
    assert adapter["parameters"] == sum(value.numel() for value in tensors.values())
    assert adapter["target_parameters"].keys() == ({*of_experts} if way in IN_16_BITS else set())
    found = [decision for decision in report["decisions"] if decision["what"] == "lora_dropout"]
    if way not in IN_16_BITS:
        assert adapter["dropout"] == 0.1
        assert not found
    else:
        assert adapter["dropout"] == 0
        ((requested, effective),) = ((decision["requested"], decision["effective"]) for decision in found)
        assert (requested, effective) == ("0.1", "0")
        assert "lora.ParamWrapper does not work with lora_dropout != 0" in found[0]["reason"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's, that ranks were ignored, is wrong
        loaded, _ = load_prepared(output)
    trained = {
        name.replace(".default.", "."): parameter
        for name, parameter in loaded.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == tensors.keys()
    assert all(torch.equal(trained[name], value) for name, value in tensors.items())
    assert sum(value.numel() for value in trained.values()) == report["parameters"]["trainable"]


@pytest.mark.parametrize("way", ["lora", "qlora"])
def test_the_rank_of_all_layers_needs_no_pattern(tmp_path: Path, way: str) -> None:
    source = write_source(tmp_path / "source", "qwen3_moe", way)
    prepare_from(source, tmp_path / "out", *WAYS[way], "--lora_experts", str(RANK), "--lora_dropout", "0")
    assert "rank_pattern" not in json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    shapes = {value.shape for name, value in read_tensors(tmp_path / "out" / "adapter").items() if ".lora_A." in name}
    assert {shape[0] for shape in shapes} == ({8, 4 * 8} if way == "lora" else {8})
    assert check(tmp_path / "out").ok


def test_layers_that_are_named_are_adapted_beside_experts(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "qwen3_moe")
    flags = ("--lora_experts", "2", "--lora_target_modules", "q_proj")
    report = prepare_from(source, tmp_path / "out", *WAYS["qlora"], *flags)
    assert report["adapter"]["targets"] == {"q_proj": 2, "gate_up": 8, "down": 8}
    assert "LoRA targets" not in {decision["what"] for decision in report["decisions"]}
    assert check(tmp_path / "out").ok


@pytest.mark.parametrize("way", WAYS)
def test_what_stays_untrained_is_said(tmp_path: Path, way: str) -> None:
    source = write_source(tmp_path / "source", "qwen3_moe", way)
    report = prepare_from(source, tmp_path / "out", *WAYS[way])
    assert (report["adapter"]["experts_r"], report["adapter"]["target_parameters"]) == (None, {})
    (decision,) = (decision for decision in report["decisions"] if decision["what"] == "experts")
    # 2 layers of 4 experts: (512 + 64) at rank 8 and (64 + 256) more; weights 512·64 and 64·256
    assert decision == {
        "what": "experts",
        "requested": "untrained",
        "effective": "untrained",
        "reason": "393,216 weights in 4 fused parameters: --lora_experts 8 would train 57,344 parameters more",
    }
    more = prepare_from(source, tmp_path / "more", *WAYS[way], "--lora_experts", "8")
    assert more["parameters"]["trainable"] - report["parameters"]["trainable"] == 57_344


def test_experts_that_can_not_be_adapted(tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", "llama4_text", vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    report = prepare_from(tmp_path / "source", tmp_path / "out", *WAYS["lora"])
    (decision,) = (decision for decision in report["decisions"] if decision["what"] == "experts")
    assert decision["reason"].endswith("fused parameters: they are in a layout that --lora_experts does not reach")
    with pytest.raises(UsageError) as raised:
        prepare_from(tmp_path / "source", tmp_path / "no", *WAYS["lora"], "--lora_experts", "4")
    assert raised.value.message == (
        "`--lora_experts`: `model.layers.1.feed_forward.experts.down_proj` holds experts in a layout that ftload can't "
        "adapt"
    )


def test_experts_some_of_which_can_not_be_adapted(tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", "inkling_text", vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    report = prepare_from(tmp_path / "source", tmp_path / "out", *WAYS["lora"], "--lora_experts", "4")
    assert report["adapter"]["target_parameters"] == {"experts.down_proj": 2, "experts.gate_up_proj": 2}
    (decision,) = (decision for decision in report["decisions"] if decision["what"] == "lora_experts")
    assert (decision["requested"], decision["effective"]) == ("4", "4, without 6 parameters")
    assert decision["reason"] == (
        "`model.layers.0.mlp.shared_experts.down_proj` holds experts in a layout that ftload can't adapt"
    )


def test_models_without_fused_experts(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama", vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    with pytest.raises(UsageError, match="`--lora_experts`: this model has no experts"):
        prepare_from(tmp_path / "source", tmp_path / "out", *WAYS["lora"], "--lora_experts", "4")
    assert not (tmp_path / "out").exists()
    report = prepare_from(tmp_path / "source", tmp_path / "out", *WAYS["lora"])
    assert "experts" not in {decision["what"] for decision in report["decisions"]}
    with pytest.raises(UsageError, match="the experts of this model are linear layers") as raised:
        check_asked(4, Experts(packed=(), whole=()), [layer("h.0.experts.0.up_proj", component="experts")], ())
    assert raised.value.hint == "leave it out: --lora_rank is their rank too"


def test_strict_names_the_flag(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "mixtral")
    flags = ("--lora_experts", "4", "--strict", "--lora_target_modules", "q_proj")
    with pytest.raises(MissingRequirementError, match=r"lora_dropout: 0.1 → 0") as raised:
        prepare_from(source, tmp_path / "out", *WAYS["lora"], *flags)
    assert "--lora_dropout 0" in str(raised.value.hint)


def layer(name: str, *, component: Any = "mlp") -> LinearLayer:
    return LinearLayer(name=name, in_features=4, out_features=6, component=component, transposed=False, in_blocks=True)


def experts_of(*parameters: str) -> tuple[FusedExperts, ...]:
    return tuple(
        FusedExperts(parameter=name, experts=2, in_features=4, out_features=6, transposed=False) for name in parameters
    )


def test_whole_names_where_another_module_has_the_short_one() -> None:
    fused = experts_of("h.0.experts.gate_up_proj", "h.0.experts.down_proj")
    experts = Experts.of(fused, {one.parameter for one in fused})
    named = layer("h.0.router.down")
    targets = Targets(patterns=("router.down",), layers=(named,), matches={"router.down": 1}, decisions=())
    modules = ("", "h", "h.0", "h.0.experts", "h.0.experts.act_fn", "h.0.router", named.name)
    assert experts.modules(modules) == (
        *("", "h", "h.0", "h.0.experts", "h.0.experts.act_fn"),
        *("h.0.experts.0", "h.0.experts.0.gate_up", "h.0.experts.0.down"),
        *("h.0.experts.1", "h.0.experts.1.gate_up", "h.0.experts.1.down"),
        *("h.0.router", named.name),
    )
    found = experts.added_to(targets, modules=modules)
    names = [f"h.0.experts.{number}.{part}" for number in (0, 1) for part in ("gate_up", "down")]
    assert [one.name for one in found.layers] == [*names, named.name]
    assert found.patterns == ("router.down", *names)
    assert found.matches == {"router.down": 1, **dict.fromkeys(names, 1)}
    adapter = PeftLora(rank=8, experts_rank=4, alpha=16, dropout=0.0)
    config = adapter.config(found, base="base", revision=None)
    assert config["target_modules"] == sorted(["router.down", *names])
    assert config["rank_pattern"] == dict.fromkeys(sorted(names), 4)
    assert list(config) == sorted(config)


def test_what_is_wrapped_last_is_named_first() -> None:
    fused = experts_of("h.0.experts.gate_up_proj", "h.0.experts.down_proj", "h.1.experts.gate_up_proj")
    targets = Targets(patterns=(), layers=(), matches={}, decisions=())
    found = Experts.of(fused, ()).added_to(targets, modules=("", "h", "h.0", "h.0.experts", "h.1.experts"))
    assert [one.name for one in found.fused] == ["h.0.experts.base_layer", "h.0.experts", "h.1.experts"]
    assert dict(found.parameters) == {"experts.down_proj": 1, "experts.gate_up_proj": 2}


SPOILT = {
    "rank_pattern": ({"experts.down_proj": 3, "experts.gate_up_proj": 4}, "`rank_pattern` is "),
    "target_parameters": (["experts.down_proj"], "`target_parameters` is "),
    "lora_dropout": (0.1, "`lora_dropout` is `0.1`, not `0"),
}


@pytest.mark.parametrize("key", SPOILT)
def test_verify_finds_other_settings(tmp_path: Path, key: str) -> None:
    source = write_source(tmp_path / "source", "qwen3_moe")
    prepare_from(source, tmp_path / "out", *WAYS["lora"], "--lora_experts", "4")
    path = tmp_path / "out" / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    value, words = SPOILT[key]
    path.write_text(json.dumps(config | {key: value}))
    (adapter,) = (one for one in check(tmp_path / "out").checks if one.name == "adapter")
    assert [problem for problem in adapter.problems if problem.startswith(words)]


def test_verify_looks_at_each_expert(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "qwen3_moe")
    prepare_from(source, tmp_path / "out", *WAYS["lora"], "--lora_experts", "4")
    path = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    tensors[name][4:8] = tensors[name][12:16]
    tensors[name][8:12] = 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    (adapter,) = (one for one in check(tmp_path / "out").checks if one.name == "adapter")
    assert adapter.problems == (
        f"`{name}` of expert 2 was not drawn: its numbers are all the same",
        f"`{name}` of expert 3 was not drawn: it is the same as `{name}` of expert 1",
    )


def test_inspect_names_parameters_and_ranks(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "qwen3_moe")
    prepare_from(source, tmp_path / "out", *WAYS["lora"], "--lora_experts", "4")
    found = inspect(str(tmp_path / "out" / "adapter")).adapter
    assert found is not None
    assert found.parameters == ("experts.gate_up_proj", "experts.down_proj")
    assert found.ranks == {"experts.down_proj": 4, "experts.gate_up_proj": 4}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The LoRA adapter (rank 8, of experts 4, alpha 16, dropout 0) is in `adapter/`" in card


def test_fused_adapters_train_and_come_back_by_peft(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "gpt_oss")
    prepare_from(source, tmp_path / "out", *WAYS["lora"], "--lora_experts", "4")
    model, _ = load_prepared(tmp_path / "out")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(str(tmp_path / "trained"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        again = PeftModel.from_pretrained(base, str(tmp_path / "trained"))
    again.eval()
    model.eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
