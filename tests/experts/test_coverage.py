"""How much of the mixtures that the field trains becomes 4-bit: their published shapes, planned from headers alone.

Layers are fewer, of each kind that there is, and as wide as they are. Files are sparse: a header, and holes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.flags.request import resolve_request
from ftload.loaders.plan.sources import resolve_sources
from ftload.loaders.prepare import read_and_plan
from ftload.loaders.progress import Silent, Stopwatch

from ..headers import write_headers

_DEEPSEEK_V3 = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 5,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral 8x7B": (
        "MixtralConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32,
         "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000},
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 2,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "vocab_size": 151936},
    ),
    "Qwen3.5-35B-A3B": (
        "Qwen3_5MoeTextConfig",
        {"hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
         "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
         "num_experts": 256, "num_experts_per_tok": 8, "vocab_size": 248320, "linear_num_value_heads": 32,
         "linear_num_key_heads": 16},
    ),
    "OLMoE-1B-7B": (
        "OlmoeConfig",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16,
         "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304},
    ),
    "gpt-oss-20b": (
        "GptOssConfig",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 2, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "vocab_size": 201088},
    ),
    "DeepSeek-V3": ("DeepseekV3Config", _DEEPSEEK_V3),
    "GLM-4.5": (
        "Glm4MoeConfig",
        {"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 5,
         "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 160,
         "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "vocab_size": 151552},
    ),
    "Granite 3.1 3B-A800M": (
        "GraniteMoeConfig",
        {"hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 24,
         "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8, "vocab_size": 49155},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_at_least_99_percent_of_the_matrices_become_4_bit(tmp_path: Path, model: str) -> None:
    config_class, arguments = PUBLISHED[model]
    source = write_headers(tmp_path / "source", config_class, arguments, packed=model == "gpt-oss-20b")
    words = ["--model", str(source), "--output_dir", str(tmp_path / "out"), "--use_qlora", "--min_quantized", "99"]
    request = resolve_request(parse_arguments(words))
    plan = read_and_plan(request, resolve_sources(request), Stopwatch(Silent()), headers_only=True)
    assert plan.coverage is not None
    assert 99 <= plan.coverage.percent < 100  # routers stay as they are
    experts = [tensor for tensor in plan.coverage.left if tensor.component == "experts"]
    assert all(tensor.name.endswith("_bias") for tensor in experts)
    assert plan.quantised_experts == {fused.parameter for fused in plan.skeleton.experts}
