"""`ftload plan` says before what the report says after, and reads nothing but headers."""

from __future__ import annotations

import json
import re
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
from .runs import at_a_terminal, without_colours

Ftload = Callable[..., Result]
KNOWN_ONLY_AFTERWARDS = {
    "created", "fingerprint", "timings", "work", "peak_anonymous_bytes", "peak_rss_bytes", "ranges", "files",
    "configuration",  # hashes of what was written
}  # fmt: skip
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
        assert {key: plan[key] for key in plan.keys() - {"files", "needs", "stored", "training_memory", "advice"}} == {
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
        for total, key in (("by_component", "component"), ("by_dtype", "dtype")):
            for name, row in report["parameters"][total].items():
                rows = [one for one in plan["stored"] if one[key] == name]
                assert {count: sum(one[count] for one in rows) for count in row} == row, (total, name)
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
        timeout=600,
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
    assert lines[0] == f"{tmp_path / 'model'} → o (qlora, 157.66 kB, a plan: nothing is written)"
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


def fitting(ftload: Ftload, model: Path, *words: str) -> dict[str, dict[str, Any]]:
    result = ftload("plan", "--model", model, "--max_seq_length", "32", *words, "--json")
    assert result.code == 0, result.err
    return {one["method"]: one for one in json.loads(result.out)["training_memory"]}


def part(method: dict[str, Any], name: str) -> int:
    (found,) = (one["bytes"] for one in method["parts"] if one["name"] == name)
    return found


def test_what_sharding_divides(ftload: Ftload, llama: Path) -> None:
    unmixed = "--mixed_precision", "no"
    alone = fitting(ftload, llama, *unmixed)["full"]
    fsdp = fitting(ftload, llama, "--fsdp", "4", *unmixed)["full"]
    assert fsdp["sharding"] == {"method": "fsdp", "gpus": 4, "stage": 3}
    assert part(fsdp, "weights") == -(-part(alone, "weights") // 4)
    assert part(fsdp, "optimizer states") == -(-part(alone, "optimizer states") // 4)
    assert part(fsdp, "activations") == part(alone, "activations")
    # with mixed precision all of it is float32
    mixed = fitting(ftload, llama, "--fsdp", "4")["full"]
    assert part(mixed, "weights") == -(-2 * part(alone, "weights") // 4)
    assert mixed["gradient_bytes"] == 2 * fsdp["gradient_bytes"]
    stages = [fitting(ftload, llama, "--zero", str(stage), "--gpus=2")["full"] for stage in (1, 2, 3)]
    elements = part(alone, "weights") // 2
    for stage, one in enumerate(stages, start=1):
        assert one["sharding"] == {"method": "zero", "gpus": 2, "stage": stage}
        assert part(one, "optimizer states") == 12 * elements // 2
        assert part(one, "weights") == part(alone, "weights") // (2 if stage == 3 else 1)
        assert one["gradient_bytes"] == 2 * elements // (2 if stage >= 2 else 1)
    assert fitting(ftload, llama, "--zero", "1")["full"]["sharding"]["gpus"] == 8
    # while gradients are accumulated, FSDP keeps them whole
    accumulated = fitting(ftload, llama, "--fsdp", "4", "--gradient_accumulation_steps", "2", *unmixed)["full"]
    assert (accumulated["gradient_bytes"], fsdp["gradient_bytes"]) == (2 * elements, -(-2 * elements // 4))
    # DeepSpeed turns its share of the gradients into float32 when it steps
    (update,) = (moment for moment in stages[1]["moments"] if moment["name"] == "optimizer step")
    assert update["temporary"] == 4 * elements // 2
    assert "ZeRO-3" in fitting(ftload, llama, "--zero", "3")["qlora"]["reason"]
    adapter = fitting(ftload, llama, "--zero", "2")["qlora"]
    # with mixed precision it makes the adapter bfloat16
    assert part(adapter, "optimizer states") == -(-12 * part(adapter, "adapter") // 2 // 8)


def test_fsdp_divides_4_bit_weights_that_are_stored_as_floats(ftload: Ftload, llama: Path) -> None:
    words = ["--use_qlora", "--lora_rank", "8"]
    alone = fitting(ftload, llama, *words)["qlora"]
    whole = fitting(ftload, llama, *words, "--fsdp", "4")["qlora"]
    floats = fitting(ftload, llama, *words, "--fsdp", "4", "--bnb_4bit_quant_storage", "bfloat16")["qlora"]
    codes = 61_440 // 2
    # of each of 14 layers two maps, and of each block of 64 a byte, of 256 of them a float32
    statistics = 61_440 // 64 + 14 * (256 + 16) * 4 + 14 * 4
    others = part(alone, "weights") - codes - statistics  # float32
    assert part(whole, "weights") == codes + statistics + others // 4
    assert part(floats, "weights") == statistics + (codes + others) // 4
    for one in (whole, floats):
        for name in ("adapter", "optimizer states"):
            assert part(one, name) == part(alone, name) // 4
        # what flows between layers is bfloat16, as all weights are once they are gathered
        assert part(one, "activations") < part(alone, "activations")
    origins = [one["parts"][0]["origin"] for one in (whole, floats)]
    assert origins == [
        f"counted from the checkpoint's headers; a share of 1/4, {codes + statistics:,} bytes aside: quantised weights "
        "are uint8, and FSDP divides floats alone: see --bnb_4bit_quant_storage",
        f"counted from the checkpoint's headers; a share of 1/4, {statistics:,} bytes aside: statistics of quantised "
        "weights are no parameters",
    ]
    # both layers, and all outside them, are gathered in bfloat16, and the codes where they are divided
    gathered = [one["moments"][0]["temporary"] - alone["moments"][0]["temporary"] for one in (whole, floats)]
    plain = (others + part(alone, "adapter")) // 2
    assert gathered == [plain, plain + codes]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fsdp", "2", "--zero", "1"], "give one"),
        (["--zero", "4"], "stages 1, 2 and 3, not 4"),
        (["--zero", "many"], "takes an int, not `many`"),
        (["--gpus", "4"], "`--gpus` goes with `--zero`"),
        (["--fsdp", "1"], "2 to 100,000, not 1"),
        (["--use_qlora", "--fsdp", "2", "false"], "`false` after `--fsdp 2`"),
        (["--fsdp", "2", "--loara", "--zero", "9"], "unknown flag `--loara`"),
        (["--fsdp"], "`--fsdp` needs a value"),
        (["--zero", "1", "2"], "`2`"),
        (["--html"], "`--html` needs a value"),
    ],
)
def test_options_that_are_refused(ftload: Ftload, llama: Path, words: list[str], said: str) -> None:
    result = ftload("plan", "--model", llama, *words)
    assert result.code == 2
    assert said in result.err


def test_prepare_does_not_know_them(ftload: Ftload, llama: Path) -> None:
    assert ftload("prepare", "--model", llama, "--fsdp", "2").code == 2


def test_what_fills_the_memory_is_drawn(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal: a bar for each method, all on one scale; in a pipe no blanks at the end of lines."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "ftload.cli", "plan", "--model", llama, "--max_seq_length", "32", "--use_qlora"]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert not set("█▒│") & set(piped)
    assert all(line == line.rstrip() for line in piped.splitlines())
    assert "  fits  full" in piped
    shown = without_colours(at_a_terminal(command, tmp_path, columns=120))
    bars = re.findall(r"^(full|lora|qlora) +([A-Z].*)│ +([0-9.]+) MB", shown, re.MULTILINE)
    assert [name for name, _, _ in bars] == ["full", "lora", "qlora"]
    for _, bar, size in bars:  # 600 MB of 16 GB, the CUDA context, are nearly all that such a small model needs
        assert len(bar) == 81
        assert len(bar.rstrip()) == round(float(size) / 16_000 * 81) == 3
        assert bar.startswith("C")
    for text in (piped, shown):
        assert "against a GPU of 16 GB, the smallest here on which qlora fits\n" in re.sub(r" *\r?\n", "\n", text)
        assert "weights: counted from the checkpoint's headers" in text
        assert "GB free; peak " in text


@pytest.mark.parametrize("columns", [80, 200])
def test_no_number_is_cut_however_narrow_the_terminal(llama: Path, tmp_path: Path, columns: int) -> None:
    """Where the GPUs' answers don't fit side by side, they stand below each other."""
    command = [sys.executable, "-m", "ftload.cli", "plan", "--model", llama, "--max_seq_length", "2048"]
    shown = without_colours(at_a_terminal(command, tmp_path, columns=columns))
    tables = shown[shown.index("\n") + 1 : shown.index("lora takes")]
    assert "…" not in tables
    assert max(map(len, tables.splitlines())) <= columns
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (heading, *wide) = re.findall(r"^[ *]*(?:fits|[0-9]+ GB)  .*$", piped, re.MULTILINE)
    assert heading.split() == ["fits", "full", "lora", "qlora"]
    lines = [line.rstrip() for line in tables.splitlines()]
    if columns == 200:
        assert lines[-10:] == [heading, *wide]
        return
    rows = [re.split(r"  +(?=yes|only|no)", row.strip()) for row in wide]
    assert len(rows) == 9
    expected = []
    for number, method in enumerate(heading.split()[1:], start=1):
        expected += [f"{method} fits", *(f"{row[0]} {row[number]}" for row in rows)]
    assert [" ".join(line.split()) for line in lines[-30:]] == expected
