# ruff: noqa: E501 -- a fault a line
"""`ftload verify` knows every adapter that PEFT's `LoraConfig` makes, and finds what was done to one of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..conftest import Result
from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import prepare

Ftload = Callable[..., Result]
STRATEGIES = ["--use_lora", "--use_qlora"]
SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random B": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"c_attn": 3}},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "patterns": {"exclude_modules": ["q_proj", "c_fc"], "layers_to_transform": [1]},
    "regex": {"target_modules": ".*(q_proj|c_attn)"},
    "biases of B": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [3, 128], "modules_to_save": ["model.norm", "ln_f"]},
}
REFUSED = {("--use_qlora", "orthogonal"), ("gpt2", "olora")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A token short, so that rows are added."""
    root = tmp_path_factory.mktemp("sources")
    for architecture in ("llama", "llama_tied", "gpt2", "qwen3_moe"):
        write_model(root / architecture, architecture, vocab_size=128, dtype="bfloat16")
        write_llama(root / architecture, vocab_size=128)
    return {directory.name: directory for directory in root.iterdir()}


def prepare_variant(model: Path, output: Path, settings: dict[str, Any], *flags: str) -> None:
    config = output.parent / f"{output.name}.json"
    config.write_text(json.dumps(settings))
    prepare(model, output, "--lora_config", str(config), "--min_quantized", "0", *flags)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_honest_variants_pass(
    ftload: Ftload, models: dict[str, Path], tmp_path: Path, setting: str, architecture: str, strategy: str
) -> None:
    if REFUSED & {(strategy, setting), (architecture, setting)}:
        pytest.skip("PEFT can't make it")
    settings = dict(SETTINGS[setting])
    names = {"llama": {"ln_f"}, "llama_tied": {"ln_f"}, "gpt2": {"model.norm"}}[architecture]
    if "modules_to_save" in settings:
        settings["modules_to_save"] = [name for name in settings["modules_to_save"] if name not in names]
    prepare_variant(models[architecture], tmp_path / "out", settings, strategy)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    result = ftload("verify", tmp_path / "moved", "--json")
    assert (result.code, result.err) == (0, ""), result.out


def test_what_peft_says_of_one_layer_alone_is_not_heard(
    models: dict[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    prepare_variant(models["llama"], tmp_path / "out", {"rank_pattern": {"q_proj": 4}}, "--use_lora")
    assert not [str(warning.message) for warning in recwarn if "peft" in warning.filename]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rank", [None, "4"])
def test_variants_of_a_mixture_pass(
    ftload: Ftload, models: dict[str, Path], tmp_path: Path, strategy: str, rank: str | None
) -> None:
    experts = [] if rank is None else ["--lora_experts", rank]
    settings = {"use_rslora": True, "modules_to_save": ["mlp.gate"]}
    prepare_variant(models["qwen3_moe"], tmp_path / "out", settings, strategy, *experts)
    result = ftload("verify", tmp_path / "out", "--json")
    assert (result.code, result.err) == (0, ""), result.out


@pytest.fixture(scope="module")
def outputs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    kinds: dict[str, tuple[str, dict[str, Any], str]] = {
        "dora": ("llama", SETTINGS["dora"], "--use_qlora"),
        "tokens": ("llama", {"trainable_token_indices": [3, 128]}, "--use_lora"),
        "saved": ("llama_tied", {"modules_to_save": ["embed_tokens"], "use_rslora": True}, "--use_lora"),
        "pissa": ("llama", {"init_lora_weights": "pissa"}, "--use_qlora"),
        "olora": ("llama", {"init_lora_weights": "olora"}, "--use_lora"),
        "patterns": ("llama", {"exclude_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}, "--use_lora"),
        "fewer": ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "--use_lora"),
        "regex": ("llama", {"target_modules": ".*q_proj"}, "--use_lora"),
    }
    for name, (architecture, settings, strategy) in kinds.items():
        prepare_variant(models[architecture], root / name, settings, strategy)
    return {name: root / name for name in kinds}


def set_config(**changes: Any) -> Callable[[Path], None]:
    return edit("adapter/adapter_config.json", lambda config: config.update(changes))


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        change(document)
        (directory / name).write_text(json.dumps(document))

    return spoil


def change_tensors(change: Callable[[dict[str, Any]], object], name: str = "adapter/adapter_model.safetensors") -> Any:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / name)
        change(tensors)
        save_file(tensors, directory / name, metadata={"format": "pt"})

    return spoil


def put_original_back(directory: Path) -> None:
    """The weight that the adapter's initial values were taken out of."""
    names = ("model.safetensors", "adapter/adapter_model.safetensors")
    base, adapter = (load_file(directory / name) for name in names)
    layer = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
    weight = base[f"{layer}.weight"]
    base[f"{layer}.weight"] = (weight.float() + 2 * b @ a).to(weight.dtype)  # alpha 16, rank 8
    save_file(base, directory / names[0], metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"
ROWS = f"{EMBED}.token_adapter.trainable_tokens_delta"
SPOILT: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    # what: output, what is done to it, the check that finds it, its first words
    "DoRA is off": ("dora", set_config(use_dora=False), "adapter", "`use_dora` is `False`, not `True`"),
    "rsLoRA is off": ("dora", set_config(use_rslora=False), "adapter", "`use_rslora` is `False`, not `True`"),
    "initialised again": ("pissa", set_config(init_lora_weights="pissa"), "adapter", "`init_lora_weights` is `pissa`, not `True`"),
    "a module is not saved": ("saved", set_config(modules_to_save=None), "adapter", "`modules_to_save` is `None`, not `['embed_tokens']`"),
    "other tokens": ("tokens", set_config(trainable_token_indices=[3, 4]), "adapter", "`trainable_token_indices` is `[3, 4]`, not `[3, 128]`"),
    "another rank": ("patterns", set_config(rank_pattern={"v_proj": 8}), "adapter", "`rank_pattern` is `{'v_proj': 8}`, not `{'v_proj': 4}`"),
    "nothing is excluded": ("patterns", set_config(exclude_modules=None), "adapter", "`exclude_modules` is `None`, not `['q_proj']`"),
    "a name more": ("regex", set_config(target_modules=["q_proj", "lm_head"]), "adapter", "`target_modules` is `['q_proj', 'lm_head']`, not `.*q_proj`"),
    "a layer more": ("fewer", set_config(target_modules=["q_proj", "v_proj"]), "adapter", "`v_proj` hits 2 layers, the report says 0"),
    "a name that is no layer's": ("fewer", set_config(target_modules=["q_proj", "lm_head"]), "adapter", "`target_modules` is `['q_proj', 'lm_head']`, not `['q_proj']`"),
    "another expression": ("regex", set_config(target_modules=".*k_proj"), "adapter", "`target_modules` is `.*k_proj`, not `.*q_proj`"),
    "a length of zero": ("dora", change_tensors(lambda t: t[f"{Q}.lora_magnitude_vector"].mul_(0)), "adapter", f"`{Q}.lora_magnitude_vector` holds what is no length: 0.0"),
    "a length too few": ("dora", change_tensors(lambda t: t.pop(f"{Q}.lora_magnitude_vector")), "adapter", f"`{Q}.lora_magnitude_vector` is missing"),
    "another row": ("tokens", change_tensors(lambda t: t[ROWS][1].copy_(t[ROWS][0])), "adapter", f"row 1 of `{ROWS}` is not row 128 of the base's `model.embed_tokens.weight`"),
    "another copy": ("saved", change_tensors(lambda t: t[f"{EMBED}.weight"][100].mul_(2)), "adapter", f"`{EMBED}.weight` is not the base's `model.embed_tokens.weight`"),
    "a copy in another dtype": ("saved", change_tensors(lambda t: t.update({f"{EMBED}.weight": t[f"{EMBED}.weight"].float()})), "adapter", f"`{EMBED}.weight` is float32, training has it in bfloat16"),
    "no copy": ("saved", change_tensors(lambda t: t.pop(f"{EMBED}.weight")), "adapter", f"`{EMBED}.weight` is missing"),
    "a B of zeros": ("pissa", change_tensors(lambda t: t[f"{Q}.lora_B.weight"].zero_()), "adapter", f"`{Q}.lora_B.weight` was not drawn: its numbers are all the same"),
    "the original": ("olora", put_original_back, "training step", "`model.layers.1.mlp.up_proj.weight` is not what is left of the original once the adapter's initial values are taken out"),
    "a base that is not changed": ("pissa", edit("ftload_report.json", lambda report: report["adapter"].update(changes_base=False)), "adapter", "`changes_base` is `False`, which its `init_lora_weights` does not say"),
    "a base elsewhere": ("pissa", edit("ftload_report.json", lambda report: report.update(base="reference")), "adapter", "its initial values were taken out of its base, and "),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_variant_fails(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path, fault: str) -> None:
    name, spoil, by, words = SPOILT[fault]
    directory = tmp_path / "out"
    shutil.copytree(outputs[name], directory)
    spoil(directory)
    result = ftload("verify", directory, "--json")
    assert result.code == 7
    checks = {check["name"]: check["problems"] for check in json.loads(result.out)["checks"]}
    assert any(problem.startswith(words) for problem in checks[by]), checks


def test_the_residual_of_a_4_bit_base_is_looked_at(outputs: dict[str, Path], models: dict[str, Path]) -> None:
    """What the check compares: of the quantised residual little lies along B, of the original as much as was taken."""
    import torch
    from ftload.loaders.checkpoint.checkpoint import open_checkpoint
    from ftload.loaders.source.resolve import resolve_source

    base = open_checkpoint(resolve_source(str(outputs["pissa"]), None), allow_pickle=False)
    with safe_open(outputs["pissa"] / "adapter/adapter_model.safetensors", framework="pt") as file:
        b = file.get_tensor(f"{Q}.lora_B.weight")
        taken = 2 * torch.linalg.norm(b @ file.get_tensor(f"{Q}.lora_A.weight"))
    directions, _ = torch.linalg.qr(b)
    weight = "model.layers.0.self_attn.q_proj.weight"
    left = torch.linalg.norm(directions.T @ base.read(base.tensors[weight]).float())
    original = load_file(models["llama"] / "model.safetensors")[weight].float()
    assert left < 0.1 * taken
    assert torch.linalg.norm(directions.T @ original) == pytest.approx(float(taken), rel=0.02)
