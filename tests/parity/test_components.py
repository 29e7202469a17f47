"""Names alone tell what a tensor is for, as `inspect` needs it, and say the same as names and modules together."""

from __future__ import annotations

from pathlib import Path

import pytest
from ftload.loaders.checkpoint.checkpoint import open_checkpoint
from ftload.loaders.inspect.inspection import inspect
from ftload.loaders.model.config import load_config
from ftload.loaders.model.skeleton import build_skeleton
from ftload.loaders.source.resolve import resolve_source

from .zoo import write_tiny

SAMPLE = (
    "llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "gemma3", "phi3", "olmo2", "bloom", "falcon", "opt", "mpt",
    "rwkv", "xlm", "xlnet", "bert", "roberta", "electra", "rembert", "reformer", "prophetnet",
    "modernbert-decoder", "mamba2", "recurrent_gemma", "megatron-bert", "longcat_flash", "mixtral", "qwen2_moe",
    "qwen3_moe",
    "qwen3_5_moe_text", "qwen3_next", "olmoe", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared",
    "deepseek_v3", "glm4_moe", "minimax_m2", "jamba", "dbrx", "llama4_text", "laguna", "ernie4_5_moe",
    "hunyuan_v1_moe", "fuyu", "exaone_moe",
)  # fmt: skip

EXCEPTIONS = {
    # transformers gives them other names on loading; elsewhere a `shared_mlp` is the only one
    "hy_v3": [("mlp.shared_mlp.", "experts", "mlp")],
    "inkling2_text": [(".attn.", "norm", "attention"), (".attn_res.", "mlp", "attention")],
    "inkling2_loop_text": [
        (".attn.", "norm", "attention"), (".attn_res.", "mlp", "attention"), (".controllers.attn.", "mlp", "attention"),
    ],
    "blt": [("model.patcher.lm_head.", "mlp", "head")],  # a part of the model has a head of its own
    "ctrl": [("transformer.w.", "embedding", "mlp")],  # a name that tells nothing
    "cpmant": [(".relative_attention_bias", "embedding", "mlp")],  # a parameter that is looked up
    "phi4_multimodal": [(".relative_attention_bias_layer.", "embedding", "attention")],  # a table that is looked up
    "git": [(".visual_projection.", "norm", "mlp")],  # a norm within a list of other modules
}  # fmt: skip
"""Types where they differ: a part of the tensors' names, what the plan says, and what `inspect` says."""


def components(directory: Path, model_type: str) -> dict[str, tuple[str, str]]:
    """Of each parameter's stored name: what the plan says that it is for, and what `inspect` says."""
    write_tiny(directory, model_type, vocab_size=144)
    config, _ = load_config(directory, overrides={}, trust_remote_code=False)
    checkpoint = open_checkpoint(resolve_source(str(directory), None), allow_pickle=False)
    skeleton = build_skeleton(checkpoint, config, trust_remote_code=False, tokenizer_size=129)
    found = {tensor.name: tensor.component for tensor in inspect(str(directory)).tensors}
    return {
        tensor.name: (tensor.component, found[tensor.name])
        for tensor in skeleton.tensors
        if not tensor.buffer and tensor.name in found
    }


@pytest.mark.parametrize("model_type", SAMPLE)
def test_plan_and_inspect_agree(tmp_path: Path, model_type: str) -> None:
    found = components(tmp_path, model_type)
    assert found
    assert {name: pair for name, pair in found.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize("model_type", EXCEPTIONS)
def test_where_names_do_not_tell(tmp_path: Path, model_type: str) -> None:
    differing = {name: pair for name, pair in components(tmp_path, model_type).items() if pair[0] != pair[1]}
    explained = {
        (part, *pair): {name for name, found in differing.items() if part in name and found == pair}
        for part, *said in EXCEPTIONS[model_type]
        for pair in [tuple(said)]
    }
    assert all(explained.values())
    assert set.union(*explained.values()) == differing.keys()
