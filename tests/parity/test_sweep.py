"""A sample of `scripts/parity_all`: types of models, each with a quirk of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from .sweep import Result, compare, problem_of, read_expected

SAMPLE = {
    "bert": True,  # embedding and head are tied, and so are two biases
    "prophetnet": True,  # three names for one embedding
    "roformer": True,
    "xlstm": True,  # its initialisation fails when the embeddings grow
    "xlnet": True,  # its first parameter is float32, and so config.json's dtype
    "zaya": False,  # sets an element of a buffer after loading
    "hy_v4": False,  # linear layers in float32, quantised as they are
    "hunyuan_v1_moe": False,  # routers that are made in float32, and loaded as bfloat16 before they are quantised
    "qwen3_next": True,  # draws from the global generator while it loads
    "qwen3_5": True,  # so does this; a text model within a multimodal type
    "mixtral": True,  # experts are merged on loading
    "llama4_text": False,  # transformers puts other modules in the place of its experts when weights are 4-bit
    "recurrent_gemma": True,  # no attention in most of its layers
    "jamba": True,  # both kinds of layers, and experts
    "gpt2": True,  # Conv1D
    "gemma3": True,  # the whole multimodal model
    "hrm_text": False,  # linear layers that are merged on saving and split on loading
    "qwen4_exp_text": False,  # modules called `..._weight`
    "deepseek_v4": True,  # a table by token id that does not grow
    "reformer": True,  # can't be saved once its embeddings have grown
    "youtu": True,  # loading zeroes the padding row, one of the new ones
    "codegen": False,  # a configuration without a pad token
}
"""The type and whether its embeddings are resized."""

_GROWN = ("refused", "nobody could load `DeepseekV4ForCausalLM` after that")
_UNSAVED = ("refused", "can't save `ReformerModelWithLMHead` after its embeddings have grown")
_IDLE = ("unverified", "is trainable and has no gradient")
EXPECTED = {
    ("prophetnet", "qlora"): _IDLE,
    ("hy_v4", "qlora"): _IDLE,
    ("hrm_text", "qlora"): ("refused", "is merged or split into linear layers on loading"),
    ("llama4_text", "qlora"): ("refused", "belongs to a `Llama4TextExperts`"),
    ("qwen4_exp_text", "qlora"): ("refused", "has 4-bit statistics that it looks for under another name"),
    ("deepseek_v4", "standard"): _GROWN,
    ("deepseek_v4", "lora"): _GROWN,
    ("deepseek_v4", "qlora"): _GROWN,
    ("reformer", "standard"): _UNSAVED,
    ("reformer", "lora"): _UNSAVED,
    ("reformer", "qlora"): _UNSAVED,
}
"""What becomes of a type under a strategy, and a part of what ftload says; all others are equal."""


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_is_equal_or_refused_for_its_reason(tmp_path: Path, model_type: str) -> None:
    results = list(compare(model_type, tmp_path, resized=SAMPLE[model_type]))
    assert [result.strategy for result in results] == ["standard", "lora", "qlora"]
    for result in results:
        outcome, words = EXPECTED.get((model_type, result.strategy), ("equal", ""))
        assert result.outcome == outcome, result.reason
        assert words in result.reason
        assert problem_of(result, read_expected()) is None


def test_the_list_is_held_to_both_ways() -> None:
    listed = [{"says": "no reason", "strategies": ["qlora"], "types": ["llama"], "resized": True}]

    def said(outcome: str, reason: str, *, resized: bool = True, strategy: str = "qlora") -> str | None:
        result = Result(
            model_type="llama",
            strategy=strategy,
            resized=resized,
            whole=False,
            outcome=outcome,  # type: ignore[arg-type]
            reason=reason,
        )
        return problem_of(result, listed)

    assert said("refused", "there is no reason for it") is None
    assert said("refused", "another") == "another"
    assert said("refused", "no reason", resized=False) == "no reason"
    assert said("refused", "no reason", strategy="lora") == "no reason"
    assert said("equal", "") == "equal, though listed: no reason"
    assert said("equal", "", resized=False) is None
    assert said("unverified", "no reason") is None
    assert said("different", "no reason") == "no reason"
    assert said("crashed", "no reason") == "no reason"
