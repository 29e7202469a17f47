"""Experts in 4 bits, loaded by transformers: the weights, and what the model computes with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.formats.nf4 import Packed4Bit
from ftload.loaders.checkpoint.tensors import TensorMeta
from ftload.loaders.errors import CheckpointError, UsageError
from ftload.loaders.model.experts.fused import FusedExperts
from safetensors.torch import load_file, save_file

from .checkpoints import FILE, MODELS, four_bit_config, keep_in_place, load, reference, unpacked


def weight_of(layer: Any) -> torch.Tensor:
    """What a layer multiplies by: the identity comes back as its transposed weight."""
    return layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).t()


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_has_its_experts_weight_bit_for_bit(written: Callable[[str], Path], name: str) -> None:
    directory = written(name)
    model, info = load(directory, device_map={"": "cpu"})
    assert {key: value for key, value in info.items() if value} == {}
    expected = unpacked(directory)
    assert expected
    for parameter, values in expected.items():
        path, _, leaf = parameter.rpartition(".")
        experts = model.get_submodule(path)
        assert not hasattr(experts, leaf)
        first = "gate_up" if experts.has_gate else "up"
        for expert, value in enumerate(values.mT if experts.is_transposed else values):
            assert list(experts.get_submodule(str(expert))) == [first, "down"]
            layer: Any = experts.get_submodule(f"{expert}.{leaf.removesuffix('_proj')}")
            assert (layer.out_features, layer.in_features) == value.shape == layer.weight.quant_state.shape
            assert not layer.training
            assert layer.weight.dtype == torch.uint8
            assert torch.equal(weight_of(layer), value), (parameter, expert)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_dequantised_model(written: Callable[[str], Path], name: str) -> None:
    """Within the rounding of bfloat16: sums over experts are taken in another order than by transformers' eager way."""
    directory = written(name)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for model in (load(directory, device_map={"": "cpu"})[0], reference(directory)):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), embedded.grad))
    (loss, gradient), (expected_loss, expected) = found
    assert abs(loss - expected_loss) < 2e-3
    error = (gradient.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02, error


@pytest.mark.parametrize("name", MODELS)
def test_bitsandbytes_own_layer_is_used_wherever_it_computes_the_right_thing(
    written: Callable[[str], Path], name: str
) -> None:
    model, _ = load(written(name))
    kinds = set()
    for parameter in unpacked(written(name)):
        path, _, leaf = parameter.rpartition(".")
        layer: Any = model.get_submodule(f"{path}.0.{leaf.removesuffix('_proj')}")
        kinds.add((leaf.removesuffix("_proj"), type(layer).__name__))
    first = "up" if name == "nemotron_h" else "gate_up"
    ours: tuple[str, ...] = ()
    if name in ("gpt_oss", "gpt_oss_square", "qwen3_moe_odd"):
        ours = (first, "down")
    elif name in ("qwen3_moe_48", "mixtral", "olmoe", "granitemoe"):  # rows of 48 and 96
        ours = ("down",)
    assert kinds == {
        (projection, "PackedExpert" if projection in ours else "Linear4bit") for projection in (first, "down")
    }


def test_slices_share_the_fused_codes_and_statistics(written: Callable[[str], Path]) -> None:
    """16384 weights an expert: nested statistics stay as they are. Else absmax is float32, also for all at once."""
    for name, nested in (("qwen3_moe", True), ("qwen3_moe_64", False), ("gpt_oss_square", False)):
        experts: Any = load(written(name))[0].get_submodule("model.layers.0.mlp.experts")
        weights = [experts.get_submodule(f"{expert}.down").weight for expert in range(4)]
        states = [weight.quant_state for weight in weights]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        assert len({state.absmax.untyped_storage().data_ptr() for state in states}) == 1
        assert {state.absmax.dtype for state in states} == {torch.uint8 if nested else torch.float32}
        assert [state.nested for state in states] == [nested] * 4
        if nested:
            assert len({state.state2.absmax.untyped_storage().data_ptr() for state in states}) == 1


def test_their_conversions_come_before_the_models_own(written: Callable[[str], Path]) -> None:
    """A tensor is converted once: some types (qwen3_vl_moe) transpose what has the name of a fused parameter."""
    model, _ = load(written("deepseek_v3"))
    operations = [type(conversion.operations[0]).__name__ for conversion in model._weight_conversions]
    assert operations == ["LoadExperts", "LoadExperts", "Bnb4bitDeserialize"]


SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    "auto": {"dtype": "auto", "device_map": "auto"},
    "a trainer's configuration": {"quantization_config": four_bit_config(), "device_map": {"": "cpu"}},
    "memory": {"low_cpu_mem_usage": True},
    "eager": {"experts_implementation": "eager"},
}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ways_to_load(written: Callable[[str], Path], settings: dict[str, Any]) -> None:
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = load(written("qwen3_moe"), device_map={"": "cpu"})[0](ids).logits
        model, info = load(written("qwen3_moe"), **settings)
        found = model(ids).logits
    assert {key: value for key, value in info.items() if value} == {}
    assert type(model.get_submodule("model.layers.1.mlp.experts.3.down")).__name__ == "Linear4bit"
    if settings.get("dtype") == torch.float32:
        assert (found - expected).abs().max() < 0.05
    else:
        assert torch.equal(found, expected)


def test_shards_and_a_model_without_its_head(written: Callable[[str], Path], tmp_path: Path) -> None:
    """Sharded within one parameter's parts; and by `AutoModel`, whose names lack a prefix."""
    import transformers

    directory = written("qwen3_moe")
    shutil.copytree(directory, tmp_path / "shards", ignore=shutil.ignore_patterns(FILE))
    tensors = load_file(directory / FILE)
    halves = [dict(sorted(tensors.items())[part::2]) for part in range(2)]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file(half, tmp_path / "shards" / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = load(directory)[0](ids, output_hidden_states=True)
        assert torch.equal(load(tmp_path / "shards")[0](ids).logits, expected.logits)
        bare = transformers.AutoModel.from_pretrained(directory)
        keep_in_place(bare)
        assert torch.equal(bare(ids).last_hidden_state, expected.hidden_states[-1])


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_48", "gpt_oss", "granitemoe", "nemotron_h"])
def test_no_base_is_saved_from_it_but_what_it_dequantises_to(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    import transformers

    directory = written(name)
    model, _ = load(directory)
    with (
        pytest.warns(UserWarning, match="a model with 4-bit experts can't be saved: the directory .* holds it already"),
        pytest.raises(ValueError, match="is not serializable"),
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model = model.dequantize()
    for parameter, values in unpacked(directory).items():
        assert torch.equal(model.get_parameter(parameter), values), parameter
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_model_with_an_adapter_is_not_dequantised(written: Callable[[str], Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = load(written("qwen3_moe"))
    get_peft_model(model, LoraConfig(r=2, target_modules=["down"], task_type="CAUSAL_LM"))
    with pytest.raises(UsageError, match=r"`model\.layers\.0\.mlp\.experts\.0\.down` has an adapter: `dequantize` the"):
        model.dequantize()


# -- what is not as it should be


def spoilt(source: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(source / FILE)
    change(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})
    return directory


UP, DOWN = (f"model.layers.1.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
STATE = ".quant_state.bitsandbytes__nf4"


def without(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[UP + suffix]

    return change


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    """gate_up_proj and down_proj are of other shapes, and here each has the other's parts."""
    for suffix in ("", ".absmax", ".nested_absmax", STATE):
        tensors[UP + suffix], tensors[DOWN + suffix] = tensors[DOWN + suffix], tensors[UP + suffix]


def one_half_as_it_was(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(DOWN)]:
        del tensors[key]
    tensors[DOWN] = torch.zeros(4, 64, 256, dtype=torch.bfloat16)


def with_single_experts(tensors: dict[str, torch.Tensor]) -> None:
    for expert in range(4):
        tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = torch.zeros(64, 256, dtype=torch.bfloat16)


def in_larger_blocks(tensors: dict[str, torch.Tensor]) -> None:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        torch.randn(4, 64, 256).bfloat16(), blocksize=128, compress_statistics=True, quant_type="nf4"
    )
    tensors |= {DOWN: codes, **{f"{DOWN}.{key}": part for key, part in state.as_dict(packed=True).items()}}


SPOILT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], type[Exception], str]] = {
    "no codes": (without(""), CheckpointError, f"tensor `{UP}` of a 4-bit weight is missing"),
    "no absmax": (without(".absmax"), CheckpointError, f"tensor `{UP}.absmax` of a 4-bit weight is missing"),
    "no nested absmax": (without(".nested_absmax"), CheckpointError, f"tensor `{UP}.nested_absmax` of a 4-bit weight"),
    "no state": (without(STATE), CheckpointError, f"`{DOWN}` is stored in 4 bits, and `{UP}` is not"),
    "another shape": (
        of_another_shape,
        CheckpointError,
        r"`model.layers.1.mlp.experts.\w+` of `model.safetensors` is a 4-bit \(4, \d+, \d+\), and the model's is \(4",
    ),
    "one half": (one_half_as_it_was, CheckpointError, f"`{UP}` is stored in 4 bits, and `{DOWN}` is not: experts are"),
    "single experts too": (
        with_single_experts,
        CheckpointError,
        f"`{DOWN}` is stored in 4 bits, and `model.layers.1.mlp.experts.0.down_proj.weight` is a part of it as well",
    ),
    "larger blocks": (in_larger_blocks, CheckpointError, f"`{DOWN}` of `{FILE}` has blocks of 128 weights, and not of"),
}


@pytest.mark.parametrize(("change", "kind", "said"), SPOILT.values(), ids=SPOILT)
def test_parts_that_do_not_belong_together(
    written: Callable[[str], Path], tmp_path: Path, change: Any, kind: type[Exception], said: str
) -> None:
    directory = spoilt(written("qwen3_moe"), tmp_path / "spoilt", change)
    with pytest.raises(kind, match=said):
        load(directory)


def test_a_configuration_that_knows_nothing_of_it(written: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(written("qwen3_moe"), tmp_path / "spoilt")
    config = json.loads((tmp_path / "spoilt" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "spoilt" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is 4-bit, but config\.json has no `quantization_config`"):
        load(tmp_path / "spoilt", quantization_config=four_bit_config())


def test_models_without_4_bit_experts_are_loaded_as_before(written: Callable[[str], Path], llama: Path) -> None:
    """By the same class: quantised while they are loaded, saved, and loaded again."""
    plain = written("qwen3_moe").with_name("qwen3_moe plain")
    for directory in (plain, llama):
        model, info = load(directory, quantization_config=four_bit_config())
        assert {key: value for key, value in info.items() if value} == {}
        assert type(model.hf_quantizer).__name__ == "ExpertsQuantizer"
        assert model.hf_quantizer.is_serializable()
    experts: Any = load(plain, quantization_config=four_bit_config())[0].get_submodule("model.layers.0.mlp.experts")
    assert experts.gate_up_proj.dtype == torch.bfloat16


def test_the_rest_may_be_stored_under_the_names_of_a_multimodal_model(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    """The language model of a published Qwen 3.5: experts have the model's names, all else has those on disk."""
    directory = written("qwen3_5_moe")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if key.startswith("model.") and ".experts." not in key:
                tensors[key.replace("model.", "model.language_model.", 1)] = tensors.pop(key)

    renamed = spoilt(directory, tmp_path / "renamed", rename)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        found, info = load(renamed)
        assert {key: value for key, value in info.items() if value} == {}
        assert torch.equal(found(ids).logits, load(directory)[0](ids).logits)


def test_what_is_found_is_not_copied_for_each_tensor(
    written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers copies its quantizer for each stored tensor: of 48 layers, that took most of the time."""

    def refuse(self: Any, memo: Any) -> None:
        raise AssertionError("copied")

    for kind in (FusedExperts, TensorMeta, Packed4Bit):
        monkeypatch.setattr(kind, "__deepcopy__", refuse, raising=False)
    load(written("qwen3_moe"))
