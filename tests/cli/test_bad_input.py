"""Bad input, through the real command line: the exit code, one line that names the culprit, and nothing left behind."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..conftest import Result
from ..hub import LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama
from .conftest import ROWS

KINDS = {2: "usage", 3: "source", 4: "checkpoint", 5: "environment", 6: "resource", 7: "verification", 8: "output"}
WEIGHT = "model.layers.1.mlp.up_proj.weight"
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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


# -- what a directory can be


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to spoil a good model, and what is said then."""

    spoil: Callable[[Path], object]
    culprit: str
    hint: str | None
    code: int = 4
    flags: tuple[str, ...] = field(default=())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


def rewrite(directory: Path, config: Any, class_name: str) -> None:
    """Put a random model of another class in the place of the weights and the configuration."""
    import transformers

    getattr(transformers, class_name)(config).save_pretrained(directory)


def shards(directory: Path) -> list[Path]:
    """Split the weights into shards, with an index."""
    (directory / FILE).unlink()
    write_model(directory, "llama", vocab_size=ROWS, dtype="bfloat16", shards=True)
    return sorted(directory.glob("model-*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_t5(directory: Path) -> None:
    from transformers import T5Config

    config = T5Config(vocab_size=ROWS, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    rewrite(directory, config, "T5ForConditionalGeneration")


def spoil_bert(directory: Path, class_name: str) -> None:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=ROWS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    rewrite(directory, config, class_name)


def spoil_classifier(directory: Path) -> None:
    from transformers import LlamaConfig

    rewrite(directory, LlamaConfig.from_pretrained(directory), "LlamaForSequenceClassification")


def spoil_gptq(directory: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            outs, ins = tensors.pop(name).shape
            stem = name.removesuffix("weight")
            tensors[f"{stem}qweight"] = torch.zeros(ins // 8, outs, dtype=torch.int32)
            tensors[f"{stem}qzeros"] = torch.zeros(1, outs // 8, dtype=torch.int32)
            tensors[f"{stem}scales"] = torch.ones(1, outs, dtype=torch.float16)
            tensors[f"{stem}g_idx"] = torch.zeros(ins, dtype=torch.int32)

    edit_weights(directory, pack)
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})


def spoil_fp8(directory: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    edit_weights(directory, pack)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit_json(directory / "config.json", quantization_config=quantization)


def spoil_8_bit(directory: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[f"{name.removesuffix('weight')}SCB"] = torch.ones(tensors[name].shape[0])
            tensors[f"{name}_format"] = torch.tensor(0, dtype=torch.uint8)
            tensors[name] = tensors[name].to(torch.int8)

    edit_weights(directory, pack)
    edit_json(directory / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def spoil_fp4(directory: Path) -> None:
    state = torch.frombuffer(bytearray(b'{"quant_type": "fp4"}'), dtype=torch.uint8)
    edit_weights(directory, lambda t: t.update({f"{WEIGHT}.quant_state.bitsandbytes__fp4": state}))
    edit_json(
        directory / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    )


def spoil_pickle(directory: Path) -> None:
    torch.save(load_file(directory / FILE), directory / "pytorch_model.bin")
    (directory / FILE).unlink()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('the pickle ran')",))


def spoil_pickle_with_code(directory: Path) -> None:
    (directory / FILE).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({WEIGHT: _Evil()}))


def spoil_lacking_and_extra(directory: Path) -> None:
    edit_weights(directory, lambda t: t.update(stray=t.pop(WEIGHT)))


def set_weight(value: float, name: str = WEIGHT) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name][3, 5] = value

        edit_weights(directory, change)

    return spoil


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return spoil


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


CASES = {
    "empty directory": Case(
        spoil=lambda d: [path.unlink() for path in d.iterdir()], culprit="/source/model`", hint="config.json"
    ),
    "weights alone": Case(
        spoil=remove("config.json", "tokenizer.json", "tokenizer_config.json"), culprit="/source/model`",
        hint="config.json",
    ),
    "no config.json": Case(spoil=remove("config.json"), culprit="`config.json`", hint="config.json"),
    "no weights": Case(spoil=remove(FILE), culprit="holds no weights", hint=FILE),
    "an adapter": Case(
        spoil=lambda d: [remove("config.json", FILE)(d), write("adapter_config.json", "{}")(d)],
        culprit="`config.json`", hint="adapter",
    ),
    "truncated": Case(spoil=lambda d: truncate(d / FILE), culprit=f"`{FILE}` is truncated", hint="download it again"),
    "truncated shard": Case(
        spoil=lambda d: truncate(shards(d)[1]), culprit="`model-00002-of-", hint="download it again"
    ),
    "empty file": Case(spoil=write(FILE, ""), culprit=f"`{FILE}` is 0 bytes", hint="download it again"),
    "LFS pointer": Case(
        spoil=write(FILE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        culprit=f"`{FILE}` is a Git LFS pointer", hint="git lfs pull",
    ),
    "shard missing": Case(
        spoil=lambda d: shards(d)[1].unlink(), culprit=f"is listed in `{INDEX}` but missing", hint="again"
    ),
    "index is no JSON": Case(
        spoil=lambda d: [shards(d), write(INDEX, "{")(d)], culprit=f"`{INDEX}` is not valid JSON", hint="incomplete"
    ),
    "wrong shape": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.update({WEIGHT: t[WEIGHT][:-8].clone()})),
        culprit=f"tensor `{WEIGHT}` has shape [88, 64], the configuration asks for [96, 64]",
        hint="belong together",
    ),
    "missing key": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.pop(WEIGHT)), culprit=f"lacks tensor `{WEIGHT}`", hint="config.json"
    ),
    "unexpected key": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.update(stray=torch.zeros(3))),
        culprit="has the unexpected tensor `stray`", hint="config.json",
    ),
    "missing and unexpected keys": Case(
        spoil=spoil_lacking_and_extra, culprit=f"lacks tensor `{WEIGHT}`; has the unexpected tensor `stray`",
        hint="config.json",
    ),
    "T5": Case(spoil=spoil_t5, culprit="`T5ForConditionalGeneration`, not a causal language model", hint="CausalLM"),
    "BERT for masked LM": Case(
        spoil=lambda d: spoil_bert(d, "BertForMaskedLM"), culprit="`BertForMaskedLM`", hint="CausalLM"
    ),
    "BERT": Case(
        spoil=lambda d: spoil_bert(d, "BertModel"), culprit="lacks tensor `cls.predictions.", hint="config.json"
    ),
    "classifier": Case(spoil=spoil_classifier, culprit="`LlamaForSequenceClassification`", hint="CausalLM"),
    "config.json is no JSON": Case(
        spoil=write("config.json", '{"model_type": '), culprit="/model/config.json`", hint="download"
    ),
    "config.json is a list": Case(spoil=write("config.json", "[]"), culprit="/model/config.json`", hint="download"),
    "config.json is empty": Case(spoil=write("config.json", "{}"), culprit="/model/config.json`", hint="transformers"),
    "unknown model_type": Case(
        spoil=lambda d: edit_json(d / "config.json", model_type="quux"), culprit="`quux`", hint="transformers"
    ),
    "bad value in config.json": Case(
        spoil=lambda d: edit_json(d / "config.json", hidden_size="many"), culprit="/model/config.json`",
        hint="transformers",
    ),
    "heads don't divide": Case(
        spoil=lambda d: edit_json(d / "config.json", num_attention_heads=0), culprit="/model/config.json`",
        hint="transformers",
    ),
    "pickle": Case(spoil=spoil_pickle, culprit="`pytorch_model.bin`", hint="--allow_pickle"),
    "pickle with code": Case(
        spoil=spoil_pickle_with_code, flags=("--allow_pickle",), culprit="`pytorch_model.bin`", hint="safetensors"
    ),
    "pickle of garbage": Case(
        spoil=lambda d: [remove(FILE)(d), write("pytorch_model.bin", "no pickle")(d)], flags=("--allow_pickle",),
        culprit="`pytorch_model.bin`", hint="safetensors",
    ),
    "NaN": Case(
        spoil=set_weight(float("nan")), flags=("--use_qlora",), culprit=f"tensor `{WEIGHT}` of `{FILE}`", hint="damaged"
    ),
    "infinity": Case(
        spoil=set_weight(float("-inf")), flags=("--use_qlora",), culprit=f"tensor `{WEIGHT}` of `{FILE}`",
        hint="damaged",
    ),
    "GPTQ": Case(spoil=spoil_gptq, culprit="is already quantised (`gptq`)", hint="16-bit"),
    "FP8": Case(spoil=spoil_fp8, culprit="is already quantised (`fp8`)", hint="16-bit"),
    "8-bit": Case(spoil=spoil_8_bit, culprit="is already quantised (`bitsandbytes`)", hint="16-bit"),
    "FP4": Case(
        spoil=spoil_fp4, culprit=f"tensor `{WEIGHT}.quant_state.bitsandbytes__fp4`: only NF4 is supported", hint=None
    ),
    "no tokenizer": Case(
        spoil=remove("tokenizer.json", "tokenizer_config.json"), culprit="/model` holds no tokenizer",
        hint="--tokenizer_name_or_path",
    ),
    "tokenizer is no JSON": Case(
        spoil=write("tokenizer.json", '{"version": '), culprit="/model/tokenizer.json`", hint="download"
    ),
    "tokenizer of nothing": Case(
        spoil=write("tokenizer.json", "{}"), culprit="/model", hint="--tokenizer_name_or_path"
    ),
    "tokenizer_config.json is no JSON": Case(
        spoil=write("tokenizer_config.json", "x"), culprit="/model/tokenizer_config.json`", hint="download"
    ),
    "generation_config.json is no JSON": Case(
        spoil=write("generation_config.json", "{"), culprit="/model/generation_config.json`", hint="download"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_can_not_be_prepared(ftload: Ftload, model: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.spoil(model)
    words = ["--model", str(model), "--output_dir", str(tmp_path / "out"), *case.flags]
    assert_refused(ftload, tmp_path, words, code=case.code, culprit=case.culprit, hint=case.hint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_stay_as_they_are_may_hold_anything(
    ftload: Ftload, model: Path, tmp_path: Path, value: float
) -> None:
    set_weight(value)(model)
    result = ftload("prepare", "--model", model, "--output_dir", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    tensor = load_file(tmp_path / "out" / FILE)[WEIGHT]
    assert tensor.isfinite().logical_not().nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nor_do_weights_matter_that_qlora_leaves_alone(
    ftload: Ftload, model: Path, tmp_path: Path, value: float
) -> None:
    set_weight(value, "lm_head.weight")(model)
    assert ftload("prepare", "--model", model, "--output_dir", tmp_path / "out", "--use_qlora").code == 0


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
        *(
            pytest.param(out, marks=pytest.mark.xfail(reason="`stream.disk_errors` takes it for a failing disk"))
            for out in ("n" * 300, "/proc/out", "/proc/below/out")
        ),
    ],
)
def test_an_output_that_can_not_be_written(ftload: Ftload, llama: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("precious")
    words = ["--model", str(llama), "--output_dir", str(tmp_path / out)]
    assert_refused(ftload, tmp_path, words, code=8, culprit=f"can't write `{tmp_path / out}`", hint="--output_dir")


@pytest.mark.parametrize("out", ["", ".."])
def test_an_output_that_would_replace_the_model(ftload: Ftload, model: Path, tmp_path: Path, out: str) -> None:
    assert (model / out / "..").resolve().is_relative_to(tmp_path)
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
    "rank beyond the disk": Flags(
        words=("--use_lora", "--lora_rank", "1000000000000"), culprit="/parent` has", hint="disk space", code=6
    ),
    "rank 0": Flags(words=("--use_lora", "--lora_rank", "0"), culprit="lora_rank", hint=None),
    "bad dropout": Flags(words=("--use_lora", "--lora_dropout", "1.5"), culprit="lora_dropout", hint=None),
    "bad choice": Flags(words=("--base", "borrow"), culprit="`--base` takes one of auto, copy, reference", hint=None),
    "bad size": Flags(words=("--max_shard_size", "huge"), culprit="`huge` is not a size", hint="500MB"),
    "seed": Flags(words=("--use_lora", "--seed", "99999999999999999999"), culprit="`seed`", hint=None),
    "negative seed": Flags(words=("--use_lora", "--seed", "-1"), culprit="`seed`", hint=None),
    "chat template": Flags(words=("--chat_template_name", "nosuch"), culprit="`nosuch`", hint=".jinja"),
    "adapter flag": Flags(words=("--lora_target_modules", "q_proj"), culprit="`--lora_target_modules`", hint="--use_"),
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
    "settings": Flags(words=("--additional_model_arguments", "[1]"), culprit="`--additional_model_arguments`", hint=None),
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
    assert_refused(ftload, tmp_path, words, code=5, culprit="lora_targets: q_proj o_proj", hint="--strict")


@pytest.mark.parametrize("flags", [[], ["--use_lora"]])
def test_a_4_bit_checkpoint_is_for_qlora_alone(ftload: Ftload, llama: Path, tmp_path: Path, flags: list[str]) -> None:
    four_bit = tmp_path / "four-bit"
    assert ftload("prepare", "--model", llama, "--output_dir", four_bit, "--use_qlora").code == 0
    shutil.rmtree(four_bit / "adapter")
    words = ["--model", str(four_bit), "--output_dir", str(tmp_path / "out"), *flags]
    assert_refused(ftload, tmp_path, words, code=4, culprit="already quantised to 4 bits", hint="--use_qlora")


def test_no_model(ftload: Ftload, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "out")]
    assert_refused(ftload, tmp_path, words, code=2, culprit="no model is given", hint="--model")
