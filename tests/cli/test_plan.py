"""`ftload plan` says before what the report says after, and reads nothing but headers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Result
from ..hub import LoopbackHub
from ..parity.models import ARCHITECTURES, write_model
from ..tokenizers import write_llama

Ftload = Callable[..., Result]
KNOWN_ONLY_AFTERWARDS = {"created", "fingerprint", "timings", "work", "peak_anonymous_bytes", "peak_rss_bytes", "files"}
FLAGS = {
    "standard": [],
    "lora": ["--use_lora"],
    "lora, copied": ["--use_lora", "--base", "copy", "--max_shard_size", "60KB"],
    "qlora": ["--use_qlora", "--min_quantized", "0", "--max_shard_size", "60KB"],
}


@pytest.mark.parametrize(
    ("architecture", "rows"), [*((name, 128) for name in ARCHITECTURES), ("llama", 136), ("gpt2", 136)]
)
def test_a_plan_is_its_report(ftload: Ftload, tmp_path: Path, architecture: str, rows: int) -> None:
    write_model(tmp_path / "model", architecture, vocab_size=rows, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    for flags in FLAGS.values():
        words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", *flags, "--json"]
        planned = ftload("plan", *words)
        assert planned.code == 0, planned.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
        plan = json.loads(planned.out)
        report = json.loads(ftload("prepare", *words).out)
        assert {key: plan[key] for key in plan.keys() - {"files", "needs", "training_memory"}} == {
            key: report[key] for key in report.keys() - KNOWN_ONLY_AFTERWARDS
        }
        written = (tmp_path / "out").rglob("*.safetensors")
        weights = {path.relative_to(tmp_path / "out").as_posix(): path.stat().st_size for path in written}
        methods = {method["method"]: method for method in plan["training_memory"]}
        assert list(methods) == ["full", "lora", "qlora"]
        mine = methods[report["strategy"] if report["adapter"] else "full"]
        assert mine["total_bytes"] == sum(part["bytes"] for part in mine["parts"]), mine
        assert {file["path"]: file["bytes"] for file in plan["files"]} == weights
        assert plan["needs"]["disk_bytes"] == sum(weights.values())
        stored = (tmp_path / "model" / "model.safetensors").stat().st_size
        assert plan["needs"]["read_bytes"] == (0 if report["base"] == "reference" else stored)
        shutil.rmtree(tmp_path / "out")


def on_hub(hub: LoopbackHub, directory: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ftload.cli", *words, "--json"]
    done = subprocess.run(
        command,
        env=hub.env(directory / "home"),
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_of_a_repository_only_headers_travel(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", vocab_size=4096, dtype="float32", shards=True)
    write_llama(tmp_path / "model", vocab_size=128)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    with LoopbackHub() as hub:
        hub.add("org/model", tmp_path / "model")
        plan = on_hub(hub, tmp_path, "plan", "--model", "org/model", "--use_qlora")
        travelled = hub.sent("*.safetensors")
        # at most the first 64 KiB of each, which hold its header
        assert travelled == sum(min(65536, path.stat().st_size) for path in shards) < size / 2
        assert not hub.sent("*.bin")
        report = on_hub(hub, tmp_path, "prepare", "--model", "org/model", "--use_qlora", "--output_dir", "output/")
        assert hub.sent("*.safetensors") == 2 * travelled + size
    assert plan["parameters"] == report["parameters"]
    assert plan["source"] == report["source"]


def test_what_it_prints(ftload: Ftload, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    result = ftload("plan", "--model", tmp_path / "model", "--use_qlora", "--lora_rank", "8", "--output_dir", "o")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{tmp_path / 'model'} → o (qlora, a plan: nothing is written)"
    (disk,) = [line.split() for line in lines if line.startswith("disk ")]
    assert disk[2] in ("kB", "MB")
    assert any(line.startswith("decided attention: flash_attention_2 → sdpa") for line in lines)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--nonsense"], 2), (["--model", "nothing/here/at/all"], 3), (["--model", "."], 4), (["--strict"], 5)],
)
def test_bad_input(
    ftload: Ftload, tmp_path: Path, words: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    result = ftload("plan", *([] if "--model" in words else ["--model", tmp_path / "model"]), *words, "--json")
    assert result.code == code
    assert json.loads(result.out)["error"]["code"] == code
    assert "Traceback" not in result.err
    assert sorted(tmp_path.rglob("*")) == before
