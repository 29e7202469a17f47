"""`prepare --source_cache none`: from a hub by ranges the same weights are written as from a directory, bit for bit.

All models are prepared from the hub in one process, in blocks so small that every file has many, few of them held.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..formats.fp8_models import Stored, pack
from ..formats.test_compressed_tensors import write_compressed
from ..formats.test_mxfp4 import write_gpt_oss
from ..hub import LoopbackHub
from ..merge.adapters import write_adapter
from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import headers, prepare

FILE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = (".safetensors", ".bin")

SCRIPT = """
import contextlib, io, json, sys
from pathlib import Path
from ftload.cli.app import run
from ftload.loaders.model import ties
from ftload.loaders.source import blocks
from ftload.loaders.write import weights

blocks._LEAST_BLOCK_BYTES = blocks._MOST_BLOCK_BYTES = 8192
ties._PIECE, ties._COMPARED_AT_ONCE = 50, 1000

class Few(blocks.Blocks):
    def __init__(self, source, pieces, held_bytes, progress):
        super().__init__(source, pieces, 8 * 8192, progress)

weights.Blocks = ties.Blocks = Few
asked, fill = [], blocks.RemoteFile.fill

def counted(self, view, begin, on_received):
    asked.append(len(view))
    fill(self, view, begin, on_received)

blocks.RemoteFile.fill = counted
answers = {}
for name, words in json.loads(sys.argv[1]).items():
    out = io.StringIO()
    asked.clear()
    with contextlib.redirect_stdout(out):
        code = run(["prepare", *words, "--output_dir", f"hub/{name}", "--lora_rank", "8", "--json"])
    cached = {path.resolve() for path in Path(sys.argv[2]).rglob("snapshots/*/*")}
    kept = sum(path.stat().st_size for path in Path(sys.argv[2]).rglob("blobs/*") if path.resolve() not in cached)
    answers[name] = {"code": code, "report": json.loads(out.getvalue()), "beside": kept, "asked": sum(asked)}
print(json.dumps(answers))
"""


# -- the models


def plain(directory: Path, architecture: str = "llama", *, rows: int = 144, shards: bool = False) -> None:
    write_model(directory, architecture, vocab_size=rows, dtype="bfloat16", shards=shards)
    write_llama(directory)


def shards(directory: Path) -> None:
    plain(directory, shards=True)


def of_its_own(directory: Path) -> None:
    write_model(directory, "llama", vocab_size=144, dtype="bfloat16", seed=5)
    write_llama(directory)


def few_rows(directory: Path) -> None:
    plain(directory, rows=128)


def wide(directory: Path) -> None:
    write_model(directory, "llama", vocab_size=144, dtype="float32", shards=True)
    write_llama(directory)


def tied(directory: Path, *, differ: bool = False) -> None:
    """With the head in the file as well."""
    plain(directory, "llama_tied")
    tensors = load_file(directory / FILE)
    head = tensors[EMBEDDING].clone()
    if differ:
        head.view(-1)[4000] += 1
    save_file({**tensors, HEAD: head}, directory / FILE, metadata={"format": "pt"})


def untied(directory: Path) -> None:
    tied(directory, differ=True)


def pickled(directory: Path) -> None:
    plain(directory)
    torch.save(load_file(directory / FILE), directory / "pytorch_model.bin")
    (directory / FILE).unlink()


def fp8(directory: Path) -> None:
    plain(directory)
    pack(directory, Stored(block=(40, 32)))


def mxfp4(directory: Path) -> None:
    write_gpt_oss(directory)
    write_llama(directory)


def compressed(directory: Path) -> None:
    write_compressed(directory, "INT4 in groups")


def experts(directory: Path) -> None:
    plain(directory, "mixtral", shards=True)


def fused(directory: Path) -> None:
    """Experts as transformers holds them, not as they are published."""
    plain(directory, "qwen3_moe")
    tensors = load_file(directory / FILE)
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack([tensors.pop(f"{place}.{expert}.{part}.weight") for expert in range(4)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{place}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        tensors[f"{place}.down_proj"] = parts["down_proj"]
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


@dataclass(frozen=True)
class Case:
    write: Callable[[Path], object]
    flags: tuple[str, ...] = ()
    reads: int = 1
    """How often weights are needed: some of them twice, all once, or none."""


LORA = ("--use_lora", "--base", "copy")
QLORA = ("--use_qlora", "--min_quantized", "0")
CASES = {
    "files as they are": Case(shards),
    "files divided anew": Case(shards, ("--max_shard_size", "40KB")),
    "another dtype": Case(wide),
    "qlora": Case(shards, (*QLORA, "--max_shard_size", "40KB")),
    "liger": Case(plain, ("--use_liger_kernel",)),
    "lora, a base of its own": Case(shards, LORA),
    "lora, the hub's base": Case(of_its_own, ("--use_lora",), reads=0),
    "grown": Case(few_rows, ("--embedding_init", "reference"), reads=2),
    "grown, qlora": Case(few_rows, (*QLORA, "--embedding_init", "reference"), reads=2),
    "tied": Case(tied, reads=2),
    "tied, but different": Case(untied, reads=2),
    "tied, qlora": Case(tied, QLORA, reads=2),
    "a pickle": Case(pickled, ("--allow_pickle",)),
    "a pickle, qlora": Case(pickled, ("--allow_pickle", *QLORA)),
    "fp8": Case(fp8),
    "fp8, qlora": Case(fp8, QLORA),
    "mxfp4": Case(mxfp4),
    "compressed": Case(compressed),
    "compressed, qlora": Case(compressed, QLORA),
    "experts": Case(experts),
    "experts, qlora": Case(experts, QLORA),
    "fused experts": Case(fused),
    "pissa": Case(plain, (*LORA, "--init_lora_weights", "pissa_niter_4"), reads=2),
    "pissa, qlora": Case(shards, (*QLORA, "--init_lora_weights", "pissa_niter_4"), reads=2),
    "dora": Case(shards, (*LORA, "--use_dora"), reads=2),
    "merged": Case(shards, ("--merge_adapter", "ADAPTER")),
}


@dataclass(frozen=True, kw_only=True)
class Runs:
    here: Path
    """Where the models are, and what was prepared from a hub, in `hub`."""
    answers: dict[str, Any]
    sent: dict[str, int]
    """Bytes of the file of each model with one file."""

    def flags(self, case: str) -> list[str]:
        return [word.replace("ADAPTER", str(self.here / "adapter")) for word in CASES[case].flags]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All cases prepared from a hub."""
    here = tmp_path_factory.mktemp("ranges")
    for write in dict.fromkeys(case.write for case in CASES.values()):
        write(here / "models" / write.__name__)
    write_adapter(here / "models" / "shards", here / "adapter", r=4, target_modules=["q_proj", "down_proj"])
    made = Runs(here=here, answers={}, sent={})
    with LoopbackHub() as hub:
        for model in (here / "models").iterdir():
            hub.add(f"org/{model.name}", model)
        jobs = {
            name: ["--model", f"org/{case.write.__name__}", "--source_cache", "none", *made.flags(name)]
            for name, case in CASES.items()
        }
        command = [sys.executable, "-c", SCRIPT, json.dumps(jobs), str(here / "home")]
        env = {**hub.env(here / "home"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        made.answers.update(json.loads(done.stdout))
        for model in (here / "models").glob(f"*/{FILE}"):
            made.sent[model.parent.name] = hub.sent(f"/{digest(model)}/{FILE}")
    return made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(directory: Path) -> dict[str, str]:
    """Hashes of all weights, an adapter's too."""
    return {str(path.relative_to(directory)): digest(path) for path in directory.rglob("*") if path.suffix in WEIGHTS}


@pytest.mark.parametrize("name", CASES)
def test_the_same_weights_are_written_as_from_a_directory(runs: Runs, tmp_path: Path, name: str) -> None:
    case, answer = CASES[name], runs.answers[name]
    assert answer["code"] == 0, answer["report"]
    model = runs.here / "models" / case.write.__name__
    prepare(model, tmp_path / "out", *runs.flags(name))
    expected = weights(tmp_path / "out")
    assert expected
    assert weights(runs.here / "hub" / name) == expected
    assert (HEAD in headers(runs.here / "hub" / name)) is (case.write not in (tied, of_its_own))
    assert answer["report"]["source"]["cache"] == ("none" if case.reads else None)
    # of blocks that are held in vain where workers wait for one another, a few are asked for twice
    size = sum((model / file).stat().st_size for file in weights(model))
    least, most = {0: (0, 0), 1: (1, 1.25), 2: (1.05, 1.9)}[case.reads]
    assert least * size <= answer["asked"] <= most * size
    ranges = answer["report"]["ranges"]
    if case.reads:
        # while it was planned: an embedding and a head that may be the same, in five blocks
        assert answer["asked"] - ranges["bytes"] == (5 * 8192 if case.write in (tied, untied) else 0)
        if case.reads == 1:
            assert ranges["compared"] == sorted(weights(model))
        elif case.write is tied:
            assert ranges["compared"] == []  # the head is left out
        else:  # with blocks so small the beginning of a file may come too late
            assert set(ranges["compared"]) <= set(weights(model))
    else:
        assert ranges is None
        assert runs.sent[model.name] == 65536  # the header travels, from a request that ends with it


def test_no_weights_lie_in_the_cache(runs: Runs) -> None:
    assert len(list((runs.here / "home").rglob("config.json"))) == len({case.write for case in CASES.values()})
    assert not [path for path in (runs.here / "home").rglob("*") if path.suffix in WEIGHTS]
    assert {answer["beside"] for answer in runs.answers.values()} == {0}  # nor what no name leads to


def test_a_copy_of_what_the_hub_does_not_list_is_no_output(llama: Path, tmp_path: Path) -> None:
    """One bit of a weight is another one, and nothing but the file's hash tells it."""
    spoilt = bytearray((llama / FILE).read_bytes())
    spoilt[-7] ^= 1
    with LoopbackHub() as hub:
        hub.add("org/model", llama)
        hub.misbehave(f"*/{FILE}", instead=bytes(spoilt))
        words = ["--model", "org/model", "--source_cache", "none", "--output_dir", "out", "--json"]
        command = [sys.executable, "-m", "ftload.cli", "prepare", *words]
        env = {**hub.env(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (4, 4)
    assert error["message"] == (
        f"`{FILE}` did not arrive as the hub lists it: its sha256 is {hashlib.sha256(spoilt).hexdigest()}, "
        f"not {digest(llama / FILE)}"
    )
    assert not (tmp_path / "out").exists()
