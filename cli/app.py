"""The `ftload` command: its commands, the process that runs them, and errors in the command line itself."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

import typer

from ..loaders.flags.command_line import read_command_line
from .doctor import doctor
from .errors import Interrupted
from .inspect import InspectCommand, inspect
from .merge import merge
from .options import FlagsCommand, MergeCommand, OptionsCommand, PlanCommand, RootCommand
from .plan import plan
from .prepare import prepare
from .recipe import recipe
from .show.output import Output
from .verify import verify

app = typer.Typer(
    name="ftload",
    cls=RootCommand,
    help="Materialise ready-to-train language models, and say exactly what is in them.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prepare", cls=FlagsCommand)(prepare)
app.command("plan", cls=PlanCommand)(plan)
app.command("merge", cls=MergeCommand)(merge)
app.command("verify", cls=OptionsCommand)(verify)
app.command("inspect", cls=InspectCommand)(inspect)
app.command("recipe", cls=OptionsCommand)(recipe)
app.command("doctor", cls=OptionsCommand)(doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        from ..loaders.system.versions import ftload_version

        typer.echo(f"ftload {ftload_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Materialise ready-to-train language models, and say exactly what is in them."""


def main() -> NoReturn:
    """Run the command line of this process and exit with its code (the README lists them)."""
    # torch and transformers create a million objects that stay: collecting garbage takes a sixth of their import
    gc.set_threshold(1_000_000)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    _pass_signals_on()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when ftload was started
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    _keep_stdout()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that can't show a character must not end the run
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # all files are closed; Python would take half a second to tear down torch's modules
    os._exit(code)


def _keep_stdout() -> None:
    """Let only Python write to stdout.

    tokenizers (Rust) prints the keys of a tokenizer's files that it does not know: they would spoil a JSON document,
    and bring a checkpoint's escape sequences to a terminal.
    """
    descriptor, encoding, buffering = sys.stdout.fileno(), sys.stdout.encoding, 1 if sys.stdout.isatty() else -1
    sys.stdout = os.fdopen(os.dup(descriptor), "w", buffering, encoding)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def run(words: list[str]) -> int:
    """Run a command line; returns the exit code."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if "--version" in words or "-V" in words:  # every command has the same
        words = ["--version"]
    try:
        root: Any = typer.main.get_command(app)
        named = root.commands.get(words[0]) if words else None
        if isinstance(named, FlagsCommand):
            # none of the root's options can be meant, and typer needs a tenth of a second to find that out
            context: Any = typer.Context(root, info_name="ftload", **root.context_settings)
            return named(words[1:], prog_name=words[0], parent=context, standalone_mode=False) or 0
        return root(words or ["--help"], prog_name="ftload", standalone_mode=False) or 0
    except (Exception, SystemExit, Interrupted) as error:
        if isinstance(error, SystemExit) and error.__context__ is None:
            return int(error.code or 0)  # how typer ends after completing a word, or installing that
        # no command got as far as its own `Output`: what can be understood of its flags says how to report it
        return Output.from_flags(read_command_line(words).values).end(error, *words[:1])


_heard: list[int] = []
"""Signals that the main thread has handled."""


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    _heard.append(signum)
    raise Interrupted(128 + signum)


def _pass_signals_on() -> None:
    """Send on to this thread, the main one, what another takes: in its place Python handles every signal.

    The system chooses a thread; where that is not this one, this one sleeps on, until what it waits for is there
    (signal(7); Python's `signal.set_wakeup_fd`). A signal that was sent on and not handled yet is sent again.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.get_ident()

    def send_on() -> None:
        while not _heard:
            (number,) = os.read(reading, 1)
            time.sleep(0.1)  # where the main thread took it, it has handled it by then
            if not _heard and signal.getsignal(number) is _interrupt:
                signal.pthread_kill(thread, number)

    threading.Thread(target=send_on, name="ftload-signals", daemon=True).start()
