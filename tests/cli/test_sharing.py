"""A prepared directory on a hub: the metadata of its card, and its card's own lines, run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.source.license import License, license_in, license_of_card
from huggingface_hub import ModelCard, metadata_load

from ..conftest import Result
from ..hub import LoopbackHub
from ..parity.models import write_model
from .runs import FLAGS, headers, prepare

Ftload = Callable[..., Result]
FRONT = "---\nlicense: other\nlicense_name: tiny-license\nlicense_link: LICENSE.md\nlanguage:\n- en\n---\n# Tiny\n"
BASE = "org/tiny"


@pytest.fixture(scope="module")
def hub(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    source = Path(shutil.copytree(llama, tmp_path_factory.mktemp("hub") / "model"))
    (source / "README.md").write_text(FRONT)
    with LoopbackHub() as hub:
        hub.add(BASE, source)
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def outputs(hub: LoopbackHub, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    kinds = {**FLAGS, "copied": ["--use_lora", "--base", "copy"]}
    for name, flags in kinds.items():
        run(hub, home, "prepare", "--model", BASE, "--output_dir", root / name, "--lora_rank", "8", "--quiet", *flags)
    return {name: root / name for name in kinds}


def run(hub: LoopbackHub, home: Path, *words: str | Path, offline: bool = False) -> str:
    command = [sys.executable, "-m", "ftload.cli", *map(str, words)]
    done = subprocess.run(command, env=hub.env(home, offline=offline), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(hub: LoopbackHub, home: Path, code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], env=hub.env(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def sharing(directory: Path) -> tuple[list[str], str]:
    """What the card says of sharing: commands, and the code that loads it."""
    text = (directory / "README.md").read_text().partition("## On a hub\n")[2]
    blocks: dict[str, str] = dict(re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    return blocks["sh"].splitlines(), blocks["python"]


RELATION = {"standard": "finetune", "liger": "finetune", "lora": "adapter", "qlora": "quantized", "copied": "finetune"}


@pytest.mark.parametrize("kind", RELATION)
def test_the_metadata(hub: LoopbackHub, outputs: dict[str, Path], kind: str) -> None:
    commit = hub.repos[BASE].branches["main"]
    metadata: Any = metadata_load(outputs[kind] / "README.md")
    assert metadata == {
        "base_model": BASE,
        "base_model_relation": RELATION[kind],
        "library_name": "peft" if kind == "lora" else "transformers",
        "license": "other",
        "license_name": "tiny-license",
        "license_link": f"{hub.endpoint}/{BASE}/blob/{commit}/LICENSE.md",
        "pipeline_tag": "text-generation",
        "tags": ["ftload", "lora" if kind == "copied" else kind],
    }
    assert ModelCard.load(outputs[kind] / "README.md").data.to_dict() == metadata
    report = json.loads((outputs[kind] / "ftload_report.json").read_text())
    assert report["source"]["license"] == {
        "id": "other", "name": "tiny-license", "link": metadata["license_link"],
    }  # fmt: skip


def test_a_local_model_has_a_license_and_no_id(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\nbase_model: x/y\n---\n")
    words = ["prepare", "--model", model, "--output_dir", tmp_path / "out", "--quiet"]
    assert ftload(*words).code == 0
    assert metadata_load(tmp_path / "out" / "README.md") == {
        "library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["ftload", "standard"],
    }  # fmt: skip
    assert ftload(*words).code == 0
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Other words\n")
    assert ftload(*words).code == 0  # up to date
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    assert ftload(*words).code == 8  # it would be another card
    assert ftload(*words, "--overwrite").code == 0
    assert metadata_load(tmp_path / "out" / "README.md")["license"] == "mit"  # pyright: ignore[reportOptionalSubscript]


def shared(directory: Path, tmp_path: Path) -> Path:
    """A copy, to be put on a hub."""
    return Path(shutil.copytree(directory, tmp_path / "shared"))


@pytest.mark.parametrize("kind", ["qlora", "copied"])
def test_base_and_adapter_in_one_repository(
    hub: LoopbackHub, home: Path, outputs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    directory, name = shared(outputs[kind], tmp_path), f"me/{kind}"
    (fix, upload), _ = sharing(directory)
    here = {"path/to/this/directory": str(directory), "ORG/NAME": name}
    words = [here.get(word, word) for word in shlex.split(fix)]
    assert words == ["ftload", "verify", str(directory), "--fix", "--base", name]
    run(hub, home, *words[1:], "--quick")
    (fix, upload), code = sharing(directory)  # which know the name now
    assert upload == f"hf upload {name} path/to/this/directory ."
    assert fix.endswith(f"--base {name}")
    hub.add(name, directory)
    hub.add(f"{name}-adapter", directory / "adapter")
    code += """
print(type(model.get_base_model()).__name__, len(tokenizer), tokenizer.pad_token)
print(sum(p.numel() for p in model.parameters() if p.requires_grad))
config = model.peft_config["default"]
print(config.base_model_name_or_path, config.revision)
"""
    report = json.loads((directory / "ftload_report.json").read_text())
    expected = ["LlamaForCausalLM 129 <pad>", str(report["parameters"]["trainable"]), f"{name} None"]
    assert python(hub, home, code) == expected
    alone = f"""
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}-adapter", is_trainable=True)
tokenizer = AutoTokenizer.from_pretrained("{name}-adapter")
"""
    assert f"`hf upload {name}-adapter path/to/this/directory/adapter .`" in (directory / "README.md").read_text()
    assert python(hub, home, alone + code.partition("\n\n")[2].partition("\n\n")[2]) == expected


def test_what_is_shared_is_a_source_again(
    hub: LoopbackHub, home: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    commit = hub.add("me/source", outputs["qlora"])
    words = ["--model", "me/source", "--output_dir", tmp_path / "out", "--use_qlora", "--lora_rank", "8", "--json"]
    report = json.loads(run(hub, home, "prepare", *words))
    assert (report["source"]["commit"], report["base"]) == (commit, "copy")
    assert headers(tmp_path / "out") == headers(outputs["qlora"])  # 4 bits pass through
    run(hub, home, "verify", tmp_path / "out")


def test_an_adapter_whose_base_is_on_the_hub_already(
    hub: LoopbackHub, home: Path, outputs: dict[str, Path], tmp_path: Path, llama: Path
) -> None:
    directory = outputs["lora"]
    commands, code = sharing(directory)
    assert commands == [
        "hf upload ORG/NAME path/to/this/directory/adapter .",
        "hf upload ORG/NAME path/to/this/directory/README.md README.md",
    ]
    to_share = Path(shutil.copytree(directory / "adapter", tmp_path / "adapter"))
    shutil.copy(directory / "README.md", to_share)
    hub.add("me/lora", to_share)
    commit = hub.repos[BASE].branches["main"]
    write_model(tmp_path / "newer", "llama", vocab_size=144, dtype="bfloat16", seed=7)
    newer = {path.name: path.read_bytes() for path in (tmp_path / "newer").iterdir()}
    hub.add(BASE, newer)
    try:
        code = (
            code.replace("ORG/NAME", "me/lora")
            + """
import torch
from safetensors.torch import load_file
print(len(tokenizer), sum(p.requires_grad for p in model.parameters()), model.peft_config["default"].revision)
"""
        )
        code += f"original = load_file({str(llama / 'model.safetensors')!r})['model.embed_tokens.weight']\n"
        code += "print(torch.equal(model.get_input_embeddings().weight, original))\n"
        assert python(hub, home, code) == [f"129 28 {commit}", "True"]
    finally:
        hub.repos[BASE].branches["main"] = commit


def test_what_is_not_to_be_shared_as_it_is(llama: Path, tmp_path: Path) -> None:
    prepare(llama, tmp_path / "out", "--use_lora")
    text = (tmp_path / "out" / "README.md").read_text().partition("## On a hub\n")[2]
    assert "hf upload" not in text
    assert "prepare it with `--base copy`" in text


def test_a_model_without_an_adapter(hub: LoopbackHub, home: Path, outputs: dict[str, Path]) -> None:
    commands, code = sharing(outputs["standard"])
    assert commands == ["hf upload ORG/NAME path/to/this/directory ."]
    hub.add("me/standard", outputs["standard"])
    code = code.replace("ORG/NAME", "me/standard") + "print(type(model).__name__, len(tokenizer))\n"
    assert python(hub, home, code) == ["LlamaForCausalLM 129"]


# -- what a card can hold


MIT = License(id="mit", name=None, link=None)
BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a, *a]\n" for n in range(99))
NAMED = "---\nlicense: other\nlicense_name: "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n", MIT),
        ("---\r\nlicense: mit\r\n---\r\nText\r\n", MIT),
        ("\ufeff---\nlicense: 'mit'\n---", MIT),
        ("---\nlicense:\n- mit\n---\n", MIT),
        (
            "---\nlicense: other\nlicense_name: my own\nlicense_link: https://example.org/a?b=c\n---\n",
            License(id="other", name="my own", link="https://example.org/a?***"),
        ),
        (NAMED + "12\nlicense_link: LICENSE\n---\n", License(id="other", name="12", link=None)),
        ("---\nlicense:\n- mit\n- bsd\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system [mit]\n---\n", MIT),
        ("---\n? [a, b]\n: c\nlicense: mit\n---\n", MIT),
        ("---\nlicense: \"mit\\nevil: true\"\n---\n", None),
        ("---\nlicense: mit\nlicense_name: \"\\e[31m\"\n---\n", MIT),
        ("---\nlicense: mit\nlicense_link: javascript:alert(1)\n---\n", MIT),
        (f"---\nlicense: {'x' * 65}\n---\n", None),
        ("---\nlicense: [" + "[" * 5000 + "\n---\n", None),
        (f"---\n{BOMB}license: mit\n---\n", MIT),
        ("---\nlicense: mit\n: : :\n\t- x\n---\n", None),
        ("---\nlicense: mit\n" + "x" * 40_000 + "\n---\n", None),
        ("license: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("---\n- license\n---\n", None),
        ("---\n---\n", None),
        ("", None),
        ("\0\x01", None),
    ],
)  # fmt: skip
def test_front_matters(tmp_path: Path, text: str, expected: License | None) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert license_of_card(tmp_path) == expected


def test_cards_that_are_none(tmp_path: Path) -> None:
    assert license_of_card(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert license_of_card(tmp_path) is None
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert license_of_card(tmp_path) is None


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("LICENSE.md", "https://hub/o/m/blob/c/LICENSE.md"),
        ("https://hub/o/m/LICENSE", "https://hub/o/m/LICENSE"),
        ("../../../evil", None),
        ("/etc/passwd", None),
        ("a b", None),
        ("x`<script>", None),
        (["LICENSE"], None),
        (7, None),
    ],
)
def test_links(link: Any, expected: str | None) -> None:
    found = license_in({"license": "other", "license_link": link}, "https://hub/o/m/blob/c")
    assert found == License(id="other", name=None, link=expected)


@pytest.mark.parametrize("metadata", [{"license": 1}, {"license": None}, {"license": {"a": 1}}, {"license": []}, {}])
def test_what_a_hub_says_that_is_no_license(metadata: dict[str, Any]) -> None:
    assert license_in(metadata, None) is None
