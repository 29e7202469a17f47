"""`ftload plan --fit`: what it says, its exit codes, its JSON, and sizes that are refused."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Result
from .runs import at_a_terminal, without_colours

Ftload = Callable[..., Result]
FIT_KEYS = [
    "gpus", "gpu_count", "gpu_bytes", "method", "total_bytes", "reason", "fits_as_given", "fits", "changes",
    "smallest_bytes", "paged_bytes", "flags", "command_line",
]  # fmt: skip


def asked(ftload: Ftload, model: Path, *words: str, code: int = 0) -> list[dict[str, Any]]:
    result = ftload("plan", "--model", model, "--max_seq_length", "512", *words, "--json")
    assert result.code == code, result.err
    advice = json.loads(result.out)["advice"]
    assert all(list(one) == FIT_KEYS for one in advice)
    return advice


def peak_of(ftload: Ftload, model: Path, *words: str) -> int:
    (one,) = asked(ftload, model, *words, "--fit", "24GB")
    return one["total_bytes"]


def test_flags_that_fit(ftload: Ftload, llama: Path) -> None:
    (one,) = asked(ftload, llama, "--fit", "24GB")
    assert (one["gpus"], one["gpu_count"], one["gpu_bytes"], one["method"]) == ("24GB", 1, 24 * 10**9, "full")
    assert (one["fits_as_given"], one["fits"], one["changes"], one["flags"], one["command_line"]) == (
        True, True, [], {}, "",
    )  # fmt: skip
    assert (one["smallest_bytes"], one["paged_bytes"], one["reason"]) == (None, None, None)
    peak = one["total_bytes"]
    # the bound itself, by the bytes that its size says
    (exact, short) = asked(ftload, llama, "--fit", f"{peak}B", f"{peak - 1}B")
    assert (exact["fits_as_given"], short["fits_as_given"]) == (True, False)
    assert ftload("plan", "--model", llama, "--json").out.count('"advice": []') == 1


def test_what_is_advised_can_be_appended(ftload: Ftload, llama: Path) -> None:
    words = ["--use_lora", "--lora_rank", "8", "--per_device_train_batch_size", "4"]
    peak = peak_of(ftload, llama, *words)
    size = f"{peak - 1}B"
    (one,) = asked(ftload, llama, *words, "--fit", size)
    assert (one["method"], one["fits_as_given"], one["fits"]) == ("lora", False, True)
    (change,) = one["changes"]
    assert change == {
        "change": "checkpointing",
        "words": "gradient checkpointing",
        "flags": {"gradient_checkpointing": True},
        "saves_bytes": peak - change["total_bytes"],
        "total_bytes": change["total_bytes"],
    }
    assert (one["flags"], one["command_line"]) == ({"gradient_checkpointing": True}, "--gradient_checkpointing")
    (then,) = asked(ftload, llama, *words, *shlex.split(one["command_line"]), "--fit", size)
    assert (then["fits_as_given"], then["total_bytes"]) == (True, change["total_bytes"])


def test_the_words_of_people(ftload: Ftload, llama: Path) -> None:
    words = ["--model", llama, "--max_seq_length", "512", "--gradient_checkpointing", "--use_liger_kernel"]
    peak = json.loads(ftload("plan", *words, "--fit", "1GB", "--json").out)["advice"][0]["total_bytes"]
    result = ftload("plan", *words, "--fit", f"{peak - 1}B", "24GB")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    number = lines.index(next(line for line in lines if line.startswith(f"fit {peak - 1}B: ")))
    mb = f"{peak / 10**6:.2f} MB"
    assert lines[number] == f"fit {peak - 1}B: no, full takes {mb}; it fits with 1 change"
    assert lines[number + 1].split() == ["change", "saves", "then"]
    change, saves, then = lines[number + 2].rsplit("  ", 2)
    assert change.startswith("batch 8 → 4, accumulation 1 → 2")
    assert float(saves.split()[0]) + float(then.split()[0]) == pytest.approx(peak / 10**6, abs=0.02)
    assert lines[number + 3] == "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    assert lines[number + 5] == f"fit 24GB: yes, full takes {mb}"
    assert len(lines) == number + 6


def test_where_nothing_fits(ftload: Ftload, llama: Path) -> None:
    """A gate for pipelines: exit 6, and one document all the same, with what was found."""
    result = ftload("plan", "--model", llama, "--fit", "24GB", "--fit", "100MB", "--json")
    assert result.code == 6
    document = json.loads(result.out)
    fits, nothing = document["advice"]
    assert (fits["gpus"], fits["fits"]) == ("24GB", True)
    assert (nothing["fits_as_given"], nothing["fits"], nothing["changes"]) == (False, False, [])
    assert 600_000_000 < nothing["smallest_bytes"] <= nothing["total_bytes"]
    assert nothing["paged_bytes"] is None
    said = f"nothing fits on `100MB`: with all that can be changed, training takes {nothing['smallest_bytes']:,} bytes"
    hint = "take more GPUs, as in `--fit 2x80GB`, larger ones, or a smaller model"
    assert document["error"] == {"code": 6, "kind": "resource", "message": said, "hint": hint}
    assert result.err.splitlines() == [f"error: {said}", f"hint: {hint}"]
    shown = ftload("plan", "--model", llama, "--fit", "100MB")
    assert (shown.code, shown.err) == (6, result.err)
    assert "\nfit 100MB: no, full takes 6" in shown.out
    quiet = ftload("plan", "--model", llama, "--fit", "100MB", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (6, "", result.err)


def test_an_optimizer_that_is_paged_may_make_room(ftload: Ftload, llama: Path) -> None:
    """Only where everything else was changed, and never as a change: nobody can say how slow it is."""
    words = ["--use_qlora", "--lora_rank", "512", "--gradient_checkpointing", "--use_8bit_optimizer"]
    words += ["--use_liger_kernel", "--per_device_train_batch_size", "1", "--max_seq_length", "512"]
    (nothing,) = asked(ftload, llama, *words, "--fit", "100MB", code=6)
    assert nothing["paged_bytes"] is None
    result = ftload("plan", "--model", llama, *words, "--fit", f"{nothing['smallest_bytes'] - 1}B", "--json")
    (paged,) = json.loads(result.out)["advice"]
    assert (result.code, paged["fits"]) == (6, False)
    method = next(one for one in json.loads(result.out)["training_memory"] if one["method"] == "qlora")
    (states,) = (part["bytes"] for part in method["parts"] if part["name"] == "optimizer states")
    assert paged["paged_bytes"] == states > 0
    (_, hint) = result.err.splitlines()
    assert hint == (
        f"hint: the optimizer is paged: on `{nothing['smallest_bytes'] - 1}B` it may still run, slowly, with up to "
        f"{states:,} bytes of its states in the host's memory"
    )


def test_several_gpus(ftload: Ftload, llama: Path) -> None:
    alone, two, once = asked(ftload, llama, "--fit", "24GB", "2x24GB", "1x80GB")
    assert [one["gpu_count"] for one in (alone, two, once)] == [1, 2, 1]
    method = json.loads(ftload("plan", "--model", llama, "--max_seq_length", "512", "--fsdp", "2", "--json").out)
    assert two["total_bytes"] == method["training_memory"][0]["total_bytes"] != alone["total_bytes"]
    assert once["total_bytes"] == alone["total_bytes"]
    # a size alone is that of each GPU that divides
    (zero,) = asked(ftload, llama, "--zero", "2", "--gpus", "4", "--fit", "24GB")
    assert zero["gpu_count"] == 4
    (fsdp,) = asked(ftload, llama, "--fsdp", "2", "--fit", "24GB")
    (both,) = asked(ftload, llama, "--fsdp", "2", "--fit", "2x24GB")
    assert fsdp["total_bytes"] == both["total_bytes"] == two["total_bytes"]
    shown = ftload("plan", "--model", llama, "--max_seq_length", "512", "--fit", "2x24GB").out
    assert f"fit 2x24GB: yes, full takes {two['total_bytes'] / 10**6:.2f} MB on each" in shown.splitlines()


def test_where_there_is_no_estimate(ftload: Ftload, llama: Path) -> None:
    result = ftload("plan", "--model", llama, "--use_qlora", "--zero", "3", "--fit", "24GB", "--json")
    assert result.code == 6
    (one,) = json.loads(result.out)["advice"]
    assert (one["total_bytes"], one["fits"], one["changes"]) == (None, False, [])
    assert one["reason"].startswith("how ZeRO-3 divides 4-bit weights is not known here")
    assert result.err == f"error: whether `qlora` fits on `24GB` is not known: {one['reason']}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0GB"], "`0GB` is not a size of at least one byte"),
        (["24"], "`24` is not the size of a GPU"),
        (["x80GB"], "`x80GB` is not the size of a GPU"),
        (["0x80GB"], "`0x80GB` are 0 GPUs, not 1 to 100,000"),
        (["200000x80GB"], "are 200,000 GPUs, not 1 to 100,000"),
        (["2x"], "`2x` is not the size of a GPU"),
        (["2xx80GB"], "`2xx80GB` is not the size of a GPU"),
        (["-80GB"], "unknown flag `-80GB`"),
        (["GB"], "`GB` is not the size of a GPU"),
        (["24GB,48GB"], "`24GB,48GB` is not the size of a GPU"),
        (["\x1b[31m24GB"], "is not the size of a GPU"),
        (["24GB", "24000MB"], "`--fit` names the same twice: `24GB` and `24000MB`"),
        (["24GB", "1x24GB"], "`--fit` names the same twice: `24GB` and `1x24GB`"),
        (["24GB", "--fit", "24gb"], "`--fit` names the same twice: `24GB` and `24gb`"),
        ([], "`--fit` needs a value"),
        (["2x80GB", "--fsdp", "4"], "`--fit 2x80GB` means FSDP on 2, `--fsdp 4` something else"),
        (["1x80GB", "--fsdp", "2"], "`--fit 1x80GB` means FSDP on 1, `--fsdp 2` something else"),
        (["2x80GB", "--zero", "2"], "`--fit 2x80GB` means FSDP on 2, `--zero 2` something else"),
    ],
)
def test_sizes_that_are_refused(ftload: Ftload, llama: Path, words: list[str], said: str) -> None:
    result = ftload("plan", "--model", llama, "--fit", *words)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") <= 2
    assert "\x1b" not in result.err
    document = ftload("plan", "--model", llama, "--json", "--fit", *words).out
    assert json.loads(document)["error"]["code"] == 2


def test_a_contradiction_says_what_to_write(ftload: Ftload, llama: Path) -> None:
    result = ftload("plan", "--model", llama, "--fit", "2x80GB", "--zero", "2")
    assert "hint: beside `--zero`, write the memory of each GPU alone: `--fit 80GB`" in result.err


def test_it_belongs_to_plan(ftload: Ftload, llama: Path) -> None:
    result = ftload("prepare", "--model", llama, "--fit", "24GB")
    assert (result.code, "unknown flag `--fit`" in result.err) == (2, True)


def test_the_page_says_the_same(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    words = ["--max_seq_length", "512", "--gradient_checkpointing", "--use_liger_kernel"]
    peak = peak_of(ftload, llama, *words)
    page = tmp_path / "plan.html"
    command = ["plan", "--model", llama, *words, "--html", page]
    assert ftload(*command, "--fit", f"{peak - 1}B").code == 0
    text = page.read_text()
    for said in (
        f"<td>{peak - 1}B</td>",
        f"no, full takes {peak / 10**6:.2f} MB; it fits with 1 change",
        "<td>batch 8 → 4, accumulation 1 → 2</td>",
        "<td>--per_device_train_batch_size 4 --gradient_accumulation_steps 2</td>",
    ):
        assert said in text, said
    assert ftload(*command).code == 0
    assert "accumulation 1 → 2" not in page.read_text()


def test_at_80_columns_the_flags_stay_on_one_line(llama: Path, tmp_path: Path) -> None:
    """Whoever selects them selects what was printed: no line break, no blanks in between."""
    words = ["--max_seq_length", "512", "--gradient_checkpointing", "--use_liger_kernel", "--fit", "603MB"]
    command = [sys.executable, "-m", "ftload.cli", "plan", "--model", llama, *words]
    shown = without_colours(at_a_terminal(command, tmp_path, columns=80))
    begin = shown.index("\nfit 603MB: no")
    lines = shown[begin:].strip().splitlines()
    flags = next(line for line in lines if line.startswith("--"))
    assert flags.endswith(("--gradient_accumulation_steps 4", "--use_qlora", "--gradient_accumulation_steps 8"))
    assert all(len(line) <= 80 for line in lines if line != flags)


def test_memory_is_drawn_against_what_is_asked_for(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = ftload("plan", "--model", llama, "--max_seq_length", "512", "--fit", "2x48GB", "24GB", "--html", page)
    assert (result.code, result.err) == (0, "")
    assert "\nagainst a GPU of 24 GB, the one of --fit 24GB\n" in result.out
    assert "\n* 24 GB  yes: " in result.out
    assert "against a GPU of <b>24 GB</b>, the one of --fit 24GB" in page.read_text()


def test_sizes_beyond_all_reason_end_at_once(ftload: Ftload, llama: Path) -> None:
    """Nobody waits for a million divisors; what is too large to be simulated has no estimate."""
    slip = ["--per_device_train_batch_size", str(2**40), "--max_seq_length", "512"]
    (one,) = json.loads(ftload("plan", "--model", llama, *slip, "--fit", "24GB", "--json").out)["advice"]
    batches = [change for change in one["changes"] if change["change"] == "batch"]
    assert [change["flags"]["per_device_train_batch_size"] for change in batches] == [4096]
    (one,) = asked(ftload, llama, "--per_device_train_batch_size", "0", "--fit", "24GB", code=6)
    assert (one["total_bytes"], one["changes"]) == (None, [])
    (one,) = asked(ftload, llama, "--max_seq_length", str(2**22), "--fit", "24GB")
    lengths = [change["flags"] for change in one["changes"] if change["change"] == "length"]
    assert all(flags["max_seq_length"] <= 2**20 for flags in lengths)
    (one,) = asked(ftload, llama, "--max_seq_length", str(10**15), "--fit", "24GB", code=6)
    assert "overflow" in one["reason"]
