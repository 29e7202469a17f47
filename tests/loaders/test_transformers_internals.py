"""transformers' private names are used in one file, and one that is gone is told as what it is."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from ftload.loaders.model import transformers_internals
from torch.utils.checkpoint import checkpoint

from ..conftest import Result

ROOT = Path(__file__).resolve().parents[2]
INTERNALS = ROOT / "loaders" / "model" / "transformers_internals.py"
PUBLISHED = {"transformers.utils.logging"}
"""What other files import from transformers' modules: it is documented."""
OF_TORCH_AND_PYTHON = {
    "_is_view", "_exit", "_checkpoint_offset", "_cdata", "_local_scalar_dense", "_to_copy", "_grouped_mm",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "_softmax_backward_data", "_apply", "_modules",
    "_register_custom_module",  # of PEFT, which documents it
}  # fmt: skip
"""Underscore attributes of other libraries."""


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Imports from transformers' modules, and underscore attributes of anything but the object itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "transformers":
            yield from (f"transformers.{alias.name}" for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "attr" in node.func.id:
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            yield from (name for name in names if isinstance(name, str) and re.match("_[a-z]", name))


def test_no_other_file_uses_them() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), use)
        for folder in ("cli", "loaders")
        for path in (ROOT / folder).rglob("*.py")
        if path != INTERNALS
        for use in private_uses(ast.parse(path.read_text(encoding="utf-8")))
        if use not in PUBLISHED | OF_TORCH_AND_PYTHON
    }
    assert found == set()


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("from transformers.modeling_utils import f", "transformers.modeling_utils.f"),
        ("def f():\n    from transformers import _private", "transformers._private"),
        ("model._init_weights(module)", "_init_weights"),
        ("getattr(model_class, '_supports_sdpa', False)", "_supports_sdpa"),
        ("self.model._supports_sdpa", "_supports_sdpa"),
    ],
)
def test_such_a_use_is_found(text: str, use: str) -> None:
    assert list(private_uses(ast.parse(text))) == [use]


def hide(monkeypatch: pytest.MonkeyPatch, module: str, name: str | None) -> None:
    """Let ftload see one of transformers' modules without a name, or not at all; transformers itself still has it."""
    real = importlib.import_module

    def without(wanted: str, package: str | None = None) -> object:
        found = real(wanted, package)
        if wanted != f"transformers.{module}":
            return found
        if name is None:
            raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)
        return SimpleNamespace(**{key: value for key, value in vars(found).items() if key != name})

    monkeypatch.setattr(transformers_internals, "importlib", SimpleNamespace(import_module=without))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING"),
        ("conversion_mapping", "get_model_conversion_mapping"),
        ("core_model_loading", "rename_source_key"),
        ("core_model_loading", "revert_weight_conversion"),
        ("modeling_utils", "remove_tied_weights_from_state_dict"),
        ("initialization", "no_tie_weights"),
        ("quantizers.base", "HfQuantizer"),
        ("pytorch_utils", "Conv1D"),
    ],
)
def test_a_name_that_is_gone_is_this_environments_fault(
    ftload: Callable[..., Result], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    hide(monkeypatch, module, name)
    done = ftload("plan", "--model", llama, "--output_dir", tmp_path / "out", "--use_lora")
    check_words(done, f"{module}.{name}")


def check_words(done: Result, name: str) -> None:
    assert done.code == 5, done.err
    error, hint = done.err.splitlines()
    assert error == f"error: transformers {transformers.__version__} has no `{name}`, which ftload needs"
    assert re.fullmatch(r"hint: ftload is tested with transformers (\S+): pip install 'transformers\1'", hint)
    assert ">=5.17" in hint
    assert "<5.25" in hint


def test_an_attribute_that_is_gone_is_too(
    ftload: Callable[..., Result], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(transformers.PreTrainedModel, "_supports_sdpa")
    done = ftload("plan", "--model", llama, "--output_dir", tmp_path / "out", "--use_lora")
    check_words(done, "PreTrainedModel._supports_sdpa")


def test_a_module_that_is_gone_is_too(
    ftload: Callable[..., Result], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "conversion_mapping", None)
    done = ftload("plan", "--model", llama, "--output_dir", tmp_path / "out", "--json")
    error = json.loads(done.out)["error"]
    assert (error["code"], error["kind"]) == (5, "environment")
    assert "has no `conversion_mapping.get_model_conversion_mapping`, which" in error["message"]


class OlderLayer(torch.nn.Module):
    """Its `__call__` is checkpointed, and with it the hooks of the module."""

    gradient_checkpointing = True

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_hooks_of_a_layer_see_what_enters_and_leaves_the_checkpoint(use_reentrant: bool) -> None:
    layer, hidden = OlderLayer(use_reentrant=use_reentrant), torch.ones(2, requires_grad=True)
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    with transformers_internals.layer_hooks(layer, before.append, after.append):
        output = layer(hidden)
        output.sum().backward()
    # once, though the layer runs twice
    assert [value is hidden for value in before] == [True]
    assert [value is output for value in after] == [True]
    assert output.requires_grad
    layer(hidden)
    assert (len(before), len(after)) == (1, 1)


@pytest.mark.parametrize("keyword", [False, True])
def test_hooks_of_a_layer_without_checkpointing(keyword: bool) -> None:
    layer, hidden = OlderLayer(use_reentrant=True), torch.ones(2)
    layer.gradient_checkpointing, layer._gradient_checkpointing_func = False, lambda function, *args: function(*args)
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    with transformers_internals.layer_hooks(layer, before.append, after.append):
        output = layer(hidden_states=hidden) if keyword else layer(hidden)
    layer(hidden)
    assert [value is hidden for value in before] == [True]
    assert [value is output for value in after] == [True]
