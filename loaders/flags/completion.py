"""What can come next in a command line that is being typed: names of flags, and the values of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .command_line import is_flag, names_meant
from .declared import Flag
from .values import ALIASES


def completions(
    words: Sequence[str], begun: str, flags: Mapping[str, Flag], known: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str | None]]:
    """Yield what `begun`, the word after `words`, can become, each with its help if it is a flag.

    `known` holds values of flags that take others too, by the flags' names. Nothing is yielded where a file can be
    meant and none of the known values is: completing those is the shell's.
    """
    if is_flag(begun) or begun in ("-", "--"):
        yield from _names(begun, flags)
        return
    given = list(words)
    while given and not is_flag(given[-1]):
        given.pop()
    names = names_meant(given[-1], flags) if given else {}
    for flag, negated in names.values():
        if len(names) == 1 and not negated:
            values = ("true", "false") if flag.kind == "bool" else flag.choices or known.get(flag.name, ())
            yield from ((value, None) for value in values if value.startswith(begun))


def _names(begun: str, flags: Mapping[str, Flag]) -> Iterator[tuple[str, str | None]]:
    """Names that go on as `begun` does, with dashes between words if it has them; `no_` only where it is begun."""
    dashes = "-" in begun.removeprefix("--") and "_" not in begun
    wanted = begun.lstrip("-").replace("-", "_")
    names = {**flags, **{alias: flags[name] for alias, name in ALIASES.items()}}
    if wanted.startswith("no"):
        names |= {f"no_{name}": flag for name, flag in flags.items() if flag.kind == "bool"}
    for name, flag in names.items():
        if name.startswith(wanted):
            yield f"--{name.replace('_', '-') if dashes else name}", flag.help
