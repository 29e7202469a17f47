"""`ftload prepare` on a tiny Llama: what is written, and that the report tells the truth about it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.checkpoint import Checkpoint
from ftload.loaders.write.staging import staged
from safetensors.torch import load_file, save_file

from ..conftest import ROWS, Result
from ..page_cache import cached_bytes, forget
from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import FLAGS, headers, list_files, prepare

Ftload = Callable[..., Result]
Runs = dict[str, tuple[Path, dict[str, Any]]]

SIDE = {"README.md", "ftload_report.json", "tokenizer.json", "tokenizer_config.json"}
BASE = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    "adapter/tokenizer.json", "adapter/tokenizer_config.json",
}  # fmt: skip
FILES = {
    "standard": SIDE | BASE,
    "liger": SIDE | BASE,
    "lora": SIDE | ADAPTER | {"config.json"},
    "qlora": SIDE | BASE | ADAPTER,
}


@pytest.fixture(scope="module")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The four strategies: output directory and what `--json` printed."""
    parent = tmp_path_factory.mktemp("prepared")
    return {name: (parent / name, prepare(llama, parent / name, *flags)) for name, flags in FLAGS.items()}


@pytest.mark.parametrize("strategy", FLAGS)
def test_files(runs: Runs, strategy: str) -> None:
    directory, report = runs[strategy]
    assert list_files(directory) == FILES[strategy]
    assert [path.name for path in directory.parent.iterdir() if path.name.startswith(".")] == []
    assert report == json.loads((directory / "ftload_report.json").read_text())
    written = {}
    for name in FILES[strategy] - {"ftload_report.json"}:
        data = (directory / name).read_bytes()
        written[name] = {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert report["files"] == [written[name] for name in sorted(written)]


@pytest.mark.parametrize("strategy", FLAGS)
def test_report_is_valid(runs: Runs, llama: Path, strategy: str) -> None:
    from ftload import loaders
    from jsonschema import Draft202012Validator, FormatChecker

    _, report = runs[strategy]
    schema = json.loads((Path(loaders.__path__[0]) / "report" / "report.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(report)
    assert report["strategy"] == strategy
    source = report["source"]
    assert (source["model"], source["kind"], source["path"]) == (str(llama), "local", str(llama))
    assert {file["path"]: file["bytes"] for file in source["files"]} == {
        path.name: path.stat().st_size for path in llama.iterdir()
    }
    assert report["embeddings"] == {
        "tokenizer_size": 129, "rows_before": ROWS, "rows_after": ROWS, "resized": False, "tied": False, "init": None,
        "pad_token_id": 128,
    }  # fmt: skip


@pytest.mark.parametrize("strategy", FLAGS)
def test_counts_are_those_of_the_written_files(runs: Runs, llama: Path, strategy: str) -> None:
    directory, report = runs[strategy]
    base = headers(directory) or headers(llama)
    adapter = headers(directory / "adapter")
    states = {
        name.partition(".quant_state.")[0]: json.loads(entry["data"])
        for name, entry in base.items()
        if ".quant_state." in name
    }
    assert len(states) == (14 if strategy == "qlora" else 0)
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    for name, entry in (base | adapter).items():
        weight = next((weight for weight in states if name == weight or name.startswith(f"{weight}.")), None)
        row = expected["nf4" if weight else {"BF16": "bfloat16", "F32": "float32"}[entry["dtype"]]]
        row["bytes"] += 0 if ".quant_state." in name else len(entry["data"])
        if weight is None or name == weight:
            row["tensors"] += 1
            row["parameters"] += math.prod(states[weight]["shape"] if weight else entry["shape"])
    parameters = report["parameters"]
    assert parameters["by_dtype"] == {dtype: dict(row) for dtype, row in expected.items()}
    total = sum(row["parameters"] for row in expected.values())
    trained = sum(math.prod(entry["shape"]) for entry in (adapter or base).values())
    assert (parameters["total"], parameters["trainable"]) == (total, trained)
    assert parameters["frozen"] == total - trained
    assert parameters["trainable_percent"] == pytest.approx(100 * trained / total, abs=5e-5)
    components = parameters["by_component"]
    assert sum(row["parameters"] for row in components.values()) == total
    assert sum(row["bytes"] for row in components.values()) == sum(row["bytes"] for row in expected.values())
    attention, mlp = 2 * 64 * (64 + 32 + 32 + 64), 2 * 3 * 64 * 96
    assert {name: row["parameters"] for name, row in components.items() if name != "adapter"} == {
        "embedding": ROWS * 64, "head": ROWS * 64, "norm": 5 * 64, "attention": attention, "mlp": mlp,
    }  # fmt: skip
    assert components.get("adapter", {"parameters": 0})["parameters"] == sum(
        math.prod(entry["shape"]) for entry in adapter.values()
    )


def test_quantisation_is_described(runs: Runs) -> None:
    assert runs["lora"][1]["quantization"] is None
    assert runs["qlora"][1]["quantization"] == {
        "method": "bitsandbytes", "quant_type": "nf4", "double_quant": True, "block_size": 64,
        "compute_dtype": "bfloat16", "storage_dtype": "uint8", "coverage_percent": 100.0, "not_quantized": [],
        "experts": 0,
    }  # fmt: skip


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_where_the_adapter_finds_its_base(runs: Runs, llama: Path, strategy: str) -> None:
    directory, report = runs[strategy]
    base = llama if strategy == "lora" else directory
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == report["adapter"]["base"] == str(base)
    assert config["revision"] is report["adapter"]["revision"] is None
    assert report["base"] == ("reference" if strategy == "lora" else "copy")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.1)
    assert report["adapter"]["targets"] == dict.fromkeys(config["target_modules"], 2)
    assert len(config["target_modules"]) == 7
    for name, entry in headers(directory / "adapter").items():
        assert (any(entry["data"])) == (".lora_A." in name)


@pytest.mark.parametrize("strategy", FLAGS)
def test_the_model_card(runs: Runs, llama: Path, strategy: str) -> None:
    import yaml

    directory, report = runs[strategy]
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    library = "peft" if strategy == "lora" else "transformers"
    assert yaml.safe_load(front) == {
        "library_name": library, "pipeline_tag": "text-generation", "tags": ["ftload", strategy],
    }  # fmt: skip
    assert f"# `{llama}`, ready to train ({strategy})" in text
    assert 'load_prepared("path/to/this/directory")' in text
    assert f"| total | {report['parameters']['total']:,} |" in text
    for dtype, row in report["parameters"]["by_dtype"].items():
        assert f"| {dtype} | {row['tensors']:,} | {row['parameters']:,} | {row['bytes']:,} |" in text
    for decision in report["decisions"]:
        change = f"- {decision['what']}: `{decision['requested']}` → `{decision['effective']}` – {decision['reason']}"
        assert change in text.splitlines()
    assert "- pad token: `none` → `<pad> (id 128)` – batches need one" in text.splitlines()
    assert (f"its base is `{llama}`, which is not copied here" in text) == (strategy == "lora")


def test_lora_reads_no_weight(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunks(*_: object) -> None:
        pytest.fail("a weight is read")

    monkeypatch.setattr(Checkpoint, "chunks", chunks)
    assert prepare(llama, tmp_path / "out", "--use_lora")["base"] == "reference"


def test_lora_copies_a_base_of_another_dtype(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama", vocab_size=ROWS, dtype="float32")
    write_llama(tmp_path / "source")
    report = prepare(tmp_path / "source", tmp_path / "out", "--use_lora")
    assert (report["base"], report["adapter"]["base"]) == ("copy", str(tmp_path / "out"))
    original, copy = load_file(tmp_path / "source" / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert copy.keys() == original.keys()
    assert all(torch.equal(copy[name], original[name].bfloat16()) for name in original)
    report = prepare(tmp_path / "source", tmp_path / "referenced", "--use_lora", "--base", "reference")
    assert report["parameters"]["by_dtype"].keys() == {"float32"}
    assert report["parameters"]["in_training"].keys() == {"bfloat16", "float32"}
    assert [d["effective"] for d in report["decisions"] if d["what"] == "dtype of the base"] == ["float32"]


def test_4_bits_pass_through(runs: Runs, tmp_path: Path) -> None:
    first, before = runs["qlora"]
    report = prepare(first, tmp_path / "out", "--use_qlora", "--seed", "7")
    base, adapter = headers(tmp_path / "out"), headers(tmp_path / "out" / "adapter")
    assert base == headers(first)
    assert adapter.keys() == headers(first / "adapter").keys()
    assert all(
        (entry["data"] == adapter[name]["data"]) == (".lora_B." in name)
        for name, entry in headers(first / "adapter").items()
    )
    for section in ("by_dtype", "in_training", "by_component", "total"):
        assert report["parameters"][section] == before["parameters"][section]
    assert report["quantization"] == before["quantization"]
    config, again = (json.loads((path / "config.json").read_text()) for path in (first, tmp_path / "out"))
    assert config == again
    assert json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "out"
    )


# -- how it is run


def test_overwrite_leaves_nothing_of_the_old(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is in nobody's way
    prepare(llama, out, "--max_shard_size", "40KB")
    old = list_files(out)
    assert {"model-00001-of-00005.safetensors", "model.safetensors.index.json"} <= old
    assert all(path.stat().st_size < 45_000 for path in out.glob("model-*.safetensors"))
    prepare(llama, out, "--overwrite")
    assert list_files(out) == FILES["standard"]
    assert list(tmp_path.iterdir()) == [out]


def test_parents_are_made(llama: Path, tmp_path: Path) -> None:
    prepare(llama, tmp_path / "a" / "b" / "out")
    assert list_files(tmp_path / "a" / "b") == {f"out/{name}" for name in FILES["standard"]}


def test_for_people(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    result = ftload("prepare", "--model", llama, "--output_dir", tmp_path / "out", "--use_qlora", "--lora_rank", "8")
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    first, *lines = result.out.splitlines()
    assert first.startswith(f"{llama} → {tmp_path / 'out'} (qlora, ")
    assert lines[-1] == f"model, tokenizer = load_prepared('{tmp_path / 'out'}')"
    report = json.loads((tmp_path / "out" / "ftload_report.json").read_text())
    (total,) = (line for line in lines if line.split()[1:2] == ["total"])
    assert total.split()[0] == f"{report['parameters']['total']:,}"
    (nf4,) = (line for line in lines if line.split()[1:2] == ["nf4"])
    assert nf4.split()[:3] == ["61,440", "nf4", "14"]
    assert "decided attention: flash_attention_2 → " in result.out
    quiet = ftload("prepare", "--model", llama, "--output_dir", tmp_path / "quiet", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_names_are_shown_as_they_are(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / ":warning:[bold]"
    result = ftload("prepare", "--model", llama, "--output_dir", out)
    assert result.out.splitlines()[0].startswith(f"{llama} → {out} (standard, ")


def test_all_linear_is_as_requested(llama: Path, tmp_path: Path) -> None:
    flags = ["--use_lora", "--lora_target_modules", "all-linear", "--no_use_flash_attn", "--strict"]
    assert sum(prepare(llama, tmp_path / "out", *flags)["adapter"]["targets"].values()) == 14


def test_an_output_that_knows_no_arrows(llama: Path, tmp_path: Path) -> None:
    words = ["--model", str(llama), "--output_dir", "öut"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "ftload.cli", "prepare", *words]
    process = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert f"{llama} \\u2192 \\xf6ut (standard, " in process.stdout


def test_yaml_and_flags(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {llama}\nuse_lora: true\nlora_rank: 4\nlora_alpha: 32\nlearning_rate: 1e-5\n"
    )
    words = ["--lora-rank=16", "--output_dir", tmp_path / "out", "--json"]
    result = ftload("prepare", tmp_path / "run.yaml", *words)
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["arguments"]["lora_rank"] == {"value": 16, "origin": "cli"}
    assert report["arguments"]["lora_alpha"] == {"value": 32, "origin": "yaml"}
    assert report["arguments"]["learning_rate"] == {"value": 1e-5, "origin": "yaml"}
    assert report["arguments"]["lora_dropout"] == {"value": 0.1, "origin": "default"}
    assert (report["adapter"]["r"], report["adapter"]["alpha"]) == (16, 32)
    ranks = {entry["shape"][0] for name, entry in headers(tmp_path / "out/adapter").items() if "_A" in name}
    assert ranks == {16}


def test_experts_that_stay_16_bit_are_an_error_unless_allowed(ftload: Callable[..., Result], tmp_path: Path) -> None:
    write_model(tmp_path / "model", "mixtral", vocab_size=136, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    words = ["prepare", "--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--use_qlora", "--json"]
    words += ["--quantize_experts", "false"]
    refused = ftload(*words)
    assert refused.code == 5
    error = json.loads(refused.out)["error"]
    # of each layer: queries, keys, values, output; the router; four experts of three matrices
    attention, router, experts = 2 * 64 * 64 + 2 * 32 * 64, 4 * 64, 4 * 3 * 96 * 64
    percent = 100 * attention / (attention + router + experts)
    assert f"{percent:.1f} % of the weight matrices would be 4-bit" in error["message"]
    assert f"experts (24 tensors, {2 * 2 * experts:,} bytes), router (2 tensors, " in error["message"]
    assert error["hint"].startswith(f"pass --min_quantized {int(percent)} ")
    assert not (tmp_path / "out").exists()
    done = ftload(*words, "--min_quantized", str(int(percent)))
    assert done.code == 0, done.err
    assert json.loads(done.out)["quantization"]["coverage_percent"] == pytest.approx(percent, abs=1e-4)
    for wrong in ("-1", "101", "nan"):
        assert ftload(*words, "--min_quantized", wrong).code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(ftload: Ftload, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    words = ["prepare", "--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--device", "cuda"]
    refused = ftload(*words, "--use_qlora")
    assert refused.code == 5
    assert refused.err.startswith("error: `--device cuda`: ")
    assert not (tmp_path / "out").exists()
    # nothing is encoded: the device has no part in it
    assert ftload(*words).code == 0


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_encodes_as_the_kernel_does(quant_type: str) -> None:
    from ftload.loaders.nf4 import encode as nf4

    values = torch.randn(1000, 64, dtype=torch.bfloat16)
    codes, absmax = nf4.encode(values, quant_type)
    other_codes, other_absmax = nf4.encode_with_bitsandbytes(values, quant_type, "cpu")
    assert torch.equal(codes, other_codes)
    assert torch.equal(absmax, other_absmax)


@pytest.mark.parametrize(
    ("flags", "begun", "read"),
    [
        (["--use_qlora"], False, True),
        ([], False, True),
        (["--base", "link"], False, True),
        (["--use_lora", "--base", "copy"], False, True),
        (["--use_lora"], False, False),  # the base may stay where it is
        (["--use_qlora"], True, False),  # an earlier run may have read it
    ],
)
def test_weights_are_read_ahead_if_they_are_surely_read(
    model: Path, tmp_path: Path, flags: list[str], begun: bool, read: bool
) -> None:
    weights, stale, out = model / "model.safetensors", model / "model-00001-of-00002.safetensors", tmp_path / "out"
    for path in (weights, stale):
        save_file({"w": torch.zeros(2**23)}, path)
        forget(path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "unheard of"}))
    if begun:
        with staged(out) as staging:
            place = staging.directory
        place.mkdir()
        (place / "journal-0").touch()
    command = [sys.executable, "-m", "ftload.cli", "prepare", "--model", model, "--output_dir", out]

    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)

    assert "unheard of" in done.stderr  # which it finds out after it has imported what takes long
    cached = cached_bytes(weights)
    # not to the last page: a busy disk may not get further, and the system may take back what it likes
    assert (cached > weights.stat().st_size // 4) if read else (cached == 0)
    assert cached_bytes(stale) == 0
