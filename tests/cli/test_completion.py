"""Completion in a real bash: installed as a user installs it, at a terminal, with the Tab key."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from ftload.loaders.flags.completion import completions
from ftload.loaders.flags.declared import Flag, all_flags, merge_flags, plan_flags
from ftload.loaders.strategy import STRATEGIES
from ftload.loaders.tokenizer.chat_templates import TEMPLATES
from ftload.loaders.tokenizer.tokenizer_functions import FUNCTIONS
from ftload.loaders.trainers.registry import TRAINERS

# completing calls the command itself, whatever function has its name: lines that are entered only show their words
RC = """
PS1='ready> '
bind 'set enable-bracketed-paste off'
ftload() { printf '<%s>' "$@"; echo; }
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory in which completion has been installed, and some files."""
    home = tmp_path_factory.mktemp("home")
    (home / ".bashrc").write_text(RC)
    # a second command, or bash would become ftload, and the shell in use be that of the tests
    done = subprocess.run(
        ["bash", "-c", "ftload --install-completion; exit $?"],
        cwd=home, env=environment(home), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"bash completion installed in {home}/.bash_completions/ftload.sh\n")
    (home / "work" / "models" / "llama").mkdir(parents=True)
    for name in ("run.yaml", "template.jinja", "models/llama/model.safetensors", "models/tiny.gguf"):
        (home / "work" / name).touch()
    return home


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COMP_", "_FTLOAD", "_TYPER"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "HOME": str(home), "PATH": path, "TERM": "dumb", "LC_ALL": "C"}


class Terminal:
    """An interactive bash, and what has been read from it and not yet looked at."""

    def __init__(self, home: Path) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            ["bash", "--rcfile", home / ".bashrc", "-i"],
            cwd=home / "work", env=environment(home), start_new_session=True,
            stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        self.until("ready> ")

    def until(self, mark: str) -> str:
        """Read to the next `mark`, and return what stands before it."""
        end = time.monotonic() + 300
        while mark not in self.seen:
            assert select.select([self.ours], [], [], max(0, end - time.monotonic()))[0], self.seen
            self.seen += os.read(self.ours, 65536).decode()
        before, _, self.seen = self.seen.partition(mark)
        return before

    def enter(self, line: str) -> list[str]:
        """Type a line in which Tab completes; the words that `ftload` would get."""
        os.write(self.ours, f"{line}\n".encode())
        shown = self.until("\nready> ")
        return re.findall(r"<([^>]*)>", shown.rstrip("\r\n").rpartition("\n")[2])


@pytest.fixture(scope="module")
def terminal(home: Path) -> Iterator[Terminal]:
    terminal = Terminal(home)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.ours)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("prep\t", "prepare"),
        ("--ver\t", "--version"),
        ("prepare --use_q\t", "prepare --use_qlora"),
        ("prepare --use-q\t", "prepare --use-qlora"),
        ("prepare --lora_rank 8 --no_use_fl\t", "prepare --lora_rank 8 --no_use_flash_attn"),
        ("prepare --use_qlora f\t", "prepare --use_qlora false"),
        ("prepare --use_qlora=f\t", "prepare --use_qlora=false"),
        ("prepare --base l\t", "prepare --base link"),
        ("prepare --base=l\t", "prepare --base=link"),
        ("prepare --base link --embedding-init r\t", "prepare --base link --embedding-init reference"),
        ("plan --ht\t", "plan --html"),
        ("plan --help --fs\t", "plan --help --fsdp"),
        ("plan --fit 24GB --fit\t", "plan --fit 24GB --fit"),
        ("plan --chat_template tu\t", "plan --chat_template tulu"),
        ("plan --chat_template_name te\t", "plan --chat_template_name template.jinja"),
        ("prepare --get_tok get_tokenizer_s\t", "prepare --get_tok get_tokenizer_simple_v1"),
        ("prepare ru\t --see\t", "prepare run.yaml --seed"),
        ("plan mod\t", "plan models/"),
        ("prepare --model models/t\t --st\t", "prepare --model models/tiny.gguf --strict"),
        ("prepare --merge_adapter x models/l\t", "prepare --merge_adapter x models/llama/"),
        ("merge models/l\t --adap\t --mo\t", "merge models/llama/ --adapter_only --model"),
        ("merge models/l\t --max_sh\t", "merge models/llama/ --max_shard_size"),
        ("verify mod\t --qui\t", "verify models/ --qui"),
        ("verify --quic\t", "verify --quick"),
        ("inspect models/llama/mo\t", "inspect models/llama/model.safetensors"),
        ("doctor --for q\t", "doctor --for qlora"),
    ],
)  # fmt: skip
def test_tab_completes(terminal: Terminal, typed: str, words: str) -> None:
    assert terminal.enter(f"ftload {typed}") == words.split()


def offered(home: Path, line: str) -> set[str]:
    """What the installed function offers at the end of a line."""
    program = f"""
        source ~/.bash_completions/ftload.sh
        COMP_WORDS=({line}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _ftload_completion ftload
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=home / "work", env=environment(home), capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stderr == ""
    return set(done.stdout.split())


COMMANDS = {"prepare", "plan", "merge", "verify", "inspect", "recipe", "doctor"}


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("ftload ''", COMMANDS),
        ("ftload help ''", COMMANDS),
        ("ftload prepare --use_lora ''", {"true", "false"}),
        ("ftload prepare --base ''", {"auto", "copy", "link", "reference"}),
        ("ftload prepare --base =", {"auto", "copy", "link", "reference"}),
        ("ftload prepare --chat_template ''", set(TEMPLATES)),
        ("ftload prepare --get_tokenizer_fn ''", set(FUNCTIONS)),
        ("ftload doctor --for ''", set(STRATEGIES)),
        ("ftload recipe out --for ''", set(TRAINERS)),
        ("ftload prepare ''", set()),
        ("ftload prepare --model ''", set()),
        ("ftload prepare --use ''", set()),  # of several flags
        ("ftload prepare --no_use_lora ''", set()),
    ],
)
def test_all_values_are_offered(home: Path, line: str, values: set[str]) -> None:
    assert offered(home, line) == values


@pytest.mark.parametrize(
    ("command", "flags"),
    [("prepare", {}), ("plan", plan_flags()), ("merge", merge_flags())],
)
def test_all_flags_are_offered(home: Path, command: str, flags: Mapping[str, Flag]) -> None:
    assert offered(home, f"ftload {command} --") == {f"--{name}" for name in (*all_flags(), *flags, "model", "help")}
    negated = {f"--no_{name}" for name, flag in {**all_flags(), **flags}.items() if flag.kind == "bool"}
    assert offered(home, f"ftload {command} --no") == negated


def test_flags_have_their_help() -> None:
    found = dict(completions(["run.yaml"], "--lora-r", all_flags(), {}))
    assert found == {"--lora-rank": "Rank of the LoRA matrices"}


@pytest.mark.parametrize("line", ["ftload prepare --use", "ftload prepare --chat_template t", "ftload doctor --for q"])
def test_completing_imports_no_library_that_takes_long(home: Path, line: str) -> None:
    program = """
import sys
from ftload.cli.app import run
code = run([])
print(code, sorted({"torch", "transformers", "peft", "numba", "numpy", "rich"} & set(sys.modules)), file=sys.stderr)
"""
    words = line.split()
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1), "_FTLOAD_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(home) | asked, capture_output=True, text=True, timeout=300
    )
    assert done.stderr == "0 []\n"
    assert done.stdout.split()


@pytest.mark.parametrize(("words", "code"), [("ftload prepare ", 1), ("ftload prepare --base c", 0)])
def test_fish_is_told_whether_to_complete_files(home: Path, words: str, code: int) -> None:
    asked = {"_FTLOAD_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": words}
    for action, said in (("is-args", (code, "")), ("get-args", (0, "" if code else "copy"))):
        done = subprocess.run(
            ["ftload"], env=environment(home) | asked | {"_TYPER_COMPLETE_FISH_ACTION": action},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert (done.returncode, done.stdout.strip(), done.stderr) == (*said, "")


def test_zsh_is_told_to_complete_files(home: Path) -> None:
    for words, said in (("ftload prepare ", "_files"), ("ftload prepare --base c", "_arguments '*: :((\"copy\"))'")):
        asked = {"_FTLOAD_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
        done = subprocess.run(["ftload"], env=environment(home) | asked, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{said}\n", "")
