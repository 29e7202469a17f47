"""The model without its weights.

transformers itself loads the checkpoint's *headers* into a model on the `meta` device, so that what it renames, drops,
ties, keeps in float32 or finds missing is its own answer, for every architecture that it knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.formats.interface import StoredFormat
from ..checkpoint.formats.registry import claimed_format
from ..errors import CheckpointError, said_by
from ..system.quiet import quiet_transformers
from .components import LinearLayer, component_of
from .experts.fused import FusedExperts, find_experts
from .linear_layers import linear_layers, quantisable_modules
from .model_class import LoadedAs, choose_class, unknown_to_auto
from .on_meta import LEAST_PARTS, PARTS_A_TENSOR, building, empty_model, load_on_meta
from .tensor_map import (
    Group,
    ModelTensor,
    SavedModel,
    kept_packed,
    map_tensors,
    said_of_dropped,
    saved_names,
    saved_tensors,
)
from .ties import tie_equal_weights
from .towers import LeftOut, find_left_out, tower_modules
from .transformers_internals import forget_stored_names, initialise_nothing, state_to_save

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Skeleton:
    """A model on the `meta` device and everything about it that a plan needs."""

    model: PreTrainedModel
    groups: tuple[Group, ...]
    """What the stored tensors become in the model."""
    saved: SavedModel
    """How the model saves them."""
    tensors: tuple[ModelTensor, ...]
    """What the two give."""
    layers: tuple[LinearLayer, ...]
    """Every linear layer, in module order."""
    fused_experts: tuple[str, ...]
    """Parameters of three dimensions that hold the weights of many experts."""
    experts: tuple[FusedExperts, ...]
    """Those of them that can be 4-bit, and adapted expert by expert."""
    never_trained: tuple[str, ...]
    """Parameters that the model's class makes without a gradient, such as the biases that balance experts."""
    embedding: str
    """Name of the input embedding's parameter."""
    head: str | None
    rows_before: int
    rows_after: int
    tied: bool
    stored_quantization: dict[str, Any] | None
    """The `quantization_config` of a checkpoint whose weights stay packed."""
    left_out: LeftOut | None
    """What the checkpoint holds beside this model."""
    towers: tuple[str, ...]
    """The modules that text does not pass through."""
    warnings: tuple[str, ...]

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration, after resizing."""
        return self.model.config

    def with_fused_experts(self) -> Skeleton:
        """The same, with experts that can be 4-bit as one tensor a projection, whatever they are stored in."""
        saved = replace(self.saved, experts={fused.parameter: fused for fused in self.experts})
        tensors = tuple(tensor for group in self.groups for tensor in saved_tensors(group, saved))
        return replace(self, saved=saved, tensors=tensors)


def build_skeleton(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    *,
    trust_remote_code: bool,
    tokenizer_size: int,
    fuse_experts: bool = False,
    headers_only: bool = False,
) -> Skeleton:
    """Load the headers of `checkpoint` into a model on `meta` and grow its embeddings to fit the tokenizer.

    With `fuse_experts`, experts that can be 4-bit are one tensor a projection, as the model has them, whatever they are
    stored in.
    Where a tied parameter is stored all the same, weights are read, unless `headers_only`: see `ties.py`.
    Raises `CheckpointError` when the model is not a causal language model, or keys are missing, unexpected or of
    another shape.
    """
    loaded = load_headers(checkpoint, config, trust_remote_code=trust_remote_code, headers_only=headers_only)
    model, groups, warnings, left_out = loaded.model, loaded.groups, list(loaded.warnings), loaded.left_out
    model_class, config, most_parts = type(model), loaded.config, _most_parts(checkpoint)
    section, claimed = loaded.section, loaded.claimed
    if unknown_to_auto(config):
        warnings.append(
            f"AutoModelForCausalLM can't load a `{config.model_type}` by itself: load what is written with "
            f"`load_prepared`, or with `{model_class.__name__}`"
        )

    embedding, head = _embedding_names(model)
    shapes_before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    rows_before = shapes_before[embedding][0]
    rows_after = rows_before
    if tokenizer_size > rows_before:
        rows_after = max(rows_before, -(-tokenizer_size // 8) * 8)
        resize_embeddings(model, rows_after)
    with building(model_class, most_parts):
        fresh = empty_model(model_class, model.config)
    if rows_after > rows_before:
        _check_loadable(model, fresh)
    kept = claimed.kept_settings(section) if claimed and section and not checkpoint.dequantize else None
    quantisable = quantisable_modules(fresh, kept)
    if claimed is not None and quantisable and not checkpoint.packed:
        raise CheckpointError(
            f"config.json of `{checkpoint.source.model}` says {claimed.name}, but no tensor is stored so: "
            f"`{min(quantisable)}.weight` is not",
            hint="config.json and the weights must belong together",
        )

    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    head_module = head.removesuffix(".weight") if head else None
    towers = tower_modules(model)
    packed = frozenset(
        group.parameters[0].removesuffix(".weight") for group in groups if kept_packed(group.sources) is not None
    )
    layers = tuple(linear_layers(model, classes, head_module, towers, packed))
    experts = find_experts(model)
    state = _state_to_save(model, is_grown=rows_after > rows_before)
    saved = SavedModel(
        model=model,
        state=state,
        names=saved_names(model, groups, state),
        shapes_before=shapes_before,
        quantisable={f"{layer.name}.weight": layer for layer in layers if layer.name in quantisable},
        experts={fused.parameter: fused for fused in experts} if fuse_experts else {},
        stays_packed=checkpoint.stays_packed,
        classes=classes,
        head=head_module,
    )
    return Skeleton(
        model=model,
        groups=tuple(groups),
        saved=saved,
        tensors=tuple(tensor for group in groups for tensor in saved_tensors(group, saved)),
        layers=layers,
        fused_experts=tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() == 3 and component_of(name, classes, head=head_module) == "experts"
        ),
        experts=experts,
        never_trained=tuple(name for name, parameter in fresh.named_parameters() if not parameter.requires_grad),
        embedding=embedding,
        head=head,
        rows_before=rows_before,
        rows_after=rows_after,
        tied=head is not None and model.get_parameter(head) is model.get_parameter(embedding),
        stored_quantization=kept,
        left_out=left_out,
        towers=towers,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedHeaders:
    """A checkpoint's headers, loaded into a model on `meta` as it stands."""

    model: PreTrainedModel
    config: PretrainedConfig
    """That the class takes."""
    section: dict[str, Any] | None
    """Its `quantization_config`."""
    claimed: StoredFormat | None
    """The format that this means."""
    groups: tuple[Group, ...]
    """What its stored tensors become."""
    left_out: LeftOut | None
    warnings: tuple[str, ...]

    @property
    def embedding(self) -> str:
        """Name of the input embedding's parameter."""
        return _embedding_names(self.model)[0]

    @property
    def head(self) -> str | None:
        """Name of the output embedding's parameter."""
        return _embedding_names(self.model)[1]


def load_headers(
    checkpoint: Checkpoint, config: PretrainedConfig, *, trust_remote_code: bool, headers_only: bool = False
) -> LoadedHeaders:
    """Load the headers of `checkpoint` into a model, and tie what is equal. Reads and raises as `build_skeleton`."""
    loaded_as = choose_class(checkpoint.source, config, trust_remote_code=trust_remote_code)
    section = _quantization_section(loaded_as.config)
    claimed = claimed_format(checkpoint.source, section, checkpoint.packed)
    most_parts = _most_parts(checkpoint)
    left_out = None
    if loaded_as.whole is not None:
        with building(loaded_as.whole.model_class, most_parts):
            left_out = find_left_out(checkpoint, empty_model(loaded_as.whole.model_class, loaded_as.whole.config))
    model, groups, warnings = _load(checkpoint, loaded_as, left_out, most_parts)
    warnings += tie_equal_weights(checkpoint, model, groups, headers_only=headers_only)
    return LoadedHeaders(
        model=model, config=loaded_as.config, section=section, claimed=claimed, groups=tuple(groups),
        left_out=left_out, warnings=tuple(warnings),
    )  # fmt: skip


def _most_parts(checkpoint: Checkpoint) -> int:
    """Modules and parameters that the model may have."""
    return PARTS_A_TENSOR * len(checkpoint.tensors) + LEAST_PARTS


def _load(
    checkpoint: Checkpoint, loaded_as: LoadedAs, left_out: LeftOut | None, most_parts: int
) -> tuple[PreTrainedModel, list[Group], list[str]]:
    """Load the headers; returns the model, what its stored tensors become, and warnings."""
    import torch

    state = {
        name: torch.empty(meta.shape, dtype=torch.bfloat16, device="meta")
        for name, meta in checkpoint.tensors.items()
        if left_out is None or name not in left_out.names
    }
    with building(loaded_as.model_class, most_parts):
        model, info = load_on_meta(loaded_as.model_class, loaded_as.config, state)
    _check_keys(checkpoint, model, info)
    if any(tensor.format is not None and not tensor.stays_packed for tensor in checkpoint.packed):
        forget_stored_names(model)
    groups, dropped = map_tensors(checkpoint, model, state)
    return model, groups, said_of_dropped(dropped)


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give the embeddings so many rows, without values."""
    initialise_nothing(model)
    with quiet_transformers():
        model.resize_token_embeddings(rows, mean_resizing=False)


def _state_to_save(model: PreTrainedModel, *, is_grown: bool) -> dict[str, Tensor]:
    try:
        return state_to_save(model)
    except RuntimeError as error:  # Reformer's head gets a bias that its class does not know to be tied
        raise CheckpointError(
            f"transformers can't save `{type(model).__name__}`"
            + (" after its embeddings have grown" if is_grown else "")
            + f": {said_by(error)}",
            hint=_NO_MORE_TOKENS if is_grown else None,
        ) from error


def _quantization_section(config: PretrainedConfig) -> dict[str, Any] | None:
    for part in (config, config.get_text_config()):
        section: Any = getattr(part, "quantization_config", None)
        if section is not None:
            return section if isinstance(section, dict) else section.to_dict()
    return None


def _check_keys(checkpoint: Checkpoint, model: PreTrainedModel, info: dict[str, Any]) -> None:
    problems = []
    is_as_linear = any(tensor.as_linear for tensor in checkpoint.packed)
    mismatched = [
        (name, tuple(stored), tuple(expected))
        for name, stored, expected in sorted(info["mismatched_keys"])
        # bitsandbytes stores the weights of GPT-2's Conv1D transposed
        if not (is_as_linear and tuple(stored) == tuple(expected)[::-1])
    ]
    if mismatched:
        name, stored, expected = mismatched[0]
        problems.append(
            f"tensor `{name}` has shape {list(stored)}, the configuration asks for {list(expected)}{_more(mismatched)}"
        )
    for what, keys in (("lacks", info["missing_keys"]), ("has the unexpected", info["unexpected_keys"])):
        if keys:
            problems.append(f"{what} tensor `{sorted(keys)[0]}`{_more(keys)}")
    if problems:
        raise CheckpointError(
            f"`{checkpoint.source.model}` does not fit `{type(model).__name__}`: {'; '.join(problems)}",
            hint="config.json and the weights must belong together",
        )


def _more(items: Any) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


_NO_MORE_TOKENS = "use a tokenizer with no more tokens than the embeddings have rows; an added pad token counts"


def _check_loadable(resized: PreTrainedModel, fresh: PreTrainedModel) -> None:
    """Whether what is resized fits a model of its own configuration: nobody could load it otherwise.

    Raises `CheckpointError` naming the first parameter or buffer that does not.
    """
    shapes = {name: tuple(value.shape) for name, value in fresh.state_dict().items()}
    for name, value in resized.state_dict().items():
        if name in shapes and shapes[name] != tuple(value.shape):
            raise CheckpointError(
                f"the embeddings have to grow, and nobody could load `{type(resized).__name__}` after that: `{name}` "
                f"has shape {list(value.shape)}, the configuration then asks for {list(shapes[name])}",
                hint=_NO_MORE_TOKENS,
            )


def _embedding_names(model: PreTrainedModel) -> tuple[str, str | None]:
    names = {id(module): name for name, module in model.named_modules()}
    output = model.get_output_embeddings()
    head = f"{names[id(output)]}.weight" if output is not None else None
    return f"{names[id(model.get_input_embeddings())]}.weight", head
