"""Loading a prepared directory as a training script would, and one real training step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import FtloadError, said_by
from ..load import load_prepared
from ..model.towers import tower_modules
from ..model.transformers_internals import is_experts
from ..system.quiet import quiet_transformers
from ..tokenizer.rendering import ANSWER, QUESTION
from .adapter_values import check_residual, starts_at_zero
from .files import Context

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def check_training(context: Context) -> Iterator[str]:
    """Load it and take one step: finite logits, a gradient where one belongs, and lora B moves."""
    import torch

    try:
        with quiet_transformers():
            model, tokenizer = load_prepared(context.root, trust_remote_code=context.trust_remote_code)
    except FtloadError:
        raise
    except Exception as error:  # four libraries read the files here, and raise whatever they like
        context.hint = _HINT
        yield f"it does not load: {said_by(error)}"
        return
    yield from _check_counts(context, model)
    yield from _check_adapter(context, model)
    context.hint = _HINT
    yield from _check_values(context, model)
    torch.manual_seed(0)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # SGD keeps no states: the step must fit where the model and its gradients do
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-2)
    device = next(iter(trainable.values())).device
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False  # nothing is generated; some caches are written in place, and spoil the gradients
    routed = _reach_experts(model) if context.report.adapter and context.report.adapter.experts_r else {}
    choices = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    # one more: nothing is asked of what follows the last
    tokens = max([_TOKENS, *(-(-experts // choices) + 1 for experts in routed.values())])
    with quiet_transformers():
        output = model(**_batch(tokenizer, device, tokens, _trained_tokens(context)))
        output.loss.backward()
    if not math.isfinite(output.loss.item()):
        yield f"the loss is {output.loss.item()}"
    if output.logits is not None and not torch.isfinite(output.logits).all():
        yield "the logits are not finite"
    base: Any = model.get_submodule("base_model.model") if context.report.adapter is not None else model
    towers = tower_modules(base)
    idle = beside = 0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if not parameter.requires_grad:
            if gradient is not None:
                yield f"`{name}` is frozen and has a gradient"
        elif gradient is None:
            if _is_in(towers, name):
                beside += 1
            elif _may_be_idle(name, routed):
                idle += 1
            else:
                yield f"`{name}` is trainable and has no gradient"
        elif not torch.isfinite(gradient).all():
            yield f"the gradient of `{name}` is not finite"
        elif any(part in name for part in _MOVING) and not gradient.count_nonzero() and not _is_in(towers, name):
            if _ROWS in name and {*_trained_tokens(context)} <= {context.report.embeddings.pad_token_id}:
                continue  # embeddings give the row of padding no gradient
            yield f"the gradient of `{name}` is zero"
    optimizer.step()
    for name, parameter in trainable.items():
        may_rest = _may_be_idle(name, routed) or _is_in(towers, name)
        if ".lora_B." in name and not parameter.count_nonzero() and not may_rest:
            yield f"`{name}` did not move in one optimizer step"
    context.found = (
        f"loss {output.loss.item():.3f}, {len(trainable) - idle - beside:,} tensors with gradients, "
        + ("experts took tokens in turn, " if routed else "")
        + (f"{idle:,} of experts that no token reached, " if idle else "")
        + (f"{beside:,} of towers that take no text, " if beside else "")
        + f"on {device}"
    )


_ROWS = ".trainable_tokens_delta."
_MOVING = (".lora_magnitude_vector.", _ROWS, ".modules_to_save.")
"""What takes part in every step from the first one on, by what names hold: A has no gradient while B is
zero, and a bias may have none, as the keys' has where attention is not rotary."""
_HINT = "look at the original model, and ask `ftload doctor` whether the libraries work here"


def _reach_experts(model: Any) -> dict[str, int]:
    """Let tokens go to experts in turn, whatever the routers say; returns each module of experts and their number."""
    import torch

    def in_turn(module: Any, args: Sequence[Any], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def other(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.is_floating_point():
                return value
            return (torch.arange(value.numel(), device=value.device) % module.num_experts).view_as(value)

        return tuple(map(other, args)), {name: other(value) for name, value in options.items()}

    found = {}
    for name, module in model.named_modules():
        if is_experts(module):
            module.register_forward_pre_hook(in_turn, with_kwargs=True)
            found[name] = module.num_experts
    return found


def _is_in(modules: Iterable[str], name: str) -> bool:
    """Whether a parameter is in one of `modules`; PEFT puts a prefix before its name."""
    return any(f".{module}." in f".{name}" for module in modules)


def _may_be_idle(name: str, routed: Collection[str]) -> bool:
    """Whether a parameter is one expert's: a router sends these few tokens past most of them.

    Experts that are fused into one parameter get their gradient as one; those in modules that are `routed` get tokens.
    """
    if _is_in(routed, name):
        return False
    return ".experts." in name and any(part.isdecimal() for part in name.partition(".experts.")[2].split("."))


def _check_counts(context: Context, model: Any) -> Iterator[str]:
    """Counts and dtypes of the model in memory."""
    reported = context.report.parameters
    counted: dict[str, int] = {}
    trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        dtype = state.quant_type if state is not None else str(parameter.dtype).removeprefix("torch.")
        number = state.shape.numel() if state is not None else parameter.numel()
        counted[dtype] = counted.get(dtype, 0) + number
        trainable += number if parameter.requires_grad else 0
    if trainable != reported.trainable:
        yield f"{trainable:,} parameters are trainable, the report says {reported.trainable:,}"
    if sum(counted.values()) != reported.total:
        yield f"the model has {sum(counted.values()):,} parameters, the report says {reported.total:,}"
    for dtype in sorted({*counted, *reported.in_training}):
        found = counted.get(dtype, 0)
        expected = reported.in_training[dtype].parameters if dtype in reported.in_training else 0
        if found != expected:
            yield f"{found:,} parameters are {dtype}, the report says {expected:,}"


def _check_values(context: Context, model: Any) -> Iterator[str]:
    """NaN and infinity, also where the step's few tokens don't get to, and rows that were to be filled and are not."""
    import torch

    for name, parameter in model.named_parameters():
        if getattr(parameter, "quant_state", None) is not None:
            continue  # codes, whatever dtype they lie under
        # a sum needs no copy of the size of the parameter, and keeps what is not finite
        if parameter.is_floating_point() and not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            yield f"`{name}` is not finite"
    embeddings = context.report.embeddings
    matrices = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    for what, module in matrices.items():
        if module is None:
            continue
        # a head may have other rows from the start: Mllama's has 8 less
        if (what == "embeddings" or embeddings.resized) and module.weight.shape[0] != embeddings.rows_after:
            yield f"the {what} have {module.weight.shape[0]} rows, the report says {embeddings.rows_after}"
        # rows of the original may be zero, as padding is; those that ftload added are not, but where loading zeroes the
        # padding (Youtu)
        added = module.weight.detach()[embeddings.rows_before :]
        empty = (added.count_nonzero(dim=1) == 0).nonzero().flatten() + embeddings.rows_before
        empty = [row for row in empty.tolist() if row != embeddings.pad_token_id]
        if empty:
            yield f"row {empty[0]} of the {what}, which was added, is zero"


def _check_adapter(context: Context, model: Any) -> Iterator[str]:
    """Whether the adapter in memory is the one in the file: PEFT goes on with random values where one is missing."""
    import torch
    from safetensors import safe_open

    if context.report.adapter is None:
        return
    loaded = _adapter_in_memory(model)
    with safe_open(context.adapter_file, framework="pt") as file:
        stored = set(file.keys())
        for name in sorted(stored | loaded.keys()):
            if name not in loaded or name not in stored:
                yield f"`{name}` is " + ("not loaded" if name in stored else "random: the adapter does not have it")
                continue
            value, expected = loaded[name].detach().cpu(), file.get_tensor(name)
            if value.dtype != expected.dtype or not torch.equal(value, expected):
                yield f"`{name}` is not loaded as it is stored"
    kept = {value.data_ptr() for value in loaded.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in kept:
            yield f"`{name}` is trained, and no part of the adapter"
        elif not parameter.requires_grad and parameter.data_ptr() in kept:
            yield f"`{name}` is part of the adapter, and not trained"
        if ".lora_B." in name and parameter.count_nonzero() and starts_at_zero(context):
            yield f"`{name}` is not zero before the first step"
    if context.report.adapter.changes_base:
        from peft.tuners.lora import LoraLayer

        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                yield from check_residual(context, name, layer)


def _adapter_in_memory(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT would save of it, by the names in its file."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        # it takes a bias of B for a matrix that was saved in pieces
        warnings.filterwarnings("ignore", ".* LoRA tensor.* have invalid shape")
        return get_peft_model_state_dict(model, save_embedding_layers=False)


_TOKENS = 32


def _trained_tokens(context: Context) -> list[int]:
    """The ids of tokens whose rows are trained beside the adapter; some of them, where there are many."""
    adapter = context.report.adapter
    indices = {} if adapter is None else adapter.settings.get("trainable_token_indices", {})
    lists = indices.values() if isinstance(indices, Mapping) else [indices]
    return [token for tokens in lists for token in tokens[: _TOKENS // 8]][: _TOKENS // 4]


def _batch(
    tokenizer: PreTrainedTokenizerBase, device: torch.device, tokens: int, trained: Sequence[int]
) -> dict[str, torch.Tensor]:
    """One sequence of ids (int64, 1 × `tokens`): a text, those of `trained`, then ids from all over the vocabulary."""
    import torch

    text = tokenizer(f"{QUESTION} {ANSWER}", add_special_tokens=False)["input_ids"][: _TOKENS // 2]
    text = [*text, *trained]
    known = sorted(set(tokenizer.get_vocab().values()))
    rest = tokens - len(text)
    step = max(1, len(known) // rest)
    ids = torch.tensor([text + [known[place * step % len(known)] for place in range(rest)]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
