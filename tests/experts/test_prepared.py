"""What `prepare` writes with 4-bit experts, and the model that `load_prepared` makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders import load_prepared
from peft import prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..tokenizers import write_llama
from .checkpoints import FILE, MODELS, fused_names, reference, write_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:attention is (sdpa|eager):UserWarning"),  # flash attention needs a GPU
]
Prepare = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def prepared(ftload: Any, tmp_path: Path) -> Prepare:
    """The checkpoint that bitsandbytes makes (see `write_checkpoint`), and what `prepare` writes of the same model."""

    def prepare(name: str) -> tuple[Path, Path]:
        directory = write_checkpoint(tmp_path / name, name, vocab_size=144)
        plain = directory.with_name(f"{name} plain")
        write_llama(plain)
        flags = ["--use_qlora", "--lora_rank", "4", "--lora_experts", "2", "--lora_dropout", "0", "--quiet"]
        result = ftload("prepare", "--model", plain, "--output_dir", tmp_path / "out", *flags)
        assert result.code == 0, result.err
        return directory, tmp_path / "out"

    return prepare


@pytest.mark.parametrize("name", MODELS)
def test_the_base_is_bitsandbytes_own_and_loads(prepared: Prepare, name: str) -> None:
    directory, out = prepared(name)
    found, expected = (load_file(path / FILE) for path in (out, directory))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key
    model, _ = load_prepared(out)
    experts = [module for name, module in model.named_modules() if ".experts." in name and hasattr(module, "lora_A")]
    assert experts
    for module in experts:
        assert module.base_layer.weight.quant_state.quant_type == "nf4"
        assert getattr(module.base_layer, "support_avx512bf16_for_cpu", False) is False


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"qwen3_moe_odd"}))
def test_codes_under_another_dtype_are_the_same_model(
    ftload: Any, prepared: Prepare, tmp_path: Path, name: str
) -> None:
    """All bytes, and what comes out; of `qwen3_moe_odd`, codes would be no whole number of elements."""
    directory, out = prepared(name)
    again = tmp_path / "again"
    words = ["--use_qlora", "--lora_rank", "4", "--lora_experts", "2", "--lora_dropout", "0", "--quiet"]
    words += ["--bnb_4bit_quant_storage", "bfloat16", "--output_dir", str(again)]
    assert ftload("prepare", "--model", directory.with_name(f"{name} plain"), *words).code == 0
    found, expected = (load_file(path / FILE) for path in (again, out))
    for key, value in expected.items():
        is_codes = f"{key}.absmax" in expected
        assert found[key].dtype == (torch.bfloat16 if is_codes else value.dtype), key
        assert found[key].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), key
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    logits, gradients = [], []
    for path in (again, out):
        torch.manual_seed(0)
        model, _ = load_prepared(path)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        logits.append(output.logits)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert torch.equal(*logits)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


class Adapted(nn.Module):
    """A fused parameter (experts, out, in), or its transpose, and the adapters of all its experts."""

    def __init__(self, factors: list[tuple[Tensor, Tensor]], *, scaling: float, transposed: bool) -> None:
        super().__init__()
        self.factors, self.scaling, self.transposed = factors, scaling, transposed

    def forward(self, weight: Tensor) -> Tensor:
        delta = torch.stack([second @ first for first, second in self.factors]) * self.scaling
        return weight + (delta.mT if self.transposed else delta)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_48", "mixtral", "gpt_oss", "gpt_oss_square", "nemotron_h"])
def test_loss_and_every_adapters_gradient_are_those_of_the_dequantised_model(prepared: Prepare, name: str) -> None:
    """Against experts in float32 whose adapters are added to the weights: within the rounding of bfloat16."""
    directory, out = prepared(name)
    model, _ = load_prepared(out)
    torch.manual_seed(2)
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(parameter, std=0.02)
    adapters = [(key, module) for key, module in model.named_modules() if hasattr(module, "lora_A")]
    other = prepare_model_for_kbit_training(reference(directory), use_gradient_checkpointing=False)
    other.train()
    leaves: dict[str, Tensor] = {}

    def leaf(key: str) -> Tensor:
        leaves[key] = model.get_parameter(key).detach().clone().requires_grad_()
        return leaves[key]

    for parameter in fused_names(other):
        path, _, name_of_leaf = parameter.rpartition(".")
        module: Any = other.get_submodule(path)
        keys = [
            f"base_model.model.{path}.{expert}.{name_of_leaf.removesuffix('_proj')}"
            for expert in range(module.num_experts)
        ]
        factors = [(leaf(f"{key}.lora_A.default.weight"), leaf(f"{key}.lora_B.default.weight")) for key in keys]
        scaling = model.get_submodule(keys[0]).scaling["default"]
        adapted = Adapted(factors, scaling=scaling, transposed=module.is_transposed)
        parametrize.register_parametrization(module, name_of_leaf, adapted, unsafe=True)
    for key, module in adapters:
        if ".experts." not in key:  # the same adapter on the same 4-bit layer, by a hook
            first, second = leaf(f"{key}.lora_A.default.weight"), leaf(f"{key}.lora_B.default.weight")

            def add(
                _: Any, inputs: Any, output: Tensor, first: Tensor = first, second: Tensor = second,
                scaling: float = module.scaling["default"],
            ) -> Tensor:  # fmt: skip
                return output + (inputs[0].float() @ first.T @ second.T * scaling).to(output.dtype)

            other.get_submodule(key.removeprefix("base_model.model.")).register_forward_hook(add)
    losses, ids = [], tokens_routed_alike(model, other)
    for one in (model, other):
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 2e-3
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == leaves.keys()
    reached = 0
    for key, parameter in trained.items():
        expected = leaves[key].grad
        assert parameter.grad is not None
        assert expected is not None
        size = expected.norm()
        reached += size > 0
        assert (parameter.grad - expected).norm() <= 0.03 * size + 1e-6, (key, parameter.grad.norm(), size)
    assert reached > 0.9 * len(trained)


def tokens_routed_alike(model: Any, other: Any) -> Tensor:
    """Tokens none of which is so near to two experts that rounding decides."""
    for seed in range(20):
        ids = torch.randint(3, 90, (4, 48), generator=torch.Generator().manual_seed(seed))
        chosen: list[list[Tensor]] = [[], []]
        for one, choices in zip((model, other), chosen, strict=True):
            hooks = [
                module.register_forward_pre_hook(lambda _, inputs, to=choices: to.append(inputs[1].sort().values))
                for name, module in one.named_modules()
                if name.endswith(".experts")
            ]
            with torch.no_grad():
                one(input_ids=ids)
            for hook in hooks:
                hook.remove()
        assert len(chosen[0]) == len(chosen[1]) > 0
        if all(map(torch.equal, *chosen)):
            return ids
    raise AssertionError("no such tokens")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss_square"])
def test_twenty_steps_saved_moved_and_resumed_half_way(prepared: Prepare, tmp_path: Path, name: str) -> None:
    _, out = prepared(name)
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))

    def start(directory: Path) -> tuple[Any, torch.optim.Optimizer]:
        model, _ = load_prepared(directory)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2)

    def steps(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(10):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = start(out)
    first = steps(model, optimizer)
    moved = shutil.copytree(out, tmp_path / "moved")
    model.save_pretrained(moved / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = steps(model, optimizer)
    assert second[-1] < first[-1] < first[0] - 0.02, (first, second)
    shutil.rmtree(out)
    resumed, optimizer = start(moved)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert steps(resumed, optimizer) == second
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
