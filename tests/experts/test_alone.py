"""Who loads 4-bit experts: nobody by accident, everybody after `import ftload.register`."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import FILE, MODELS

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "as written": {},
    "none": None,
    "unknown": {"quant_method": "ftload"},
}
"""The `quantization_config` of config.json: a change of it, or None to leave it out."""
PROGRAM = """
import json, sys
import torch, transformers
transformers.utils.logging.disable_progress_bar()
ends = []
for directory in json.loads(sys.argv[1]):
    for settings in ({}, {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, **settings)
            model(torch.arange(3, 20)[None])
        except Exception as error:
            ends.append([type(error).__name__, str(error)])
        else:
            ends.append(None)
print(json.dumps([ends, sorted(name for name in sys.modules if name.split(".")[0] == "ftload")]))
"""


def run(program: str, *words: str) -> Any:
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def with_configuration(source: Path, directory: Path, change: dict[str, Any] | None) -> Path:
    """The same checkpoint, with another `quantization_config`."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns(FILE))
    (directory / FILE).symlink_to(source / FILE)
    config = json.loads((directory / "config.json").read_text())
    section = config.pop("quantization_config")
    if change is not None:
        section = {"quant_method": change["quant_method"]} if change else section
        config["quantization_config"] = section
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_transformers_alone_ends_with_an_error(written: Callable[[str], Path], tmp_path: Path) -> None:
    """Each layout, whatever config.json says: no model with random or garbled experts.

    It ends while it is loaded; with older releases (5.17) at the first forward pass, which can't multiply bytes.
    """
    directories = [
        with_configuration(written(name), tmp_path / f"{name}, {kind}", change)
        for name in MODELS
        for kind, change in CONFIGURATIONS.items()
    ]
    ends, imported = run(PROGRAM, json.dumps([str(directory) for directory in directories]))
    assert imported == []
    assert len(ends) == 2 * len(directories)
    for index, end in enumerate(ends):
        assert end is not None, directories[index // 2].name
        assert end[0] == "RuntimeError", (directories[index // 2].name, end)
        assert "ignore_mismatched_sizes" in end[1] or "got Byte" in end[1], end[1]


def test_after_the_import_it_loads(written: Callable[[str], Path]) -> None:
    directories = json.dumps([str(written(name)) for name in ("qwen3_moe", "gpt_oss", "granitemoe")])
    ends, imported = run("import ftload.register\n" + PROGRAM, directories)
    assert ends == [None] * 6
    assert "ftload.register" in imported
    assert not any(name.startswith("ftload.cli") for name in imported)


def test_nothing_of_ftload_registers_by_an_import() -> None:
    """`load_prepared` registers when it loads a 4-bit model, and only then."""
    found = {
        path.relative_to(ROOT).as_posix()
        for top in ("cli", "loaders")
        for path in (ROOT / top).rglob("*.py")
        if registers(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == {"loaders/load.py", "loaders/register/__init__.py"}


def registers(tree: ast.Module) -> bool:
    """Whether a file imports the package that registers, or calls what that calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.endswith(".register") for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
            if any(name.rpartition(".")[2] == "register" for name in names):
                return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "register_experts":
            return True
    return False


@pytest.mark.parametrize(
    "text",
    [
        "import ftload.register",
        "from .. import register",
        "from ftload import register",
        "def f():\n    register_experts()",
    ],
)
def test_such_a_file_is_found(text: str) -> None:
    assert registers(ast.parse(text))
    assert not registers(ast.parse(f'"""{text}"""'))


@pytest.mark.parametrize("words", [["--help"], ["plan", "--model", "MODEL", "--use_qlora"]], ids=["help", "plan"])
def test_the_command_line_leaves_transformers_as_it_is(llama: Path, words: list[str]) -> None:
    program = """
import json, sys
from ftload.cli.app import run
code = run(json.loads(sys.argv[1]))
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
registered = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__module__
imported = sorted(name for name in sys.modules if name.startswith(("ftload.register", "ftload.loaders.experts")))
print(json.dumps([code, registered, imported]))
"""
    words = [str(llama) if word == "MODEL" else word for word in words]
    code, registered, imported = run(program, json.dumps(words))
    assert code == 0
    assert registered == "transformers.quantizers.quantizer_bnb_4bit"
    assert "ftload.register" not in imported
    assert not [name for name in imported if name.endswith((".quantizer", ".layers"))]


def test_it_may_be_imported_twice() -> None:
    from ftload.loaders.experts.registration import register_experts
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    for _ in range(2):
        register_experts()
    quantizer = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    assert quantizer.__module__ == "ftload.loaders.experts.quantizer"
    assert "transformers.quantizers.quantizer_bnb_4bit" in [base.__module__ for base in quantizer.__mro__]
    assert ALL_EXPERTS_FUNCTIONS["ftload_experts"].__module__ == "ftload.loaders.experts.forward"
