"""`ftload inspect` through the real command line: what is shown, what is loaded, what travels, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..conftest import Result
from ..hub import LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import at_a_terminal, prepare, without_colours
from .spoilt import FILE

Ftload = Callable[..., Result]
INSPECT = [sys.executable, "-m", "ftload.cli", "inspect"]


def test_for_people(ftload: Ftload, llama: Path) -> None:
    result = ftload("inspect", llama)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == str(llama)
    assert lines[1] == f"80.19 k parameters · 21 tensors · 1 file · {(llama / FILE).stat().st_size / 1000:.2f} kB"
    assert "attention  bfloat16        8      24,576   49.15 kB  30.6 %" in lines
    assert "total      bfloat16       21      80,192  160.38 kB" in lines
    assert (
        "architecture  LlamaForCausalLM (llama), 2 layers, hidden 64, inner 96, 4 heads (2 for keys and values), "
        "context 64"
    ) in lines
    assert "embeddings    144 rows, a head of its own" in lines
    assert "tokenizer     128 tokens, bos <s>, eos </s>, no pad, no chat template" in lines
    assert all(line == line.rstrip() for line in lines)


def test_for_programs(ftload: Ftload, llama: Path) -> None:
    result = ftload("inspect", llama, "--json")
    document = json.loads(result.out)
    assert document["total"] == {"tensors": 21, "parameters": 80192, "bytes": 160384}
    assert document["by_dtype"] == {"bfloat16": document["total"]}
    assert document["files"] == [{"path": FILE, "bytes": (llama / FILE).stat().st_size}]
    assert "tensors" not in document


def test_a_prepared_directory_for_people(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    prepare(llama, tmp_path / "out", "--use_qlora")
    out = ftload("inspect", tmp_path / "out").out
    assert f"prepared      qlora from {llama} by ftload " in out
    assert "adapter       LORA, rank 8, alpha 16, dropout 0.1: q_proj k_proj" in out
    assert "quantised     100.0 % of the weight matrices outside embeddings and head are 4-bit" in out


@pytest.mark.parametrize(("glob", "count"), [((), 21), (("*.self_attn.?_proj.*",), 8), (("nothing",), 0)])
def test_a_list_of_tensors(ftload: Ftload, llama: Path, glob: tuple[str, ...], count: int) -> None:
    document = json.loads(ftload("inspect", llama, "--json", "--tensors", *glob).out)
    assert len(document["tensors"]) == count
    shapes = {name: list(tensor.shape) for name, tensor in load_file(llama / FILE).items()}
    for tensor in document["tensors"]:
        assert tensor["shape"] == shapes[tensor["name"]]
        assert (tensor["dtype"], tensor["file"]) == ("bfloat16", FILE)
    text = ftload("inspect", llama, "--tensors", *glob).out
    listed = [line for line in text.splitlines() if line.endswith(FILE)]
    assert len(listed) == count
    assert ("no tensor matches" in text) == (count == 0)


def test_two_checkpoints(ftload: Ftload, llama: Path, model: Path) -> None:
    same = ftload("inspect", llama, model, "--bytes")
    assert same.code == 0
    assert same.out.startswith("equal 21 common tensors (names, dtypes, shapes, contents of 21)\n")
    assert json.loads(ftload("inspect", llama, model, "--bytes", "--json").out)["equal"] is True
    tensors = load_file(model / FILE)
    tensors["model.norm.weight"][3] += 1
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:9].clone()
    save_file(tensors, model / FILE)
    different = ftload("inspect", llama, model, "--bytes")
    assert different.code == 0
    assert different.out.startswith("different 21 common tensors (names, dtypes, shapes, contents of 20)\n")
    assert "1 tensor of another shape\nlm_head.weight  144×64 → 9×64\n" in different.out
    assert re.search(r"1 tensor of another contents\nmodel\.norm\.weight  [0-9a-f]{16} → [0-9a-f]{16}\n", different.out)
    document = json.loads(ftload("inspect", llama, model, "--json").out)
    assert (document["equal"], document["hashed"]) == (False, None)
    assert document["changes"] == [{"name": "lm_head.weight", "what": "shape", "first": [144, 64], "second": [9, 64]}]


def test_nothing_heavy_is_imported(llama: Path) -> None:
    heavy = "torch", "transformers", "peft", "bitsandbytes", "numpy", "numba", "tokenizers", "huggingface_hub"
    code = (
        "import sys; from ftload.cli.app import run; "
        f"code = run(['inspect', {str(llama)!r}, '--tensors', '--json']); "
        f"print(code, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_is_not_too_narrow(llama: Path, width: int) -> None:
    for words in ([], ["--tensors"], ["--help"]):
        shown = at_a_terminal([*INSPECT, llama.name, *words], llama.parent, columns=width)
        lines = without_colours(shown).splitlines()
        assert len(lines) > 10
        assert max(map(len, lines)) <= width


def test_names_can_not_reach_the_terminal(ftload: Ftload, tmp_path: Path) -> None:
    save_file({"\x1b[31mred[/bold]\n.weight": torch.ones(2)}, tmp_path / FILE)
    result = ftload("inspect", tmp_path, "--tensors")
    assert result.code == 0
    assert "\x1b" not in result.out
    assert "[31mred[/bold] .weight  float32" in result.out


# -- a hub


def test_only_headers_travel(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", vocab_size=4096, dtype="bfloat16")
    write_llama(tmp_path / "model")
    size = (tmp_path / "model" / FILE).stat().st_size
    with LoopbackHub() as hub:
        commit = hub.add("org/model", tmp_path / "model")
        done = subprocess.run(
            [*INSPECT, "org/model", "--json"], env=hub.env(tmp_path / "home"), capture_output=True, check=True
        )
        weights = sum(request.sent for request in hub.requests if request.path.endswith(FILE))
    document = json.loads(done.stdout)
    assert document["commit"] == commit
    local = subprocess.run([*INSPECT, tmp_path / "model", "--json"], capture_output=True, check=True)
    assert {**json.loads(local.stdout), "model": "org/model", "commit": commit} == document
    assert 0 < weights <= 64 * 1024 < size / 8
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_contents_are_never_downloaded(tmp_path: Path, llama: Path) -> None:
    with LoopbackHub() as hub:
        hub.add("org/model", llama)
        env = hub.env(tmp_path / "home")
        done = subprocess.run([*INSPECT, "org/model", llama, "--bytes"], env=env, capture_output=True, text=True)
    assert done.returncode == 3
    assert "are not on this machine" in done.stderr


# -- bad input


def refused(ftload: Ftload, *words: str | Path) -> tuple[int, str]:
    """One line and perhaps a hint on stderr, one document on stdout; returns the code and the message."""
    result = ftload("inspect", *words)
    first, *rest = result.err.splitlines()
    assert result.out == ""
    assert first.startswith("error: ")
    assert len(rest) <= 1
    document = json.loads(ftload("inspect", *words, "--json").out)
    assert list(document) == ["error"]
    assert document["error"]["code"] == result.code
    return result.code, first


def test_what_is_not_there(ftload: Ftload, tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", tmp_path / "nothing.safetensors", "nothing.gguf"):
        code, message = refused(ftload, name)
        assert code == 3
        assert str(name) in message
    code, message = refused(ftload, tmp_path)
    assert code == 4
    assert "holds no weights" in message


def test_what_is_only_pickled(ftload: Ftload, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    code, message = refused(ftload, tmp_path)
    assert (code, "only pickled weights" in message) == (4, True)
    assert "convert it to safetensors" in ftload("inspect", tmp_path).err


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n" * 3])
def test_a_file_of_another_kind(ftload: Ftload, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for place in (tmp_path / name, *((tmp_path,) if name == FILE else ())):
        code, message = refused(ftload, place)
        assert code == 4
        assert name in message


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"), ("config.json", "[]"), ("tokenizer.json", '{"model": '), ("tokenizer.json", "3"),
        ("tokenizer_config.json", "[" * 100_000), ("ftload_report.json", "{}"), ("adapter_config.json", "no"),
    ],
)  # fmt: skip
def test_a_json_file_that_is_none(ftload: Ftload, model: Path, file: str, content: str) -> None:
    (model / file).write_text(content)
    code, message = refused(ftload, model)
    assert code == 4
    assert file in message


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"])
def test_values_of_the_wrong_kind(ftload: Ftload, model: Path, file: str) -> None:
    document = json.loads((model / file).read_text()) if (model / file).exists() else {"r": 8, "target_modules": ["x"]}
    for wrong in (None, [], {}, "text", -1, 1.5, [None, {}], {"content": 3}, 10**30):
        (model / file).write_text(json.dumps(dict.fromkeys(document, wrong)))
        assert ftload("inspect", model).code == 0
        assert ftload("inspect", model, "--json").code == 0


@pytest.mark.parametrize("state", [b"", b"{}", b'{"shape": 3}', b'{"shape": [-8, -16]}', b"[" * 9_000, b"x" * 20_000])
def test_a_four_bit_state_that_is_none(ftload: Ftload, tmp_path: Path, state: bytes) -> None:
    tensors = {
        "a.weight": torch.zeros(64, 1, dtype=torch.uint8),
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / FILE)
    code, message = refused(ftload, tmp_path)
    assert code == 4
    assert "a.weight" in message


def test_usage(ftload: Ftload, llama: Path) -> None:
    for words in (
        [],
        [llama, "--bytes"],
        [llama, llama, "--tensors"],
        [llama, llama, llama],
        [llama, "--no-such-flag"],
    ):
        assert ftload("inspect", *words).code == 2
