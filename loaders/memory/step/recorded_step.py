"""One training step of a cut model on `meta`, with every storage recorded from its allocation until it is freed.

This module imports torch: import it where a step is run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...model.transformers_internals import layer_hooks
from ...system.quiet import quiet_transformers
from .cut_model import CutModel
from .losses import step_loss
from .meta_experts import count_repeats
from .meta_kernels import kernels_of, liger_unlaunched
from .setting import Batch, PeftSetting, Setting

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """What one step of a cut model held, in bytes; gradients that an earlier pass left are not included."""

    saved: int
    """Storages saved for the backward pass, parameters, buffers and inputs left out."""
    held: int
    """When the forward pass of the last layer is done."""
    forward_peak: int
    """Peak until the forward pass of the last layer is done: work such as DoRA's on whole weights needs room."""
    loss_peak: int
    """Peak from the last norm's forward pass until the last layer's backward pass begins."""
    logits: int
    """The model's output, where the training loop holds it until the step is over."""
    head_gradients: int
    """Gradients that exist when the last layer's backward pass begins."""
    backward_peaks: tuple[int, ...]
    """Peak in each layer's backward pass."""
    end_peak: int
    """Peak after the first layer's backward pass; 0 where nothing before that layer is trained."""


def record_step(cut: CutModel, setting: Setting, batch: Batch, *, accumulate: bool) -> RecordedStep:
    """Run forward, loss and backward of one batch; with `accumulate`, all gradients are there from the beginning."""
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
    recorder = _Recorder(model, inputs, setting)
    decoder: Any = model.get_decoder()
    count_repeats(model, recorder)
    hooks = ExitStack()
    for number, layer in enumerate(cut.layers):
        hooks.enter_context(layer_hooks(layer, *_on_layer(recorder, cut, number)))
    hooks.callback(decoder.register_forward_hook(_on_decoder_output(recorder)).remove)
    try:
        if isinstance(setting.lora, PeftSetting):
            from .peft_layers import autocast_for_peft

            hooks.enter_context(autocast_for_peft(setting))
        with quiet_transformers(), liger_unlaunched(model, wanted=setting.liger), kernels_of(setting.device), recorder:
            with (
                torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda saved: saved),
                nullcontext() if cut.autocast is None else cut.autocast.region(),
            ):
                loss, outputs = step_loss(
                    model, inputs, setting.loss, product_dtype=torch.bfloat16 if setting.autocast else None
                )
            logits = outputs.get("logits")
            del outputs
            if setting.autocast and logits is not None:
                logits = logits.float()  # accelerate's conversion of outputs
            if not setting.keeps_outputs:
                logits = None
            loss.backward()
    finally:
        hooks.close()
        count_repeats(model, None)
        model.zero_grad()
    recorder.enter("done")
    return RecordedStep(
        saved=recorder.saved,
        held=recorder.held,
        forward_peak=recorder.peaks["forward"],
        loss_peak=recorder.peaks["loss"],
        logits=0 if logits is None else logits.untyped_storage().nbytes(),
        head_gradients=recorder.head_gradients,
        backward_peaks=tuple(recorder.peaks.get(f"backward {number}", 0) for number in range(len(cut.layers))),
        end_peak=recorder.peaks.get("embedding", 0),
    )


def _on_layer(
    recorder: _Recorder, cut: CutModel, number: int
) -> tuple[Callable[[Tensor], None], Callable[[Any], None]]:
    """A layer's backward pass is over when its input's gradient exists; the last layer's begins with its output's."""

    def begin(_: Tensor) -> None:
        gradients = (parameter.grad for parameter in cut.model.parameters())
        recorder.head_gradients = sum(
            value.nbytes for value in gradients if value is not None and not recorder.is_given(value)
        )
        recorder.enter(f"backward {number}")

    def before(hidden: Tensor) -> None:
        if hidden.requires_grad:
            hidden.register_hook(lambda _: recorder.enter(f"backward {number - 1}" if number else "embedding"))

    def after(output: Any) -> None:
        if number == len(cut.layers) - 1:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(begin)

    return before, after


def _on_decoder_output(recorder: _Recorder) -> Callable[..., None]:
    """After the decoder, only head and loss are left of the forward pass."""

    def hook(*_: Any) -> None:
        recorder.held = recorder.live
        recorder.enter("loss")

    return hook


_CUDA_BLOCK = 512
"""What PyTorch's CUDA allocator rounds sizes up to."""


class _Recorder(TorchDispatchMode):
    """Counts the bytes of all storages allocated while it is active, each until it is freed.

    Parameters, buffers, inputs and gradients of an earlier pass are given: they are not counted.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], setting: Setting) -> None:
        super().__init__()
        self.live = self.peak = self.held = self.saved = self.head_gradients = 0
        self.peaks: dict[str, int] = {}
        """Of the segments that are over, by name: `forward`, `loss`, `backward 3`, …, `embedding`."""
        self.segment = "forward"
        self._block = _CUDA_BLOCK if setting.device == "cuda" else 1
        self._has_mask = "attention_mask" in inputs
        head: Any = model.get_output_embeddings()
        self._head = head
        # on a GPU, Liger multiplies straight into the head's gradient; elsewhere into a new tensor that it adds
        aten = torch.ops.aten
        self._in_place = (aten.mm.default, aten._to_copy.default) if setting.liger and setting.loss == "model" else ()
        # the CUDA kernel of softmax's backward pass is given gradient · result (`SoftMax.cu`), log-softmax's is not
        self._multiplies_first = aten._softmax_backward_data.default if setting.device == "cuda" else None
        parameters = [*model.parameters()]
        given = [*parameters, *(p.grad for p in parameters), *model.buffers(), *inputs.values()]
        self._given = {value.untyped_storage()._cdata for value in given if isinstance(value, torch.Tensor)}
        self._seen: dict[int, Any] = {}
        self._times: dict[int, int] = {}
        """How often each storage counts."""
        self._now, self._looks_for_peaks = 1, True
        self._packed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # transformers asks whether nothing is padded or packed, Liger how many labels count
            return not self._has_mask if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.equal.default:
            return True
        product = torch.empty_like(args[0]) if func is self._multiplies_first else None
        if product is not None:
            self._see(product.untyped_storage())
        result = func(*args, **(kwargs or {}))
        if self.segment == "loss" and func in self._in_place and result.shape == self._head.weight.shape:
            return result
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return result

    def is_given(self, value: Tensor) -> bool:
        """Whether a tensor was there before."""
        return value.untyped_storage()._cdata in self._given

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen or key in self._given:
            return
        size = self._rounded(storage)

        def freed(_: Any) -> None:
            self.live -= size * self._times.pop(key)
            del self._seen[key]
            self._packed.discard(key)

        self._seen[key] = weakref.ref(storage, freed)
        self._times[key] = self._now
        self.live += size * self._now
        if self._looks_for_peaks:
            self.peak = max(self.peak, self.live)

    def begin(self, times: int) -> None:
        """As `Repeats` says."""
        self._now, self._looks_for_peaks = times, False

    def end(self) -> None:
        """As `Repeats` says."""
        self._now, self._looks_for_peaks = 1, True
        self.peak = max(self.peak, self.live)

    def count(self, value: Tensor, times: int) -> None:
        """As `Repeats` says."""
        storage = value.untyped_storage()
        if storage._cdata in self._seen:
            self.live += self._rounded(storage) * (times - self._times[storage._cdata])
            self._times[storage._cdata] = times

    def _rounded(self, storage: Any) -> int:
        """What the allocator gives out for it."""
        return -(-storage.nbytes() // self._block) * self._block

    def pack(self, saved: Tensor) -> Tensor:
        """Count a tensor that autograd saves for the backward pass; each storage once."""
        storage = saved.untyped_storage()
        if storage._cdata in self._seen and storage._cdata not in self._packed:
            self._packed.add(storage._cdata)
            self.saved += storage.nbytes() * self._times[storage._cdata]
        return saved

    def enter(self, segment: str) -> None:
        """End the present segment of the step and begin another."""
        self.peaks[self.segment] = max(self.peaks.get(self.segment, 0), self.peak)
        self.segment = segment
        self.peak = self.live
