"""`ftload doctor`: libraries that are broken in every way are told, with the command that mends them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.doctor.hub import look_at_hub
from ftload.loaders.doctor.probe_processes import run_probe

from ..conftest import Result
from ..hub import LoopbackHub

Ftload = Callable[..., Result]
SYMBOL = "_ZN3c104cuda9SetDeviceEi"
PLANTED = {
    "flash_attn": f"raise ImportError('flash_attn_2_cuda.so: undefined symbol: {SYMBOL}')",
    "gguf": "import sys; sys.exit(3)",
    "peft": "import os; os.kill(os.getpid(), 11)",
    "numba": "import os; os._exit(7)",
}
TOKEN = "hf_doNotPrintThisTokenAnywhere"

without_gpu = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is an NVIDIA driver")


def plant(directory: Path, packages: dict[str, str]) -> Path:
    """Packages for PYTHONPATH, where they come before those that are installed."""
    for name, code in packages.items():
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(code + "\n")
    return directory


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One whole examination, with broken packages and a hub."""
    packages = plant(tmp_path_factory.mktemp("packages"), PLANTED)
    with LoopbackHub() as hub:
        env = hub.env(tmp_path_factory.mktemp("home"), token=TOKEN) | {"PYTHONPATH": str(packages)}
        words = ["doctor", "--json", "--for", "standard,lora"]
        return subprocess.run([sys.executable, "-m", "ftload.cli", *words], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def findings(examined: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in json.loads(examined.stdout)["findings"]}


@pytest.mark.parametrize(
    ("name", "words", "mend"),
    [
        (
            "flash-attn",
            f"built for another torch than {version('torch')}: ImportError: flash_attn_2_cuda.so: undefined symbol: "
            + SYMBOL,
            "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir flash-attn",
        ),
        ("gguf", "ends the process while it is imported (exit code 3)", "pip install 'ftload[gguf]'"),
        ("peft", "crashes (SIGSEGV) while it is imported", "pip install --force-reinstall --no-deps peft"),
        (
            "numba",
            "ends the process (exit code 7) while it is imported",
            "pip install --force-reinstall --no-deps numba",
        ),
    ],
)
def test_a_broken_library(findings: dict[str, dict[str, Any]], name: str, words: str, mend: str) -> None:
    finding = findings[name]
    assert finding["state"] == "broken"
    assert words in finding["detail"]
    assert finding["mend"] == mend


def test_what_imports_a_broken_library_is_mended_by_its_cure(findings: dict[str, dict[str, Any]]) -> None:
    liger = findings["liger-kernel"]
    assert liger["state"] == "broken"
    assert "(peft is broken)" in liger["detail"]
    assert liger["mend"] == findings["peft"]["mend"]


@pytest.mark.parametrize("name", ["torch", "transformers", "tokenizers", "safetensors", "accelerate", "bitsandbytes"])
def test_a_library_that_works(findings: dict[str, dict[str, Any]], name: str) -> None:
    finding = findings[name]
    assert (finding["state"], finding["mend"]) == ("ok", None)
    assert finding["facts"]["version"] == version(name)
    assert finding["detail"].startswith(version(name) + ", ")


def test_bitsandbytes_quantises(findings: dict[str, dict[str, Any]]) -> None:
    assert "a block quantised to NF4 and to FP4, and back, on cpu" in findings["bitsandbytes"]["detail"]


def test_the_machine(findings: dict[str, dict[str, Any]]) -> None:
    assert findings["python"]["facts"]["version"] == sys.version.split()[0]
    assert findings["processors"]["facts"]["threads"] == len(os.sched_getaffinity(0))
    memory = findings["memory"]["facts"]
    assert 0 < memory["available_bytes"] <= memory["limit_bytes"] <= memory["total_bytes"]
    assert findings["disk"]["facts"]["path"] == str(Path.cwd())
    assert findings["disk"]["facts"]["free_bytes"] > 0


def test_the_hub_answers_and_the_token_stays_secret(
    examined: subprocess.CompletedProcess[str], findings: dict[str, dict[str, Any]]
) -> None:
    assert findings["hub"]["state"] == "ok"
    assert "http://127.0.0.1" in findings["hub"]["detail"]
    assert "HF_TOKEN" in findings["token"]["detail"]
    assert TOKEN not in examined.stdout + examined.stderr


def test_strategies_and_the_exit_code(examined: subprocess.CompletedProcess[str]) -> None:
    document = json.loads(examined.stdout)
    strategies = document["strategies"]
    assert strategies["standard"]["prepare"]["works"] is strategies["standard"]["train"]["works"] is True
    for name in ("lora", "qlora"):
        assert strategies[name]["prepare"]["works"] is True  # it writes PEFT's files without PEFT: see the next test
        assert strategies[name]["train"]["works"] is False
        assert strategies[name]["train"]["detail"] == "peft is broken"
    assert examined.returncode == document["error"]["code"] == 5
    assert document["error"]["message"].startswith("`lora` can't work here: peft is broken: ")
    assert document["error"]["hint"] == "run `pip install --force-reinstall --no-deps peft`"


def test_preparing_with_broken_libraries(tmp_path: Path, llama: Path) -> None:
    """A broken PEFT is not in the way; a broken bitsandbytes is told as what it is."""
    words = [sys.executable, "-m", "ftload.cli", "prepare", "--model", llama, "--lora_rank", "8", "--quiet"]

    def run(name: str, *flags: str, **broken: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / name).mkdir()
        env = {**os.environ, "PYTHONPATH": str(plant(tmp_path / name, broken))}
        command = [*words, "--output_dir", tmp_path / name / "out", *flags]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    for flag in ("--use_lora", "--use_qlora"):
        done = run(flag[2:], flag, peft="import os; os.kill(os.getpid(), 11)")
        assert (done.returncode, done.stderr) == (0, "")
    done = run("bitsandbytes", "--use_qlora", bitsandbytes="raise OSError('no such library')")
    assert done.returncode == 5
    assert done.stderr.splitlines()[0] == "error: bitsandbytes does not import: no such library"


def test_a_library_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(plant(tmp_path, {"gguf": "import time; time.sleep(600)"})))
    running: list[subprocess.Popen[bytes]] = []
    assert run_probe("gguf", 2, running) == {"problem": "hangs: no answer within 2 s"}
    assert running[0].returncode == -9


def test_what_lies_in_the_current_directory_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, {"gguf": "raise RuntimeError"})
    monkeypatch.chdir(tmp_path)
    assert run_probe("gguf", 60, []) == {"detail": "imports"}


# -- quick


def test_quick_tries_nothing(tmp_path: Path) -> None:
    packages = plant(tmp_path, {"flash_attn": "open('/dev/full', 'w').write('imported')"})
    heavy = "torch", "transformers", "peft", "bitsandbytes", "numba", "flash_attn"
    code = (
        "import sys; from ftload.cli.app import run; code = run(['doctor', '--quick', '--json']); "
        f"print(code, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["torch"] == {
        "name": "torch", "state": "untried", "detail": version("torch"), "mend": None,
        "facts": {"version": version("torch")},
    }  # fmt: skip
    assert found["flash-attn"]["state"] == "untried"
    assert found["flash-attn"]["detail"] == "unknown version"


def test_for_people(ftload: Ftload) -> None:
    result = ftload("doctor", "--quick")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert f"untried  torch               {version('torch')}" in lines
    assert lines[-5].split() == ["strategy", "prepare", "train"]
    assert [line.split()[:2] for line in lines[-4:]] == [
        ["standard", "yes"], ["liger", "yes"], ["lora", "yes"], ["qlora", "yes"],
    ]  # fmt: skip


def test_strategies_that_work(ftload: Ftload) -> None:
    assert ftload("doctor", "--quick", "--for", "qlora,standard", "--for", "lora").code == 0


@without_gpu
def test_liger_does_not_train_without_a_gpu(ftload: Ftload) -> None:
    result = ftload("doctor", "--quick", "--for", "liger")
    assert result.code == 5
    assert result.err == "error: `liger` can't work here: GPU is absent: no NVIDIA driver\n"
    strategies = json.loads(ftload("doctor", "--quick", "--json").out)["strategies"]
    assert strategies["liger"]["prepare"]["works"] is True
    assert strategies["liger"]["train"]["works"] is False


def test_a_strategy_that_there_is_not(ftload: Ftload) -> None:
    result = ftload("doctor", "--for", "qlora,dora")
    assert result.code == 2
    assert "`dora`" in result.err
    assert "standard, liger, lora, qlora" in result.err


def test_a_hub_that_is_switched_off(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        env = hub.env(tmp_path, offline=True)
        done = subprocess.run(
            [sys.executable, "-m", "ftload.cli", "doctor", "--quick"], env=env, capture_output=True, text=True
        )
        assert hub.requests == []
    off = "switched off by `HF_HUB_OFFLINE`: models are taken from the cache, or from a directory: "
    assert f"absent   hub                 {off}--model DIR\n" in done.stdout
    assert "                       unset HF_HUB_OFFLINE\n" in done.stdout


def test_without_a_network_it_says_how_to_work() -> None:
    problem = "can't reach the hub at `https://huggingface.co`"
    hub = next(look_at_hub({"problem": problem}, offline=False))
    assert (hub.state, hub.mend) == ("broken", "export HF_HUB_OFFLINE=1  # cache, or --model DIR")
    how = "without a network, models are taken from the cache, or from a directory: --model DIR"
    assert hub.detail == f"{problem}; {how}"


def test_an_endpoint_that_is_none() -> None:
    env = {**os.environ, "HF_ENDPOINT": "ftp://user:secret@hub"}
    done = subprocess.run(
        [sys.executable, "-m", "ftload.cli", "doctor", "--quick"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "secret" not in done.stdout + done.stderr
    env["HF_HUB_OFFLINE"] = "0"
    program = "from ftload.loaders.doctor.probe_processes import run_probe; print(run_probe('hub', 60, []))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "is not an http(s) URL" in answer.stdout
    assert "secret" not in answer.stdout
