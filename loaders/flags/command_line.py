"""From the words of a command line, and the YAML file that may come before its flags, to `Arguments`.

What HfArgumentParser accepts is accepted and means the same: tests compare the two. All problems are reported in one
error, to be corrected in one go. That is why this is not argparse, which stops at the first error, does not say which
words came after an unknown flag, and can't prefer the training script's flags where the beginning of a name is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from keyword import iskeyword
from typing import Any, TypeAlias

from ..errors import UsageError
from .declared import (
    Arguments,
    Flag,
    FlatArguments,
    MergeOptions,
    Origin,
    OwnOptions,
    PlanOptions,
    TokenizerConfig,
    all_flags,
    parse_size,
)
from .gpu_sizes import MOST_GPUS, Gpus, parse_gpus
from .lora_config import initialisation_problem, token_ids
from .values import ALIASES, EXPECTED, Problems, from_text, is_boolean, is_null, printable
from .yaml_file import read_yaml

YAML_SUFFIXES = (".yaml", ".yml")
ADAPTER_ONLY = frozenset(
    ("adapter_only", "merge_adapter", "model_name_or_path", "model_revision", "output_dir", "json", "quiet", "debug")
)
"""All flags that have a meaning where `ftload merge` writes an adapter alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """What a command line and its YAML file say: every value that could be read, and everything that is wrong."""

    from_yaml: Mapping[str, Any]
    from_cli: Mapping[str, Any]
    """Values by the flags' names; None also stands for a value that the flag can't take."""
    problems: Problems

    @property
    def values(self) -> Mapping[str, Any]:
        """The value of every flag that was given, by its name: a flag overrides the file."""
        return {**self.from_yaml, **self.from_cli}

    def arguments(self) -> Arguments:
        """Return the value of every flag.

        Raises:
            UsageError: names every unknown flag and key, every bad value and every misplaced word.
        """
        self.problems.raise_if_any()
        origins: dict[str, Origin] = {}
        for name in all_flags():
            origins[name] = "cli" if name in self.from_cli else "yaml" if name in self.from_yaml else "default"
        return Arguments(
            flat=self._group(FlatArguments),
            tokenizer=self._group(TokenizerConfig),
            own=self._group(OwnOptions),
            origins=origins,
        )

    def plan_options(self) -> PlanOptions:
        """Return the value of every flag that only `ftload plan` takes. Raises `UsageError` as `arguments` does."""
        self.problems.raise_if_any()
        return self._group(PlanOptions)

    def merge_options(self) -> MergeOptions:
        """Return the value of every flag that only `ftload merge` takes. Raises `UsageError` as `arguments` does."""
        self.problems.raise_if_any()
        return self._group(MergeOptions)

    def _group(self, kind: type) -> Any:
        flags = self.problems.flags
        given = {name: value for name, value in self.values.items() if flags[name].group == kind.__name__}
        return kind(**{f"{name}_" if iskeyword(name) else name: value for name, value in given.items()})


def read_command_line(argv: Sequence[str], more_flags: Mapping[str, Flag] | None = None) -> CommandLine:
    """Read `[model] [run.yaml] [--flag [value ...]]...` as far as it can be understood.

    The word before the flags that ends as YAML files do is the file, and the other one the model, whichever comes
    first. `more_flags` can be given beside `all_flags`, though not in the file.
    """
    problems = Problems({**all_flags(), **(more_flags or {})})
    leading = list(takewhile(lambda word: not is_flag(word), argv))
    from_yaml, model = _read_leading(leading, problems)
    from_cli = _read_flags(list(argv[len(leading) :]), model, problems)
    _check_plan_options(from_cli, problems)
    if from_cli.get("adapter_only"):
        _check_adapter_only(from_cli, problems)
    _check_ranges({**from_yaml, **from_cli}, problems)
    return CommandLine(from_yaml=from_yaml, from_cli=from_cli, problems=problems)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Return the arguments that a command line means. Raises `UsageError` as `CommandLine.arguments` does."""
    return read_command_line(argv).arguments()


def _read_leading(words: list[str], problems: Problems) -> tuple[dict[str, Any], str | None]:
    """Return the values in the YAML file, and the model, that the words before the flags name: one of each at most."""
    files = [word for word in words if word.endswith(YAML_SUFFIXES)]
    models = [word for word in words if word not in files]
    values: dict[str, Any] = {}
    for word in files[:1]:
        try:
            values = read_yaml(word, problems)
        except UsageError as error:
            problems.add(error.message, error.hint)
    for word in files[1:]:
        _add_stray(word, problems)
    if models and models[0].endswith(".json"):
        problems.add(f"`{printable(models[0])}` is neither a model nor a YAML file (.yaml or .yml)")
    for word in models[1:]:
        problems.add(
            f"`{printable(models[0])}` and `{printable(word)}` come before the flags: only one can be the model"
        )
    return values, models[0] if models else None


def is_flag(word: str) -> bool:
    """Whether `word` is a flag rather than a value: `-1e-3`, `-` and `- a b` are values, as for argparse."""
    if not word.startswith("-") or word == "-" or (" " in word and not word.startswith("--")):
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _read_flags(words: list[str], model: str | None, problems: Problems) -> dict[str, Any]:
    """Return the value of every flag among `words`, by the flag's name; a `model` came before them."""
    values: dict[str, Any] = {}
    models: dict[str, str] = {}
    if model is not None:
        values[ALIASES["model"]] = models[""] = model
    while words:
        word = words.pop(0)
        if not is_flag(word):
            _add_stray(word, problems)
            continue
        typed, equals, attached = word.partition("=")
        given = [attached] if equals else []
        while not equals and words and not is_flag(words[0]):
            given.append(words.pop(0))

        names = names_meant(typed, problems.flags)
        if len(names) != 1:
            _add_unknown_or_ambiguous(typed, names, problems)
            continue
        (name,) = names
        flag, negated = names[name]
        if not negated:
            value = _from_words(flag, typed, given, bool(equals), words, problems)
        else:
            value = False
            if given:
                problems.add(f"`{typed}` takes no value, but `{printable(given[0])}` follows it")
        if flag.adds and isinstance(value, list):
            value = [*(values.get(name) or ()), *value]
        if flag.name in ALIASES.values() and isinstance(value, str):
            models[name] = value
        values[flag.name] = value
    if len(set(models.values())) > 1:
        both = " and ".join(f"`{name and f'--{name} '}{printable(value)}`" for name, value in models.items())
        problems.add(f"{both} name different models")
    return values


Names: TypeAlias = dict[str, tuple[Flag, bool]]
"""By name without dashes: the flag that the name means, and whether it turns that off."""


def names_meant(typed: str, flags: Mapping[str, Flag]) -> Names:
    """Return the name that `typed` is, or those that it is the beginning of: none, one or several.

    Names of the training script come first, so that what is short for one of them there is short for it here too,
    whatever flags ftload adds.
    """
    name = typed.removeprefix("--").replace("-", "_")
    if not typed.startswith("--") or not name:
        return {}
    training: Names = {}
    own: Names = {alias: (flags[meant], False) for alias, meant in ALIASES.items()}
    for flag in flags.values():
        is_training = flag.group in (FlatArguments.__name__, TokenizerConfig.__name__)
        (training if is_training else own)[flag.name] = flag, False
        if flag.kind == "bool":
            # HfArgumentParser has `no_` before the booleans that are true by default
            (training if is_training and flag.default else own)[f"no_{flag.name}"] = flag, True
    for names in (training, own):
        if name in names:
            return {name: names[name]}
    for names in (training, own):
        if begun := {full: meant for full, meant in names.items() if full.startswith(name)}:
            return begun
    return {}


def _add_unknown_or_ambiguous(typed: str, names: Iterable[str], problems: Problems) -> None:
    """Add a flag that does not exist, or that could be any of `names`."""
    could_be = ", ".join(f"`--{name}`" for name in names)
    if could_be:
        problems.add(f"ambiguous flag `{printable(typed)}`: it could be {could_be}", "write more of its name")
    else:
        problems.add_unknown("flag", typed)


def _from_words(flag: Flag, label: str, given: list[str], attached: bool, ahead: list[str], problems: Problems) -> Any:
    """Return the value of `flag`, typed as `label`, from the words up to the next flag, the first of `ahead`."""
    spelled = label.removeprefix("--").replace("-", "_")
    shown = f"`{label}`" if ALIASES.get(spelled, spelled) == flag.name else f"`{label}` (`--{flag.name}`)"
    takes_list = flag.kind in ("list", "str or list")
    if not given:
        if flag.kind == "bool":
            return True
        dashed = ahead and not ahead[0].startswith("--")
        hint = f"write `{label}={printable(ahead[0])}` if that is the value" if dashed else None
        problems.add(f"{shown} needs a value: {EXPECTED[flag.kind]}", hint)
        return None
    if flag.optional and flag.type != "str | None" and len(given) == 1 and is_null(given[0]):
        return None
    if takes_list:
        return given
    if flag.kind == "bool" and not attached and not is_boolean(given[0]):
        _add_stray(given[0], problems, after=label, hint=f"`{label}` stands alone, or takes true or false")
        return None
    for word in given[1:]:
        _add_stray(word, problems, after=f"{label} {printable(given[0])}")
    try:
        return from_text(flag, given[0])
    except ValueError as error:
        problems.add_bad_value(shown, flag, error, given[0])
        return None


def _add_stray(word: str, problems: Problems, after: str = "", hint: str | None = None) -> None:
    """Add a word that no flag takes."""
    place = f" after `{after}`" if after else ""
    if word.endswith(YAML_SUFFIXES):
        problems.add(f"`{printable(word)}`{place} is out of place: one YAML file can be given, before the flags")
    elif "/" in word or word.endswith(".gguf"):
        problems.add(f"`{printable(word)}`{place} belongs to no flag", "a model comes before the flags")
    else:
        problems.add(f"`{printable(word)}`{place} belongs to no flag", hint)


def _check_plan_options(values: Mapping[str, Any], problems: Problems) -> None:
    """Refuse what `ftload plan` can't divide the memory by."""
    fsdp, zero, gpus = (values.get(name) for name in ("fsdp", "zero", "gpus"))
    if fsdp is not None and zero is not None:
        problems.add("`--fsdp` and `--zero` are two ways to divide the same: give one")
    if zero is not None and zero not in (1, 2, 3):
        problems.add(f"`--zero` has the stages 1, 2 and 3, not {zero}")
    if gpus is not None and "zero" not in values:
        problems.add("`--gpus` goes with `--zero`", "`--fsdp` takes the number itself: `--fsdp 8`")
    for name, count in (("fsdp", fsdp), ("gpus", gpus)):
        if count is not None and not 2 <= count <= MOST_GPUS:
            problems.add(f"`--{name}` is a number of GPUs, 2 to {MOST_GPUS:,}, not {count}")
    _check_fit(values, problems)


def _check_fit(values: Mapping[str, Any], problems: Problems) -> None:
    """Refuse sizes that no GPU has, that are given twice, or that contradict what else divides the memory."""
    seen: dict[tuple[int, int], Gpus] = {}
    dividing = next((name for name in ("fsdp", "zero") if values.get(name) is not None), None)
    for text in values.get("fit") or ():
        try:
            gpus = parse_gpus(text)
        except UsageError as error:
            problems.add(f"`--fit`: {error.message}", error.hint)
            continue
        key = gpus.count or 1, gpus.bytes
        if key in seen:
            problems.add(f"`--fit` names the same twice: `{seen[key]}` and `{gpus}`")
        seen[key] = gpus
        if gpus.count is not None and dividing is not None and values.get("fsdp") != gpus.count:
            problems.add(
                f"`--fit {gpus}` means FSDP on {gpus.count:,}, `--{dividing} {values[dividing]}` something else",
                f"beside `--{dividing}`, write the memory of each GPU alone: `--fit {gpus.size}`",
            )


def _check_adapter_only(values: Mapping[str, Any], problems: Problems) -> None:
    """Refuse what changes nothing of an adapter that `ftload merge` writes unmerged."""
    for name in values:
        if name not in ADAPTER_ONLY:
            problems.add(f"`--{name}` has no effect with `--adapter_only`: no model is written", "leave it out")
    adapters = values.get("merge_adapter") or ()
    if len(adapters) > 1:
        problems.add(f"`--adapter_only` writes one adapter, not {len(adapters)}")
    if values.get("model_name_or_path") is None:
        problems.add("`--adapter_only` needs `--model`: the model in 16 bits that the adapter is for")


def _check_ranges(values: Mapping[str, Any], problems: Problems) -> None:
    """Refuse values that have the right type but that nothing can be prepared with; a bad value is None here."""
    rank, alpha, dropout, seed = (values.get(f) for f in ("lora_rank", "lora_alpha", "lora_dropout", "seed"))
    if rank is not None and rank < 1:
        problems.add(f"`lora_rank` must be at least 1, not {rank}")
    of_experts = values.get("lora_experts")
    if of_experts is not None and of_experts < 1:
        problems.add(f"`lora_experts` must be at least 1, not {of_experts}")
    if alpha is not None and not math.isfinite(alpha):
        problems.add(f"`lora_alpha` must be a finite number, not {alpha}")
    if dropout is not None and not 0 <= dropout < 1:
        problems.add(f"`lora_dropout` must be at least 0 and below 1, not {dropout}")
    if seed is not None and not 0 <= seed < 2**32:
        # the bound is numpy's, which training scripts seed as well
        problems.add(f"`seed` must be at least 0 and below 2^32, not {seed}")
    least = values.get("min_quantized")
    if least is not None and not 0 <= least <= 100:
        problems.add(f"`min_quantized` is a percentage, 0 to 100, not {least}")
    for name, what in (
        ("lora_target_modules", "layer"),
        ("lora_target_parameters", "parameter"),
        ("lora_modules_to_save", "layer"),
    ):
        if values.get(name) == []:
            problems.add(f"`{name}` must name at least one {what}")
    initialisation, tokens = values.get("init_lora_weights"), values.get("trainable_token_indices")
    if initialisation is not None and (problem := initialisation_problem(initialisation)):
        problems.add(f"`init_lora_weights` {problem}")
    try:
        token_ids(["0"] if tokens is None else tokens)
    except ValueError as error:
        problems.add(f"`trainable_token_indices` {error}")
    for name in ("max_shard_size", "max_memory"):
        try:
            parse_size(values.get(name) or "1")
        except UsageError as error:
            problems.add(f"`{name}`: {error.message}", error.hint)
