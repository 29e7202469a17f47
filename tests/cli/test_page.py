"""`--html`: the page in a real headless browser, in light and dark, wide and narrow; and the file that it is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ftload.cli.show.page import plan_page
from ftload.cli.show.tables import format_bytes
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.flags.declared import PlanOptions
from ftload.loaders.memory import chosen_gpu
from ftload.loaders.prepare import plan_only
from ftload.loaders.progress import Silent

from ..conftest import Result
from ..loaders.memories import training_memory
from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import prepare

Ftload = Callable[..., Result]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_gpu, "first_gpu", lambda: None)


@pytest.fixture
def planned(ftload: Ftload, llama: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The page of a QLoRA plan, and the plan."""
    page = tmp_path / "plan.html"
    words = ["--model", llama, "--use_qlora", "--lora_rank", "8", "--max_seq_length", "64", "--html", page, "--json"]
    result = ftload("plan", *words)
    assert (result.code, result.err) == (0, "")
    return page, json.loads(result.out)


# What is asked of the page in the browser. Contrast is that of WCAG 2.1, section 1.4.3.
LOOK = """() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const rgb = text => text.match(/[0-9.]+/g).map(Number);
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.getClientRects().length) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    texts.push([walker.currentNode.data.trim(), (a + 0.05) / (b + 0.05)]);
  }
  return {
    width: document.documentElement.scrollWidth, window: innerWidth,
    back: rgb(getComputedStyle(document.body).backgroundColor),
    treemap: box(document.querySelector('.treemap')),
    cells: [...document.querySelectorAll('.cell')].map(e => ({box: box(e), title: e.title,
      label: e.firstElementChild.getClientRects().length ? box(e.firstElementChild) : null,
      needs: e.firstElementChild.scrollWidth})),
    bars: [...document.querySelectorAll('.bar')].map(e => ({box: box(e),
      line: box(e.querySelector('.line')), room: box(e.querySelector('.room')), cut: !!e.querySelector('.cut'),
      over: [...e.querySelectorAll('.over')].map(box),
      parts: [...e.querySelectorAll('.part')].map(p => ({box: box(p), title: p.title,
        letter: p.firstElementChild.getClientRects().length ? box(p.firstElementChild) : null,
        colour: getComputedStyle(p).backgroundColor}))})),
    scrolls: [...document.querySelectorAll('#memory .wide')].map(e => e.scrollWidth - e.clientWidth),
    chosen: [...document.querySelectorAll('.chosen')].map(e => e.firstElementChild.textContent),
    texts,
  };
}"""


def check_bar(bar: dict[str, Any], method: dict[str, Any], capacity: int, scale: int) -> None:
    """Raise unless lengths in pixels are bytes on the scale; a bar is as long as `scale` bytes."""
    left, _, right, _ = bar["box"]
    pixels = (right - left) / scale
    line = left + capacity * pixels
    assert bar["line"][2] == pytest.approx(line, abs=0.5)
    assert (bar["room"][0], bar["room"][2]) == pytest.approx((left, line), abs=0.5)
    sizes = {part["name"]: part["bytes"] for part in method["parts"] if part["bytes"]}
    assert [part["title"] for part in bar["parts"]] == list(sizes)
    end = left
    for part in bar["parts"]:
        begin, end = end, end + sizes[part["title"]] * pixels
        assert (part["box"][0], part["box"][2]) == pytest.approx((begin, end), abs=1.5)
        if part["letter"]:
            assert part["letter"][2] <= part["box"][2] + 0.5
        red, green, blue = map(int, re.findall(r"\d+", part["colour"])[:3])
        assert red < 1.6 * green or red < blue + 40, part  # red is for overflow
    total = left + method["total_bytes"] * pixels
    if method["total_bytes"] <= capacity:
        assert bar["over"] == []
        assert end <= line + 0.5
    else:
        assert len(bar["over"]) == 1
        assert (bar["over"][0][0], bar["over"][0][2]) == pytest.approx((line, total), abs=1)
    assert bar["cut"] == (method["total_bytes"] > scale)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 390])
def test_it_looks_right(
    browser: Any, planned: tuple[Path, dict[str, Any]], scheme: str, width: int, tmp_path: Path
) -> None:
    path, plan = planned
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    seen = page.evaluate(LOOK)
    context.close()
    assert requests == [path.as_uri()]  # nothing is asked of any network
    assert said == []
    assert seen["width"] <= seen["window"] == width
    assert (sum(seen["back"][:3]) > 600) == (scheme == "light")

    # every component and dtype has the area that its parameters have, within the border of a pixel
    left, top, right, bottom = seen["treemap"]
    whole = (right - left) * (bottom - top)
    stored = [row for row in plan["stored"] if row["parameters"]]
    total = sum(row["parameters"] for row in stored)
    cells = {cell["title"].split(":")[0]: cell["box"] for cell in seen["cells"]}
    assert set(cells) == {f"{row['component']}, {row['dtype']}" for row in stored}
    assert total == plan["parameters"]["total"]
    for row in stored:
        x0, y0, x1, y1 = cells[f"{row['component']}, {row['dtype']}"]
        assert (x1 - x0) * (y1 - y0) == pytest.approx(row["parameters"] / total * whole, rel=0.02, abs=20)
        assert left - 1 <= x0 <= x1 <= right + 1
        assert top - 1 <= y0 <= y1 <= bottom + 1
    labelled = [cell for cell in seen["cells"] if cell["label"]]
    assert len(labelled) >= (3 if width > 1000 else 2)
    for cell in labelled:  # what is written fits in
        assert cell["label"][3] <= cell["box"][3] + 1, cell
        assert cell["needs"] <= cell["box"][2] - cell["box"][0] + 1, cell

    # a bar for each method, filled in proportion up to the GPU's line and, as overflow, beyond it
    methods = [method for method in plan["training_memory"] if "parts" in method]
    capacity = 16 * 10**9
    assert len(seen["bars"]) == len(methods) == 3
    for bar, method in zip(seen["bars"], methods, strict=True):
        check_bar(bar, method, capacity, capacity)
    assert seen["chosen"] == ["16 GB"]
    assert seen["scrolls"] == [0, 0]

    faint = [text for text, contrast in seen["texts"] if contrast < 4.5]
    assert len(seen["texts"]) > 100
    assert faint == []


GB = 10**9
LARGE = {
    "weights": 16 * GB, "adapter": GB, "optimizer states": 20 * GB, "CUDA context": 600_000_000,
    "gradients": 16 * GB, "activations": 140 * GB, "logits and loss": 12 * GB, "temporary buffers": 400_000_000,
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 390])
def test_overflow_is_seen_as_overflow(
    browser: Any, llama: Path, tmp_path: Path, scheme: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen_gpu, "first_gpu", lambda: ("NVIDIA A100", 80 * GB))
    methods = (
        training_memory("full", LARGE, with_checkpointing=90 * GB),
        training_memory("lora", {**LARGE, "activations": 20 * GB}, moment="backward pass of layer 3"),
        training_memory("qlora", {**LARGE, "weights": 150 * GB}, with_checkpointing=1111 * GB),
    )
    arguments = parse_arguments(["--model", str(llama), "--use_qlora", "--output_dir", str(tmp_path / "out")])
    outcome = plan_only(arguments, PlanOptions(), Silent())
    path = tmp_path / "page.html"
    path.write_text(plan_page(replace(outcome, training_memory=methods)))
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    seen = page.evaluate(LOOK)
    assert seen["width"] <= seen["window"] == width
    for bar, method in zip(seen["bars"], methods, strict=True):
        if bar["cut"]:  # what lies beyond its end is not drawn
            assert method.method == "qlora"
            assert bar["over"][0][0] == pytest.approx(bar["line"][2], abs=0.5)
            assert bar["over"][0][2] > bar["box"][2]
            assert (
                page.locator(".bar").nth(2).locator(".parts").evaluate("e => getComputedStyle(e).overflowX") == "hidden"
            )
        else:
            check_bar(bar, method.to_json(), 80 * GB, 240 * GB)
    assert [bar["cut"] for bar in seen["bars"]] == [False, False, True]
    assert [len(bar["over"]) for bar in seen["bars"]] == [1, 1, 1]
    assert seen["chosen"] == ["80 GB"]
    assert seen["scrolls"] == [0, 0]
    assert [text for text, contrast in seen["texts"] if contrast < 4.5] == []
    words = " ".join(page.locator("#memory").inner_text().split())
    assert "against a GPU of 80 GB, the GPU of this machine: NVIDIA A100" in words
    assert "126.00 GB too much; peak at the loss, when all logits exist" in words
    assert "6.00 GB too much; peak in the backward pass of layer 3 of 4" in words
    assert "260.00 GB too much, 4.2 times the GPU; peak at the loss" in words
    assert "smallest GPU > 192 GB 96 GB > 192 GB" in words
    assert "with gradient checkpointing 90.00 GB 1.11 TB" in words
    assert "smallest GPU then 96 GB > 192 GB" in words
    page.close()


def test_the_line_of_the_gpu_is_written_where_it_stands(planned: tuple[Path, dict[str, Any]]) -> None:
    text = planned[0].read_text()
    assert text.count('<div class="line" style="left:100.000%">') == 3
    assert "against a GPU of <b>16 GB</b>, the smallest here on which qlora fits" in text


def test_an_inspection_looks_right(browser: Any, ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    prepare(llama, tmp_path / "out", "--use_qlora")
    path = tmp_path / "inspect.html"
    assert ftload("inspect", tmp_path / "out", "--html", path, "--tensors", "*q_proj*").code == 0
    document = json.loads(ftload("inspect", tmp_path / "out", "--json").out)
    page = browser.new_page(viewport={"width": 900, "height": 900})
    page.goto(path.as_uri())
    seen = page.evaluate(LOOK)
    assert seen["width"] <= 900
    assert {cell["title"].split(":")[0] for cell in seen["cells"]} == {
        f"{row['component']}, {row['dtype']}" for row in document["stored"] if row["parameters"]
    }
    assert page.locator("section:has(h2:text-is('Tensors')) tr").count() == 1 + 2 * 3  # q_proj, its LoRA A and B
    assert [text for text, contrast in seen["texts"] if contrast < 4.5] == []
    page.close()


class Addresses(HTMLParser):
    """Elements that load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form"):
            self.found.append(tag)
        self.found += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href") or name.startswith("on")]


def test_it_stands_alone(planned: tuple[Path, dict[str, Any]]) -> None:
    text = planned[0].read_text()
    parser = Addresses()
    parser.feed(text)
    assert parser.found == []
    assert "url(" not in text
    assert "@import" not in text
    assert [path.name for path in planned[0].parent.iterdir()] == ["plan.html"]


def test_the_numbers_are_the_plan_s(planned: tuple[Path, dict[str, Any]]) -> None:
    path, plan = planned
    text = re.sub(r"<[^>]*>", "|", path.read_text())
    for row in plan["stored"]:
        cells = [row["component"], row["dtype"], f"{row['tensors']:,}", f"{row['parameters']:,}"]
        assert "||".join(cells) in text, row
    for file in plan["files"]:
        assert f"{file['path']}||{file['bytes']:,}" in text
    for method in plan["training_memory"]:
        for part in method["parts"]:
            assert not part["bytes"] or f"|{format_bytes(part['bytes'])}|" in text, part
        assert f"|{format_bytes(method['total_bytes'])}|" in text
        for fit in method["fits"]:
            assert f"{fit['largest_length']:,} tokens" in text
    assert "--lora_rank||8" in text


def test_names_in_a_checkpoint_are_text(ftload: Ftload, tmp_path: Path) -> None:
    """Whoever made the checkpoint can't put anything else into the page."""
    import torch
    from safetensors.torch import save_file

    name = "<script>alert(1)</script>\u202e\x07\n.weight"
    save_file({name: torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    assert ftload("inspect", tmp_path / "x.safetensors", "--tensors", "--html", tmp_path / "p.html").code == 0
    text = (tmp_path / "p.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert not set("\u202e\x07") & set(text)


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_places_that_are_refused(ftload: Ftload, llama: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "other.html").write_text("<!doctype html><title>somebody's own</title>")
    os.mkfifo(tmp_path / "pipe")
    places = sorted(path.name for path in tmp_path.iterdir())
    words = ["plan", "--model", llama] if command == "plan" else ["inspect", llama]
    for name in ("file", "link", "other.html", "pipe", "nowhere/page.html", ".", "n" * 300):
        result = ftload(*words, "--html", tmp_path / name, "--json")
        assert result.code == 8, result
        assert json.loads(result.out)["error"]["code"] == 8
        assert result.err.splitlines()[1:] == ["hint: choose another --html"]
    assert ftload(*words, "--html", "").code == 2
    assert (tmp_path / "file").read_bytes() == b"weights"
    assert "somebody" in (tmp_path / "other.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == places
    # a page of before is replaced, and nothing else is left
    for _ in range(2):
        assert ftload(*words, "--html", tmp_path / "page.html", "--json").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*places, "page.html"])


def test_two_checkpoints_have_no_page(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    result = ftload("inspect", llama, llama, "--html", tmp_path / "p.html")
    assert result.code == 2
    assert not (tmp_path / "p.html").exists()


def test_no_page_of_a_plan_that_failed(ftload: Ftload, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", vocab_size=136, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no header")
    assert ftload("plan", "--model", tmp_path / "model", "--html", tmp_path / "p.html").code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
