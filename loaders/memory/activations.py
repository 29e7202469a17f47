"""One training step without its tensors: what it saves for the backward pass, and what it holds at its peaks.

The model's own modules run forward, loss and backward on the `meta` device, where every operation has a result of the
right shape and dtype and no data. A dispatch mode sees each result come and go. The stack of layers is cut to one layer
of each kind, then to one more of each: what the one more adds is what every further layer adds.

Code that can't run on `meta` is stood in for (`stand_ins.py`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING, Any, Literal

from ..system.quiet import quiet_transformers
from .meta_kernels import four_bit_linear, kernels_of, liger_unlaunched, lora_linear, set_attention

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSetting:
    """The adapter that is trained."""

    layers: frozenset[str]
    """Full names of the linear layers that have one."""
    rank: int
    alpha: float
    dropout: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a model is trained."""

    attention: str
    """`flash_attention_2`, `sdpa` or `eager`."""
    checkpointing: bool
    lora: LoraSetting | None = None
    """None: all parameters are trained."""
    four_bit: frozenset[str] = frozenset()
    """Full names of the linear layers whose weights are 4-bit; where there are any, all else is float32, as k-bit
    preparation leaves it."""
    liger: bool = False
    router_loss: bool = False
    """Whether the load-balancing loss is asked for."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whose kernels are meant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What goes into one forward pass."""

    size: int
    """Sequences."""
    length: int
    """Tokens in each of them."""
    padded: bool = False
    """Whether some sequences are shorter: sdpa needs a mask then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What a step holds at one of its peaks beside weights and optimizer states, in bytes."""

    name: str
    activations: int
    """Tensors of the layers and the embedding that the backward pass still needs."""
    logits: int
    """Logits and, while the loss is computed, everything that goes with it."""
    gradients: int
    """Of parameters."""
    temporary: int
    """What the work of this moment itself needs."""

    @property
    def total(self) -> int:
        """Their sum."""
        return self.activations + self.logits + self.gradients + self.temporary


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """The memory of one training step, for all layers."""

    saved: int
    """Bytes of all storages saved for the backward pass, each counted once, parameters and buffers left out."""
    moments: tuple[Moment, ...]
    """The candidates for the peak, in the order of time: loss, each layer's backward pass, its end."""

    @property
    def peak(self) -> Moment:
        """The largest moment."""
        return max(self.moments, key=lambda moment: moment.total)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """A model with some of its layers, ready to train."""

    model: PreTrainedModel
    layers: tuple[nn.Module, ...]
    gradients: tuple[int, ...]
    """Bytes of each layer's gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What one step of a cut model held, in bytes."""

    saved: int
    held: int
    """When the last layer is done."""
    loss: int
    """Peak between the last norm's forward pass and the last layer's backward pass."""
    logits: int
    """Of the model's output, which the training loop holds until the step is over."""
    outer: int
    """Gradients that are new when the last layer's backward begins: the head's."""
    backward: tuple[int, ...]
    """Peak in each layer's backward."""
    after: int
    """Peak from the first layer's backward to the end; 0 where nothing there is trained."""


class Simulation:
    """A model's training step, to be run for batches of any size.

    `model` is a transformers model on `meta`; it is not changed.
    """

    def __init__(self, model: PreTrainedModel, setting: Setting) -> None:
        path, layers = _find_layers(model)
        kinds = _kinds(model, layers)
        self._setting = setting
        self._kinds = kinds
        self._order = tuple(dict.fromkeys(kinds))
        """The kinds as the base holds them: one layer of each, in the order in which they come first."""
        first = [kinds.index(kind) for kind in self._order]
        self._base = _cut(model, path, first, setting)
        self._more = {
            kind: _cut(model, path, sorted([*first, index]), setting)
            for kind, index in zip(self._order, first, strict=True)
        }
        counted = Counter(kinds)
        further = sum(size * (counted[kind] - 1) for size, kind in zip(self._base.gradients, self._order, strict=True))
        self.gradients = _gradient_bytes(self._base.model) + further
        """Bytes of all parameters' gradients."""

    def run(self, batch: Batch, *, accumulate: bool = False) -> Footprint:
        """Simulate one step on all layers.

        With `accumulate`, the gradients of an earlier pass are there from the beginning.
        """
        base = _step(self._base, self._setting, batch, accumulate)
        more = [_step(self._more[kind], self._setting, batch, accumulate) for kind in self._order]
        counted = Counter(self._kinds)
        further = [counted[kind] - 1 for kind in self._order]
        adds = tuple(run.held - base.held for run in more)
        saves = (run.saved - base.saved for run in more)
        given = self.gradients if accumulate else 0
        fresh = (0,) * len(adds) if accumulate else self._base.gradients
        held = base.held + sum(map(mul, further, adds))
        loss = Moment(name="loss", activations=held, logits=base.loss - base.held, gradients=given, temporary=0)
        gradients = given or self.gradients
        end = base.after + sum(map(mul, further, fresh)) + given - base.logits - gradients
        return Footprint(
            saved=base.saved + sum(map(mul, further, saves)),
            moments=(
                loss,
                *self._backward(more, adds, fresh, held, given),
                Moment(
                    name="end of the backward pass", activations=0, logits=base.logits, gradients=gradients,
                    temporary=max(0, end),
                ),
            ),
        )  # fmt: skip

    def _backward(
        self, more: list[_Run], adds: tuple[int, ...], fresh: tuple[int, ...], held: int, given: int
    ) -> Iterator[Moment]:
        """Each layer's backward pass, the last layer's first."""
        # a layer's own share: its peak without what earlier layers hold and later ones have left; it is that of the
        # second layer of its kind, since the first layer of all may have no gradient to pass on
        own = [
            run.backward[position + 1] - sum(adds[: position + 1]) - sum(fresh[position + 1 :])
            for position, run in enumerate(more)
        ]
        outer, logits = more[0].outer, more[0].logits
        positions = [self._order.index(kind) for kind in self._kinds]
        earlier = sum(adds[position] for position in positions)
        left = 0
        for number in reversed(range(len(positions))):
            position = positions[number]
            earlier -= adds[position]
            gradients = given + outer + left
            total = own[position] + earlier + left + given
            activations = min(held, total - gradients - logits)
            yield Moment(
                name=f"backward pass of layer {number + 1}", activations=activations, logits=logits,
                gradients=gradients, temporary=total - activations - logits - gradients,
            )  # fmt: skip
            held -= adds[position]
            left += fresh[position]


def layer_bytes(model: PreTrainedModel, setting: Setting) -> tuple[tuple[int, ...], int]:
    """Bytes of the weights of one layer of each kind, and of everything outside the layers, as they are trained."""
    path, layers = _find_layers(model)
    kinds = _kinds(model, layers)
    cut = _cut(model, path, [kinds.index(kind) for kind in dict.fromkeys(kinds)], setting)
    each = tuple(_weight_bytes(layer) for layer in cut.layers)
    return each, _weight_bytes(cut.model) - sum(each)


def _weight_bytes(module: nn.Module) -> int:
    # half a byte an element, and a byte for each 64 of them: the second quantisation's own share is below 1 %
    packed: Any = [part.shape for part in module.modules() if hasattr(part, "shape")]
    return sum(value.nbytes for value in module.parameters()) + sum(o * i // 2 + o * i // 64 for o, i in packed)


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers and its name."""
    from torch import nn

    depth = model.config.get_text_config().num_hidden_layers
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    # the outermost one: experts inside a layer may be as many as there are layers
    return min(stacks, key=lambda stack: stack[0].count("."))


_MANY_KINDS = 8


def _kinds(model: PreTrainedModel, layers: nn.ModuleList) -> list[Any]:
    """For each layer a value that is equal for layers that do the same."""
    types = vars(model.config.get_text_config()).get("layer_types") or [None] * len(layers)
    kinds = [(types[number], _shapes(layer), _settings(layer)) for number, layer in enumerate(layers)]
    if len(set(kinds)) > _MANY_KINDS:
        # some attribute numbers the layers
        return [kind[:2] for kind in kinds]
    return kinds


def _shapes(layer: nn.Module) -> Any:
    return type(layer), tuple((name, value.shape, value.dtype) for name, value in layer.named_parameters())


def _settings(layer: nn.Module) -> Any:
    return tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and key != "layer_idx"
    )


def _cut(model: PreTrainedModel, path: str, chosen: list[int], setting: Setting) -> _Cut:
    """A copy of the model with the chosen layers, made ready for training."""
    from torch import nn

    stack: Any = model.get_submodule(path)
    memo: dict[int, Any] = {id(stack): nn.ModuleList([deepcopy(stack[number]) for number in chosen])}
    copy = deepcopy(model, memo)
    text = copy.config.get_text_config()
    types = vars(text).get("layer_types")
    if types is not None:
        text.layer_types = [types[number] for number in chosen]
    text.num_hidden_layers = len(chosen)
    with quiet_transformers():
        _prepare(copy, path, chosen, setting)
    layers: Any = copy.get_submodule(path)
    return _Cut(model=copy, layers=tuple(layers), gradients=tuple(_gradient_bytes(layer) for layer in layers))


def _gradient_bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters() if value.requires_grad)


def _prepare(model: PreTrainedModel, path: str, chosen: list[int], setting: Setting) -> None:
    """What `load_prepared` does, in its order."""
    import torch

    set_attention(model, setting.attention)
    names = {f"{path}.{position}": f"{path}.{number}" for position, number in enumerate(chosen)}
    if setting.four_bit:
        for name, parent, leaf in _places(model, setting.four_bit, names):
            setattr(parent, leaf, four_bit_linear(model.get_submodule(name)))
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    if setting.checkpointing:
        # what k-bit preparation asks for ends in torch's default, transformers' own is the other one
        model.gradient_checkpointing_enable({"use_reentrant": bool(setting.four_bit)})
        if setting.lora is not None:
            model.enable_input_require_grads()
    lora = setting.lora
    if lora is not None:
        model.requires_grad_(False)
        for name, parent, leaf in _places(model, lora.layers, names):
            base = model.get_submodule(name)
            setattr(parent, leaf, lora_linear(base, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout))
    model.train()


def _places(
    model: PreTrainedModel, wanted: frozenset[str], names: Mapping[str, str]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, parent and leaf of the modules of a cut model that are among `wanted` in the whole one."""
    for name in [name for name, _ in model.named_modules()]:
        prefix = next((prefix for prefix in names if name.startswith(f"{prefix}.")), None)
        full = name if prefix is None else names[prefix] + name.removeprefix(prefix)
        if full in wanted:
            parent, _, leaf = name.rpartition(".")
            yield name, model.get_submodule(parent), leaf


def _step(cut: _Cut, setting: Setting, batch: Batch, accumulate: bool) -> _Run:
    """Forward, loss and backward of one batch."""
    import torch

    model = cut.model
    tokens = torch.zeros(batch.size, batch.length, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if batch.padded:
        inputs["attention_mask"] = torch.ones_like(tokens)
    if setting.router_loss:
        inputs["output_router_logits"] = True
    if accumulate:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    memory = _memory_mode(model, inputs, setting)
    count = len(cut.layers)
    hooks = [
        layer.register_forward_pre_hook(_watch_input(memory, number), with_kwargs=True)
        for number, layer in enumerate(cut.layers)
    ]
    decoder: Any = model.get_decoder()
    hooks.append(decoder.register_forward_hook(_watch_decoder(memory)))
    hooks.append(cut.layers[-1].register_forward_hook(_watch_output(memory, cut)))
    try:
        with quiet_transformers(), liger_unlaunched(model, wanted=setting.liger), kernels_of(setting.device), memory:
            with torch.autograd.graph.saved_tensors_hooks(memory.pack, lambda saved: saved):
                output = model(**inputs)
            output.loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    logits = output.get("logits")
    memory.enter("done")
    return _Run(
        saved=memory.saved,
        held=memory.held,
        loss=memory.peaks["loss"],
        logits=0 if logits is None else logits.untyped_storage().nbytes(),
        outer=memory.outer,
        backward=tuple(memory.peaks.get(f"backward {number}", 0) for number in range(count)),
        after=memory.peaks.get("embedding", 0),
    )


def _watch_input(memory: Any, number: int) -> Callable[..., None]:
    """Notice when the gradient of a layer's input is there: its backward pass is over."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: memory.enter(f"backward {number - 1}" if number else "embedding"))

    return hook


def _watch_decoder(memory: Any) -> Callable[..., None]:
    """Notice when only head and loss are left of the forward pass."""

    def hook(*_: Any) -> None:
        memory.held = memory.live
        memory.enter("loss")

    return hook


def _watch_output(memory: Any, cut: _Cut) -> Callable[..., None]:
    """Notice when the last layer's backward pass begins."""

    def begin(_: Tensor) -> None:
        gradients = (parameter.grad for parameter in cut.model.parameters())
        memory.outer = sum(value.nbytes for value in gradients if value is not None and not memory.is_given(value))
        memory.enter(f"backward {len(cut.layers) - 1}")

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(begin)

    return hook


_CUDA_BLOCK = 512
"""What PyTorch's CUDA allocator rounds sizes up to."""


def _memory_mode(model: PreTrainedModel, inputs: Mapping[str, Any], setting: Setting) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    block = _CUDA_BLOCK if setting.device == "cuda" else 1
    head: Any = model.get_output_embeddings()
    # on a GPU, Liger multiplies straight into the head's gradient; elsewhere into a new tensor that it adds
    straight = (torch.ops.aten.mm.default, torch.ops.aten._to_copy.default) if setting.liger else ()

    class Memory(TorchDispatchMode):
        """Counts the bytes of all storages that come into being while it is active, from then until they are freed."""

        def __init__(self) -> None:
            super().__init__()
            self.live = self.peak = self.held = self.saved = self.outer = 0
            self.peaks: dict[str, int] = {}
            self.segment = "forward"
            parameters = [*model.parameters()]
            given = [*parameters, *(p.grad for p in parameters), *model.buffers(), *inputs.values()]
            self.given = {value.untyped_storage()._cdata for value in given if isinstance(value, torch.Tensor)}
            self.seen: dict[int, Any] = {}
            self.packed: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                # transformers asks whether nothing is padded or packed, Liger how many labels count
                return "attention_mask" not in inputs if args[0].dtype == torch.bool else 1
            if func is torch.ops.aten.equal.default:
                return True
            result = func(*args, **(kwargs or {}))
            if self.segment == "loss" and func in straight and result.shape == head.weight.shape:
                return result
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    self.see(value.untyped_storage())
            return result

        def is_given(self, value: Tensor) -> bool:
            return value.untyped_storage()._cdata in self.given

        def see(self, storage: Any) -> None:
            key = storage._cdata
            if key in self.seen or key in self.given:
                return
            size = -(-storage.nbytes() // block) * block

            def freed(_: Any) -> None:
                self.live -= size
                del self.seen[key]
                self.packed.discard(key)

            self.seen[key] = weakref.ref(storage, freed)
            self.live += size
            self.peak = max(self.peak, self.live)

        def pack(self, saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage._cdata in self.seen and storage._cdata not in self.packed:
                self.packed.add(storage._cdata)
                self.saved += storage.nbytes()
            return saved

        def enter(self, segment: str) -> None:
            self.peaks[self.segment] = max(self.peaks.get(self.segment, 0), self.peak)
            self.segment = segment
            self.peak = self.live

    return Memory()
