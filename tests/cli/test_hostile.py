# ruff: noqa: E501 -- a harm a line
"""Input that means harm: bounded in time and memory, told in one clean line, and nothing is run, reached or left."""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import CheckpointError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.tokenizer.rendering import MAX_SECONDS
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from ..conftest import Result
from ..parity.models import write_model
from ..tokenizers import write_llama
from .spoilt import edit_json

Ftload = Callable[..., Result]
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "source" / "model"
    write_model(directory, "llama", vocab_size=136, dtype="bfloat16")
    write_llama(directory, vocab_size=128)
    return directory


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def header(model: Path, content: bytes, length: int | None = None, data: bytes = b"") -> None:
    size = len(content) if length is None else length
    (model / WEIGHTS).write_bytes(struct.pack("<Q", size) + content + data)


def index(model: Path, file: str) -> None:
    (model / WEIGHTS).unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))


def many_tensors(model: Path) -> None:
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header(model, ("{" + ",".join(entry % n for n in range(600_000)) + "}").encode())


def add_token(model: Path, number: int) -> None:
    path = model / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"]["far"] = number
    path.write_text(json.dumps(document))


def add_state(model: Path, state: bytes, size: int = 0) -> None:
    """A 4-bit weight of 8 × 8, of which nothing else is there, with a state that is as long as it is, or as `size`."""
    end = 32 + (size or len(state))
    entries = {
        "a": {"dtype": "U8", "shape": [32, 1], "data_offsets": [0, 32]},
        "a.quant_state.bitsandbytes__nf4": {"dtype": "U8", "shape": [end - 32], "data_offsets": [32, end]},
    }
    content = json.dumps(entries).encode()
    header(model, content, data=bytes(32) + state)
    os.truncate(model / WEIGHTS, 8 + len(content) + end)


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a configuration of a gigabyte": (lambda m: sparse(m / "config.json", 10**9), "config.json` is 1000000000 bytes long"),
    "an index of a gigabyte": (
        lambda m: ((m / WEIGHTS).unlink(), sparse(m / "model.safetensors.index.json", 10**9)), "is 1000000000 bytes long",
    ),
    "a configuration nested 100,000 deep": (lambda m: (m / "config.json").write_text(nested(100_000)), "config.json` is not valid JSON"),
    "a header nested 100,000 deep": (lambda m: header(m, nested(100_000).encode()), "is not valid JSON"),
    "a header length of exabytes": (lambda m: header(m, b"{}", 2**63), "has a header of 9223372036854775808 bytes"),
    "a header of a gigabyte": (
        lambda m: (header(m, b"{}", 10**9), os.truncate(m / WEIGHTS, 2 * 10**9)), "has a header of 1000000000 bytes",
    ),
    "a header of 600,000 tensors": (many_tensors, "has a header of "),
    "a shape of a thousand dimensions": (
        lambda m: header(m, json.dumps({"a": {"dtype": "U8", "shape": [10**9] * 1000, "data_offsets": [0, 0]}}).encode()), "malformed",
    ),
    "integers of a thousand digits": (
        lambda m: header(m, b'{"a":{"dtype":"U8","shape":[1' + b"0" * 1000 + b'],"data_offsets":[0,1]}}'), "is not valid JSON",
    ),
    "overlapping data": (
        lambda m: header(m, json.dumps({n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "ab"}).encode(), data=b"12"), "overlap",
    ),
    "a key twice": (lambda m: header(m, b'{"a":{},"a":{}}'), "names a key twice"),
    "a shard above the directory": (lambda m: index(m, "../model.safetensors"), "which is not a shard's name"),
    "a shard at an absolute path": (lambda m: index(m, "/etc/passwd"), "which is not a shard's name"),
    "a shard with a null byte": (lambda m: index(m, "a\0.safetensors"), "missing"),
    "an index that names itself": (lambda m: index(m, "model.safetensors.index.json"), "which is not a shard's name"),
    "a billion layers": (lambda m: edit_config(m, num_hidden_layers=10**9), "`num_hidden_layers` is more than"),
    "a billion layers within": (lambda m: edit_config(m, text_config={"n_layer": 10**9}), "`n_layer` is more than"),
    "heads of a billion dimensions": (lambda m: edit_config(m, head_dim=10**9), "`head_dim` is more than"),
    "a template that never ends": (
        lambda m: (m / "chat_template.jinja").write_text("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "the chat template does not end within",
    ),
    "a template that fills the memory": (
        lambda m: (m / "chat_template.jinja").write_text("{{ 'x' * 100000000000 }}"), "the chat template does not end within",
    ),
    "a model of other parts than are stored": (
        lambda m: edit_config(m, model_type="bamba", num_hidden_layers=2000), "far more parts than there are tensors",
    ),
    "a billion cycles": (lambda m: edit_config(m, model_type="hrm_text", H_cycles=10**9), "`H_cycles` is more than"),
    "a hundred million labels": (lambda m: edit_config(m, num_labels=10**8), "`num_labels` is more than"),
    "generation settings nested 900 deep": (lambda m: (m / "generation_config.json").write_text(nested(900)), "generation_config.json` can't be used"),
    "a token with the id of billions": (lambda m: add_token(m, 4 * 10**9), "has a token of the id 4,000,000,000"),
    "a 4-bit state of a gigabyte": (lambda m: add_state(m, bytes(0), 10**9), "is too long to be a bitsandbytes state"),
    "a 4-bit state of infinite size": (lambda m: add_state(m, b'{"shape": [1e999], "blocksize": 64}'), "is not a bitsandbytes state"),
    "a 4-bit state nested 9,000 deep": (lambda m: add_state(m, nested(9_000).encode()), "is not a bitsandbytes state"),
    "4-bit blocks of nothing": (lambda m: add_state(m, b'{"shape": [8, 8], "blocksize": 0}'), "is not a bitsandbytes state"),
    "a 4-bit weight without its maxima": (lambda m: add_state(m, b'{"shape": [8, 8], "blocksize": 64, "quant_type": "nf4", "dtype": "bfloat16"}'), "`a.absmax` of a 4-bit weight is missing"),
    "a tokenizer of a gigabyte": (lambda m: sparse(m / "tokenizer.json", 10**9), "tokenizer"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one process took, with the children that it waited for: processor time and the largest resident set."""

    seconds: float
    bytes: int


def run_alone(*words: str | Path) -> tuple[Result, Cost]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, "-m", "ftload.cli", *map(str, words)], stdout=out, stderr=err)
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (120, 120))  # what never ends is not waited for
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        result = Result(code=process.returncode, out=out.read(), err=err.read())
    return result, Cost(seconds=usage.ru_utime + usage.ru_stime, bytes=usage.ru_maxrss * 1024)


@pytest.fixture(scope="module")
def honest(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Cost:
    """What the good model costs on this machine: nearly all of it are the libraries' imports."""
    result, cost = run_alone("prepare", "--model", llama, "--output_dir", tmp_path_factory.mktemp("honest") / "out")
    assert result.code == 0, result.err
    return cost


@pytest.mark.parametrize("harm", HARM)
def test_it_ends_soon_and_small(model: Path, tmp_path: Path, honest: Cost, harm: str) -> None:
    plant, culprit = HARM[harm]
    plant(model)
    before = sorted(tmp_path.rglob("*"))
    result, cost = run_alone("prepare", "--model", model, "--output_dir", tmp_path / "out", "--json")
    assert result.code == 4, result.err
    assert culprit in json.loads(result.out)["error"]["message"]
    assert len(result.err.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before
    # processor time, and of a template no more than it may take; `make_ready` may read a file of some 100 MB
    assert cost.seconds < 2 * honest.seconds + MAX_SECONDS
    assert cost.bytes < honest.bytes + 600e6


REACHING = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.append(1) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{{ cycler.__init__.__globals__.os }}": "access to attribute '__init__' of 'type' object is unsafe",
}


@pytest.mark.parametrize("template", REACHING)
def test_a_template_reaches_nothing(ftload: Ftload, model: Path, tmp_path: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    refused = ftload("prepare", "--model", model, "--output_dir", tmp_path / "out", "--use_lora")
    assert refused.code == 4
    assert f"it does not render a question and its answer: {REACHING[template]}\n" in refused.err


NASTY = "evil\x1b[31m\u202e\n# owned\n<script>alert(1)</script>`|x|`"


@pytest.mark.parametrize("command", ["plan", "prepare"])
def test_a_longest_text_that_is_no_number(ftload: Ftload, model: Path, tmp_path: Path, command: str) -> None:
    edit_json(model / "tokenizer_config.json", model_max_length=[])
    result = ftload(command, "--model", model, "--output_dir", tmp_path / "out")
    assert (result.code, result.err) == (
        4,
        f"error: `model_max_length` of the tokenizer in `{model}` is no number\n"
        "hint: fix tokenizer_config.json, or take another with --tokenizer_name_or_path\n",
    )


def test_special_tokens_that_are_not_there(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    """Looking up one of them would never end in transformers: the unknown token is looked up for it, and so on."""
    edit_json(model / "tokenizer_config.json", unk_token="")
    assert ftload("plan", "--model", model, "--quiet").code == 0
    edit_json(model / "tokenizer_config.json", eos_token="")
    result = ftload("plan", "--model", model)
    assert result.code == 4
    assert "special token of the tokenizer is not in its vocabulary" in result.err


def test_libraries_do_not_warn(model: Path, tmp_path: Path) -> None:
    """torch warns of tensors without elements; what is wrong with them is ours to tell, in one line."""
    edit_json(model / "config.json", intermediate_size=0)
    command = [sys.executable, "-m", "ftload.cli", "plan", "--model", model, "--use_qlora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


def test_names_reach_neither_terminal_nor_markdown(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[NASTY] = tensors["model.norm.weight"].clone()
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    refused = ftload("prepare", "--model", model, "--output_dir", tmp_path / "out")
    assert refused.code == 4
    assert len(refused.err.splitlines()) <= 2
    assert all(character.isprintable() for line in refused.err.splitlines() for character in line)
    del tensors[NASTY]
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    named = model.rename(model.parent / "evil\x1b[31m\u202e\n# owned\n<b>`|")
    edit_json(named / "tokenizer_config.json", pad_token="[x](x)`<i>|``", eos_token="[x](x)`<i>|``")
    done = ftload("prepare", "--model", named, "--output_dir", tmp_path / "out", "--use_lora")
    assert done.code == 0, done.err
    assert all(character.isprintable() for line in done.out.splitlines() for character in line)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert "\n# owned" not in card
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])
    assert set(re.findall("<([a-z0-9]+)", shown)) <= {
        "h1", "h2", "p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "ul", "li",
    }  # fmt: skip
    assert "<code>[x](x)`&lt;i&gt;|``</code> → <code>&lt;pad&gt; (id 129)</code>" in shown


SECRET = "hf_verysecretverysecretverysecret0123"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--model", "org/model"], {"HF_TOKEN": SECRET, "HF_ENDPOINT": "http://127.0.0.1:9"}),
        (["--model", "org/model"], {"HF_ENDPOINT": f"http://user:{SECRET}@127.0.0.1:9"}),
        (["--model", f"https://user:{SECRET}@127.0.0.1/org/model"], {}),
        (["--model", f"https://127.0.0.1/org/model?token={SECRET}"], {}),
    ],
)
def test_secrets_are_never_shown(
    tmp_path: Path, words: list[str], environment: dict[str, str], debug: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ftload.cli", "prepare", *words, *debug, "--output_dir", tmp_path / "out", "--json"],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), **environment}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_secrets_do_not_reach_the_report(model: Path, tmp_path: Path) -> None:
    words = ["--model", model, "--output_dir", tmp_path / "out", "--use_lora", "--hf_entity", "me"]
    environment = {**os.environ, "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
    command = [sys.executable, "-m", "ftload.cli", "prepare", *map(str, words)]
    assert subprocess.run(command, env=environment, check=False, timeout=120).returncode == 0
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_model_is_not_followed(ftload: Ftload, model: Path, tmp_path: Path, name: str) -> None:
    private = tmp_path / "private"
    private.write_bytes((model / name).read_bytes() if (model / name).exists() else b"my private key")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(private)
    refused = ftload("prepare", "--model", model, "--output_dir", tmp_path / "out")
    assert refused.code == 4
    assert f"`{model / name}` is a link to `{private}`, out of the model's directory" in refused.err


def test_weights_and_the_directory_may_be_links(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    (model / WEIGHTS).rename(tmp_path / "big.safetensors")
    (model / WEIGHTS).symlink_to(tmp_path / "big.safetensors")
    (tmp_path / "link").symlink_to(model)
    assert ftload("prepare", "--model", tmp_path / "link", "--output_dir", tmp_path / "out").code == 0


@pytest.mark.parametrize("what", ["truncated", "rewritten", "replaced"])
def test_a_source_that_changes_while_it_is_read(model: Path, tmp_path: Path, what: str) -> None:
    path = model / WEIGHTS
    data = path.read_bytes()

    class Changing(Silent):
        def stage(self, name: str) -> None:
            if name == "write":
                if what == "truncated":
                    os.truncate(path, len(data) // 2)
                elif what == "rewritten":
                    path.write_bytes(data[:-1] + b"\0")
                else:
                    (model / "new").write_bytes(data[::-1])
                    (model / "new").rename(path)

    flags = ["--model", str(model), "--output_dir", str(tmp_path / "out"), "--max_shard_size", "50KB"]
    with pytest.raises(CheckpointError) as raised:
        prepare(parse_arguments(flags), Changing())
    assert raised.value.message == f"`{path}` changed while it was read"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_pickle_runs_nothing(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    import pickle

    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Harm()}))
    assert ftload("prepare", "--model", model, "--output_dir", tmp_path / "out", "--allow_pickle").code == 4
    assert not (tmp_path / "owned").exists()


def test_a_source_in_a_pipe_is_not_waited_for(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    (model / WEIGHTS).unlink()
    os.mkfifo(model / WEIGHTS)
    done = threading.Event()
    threading.Timer(30, lambda: done.is_set() or os._exit(99)).start()
    assert ftload("prepare", "--model", model, "--output_dir", tmp_path / "out").code == 4
    done.set()
