"""Proving that a prepared directory is what its report says, and that it trains.

Each check stands on its own and all of them are made, so that one run tells everything that is wrong. First what the
files say, then what the libraries make of them: `load_prepared` and one training step.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_templates import render
from .checkpoint import TORCH_NAMES, Checkpoint, TensorMeta, open_checkpoint, read_header
from .disk import hash_file
from .environment import quiet_transformers
from .errors import FtloadError, VerificationError, said_by
from .identity import can_have_a_part
from .model_config import load_config, load_generation_config
from .nf4 import STATE_SUFFIX, find_packed
from .prepared import load_prepared, read_report
from .report import REPORT_FILE
from .source import resolve_source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from .stream import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    problems: tuple[str, ...]
    """What is wrong; empty where nothing is."""
    found: str
    """What was seen, in a few words."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """All checks of a directory, in the order in which they were made."""

    directory: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check is."""
        return all(check.ok for check in self.checks)

    @property
    def error(self) -> VerificationError | None:
        """What failed, in one line; None if nothing did."""
        failed = [check for check in self.checks if not check.ok]
        if not failed:
            return None
        listed = "; ".join(f"{check.name}: {check.problems[0]}{_more(check.problems)}" for check in failed)
        return VerificationError(
            f"`{self.directory}`: {len(failed)} of {len(self.checks)} checks failed: {listed}",
            hint="prepare it again with --overwrite",
        )


def verify(directory: Path, *, quick: bool, trust_remote_code: bool, progress: Progress) -> Verification:
    """Check a prepared directory; `quick` leaves out loading the model and the training step.

    Raises `CheckpointError` when there is no report that this version understands, `SourceError` when there is no such
    directory.
    """
    root = resolve_source(str(directory), None).root
    report = read_report(root)
    steps: list[tuple[str, Callable[..., Iterator[str]]]] = [
        ("report", _check_report),
        ("files", _check_files),
        ("tensors", _check_tensors),
        ("config", _check_config),
        ("tokenizer", _check_tokenizer),
        ("chat template", _check_chat_template),
        ("adapter", _check_adapter),
    ]
    if not quick:
        steps.append(("training step", _check_training))
    checks = []
    for name, check in steps:
        progress.stage(name)
        context = _Context(root=root, report=report, trust_remote_code=trust_remote_code, progress=progress)
        problems = []
        try:
            problems += check(context)
        except FtloadError as error:
            problems.append(error.message)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            # the files may hold anything: what can't be understood does not verify
            problems.append(f"can't be understood: {type(error).__name__}: {said_by(error)}")
        except (OSError, RuntimeError, ImportError) as error:
            problems.append(said_by(error))
        checks.append(Check(name=name, problems=tuple(problems), found=context.found))
    return Verification(directory=str(directory), checks=tuple(checks))


@dataclass(kw_only=True, slots=True)
class _Context:
    root: Path
    report: Mapping[str, Any]
    trust_remote_code: bool
    progress: Progress
    found: str = ""

    def base(self) -> Checkpoint:
        """The headers of the base: of the output itself, or of what the adapter refers to."""
        if self.report["base"] == "copy":
            return open_checkpoint(resolve_source(str(self.root), None), allow_pickle=False)
        adapter = self.report["adapter"]
        return open_checkpoint(resolve_source(adapter["base"], adapter["revision"]), allow_pickle=False)

    def adapter(self) -> dict[str, TensorMeta]:
        """The headers of the adapter's tensors."""
        path = self.root / "adapter" / "adapter_model.safetensors"
        return {tensor.name: tensor for tensor in read_file_header(path)}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as it lies in the directory."""
        from transformers import AutoTokenizer

        with quiet_transformers():
            return AutoTokenizer.from_pretrained(self.root, trust_remote_code=self.trust_remote_code)


def read_file_header(path: Path) -> tuple[TensorMeta, ...]:
    """The tensors of one safetensors file. Raises `CheckpointError`."""

    def read(begin: int, end: int) -> bytes:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    return read_header(path.name, path.stat().st_size, read)


def _check_report(context: _Context) -> Iterator[str]:
    """Whether the report agrees with itself."""
    parameters = context.report["parameters"]
    total, trainable = parameters["total"], parameters["trainable"]
    context.found = f"{context.report['strategy']}, {total:,} parameters, {trainable:,} trainable"
    if trainable + parameters["frozen"] != total:
        yield "trainable and frozen parameters are not the total"
    for section in ("by_dtype", "in_training", "by_component"):
        if sum(row["parameters"] for row in parameters[section].values()) != total:
            yield f"the parameters of `{section}` are not the total"
    adapter = context.report["adapter"]
    if trainable != (adapter["parameters"] if adapter else total):
        yield "the trainable parameters are not " + ("the adapter's" if adapter else "all")


def _check_files(context: _Context) -> Iterator[str]:
    """Every file's size and sha256, and that there are no others."""
    listed = {str(entry["path"]): entry for entry in context.report["files"]}
    context.progress.expect(bytes=sum(entry["bytes"] for entry in listed.values()), tensors=0)

    def look_at(name: str) -> str | None:
        path = context.root / name
        if not path.is_file():
            return f"`{name}` is missing"
        if path.stat().st_size != listed[name]["bytes"]:
            return f"`{name}` has {path.stat().st_size} bytes, not {listed[name]['bytes']}"
        if hash_file(path) != listed[name]["sha256"]:
            return f"`{name}` is not what was written: its sha256 differs"
        return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, problem in zip(listed, pool.map(look_at, listed), strict=True):
            context.progress.advance(bytes=listed[name]["bytes"], tensors=0)
            if problem is not None:
                yield problem
    for path in sorted(context.root.rglob("*")):
        name = path.relative_to(context.root).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.is_file() and can_have_a_part(name) and not hidden and name not in (*listed, REPORT_FILE):
            yield f"`{name}` is not in the report"
    context.found = f"{len(listed)} files, {sum(entry['bytes'] for entry in listed.values()):,} bytes"


def _check_tensors(context: _Context) -> Iterator[str]:
    """Counts and dtypes, taken again from the headers."""
    base = context.base()
    packed = find_packed(base)
    parts = {part.name: weight for weight, tensor in packed.items() for part in tensor.parts}
    counted: dict[str, dict[str, int]] = {}

    def count(dtype: str, tensors: int, nbytes: int) -> None:
        row = counted.setdefault(dtype, {"tensors": 0, "bytes": 0})
        row["tensors"] += tensors
        row["bytes"] += nbytes

    for tensor in base.tensors.values():
        size = 0 if tensor.name.endswith(STATE_SUFFIX) else tensor.nbytes
        if tensor.name in parts:
            count("nf4", tensor.name in packed, size)
        else:
            count(TORCH_NAMES[tensor.dtype], 1, size)
    adapter = context.adapter() if context.report["adapter"] else {}
    for tensor in adapter.values():
        count(TORCH_NAMES[tensor.dtype], 1, tensor.nbytes)
    reported = context.report["parameters"]["by_dtype"]
    for dtype in sorted({*counted, *reported}):
        found, expected = counted.get(dtype, {}), reported.get(dtype, {})
        for what in ("tensors", "bytes"):
            if found.get(what, 0) != expected.get(what, 0):
                yield f"{found.get(what, 0):,} {what} of {dtype}, the report says {expected.get(what, 0):,}"
    four_bit = sum(math.prod(tensor.shape) for tensor in packed.values())
    if four_bit != reported.get("nf4", {}).get("parameters", 0):
        yield f"{four_bit:,} 4-bit parameters, the report says {reported.get('nf4', {}).get('parameters', 0):,}"
    if adapter and sum(tensor.parameters for tensor in adapter.values()) != context.report["adapter"]["parameters"]:
        yield "the adapter does not have the parameters that the report says"
    context.found = ", ".join(f"{row['tensors']:,} {dtype}" for dtype, row in sorted(counted.items()))


def _check_config(context: _Context) -> Iterator[str]:
    """Whether config.json describes what the report does."""
    if context.report["base"] != "copy":
        context.found = "the base's own"
        return
    with quiet_transformers():
        config, _ = load_config(context.root, overrides={}, trust_remote_code=context.trust_remote_code)
        load_generation_config(context.root)
    rows = context.report["embeddings"]["rows_after"]
    text: Any = config.get_text_config()
    if text.vocab_size != rows:
        yield f"`vocab_size` is {text.vocab_size}, the embeddings have {rows} rows"
    if bool(text.tie_word_embeddings) != context.report["embeddings"]["tied"] and text.tie_word_embeddings:
        yield "`tie_word_embeddings` is set, the report says that they are not tied"
    stored = json.loads((context.root / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    expected = context.report["quantization"]
    if (stored is None) != (expected is None):
        yield "`quantization_config` is " + ("missing" if stored is None else "there, the report knows of none")
    elif stored is not None:
        for key, name in (
            ("quant_type", "bnb_4bit_quant_type"),
            ("double_quant", "bnb_4bit_use_double_quant"),
            ("compute_dtype", "bnb_4bit_compute_dtype"),
        ):
            if stored[name] != expected[key]:
                yield f"`{name}` is {stored[name]}, the report says {expected[key]}"
    if type(config).model_type != context.report["source"]["model_type"]:
        yield f"the model is a `{config.model_type}`, the report says `{context.report['source']['model_type']}`"
    context.found = f"{context.report['source']['architecture']}, {rows:,} rows"


def _check_tokenizer(context: _Context) -> Iterator[str]:
    """Whether the ids fit the embeddings, and texts can be padded and ended."""
    tokenizer = context.tokenizer()
    expected = context.report["tokenizer"]
    rows = context.report["embeddings"]["rows_after"]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        yield f"token id {highest} does not fit {rows} embedding rows"
    if len(tokenizer) != expected["size"]:
        yield f"{len(tokenizer)} tokens, the report says {expected['size']}"
    for what in ("pad_token", "eos_token", "bos_token"):
        if getattr(tokenizer, what) != expected[what]:
            yield f"{what} is `{getattr(tokenizer, what)}`, the report says `{expected[what]}`"
    if tokenizer.pad_token is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield f"pad and eos are the same token, `{tokenizer.eos_token}`: the model would not learn to stop"
    context.found = f"{len(tokenizer):,} tokens, pad `{tokenizer.pad_token}`, eos `{tokenizer.eos_token}`"


_ANSWER = "Forty-two"
_CONVERSATION = [
    {"role": "user", "content": "What do you get if you multiply six by nine?"},
    {"role": "assistant", "content": _ANSWER},
]


def _check_chat_template(context: _Context) -> Iterator[str]:
    """Whether the template renders, and ends an assistant's turn with a token that generation stops at."""
    from jinja2 import TemplateSyntaxError

    from .tokenizer import template_hash

    tokenizer = context.tokenizer()
    digest = template_hash(tokenizer.chat_template)
    if digest != context.report["tokenizer"]["chat_template_sha256"]:
        yield "the chat template is not the one in the report" if digest else "the chat template is gone"
    if digest is None:
        context.found = "none"
        return
    try:
        text = render(tokenizer, _CONVERSATION)
    except TemplateSyntaxError as error:
        yield f"it is not valid, line {error.lineno}: {error.message}"
        return
    if text is None:
        yield "it does not render a question and its answer"
        return
    stops = _stop_tokens(context, tokenizer)
    _, answer, end = text.rpartition(_ANSWER)
    context.found = f"turns end with {end.strip()!r}"
    if not answer:
        yield "it leaves out what the assistant says"
    elif text == _ANSWER:
        context.found = "it marks no turns at all"  # as was asked for: what ends them is up to the training script
    elif not any(stop in end for stop in stops):
        yield f"an assistant's turn ends with {end!r}, which has none of the tokens that generation stops at: {stops}"


def _stop_tokens(context: _Context, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ids: list[Any] = [tokenizer.eos_token_id]
    if context.report["base"] == "copy":
        with quiet_transformers():
            stored: Any = load_generation_config(context.root).eos_token_id
        ids += stored if isinstance(stored, list) else [stored]
    return sorted({str(tokenizer.convert_ids_to_tokens(number)) for number in ids if number is not None})


def _check_adapter(context: _Context) -> Iterator[str]:
    """Whether adapter_config.json, the adapter's tensors and its base belong together."""
    expected = context.report["adapter"]
    if expected is None:
        context.found = "none"
        return
    config = json.loads((context.root / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    for key, name in (
        ("r", "r"),
        ("alpha", "lora_alpha"),
        ("dropout", "lora_dropout"),
        ("base", "base_model_name_or_path"),
        ("revision", "revision"),
    ):
        if config[name] != expected[key]:
            yield f"`{name}` is `{config[name]}`, the report says `{expected[key]}`"
    if sorted(config["target_modules"]) != sorted(expected["targets"]):
        yield "`target_modules` are not those of the report"
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in context.adapter().items()}
    layers = {name.rpartition(".lora_")[0] for name in shapes}
    if len(layers) != sum(expected["targets"].values()):
        yield f"{len(layers)} layers are adapted, the report says {sum(expected['targets'].values())}"
    for layer in sorted(layers):
        a, b = shapes.get(f"{layer}.lora_A"), shapes.get(f"{layer}.lora_B")
        if a is None or b is None or a[0] != expected["r"] or b[1] != expected["r"]:
            yield f"`{layer}` does not have matrices of rank {expected['r']}"
    if context.report["base"] == "reference":
        yield from _check_base(context)
    context.found = f"rank {expected['r']} on {len(layers)} layers"


def _check_base(context: _Context) -> Iterator[str]:
    """Whether the base that the adapter refers to is the one that it was made for, as far as its listing tells."""
    adapter = context.report["adapter"]
    source = resolve_source(adapter["base"], adapter["revision"])
    files = {file.path: file for file in source.files}
    for entry in context.report["source"]["files"]:
        name = entry["path"]
        if not name.endswith((".safetensors", "config.json")):
            continue
        if name not in files:
            yield f"the base, `{adapter['base']}`, lacks `{name}`"
        elif files[name].bytes != entry["bytes"]:
            yield f"`{name}` of the base has {files[name].bytes} bytes, not {entry['bytes']}"
        elif None not in (entry["sha256"], files[name].sha256) and files[name].sha256 != entry["sha256"]:
            yield f"`{name}` of the base has another sha256"


def _check_training(context: _Context) -> Iterator[str]:
    """Load it as a training script would and take one step."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = load_prepared(context.root, trust_remote_code=context.trust_remote_code)
    yield from _check_loaded(context, model)
    torch.manual_seed(0)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name: parameter for name, parameter in trainable.items() if ".lora_B." in name}
    for name, parameter in adapters.items():
        if parameter.count_nonzero():
            yield f"`{name}` is not zero before the first step"
    optimizer = torch.optim.SGD(
        trainable.values(), lr=1e-2
    )  # without states of its own: it must fit where the model does
    device = next(iter(trainable.values())).device
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        output = model(**_batch(tokenizer, context, device))
        output.loss.backward()
    context.found = f"loss {output.loss.item():.3f}, {len(trainable):,} tensors with gradients, on {device}"
    if not math.isfinite(output.loss.item()):
        yield f"the loss is {output.loss.item()}"
    if output.logits is not None and not torch.isfinite(output.logits).all():
        yield "the logits are not finite"
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if not parameter.requires_grad:
            if gradient is not None:
                yield f"`{name}` is frozen and has a gradient"
        elif gradient is None:
            # a router sends these few tokens past most experts
            if "experts" not in name:
                yield f"`{name}` is trainable and has no gradient"
        elif not torch.isfinite(gradient).all():
            yield f"the gradient of `{name}` is not finite"
    optimizer.step()
    for name, parameter in adapters.items():
        if not parameter.count_nonzero() and "experts" not in name:
            yield f"`{name}` did not move in one optimizer step"


def _check_loaded(context: _Context, model: Any) -> Iterator[str]:
    """Counts and dtypes of the model in memory."""
    reported = context.report["parameters"]
    counted: dict[str, int] = {}
    trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        dtype = "nf4" if state is not None else str(parameter.dtype).removeprefix("torch.")
        number = state.shape.numel() if state is not None else parameter.numel()
        counted[dtype] = counted.get(dtype, 0) + number
        trainable += number if parameter.requires_grad else 0
    if trainable != reported["trainable"]:
        yield f"{trainable:,} parameters are trainable, the report says {reported['trainable']:,}"
    for dtype in sorted({*counted, *reported["in_training"]}):
        found = counted.get(dtype, 0)
        expected = reported["in_training"].get(dtype, {}).get("parameters", 0)
        if found != expected:
            yield f"{found:,} parameters are {dtype}, the report says {expected:,}"
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != context.report["embeddings"]["rows_after"]:
        yield f"{rows} embedding rows, the report says {context.report['embeddings']['rows_after']}"


_TOKENS = 32


def _batch(tokenizer: PreTrainedTokenizerBase, context: _Context, device: torch.device) -> dict[str, torch.Tensor]:
    """One sequence of ids (int64, 1 × 32) from all over the vocabulary, so that a spoilt row has a chance to show."""
    import torch

    known = sorted(set(tokenizer.get_vocab().values()))
    step = max(1, len(known) // _TOKENS)
    ids = torch.tensor([known[::step][:_TOKENS]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _more(problems: tuple[str, ...]) -> str:
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
