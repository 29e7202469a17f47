"""Which linear layers an adapter trains, and what parameters are for."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from ftload.loaders.adapter.targets import REFERENCE_TARGETS, Targets, resolve_targets
from ftload.loaders.errors import UsageError
from ftload.loaders.flags.lora_config import ALL_LINEAR
from ftload.loaders.model.components import Component, LinearLayer, component_of


def _layer(name: str, component: Component) -> LinearLayer:
    return LinearLayer(
        name=name, in_features=4, out_features=4, component=component, transposed=False,
        in_blocks="vision_tower" not in name,
    )  # fmt: skip


def _resolve(
    layers: Iterable[LinearLayer], *, asked: tuple[str, ...] | None, fused_experts: bool, others: tuple[str, ...] = ()
) -> Targets:
    layers = tuple(layers)
    modules = [*(layer.name for layer in layers), *others]
    return resolve_targets(layers, modules=modules, asked=asked, fused_experts=fused_experts)


LLAMA = [
    _layer(f"model.layers.{n}.{part}", component)
    for n in (0, 1)
    for part, component in (
        *((f"self_attn.{name}_proj", "attention") for name in "qkvo"),
        *((f"mlp.{name}_proj", "mlp") for name in ("gate", "up", "down")),
    )
]


def test_the_seven_names_where_the_architecture_has_them() -> None:
    targets = _resolve(LLAMA, asked=None, fused_experts=False)
    assert targets.patterns == REFERENCE_TARGETS
    assert dict(targets.matches) == dict.fromkeys(REFERENCE_TARGETS, 2)
    assert targets.layers == tuple(LLAMA)
    assert targets.decisions == ()


def test_all_linear_layers_of_the_blocks_where_some_name_is_missing() -> None:
    layers = [
        _layer("h.0.attn.qkv", "attention"),
        _layer("h.0.mlp.down_proj", "mlp"),
        _layer("h.0.mlp.gate", "router"),
        _layer("vision_tower.h.0.attn.qkv_vision", "attention"),
    ]
    targets = _resolve(layers, asked=None, fused_experts=False)
    assert targets.patterns == ("qkv", "down_proj")
    (decision,) = targets.decisions
    assert decision.what == "LoRA targets"
    assert decision.effective == "qkv down_proj"
    assert "has no q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj:" in decision.reason


def test_attention_alone_where_experts_are_fused() -> None:
    targets = _resolve(LLAMA, asked=None, fused_experts=True)
    assert targets.patterns == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert len(targets.layers) == 8
    assert targets.decisions[0].reason == (
        "the experts are fused into 3-D parameters, which no layer's name reaches: by name, attention alone is trained"
    )


def test_whole_names_where_a_short_one_would_hit_what_must_not_be_trained() -> None:
    layers = [
        _layer("model.layers.0.self_attn.proj", "attention"),
        _layer("model.vision_tower.0.attn.proj", "attention"),
    ]
    targets = _resolve(layers, asked=None, fused_experts=False)
    assert targets.patterns == ("model.layers.0.self_attn.proj",)
    assert dict(targets.matches) == {"model.layers.0.self_attn.proj": 1}
    assert targets.layers == (layers[0],)


def test_whole_names_where_a_module_of_another_kind_has_the_short_one() -> None:
    layers = [_layer("h.0.ffn.0", "mlp"), _layer("h.0.ffn.2", "mlp")]
    targets = _resolve(layers, asked=None, fused_experts=False, others=("h", "h.0"))
    assert targets.patterns == ("h.0.ffn.0", "h.0.ffn.2")
    assert _resolve(LLAMA, asked=None, fused_experts=False, others=("other.q_proj",)).patterns == tuple(
        layer.name for layer in LLAMA
    )


def test_a_mixer_is_trained_where_experts_are_fused_and_no_attention_is_called_so() -> None:
    layers = [_layer("layers.0.mixer.in_proj", "mlp"), _layer("layers.0.experts.0.up_proj", "experts")]
    targets = _resolve(layers, asked=None, fused_experts=True)
    assert targets.patterns == ("in_proj",)
    assert "the rest alone is trained" in targets.decisions[0].reason


def test_what_the_user_names_is_taken_and_must_hit() -> None:
    targets = _resolve(LLAMA, asked=("q_proj", "layers.1.mlp.up_proj"), fused_experts=False)
    assert dict(targets.matches) == {"q_proj": 2, "layers.1.mlp.up_proj": 1}
    assert [layer.name for layer in targets.layers] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    with pytest.raises(UsageError, match="no linear layer is called `w1`, `w2`") as raised:
        _resolve(LLAMA, asked=("q_proj", "w1", "w2"), fused_experts=False)
    assert raised.value.hint == "this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def test_all_linear_is_pefts_word() -> None:
    targets = _resolve(LLAMA, asked=(ALL_LINEAR,), fused_experts=False)
    assert set(targets.patterns) == set(REFERENCE_TARGETS)
    assert targets.decisions[0].requested == "all-linear"


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UsageError, match="finds no linear layer"):
        _resolve([_layer("x.gate", "router")], asked=None, fused_experts=False)


@pytest.mark.parametrize(
    ("parameter", "module_class", "component"),
    [
        ("model.embed_tokens.weight", "Embedding", "embedding"),
        ("transformer.wpe.weight", "Embedding", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "Linear", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "LlamaRMSNorm", "norm"),
        ("transformer.h.0.ln_1.bias", "LayerNorm", "norm"),
        ("model.layers.0.mlp.down_proj.weight", "Linear", "mlp"),
        ("model.layers.0.mlp.gate.weight", "MixtralTopKRouter", "router"),
        ("model.layers.0.mlp.experts.gate_up_proj", "MixtralExperts", "experts"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "Linear", "experts"),
        ("gpt_neox.layers.0.attention.dense.weight", "Linear", "attention"),
        ("lm_head.weight", "Linear", "head"),
    ],
)
def test_components(parameter: str, module_class: str, component: Component) -> None:
    classes = {parameter.rpartition(".")[0]: module_class}
    assert component_of(parameter, classes, head="lm_head") == component


TOWER = _layer("model.vision_tower.layers.0.self_attn.q_proj", "attention")
ROUTER = _layer("model.layers.0.mlp.gate", "router")


def test_the_seven_names_leave_a_vision_tower_alone() -> None:
    targets = _resolve([*LLAMA, TOWER], asked=None, fused_experts=False)
    assert targets.layers == tuple(LLAMA)
    assert TOWER.name in targets.decisions[0].reason


def test_a_name_that_hits_a_vision_tower_unasked() -> None:
    message = f"`q_proj` hits `{TOWER.name}`, which lies outside the language model's layers and was not asked for"
    with pytest.raises(UsageError, match=message):
        _resolve([*LLAMA, TOWER], asked=("q_proj",), fused_experts=False)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("proj", ["model.layers.0.mlp.proj"]),  # whole parts of a name count, not their ends
        ("gate_proj", ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]),
    ],
)
def test_a_name_hits_whole_parts_of_names(pattern: str, found: list[str]) -> None:
    layers = [*LLAMA, TOWER, ROUTER, _layer("model.layers.0.mlp.proj", "mlp")]
    targets = _resolve(layers, asked=(pattern,), fused_experts=False)
    assert [layer.name for layer in targets.layers] == found


@pytest.mark.parametrize("pattern", [TOWER.name, "vision_tower.layers.0.self_attn.q_proj", "gate"])
def test_what_is_asked_for_by_its_own_name_is_trained(pattern: str) -> None:
    (layer,) = _resolve([*LLAMA, TOWER, ROUTER], asked=(pattern,), fused_experts=False).layers
    assert layer in (TOWER, ROUTER)
