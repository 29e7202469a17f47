"""Bad input, through the real command line: the exit code, one line that names the culprit, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import ROWS, Result
from ..hub import LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama
from .spoilt import CASES, FILE, WEIGHT, edit_json, edit_weights, set_weight

KINDS = {2: "usage", 3: "source", 4: "checkpoint", 5: "environment", 6: "resource", 7: "verification", 8: "output"}
IN_THE_WEIGHTS = {
    "NaN",
    "infinity",
    "NaN in a file that is copied whole",
    "infinity in a file that is linked",
    "NaN in a tensor that is cast",
    "NaN in what is not quantised",
    "float32 beyond bfloat16",
    "float32 beyond bfloat16, quantised",
}
"""Cases that headers do not show."""
CODE = "open('{marker}', 'w').close()\n"

Ftload = Callable[..., Result]


def assert_refused(
    ftload: Ftload, parent: Path, words: list[str], *, code: int, culprit: str, hint: str | None
) -> None:
    """Run `prepare`, for people and for programs. `parent` is where the output would go."""
    before = snapshot(parent)
    result = ftload("prepare", *words)
    message = assert_one_line(result, code=code, culprit=culprit, hint=hint)
    assert result.out == ""
    assert snapshot(parent) == before
    result = ftload("prepare", *words, "--json")
    assert_one_line(result, code=code, culprit=culprit, hint=hint)
    error = json.loads(result.out)["error"]
    assert list(json.loads(result.out)) == ["error"]
    assert error.keys() == {"code", "kind", "message", "hint"}
    assert (error["code"], error["kind"], error["message"]) == (code, KINDS[code], message)
    assert (error["hint"] is None) == (hint is None)
    assert snapshot(parent) == before


def assert_one_line(result: Result, *, code: int, culprit: str, hint: str | None) -> str:
    """`error: …` with the culprit, `hint: …` if there is to be one, nothing else; returns the message."""
    assert result.code == code, result.err
    first, *rest = result.err.splitlines()
    assert first.startswith("error: ")
    assert culprit in first
    assert not first.endswith(".")
    assert len(rest) == (0 if hint is None else 1), result.err
    if hint is not None:
        assert rest[0].startswith("hint: ")
        assert hint in rest[0]
    return first.removeprefix("error: ")


def snapshot(directory: Path) -> dict[str, int]:
    """Every path below, hidden ones too, and when a file was changed."""
    return {
        str(path.relative_to(directory)): 0 if path.is_dir() else path.lstat().st_mtime_ns
        for path in directory.rglob("*")
    }


# -- directories that can't be prepared, or can


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_can_not_be_prepared(ftload: Ftload, model: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.spoil(model)
    words = ["--model", str(model), "--output_dir", str(tmp_path / "out"), *case.flags]
    assert_refused(ftload, tmp_path, words, code=case.code, culprit=case.culprit, hint=case.hint)


@pytest.mark.parametrize("name", CASES)
def test_plan_and_inspect_stop_at_it_too(ftload: Ftload, model: Path, tmp_path: Path, name: str) -> None:
    """A plan fails as preparing does, unless the weights themselves are at fault; headers can always be looked at."""
    case = CASES[name]
    case.spoil(model)
    before = snapshot(tmp_path)
    planned = ftload("plan", "--model", model, *case.flags, "--html", tmp_path / "page.html")
    if name in IN_THE_WEIGHTS:
        assert planned.code == 0
        (tmp_path / "page.html").unlink()
    else:
        assert_one_line(planned, code=case.code, culprit=case.culprit, hint=case.hint)
        assert planned.out == ""
    inspected = ftload("inspect", model, "--html", tmp_path / "page.html")
    if inspected.code == 0:
        (tmp_path / "page.html").unlink()
    else:
        assert inspected.code in (3, 4)
        assert inspected.out == ""
        assert re.fullmatch(r"error: .+\n(hint: .+\n)?", inspected.err)
    assert snapshot(tmp_path) == before


def test_the_largest_numbers_are_no_infinity(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    """Their sum is infinite, and the largest that rounds down to a bfloat16 is beyond all of those."""
    largest = 3.3895e38

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            tensors[name] = value.float()
        tensors[WEIGHT][:] = largest

    edit_weights(model, change)
    for name, flags in {"standard": [], "qlora": ["--use_qlora"], "again": []}.items():
        assert ftload("prepare", "--model", model, "--output_dir", tmp_path / name, *flags).code == 0
        model = tmp_path / "standard"  # in bfloat16: copied whole
    written = load_file(tmp_path / "again" / FILE)[WEIGHT]
    assert written.unique().tolist() == [torch.finfo(torch.bfloat16).max]


def test_a_base_that_is_not_read_is_told_of(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    set_weight(float("nan"))(model)
    words = ["--model", model, "--use_lora", "--output_dir"]
    result = ftload("prepare", *words, tmp_path / "out")
    assert result.code == 0
    assert "(left where it is, its values not scanned)" in " ".join(result.out.split())
    assert json.loads((tmp_path / "out" / "ftload_report.json").read_text())["base_scanned"] is False
    result = ftload("prepare", *words, tmp_path / "copy", "--base", "copy")
    assert_one_line(result, code=4, culprit=f"tensor `{WEIGHT}` of `{FILE}` holds NaN", hint="damaged")
    set_weight(0.0)(model)
    result = ftload("prepare", *words, tmp_path / "copy", "--base", "copy")
    assert "scanned" not in result.out
    assert json.loads((tmp_path / "copy" / "ftload_report.json").read_text())["base_scanned"] is True


# -- code in the checkpoint


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    """Someone who would say yes to everything."""
    answers = StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("there was a prompt"))
    return answers


def test_remote_code_of_the_model(ftload: Ftload, model: Path, tmp_path: Path, stdin: StringIO) -> None:
    marker = tmp_path / "source" / "ran"
    for name in ("configuration_evil.py", "modeling_evil.py"):
        (model / name).write_text(CODE.format(marker=marker))
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    edit_json(model / "config.json", model_type="evil", architectures=["EvilForCausalLM"], auto_map=auto_map)
    words = ["--model", str(model), "--output_dir", str(tmp_path / "out")]
    assert_refused(ftload, tmp_path, words, code=4, culprit=f"`{model}` needs code", hint="--trust_remote_code")
    assert not marker.exists()
    assert stdin.tell() == 0


def test_remote_code_of_the_tokenizer(ftload: Ftload, model: Path, tmp_path: Path, stdin: StringIO) -> None:
    marker = tmp_path / "source" / "ran"
    (model / "tokenization_evil.py").write_text(CODE.format(marker=marker))
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    edit_json(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    words = ["--model", str(model), "--output_dir", str(tmp_path / "out")]
    assert_refused(ftload, tmp_path, words, code=4, culprit=f"`{model}` needs code", hint="--trust_remote_code")
    assert not marker.exists()
    assert stdin.tell() == 0


# -- models that aren't directories


@pytest.mark.parametrize(
    ("model", "culprit"), [("./nowhere", "`./nowhere`"), ("{}/nowhere", "/nowhere`"), ("a/b/c", "`a/b/c`")]
)
def test_a_path_that_leads_nowhere(ftload: Ftload, tmp_path: Path, model: str, culprit: str) -> None:
    words = ["--model", model.format(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert_refused(ftload, tmp_path, words, code=3, culprit=f"{culprit} does not exist", hint="check the path")


def test_a_file(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    words = ["--model", str(llama / FILE), "--output_dir", str(tmp_path / "out")]
    assert_refused(ftload, tmp_path, words, code=3, culprit=f"`{llama / FILE}` is a file", hint=str(llama))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no gguf" * 100])
def test_a_gguf_file_of_garbage(ftload: Ftload, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    words = ["--model", str(path), "--output_dir", str(tmp_path / "out")]
    assert_refused(ftload, tmp_path, words, code=4, culprit=f"`{path}`", hint="whole GGUF file")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.mark.parametrize(
    ("model", "token", "culprit", "hint"),
    [
        ("org/unknown", None, "`org/unknown` is neither a directory nor on the hub", "`HF_TOKEN`"),
        ("org/gated", None, "`org/gated` is gated", "set `HF_TOKEN`"),
        ("org/gated", "stranger", "`org/gated` is gated", "the token's account"),
    ],
)
def test_a_repository_that_can_not_be_read(
    hub: LoopbackHub, llama: Path, tmp_path: Path, model: str, token: str | None, culprit: str, hint: str
) -> None:
    hub.add("org/gated", llama, access="gated")
    words = ["--model", model, "--output_dir", str(tmp_path / "parent" / "out")]

    def run(*words: str) -> Result:
        env = hub.env(tmp_path / "home", token=hub.stranger_token if token else None)
        process = subprocess.run(
            [sys.executable, "-m", "ftload.cli", *words], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        return Result(code=process.returncode, out=process.stdout, err=process.stderr)

    (tmp_path / "parent").mkdir()
    assert_refused(run, tmp_path / "parent", words, code=3, culprit=culprit, hint=hint)
    assert not hub.sent("*.safetensors")


# -- the output


def test_an_output_that_exists(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    words = ["--model", str(llama), "--output_dir", str(out)]
    assert_refused(ftload, tmp_path, words, code=8, culprit=f"`{out}` exists", hint="--overwrite")
    foreign = f"`{out}` was not written by ftload"
    assert_refused(ftload, tmp_path, [*words, "--overwrite"], code=8, culprit=foreign, hint="remove the directory")
    assert (out / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_an_output_that_is_no_directory(
    ftload: Ftload, llama: Path, tmp_path: Path, kind: str, flags: list[str]
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
    words = ["--model", str(llama), "--output_dir", str(out), *flags]
    assert_refused(
        ftload, tmp_path, words, code=8, culprit=f"`{out}` exists and is not a directory", hint="--output_dir"
    )


@pytest.mark.parametrize(
    "out",
    [
        "file/out",
        "file/below/out",
        "n" * 300,
        "/proc/out",
        "/proc/below/out",
    ],
)
def test_an_output_that_can_not_be_written(ftload: Ftload, llama: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("precious")
    words = ["--model", str(llama), "--output_dir", str(tmp_path / out)]
    assert_refused(ftload, tmp_path, words, code=8, culprit=f"can't write `{tmp_path / out}`", hint="--output_dir")


@pytest.mark.parametrize("out", ["", ".."])
def test_an_output_that_would_replace_the_model(ftload: Ftload, model: Path, tmp_path: Path, out: str) -> None:
    assert (model / out / "..").resolve().is_relative_to(tmp_path)
    (model / out / "ftload_report.json").write_text("{}")  # else it is not ftload's to replace at all
    words = ["--model", str(model), "--output_dir", str(model / out), "--overwrite"]
    assert_refused(ftload, tmp_path, words, code=8, culprit="is or holds the model itself", hint="--output_dir")


# -- the flags


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Words after a good model, and what is said of them."""

    words: tuple[str, ...]
    culprit: str
    hint: str | None
    code: int = 2


FLAGS = {
    "unknown flag": Flags(words=("--use_qlroa",), culprit="`--use_qlroa` (nearest: `--use_qlora`", hint="--help"),
    "two unknown flags": Flags(words=("--xyzzy", "--plugh"), culprit="`--plugh`", hint="--help"),
    "bad int": Flags(words=("--lora_rank", "many"), culprit="`--lora_rank` takes an int, not `many`", hint=None),
    "rank beyond memory": Flags(
        words=("--use_lora", "--lora_rank", "1000000000000"), culprit="`--max_memory` allows", hint="--max_memory",
        code=6,
    ),
    "rank beyond the disk": Flags(
        words=("--use_lora", "--lora_rank", "1000000000000", "--max_memory", "10000TB"), culprit="/parent` has",
        hint="disk space", code=6,
    ),
    "rank 0": Flags(words=("--use_lora", "--lora_rank", "0"), culprit="lora_rank", hint=None),
    "alpha": Flags(words=("--use_lora", "--lora_alpha", "nan"), culprit="`lora_alpha` must be a finite", hint=None),
    "bad dropout": Flags(words=("--use_lora", "--lora_dropout", "1.5"), culprit="lora_dropout", hint=None),
    "bad choice": Flags(words=("--base", "borrow"), culprit="`--base` takes one of auto, copy, ", hint=None),
    "bad size": Flags(words=("--max_shard_size", "huge"), culprit="`huge` is not a size", hint="500MB"),
    "seed": Flags(words=("--use_lora", "--seed", "99999999999999999999"), culprit="`seed`", hint=None),
    "negative seed": Flags(words=("--use_lora", "--seed", "-1"), culprit="`seed`", hint=None),
    "chat template": Flags(words=("--chat_template_name", "nosuch"), culprit="`nosuch`", hint=".jinja"),
    "adapter flag": Flags(words=("--lora_target_modules", "q_proj"), culprit="`--lora_target_modules`", hint="--use_"),
    "adapter file": Flags(words=("--lora_config", "lora.yaml"), culprit="`--lora_config`", hint="--use_"),
    "no adapter file": Flags(
        words=("--use_qlora", "--lora_config", "no.json"), culprit="`no.json` can't be read: no such file", hint=None
    ),
    "first values from data": Flags(
        words=("--use_lora", "--init_lora_weights", "eva"), culprit="EVA starts from the activations of data", hint=None
    ),
    "a base that changes, elsewhere": Flags(
        words=("--use_lora", "--init_lora_weights", "pissa", "--base", "reference"),
        culprit="the adapter's initial values are taken out of its weights", hint="--base copy",
    ),
    "two ways of naming experts": Flags(
        words=("--use_lora", "--lora_experts", "2", "--lora_target_parameters", "mlp.experts.down_proj"),
        culprit="two ways of naming what is adapted", hint="--lora_experts RANK",
    ),
    "an odd rank": Flags(
        words=("--use_lora", "--init_lora_weights", "orthogonal", "--lora_rank", "3"), culprit="to be even, got 3",
        hint="change one of them",
    ),
    "base of no adapter": Flags(words=("--base", "reference"), culprit="`--base`", hint="--use_lora"),
    "reference to a quantised base": Flags(
        words=("--use_qlora", "--base", "reference"), culprit="it is quantised", hint="--base copy"
    ),
    "reference to a changed config": Flags(
        words=("--use_lora", "--base", "reference", "--additional_model_arguments", '{"rope_theta": 5.0}'),
        culprit="its configuration is changed", hint="--base copy",
    ),
    "no such module": Flags(
        words=("--use_lora", "--lora_target_modules", "q_proj", "nosuch"), culprit="`nosuch`", hint="down_proj"
    ),
    "embedding as a target": Flags(
        words=("--use_lora", "--lora_target_modules", "embed_tokens"), culprit="`embed_tokens`", hint="down_proj"
    ),
    "tokenizer nowhere": Flags(words=("--tokenizer_name_or_path", "./no"), culprit="`./no`", hint="path", code=3),
    "config nowhere": Flags(words=("--config_name", "./no"), culprit="`./no`", hint="path", code=3),
    "config of nothing": Flags(words=("--config_name", "{}"), culprit="`config.json`", hint="config.json", code=4),
    "a setting of the wrong type": Flags(
        words=("--additional_model_arguments", '{"num_hidden_layers": "many"}'), culprit="num_hidden_layers",
        hint="--additional_model_arguments", code=4,
    ),
    "a setting that does not fit": Flags(
        words=("--additional_model_arguments", '{"hidden_size": 128}'), culprit="has shape", hint="config.json", code=4
    ),
    "settings": Flags(
        words=("--additional_model_arguments", "[1]"), culprit="`--additional_model_arguments`", hint=None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_can_not_be_used(ftload: Ftload, llama: Path, tmp_path: Path, name: str) -> None:
    case = FLAGS[name]
    (tmp_path / "parent").mkdir()
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "empty") if word == "{}" else word for word in case.words]
    words = ["--model", str(llama), "--output_dir", str(tmp_path / "parent" / "out"), *words]
    assert_refused(ftload, tmp_path / "parent", words, code=case.code, culprit=case.culprit, hint=case.hint)


def test_reference_to_a_base_that_must_be_resized(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    write_model(model, "llama", vocab_size=128, dtype="bfloat16")
    words = ["--model", str(model), "--output_dir", str(tmp_path / "out"), "--use_lora", "--base", "reference"]
    assert_refused(ftload, tmp_path, words, code=2, culprit="its embeddings are resized", hint="--base copy")


def test_strict_with_target_names_that_hit_in_part(ftload: Ftload, tmp_path: Path) -> None:
    write_model(tmp_path / "source", "phi3", vocab_size=ROWS, dtype="bfloat16")
    write_llama(tmp_path / "source")
    flags = ["--use_lora", "--no_use_flash_attn", "--strict"]
    words = ["--model", str(tmp_path / "source"), "--output_dir", str(tmp_path / "out"), *flags]
    assert_refused(ftload, tmp_path, words, code=5, culprit="LoRA targets: q_proj k_proj", hint="--strict")


@pytest.mark.parametrize("flags", [[], ["--use_lora"]])
def test_a_4_bit_checkpoint_is_for_qlora_alone(ftload: Ftload, llama: Path, tmp_path: Path, flags: list[str]) -> None:
    four_bit = tmp_path / "four-bit"
    assert ftload("prepare", "--model", llama, "--output_dir", four_bit, "--use_qlora").code == 0
    shutil.rmtree(four_bit / "adapter")
    words = ["--model", str(four_bit), "--output_dir", str(tmp_path / "out"), *flags]
    assert_refused(ftload, tmp_path, words, code=4, culprit="already quantised to 4 bits", hint="--use_qlora")


def test_names_are_shown_as_they_are(ftload: Ftload, tmp_path: Path) -> None:
    words = ["--model", "./:smile:[red]\x1b[31m", "--output_dir", str(tmp_path / "out")]
    assert_refused(ftload, tmp_path, words, code=3, culprit="`./:smile:[red] [31m` does not", hint="check the path")


@pytest.mark.parametrize(
    ("file", "culprit", "hint"),
    [
        ("config.json", "unknown field `architectures` in ", "PEFT's `LoraConfig`"),
        ("model.safetensors", "is larger than 128 KiB, too large for the configuration of an adapter", None),
        (".", "can't be read: is a directory", None),
    ],
)
def test_what_is_no_file_of_an_adapter(
    ftload: Ftload, llama: Path, tmp_path: Path, file: str, culprit: str, hint: str | None
) -> None:
    words = ["--model", str(llama), "--output_dir", str(tmp_path / "out"), "--use_lora"]
    assert_refused(ftload, tmp_path, [*words, "--lora_config", str(llama / file)], code=2, culprit=culprit, hint=hint)


@pytest.mark.parametrize("flag", ["--model", "--output_dir", "--lora_config"])
def test_a_path_that_is_no_text(ftload: Ftload, llama: Path, tmp_path: Path, flag: str) -> None:
    words = ["--model", str(llama), "--output_dir", str(tmp_path / "out"), flag, f"{tmp_path}/\udcff"]
    assert_refused(ftload, tmp_path, words, code=2, culprit=f"`{flag}`: `{tmp_path}/", hint="rename")


def test_no_model(ftload: Ftload, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "out")]
    assert_refused(ftload, tmp_path, words, code=2, culprit="no model is given", hint="before the flags")
