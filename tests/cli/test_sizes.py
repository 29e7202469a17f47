"""One size of an output, and of what is in it, wherever it is shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Result
from .runs import FLAGS

Ftload = Callable[..., Result]
ROW = re.compile(r"\b(nf4|bfloat16|float32) .*?([\d.]+ [kM]?B)\b")


@pytest.mark.parametrize("strategy", ["standard", "lora", "qlora"])
def test_plan_prepare_inspect_and_their_pages_agree(ftload: Ftload, llama: Path, tmp_path: Path, strategy: str) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    words = ["--model", llama, "--output_dir", out, "--lora_rank", "8", *FLAGS[strategy]]
    written = ("plan", *words), ("prepare", *words), ("inspect", out)
    shown = {command: ftload(command, *rest).out.splitlines() for command, *rest in written}
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors")) / 1000
    expected = f"{size:.2f} kB"
    assert shown["plan"][0].endswith(f"({strategy}, {expected}, a plan: nothing is written)")
    assert shown["prepare"][0].endswith(f"({strategy}, {expected})")
    assert shown["inspect"][1].endswith(f" · {expected}")
    # what the tensors of each dtype take: the last rows are the totals; a base that lies elsewhere is not inspected
    found = {name: dict(pair for line in shown[name] for pair in ROW.findall(line)) for name in ("prepare", "inspect")}
    assert found["inspect"]
    assert found["inspect"].items() <= found["prepare"].items()
    for command, *rest in (("plan", *words), ("inspect", out)):
        assert ftload(command, *rest, "--html", page, "--quiet" if command == "plan" else "--json").code == 0
        assert f"<dt>size</dt><dd>{expected}</dd>" in page.read_text()
        page.unlink()
