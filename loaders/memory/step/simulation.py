"""The memory of a training step of any model, simulated on `meta`: what it saves for the backward pass, and its peaks.

The model's own modules run forward, loss and backward on the `meta` device, where results have shapes and dtypes, and
no data. Not all layers run. Layers that do the same are of one kind; a *base* model has one layer of each kind, and for
each kind q another model has a second layer of that kind right behind the first. What the second layer adds is what
every further layer of its kind adds. In bytes, with layers k = 1 … n and n_q of them of kind q:

    a_k  activations that layer k keeps until its backward pass
    g_k  gradients that layer k's backward pass creates; 0 with gradient accumulation, where they are there already
    G    gradients that are there from the beginning; 0 without gradient accumulation
    H    held when the forward pass of the last layer is done
    w_k  what layer k's backward pass holds beside earlier layers' activations and later layers' gradients
    P_k  peak of layer k's backward pass

a, g and w are equal for layers of a kind: a_q, g_q, w_q. Kinds are ordered by their first layers. With p_q the measured
peak of the backward pass of the second layer of kind q:

    a_q = H(base with a second layer of kind q) - H(base)
    H   = H(base) + Σ_q (n_q - 1) a_q
    w_q = p_q - Σ_{r ≤ q} a_r - Σ_{r > q} g_r
    P_k = w_k + Σ_{j < k} a_j + Σ_{j > k} g_j + G

The second layer gives w_q, since the first layer of all may have no gradient to pass on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING

from .cut_model import cut_model, gradient_bytes, layer_kinds
from .setting import Batch, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .recorded_step import RecordedStep


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


class Simulation:
    """A model's training step, to be run for batches of any size.

    `model` is a transformers model on `meta`; it is not changed.
    """

    def __init__(self, model: PreTrainedModel, setting: Setting) -> None:
        kinds = layer_kinds(model, setting.lora)
        order = tuple(dict.fromkeys(kinds))
        first = [kinds.index(kind) for kind in order]
        self._setting = setting
        self._layers = [order.index(kind) for kind in kinds]
        """The kind of each layer, as its position in the base."""
        counts = Counter(self._layers)
        self._further = [counts[kind] - 1 for kind in range(len(order))]
        """n_q - 1 for each kind q."""
        self._base = cut_model(model, first, setting)
        self._with_second = [cut_model(model, sorted([*first, index]), setting) for index in first]
        """For each kind the base with a second layer of that kind."""
        self.gradients = gradient_bytes(self._base.model) + sum(map(mul, self._further, self._base.gradients))
        """Bytes of all parameters' gradients."""

    def run(self, batch: Batch, *, accumulate: bool = False) -> Footprint:
        """Simulate one step on all layers.

        With `accumulate`, the gradients of an earlier pass are there from the beginning.
        """
        from .recorded_step import record_step

        base = record_step(self._base, self._setting, batch, accumulate=accumulate)
        with_second = [record_step(cut, self._setting, batch, accumulate=accumulate) for cut in self._with_second]
        a = [step.held - base.held for step in with_second]
        g = [0] * len(a) if accumulate else [*self._base.gradients]
        given = self.gradients if accumulate else 0
        held = base.held + sum(map(mul, self._further, a))
        saved = base.saved + sum(map(mul, self._further, (step.saved - base.saved for step in with_second)))
        end_peak = base.end_peak + sum(map(mul, self._further, g)) + given
        return Footprint(
            saved=saved,
            moments=(
                Moment(
                    # or the last layer's forward pass just before, where its work needs more room than the loss
                    name="loss", activations=held, logits=base.loss_peak - base.held, gradients=given,
                    temporary=max(0, base.forward_peak - base.loss_peak),
                ),
                *self._backward_moments(with_second, a=a, g=g, held=held, given=given),
                Moment(
                    name="end of the backward pass", activations=0, logits=base.logits, gradients=self.gradients,
                    temporary=max(0, end_peak - base.logits - self.gradients),
                ),
            ),
        )  # fmt: skip

    def _backward_moments(
        self, with_second: list[RecordedStep], *, a: list[int], g: list[int], held: int, given: int
    ) -> Iterator[Moment]:
        """P_k of each layer's backward pass, the last layer's first; `held` is H, `given` is G."""
        w = [step.backward_peaks[q + 1] - sum(a[: q + 1]) - sum(g[q + 1 :]) for q, step in enumerate(with_second)]
        logits, head_gradients = with_second[0].logits, with_second[0].head_gradients
        earlier, later = sum(a[q] for q in self._layers), 0
        for k in reversed(range(len(self._layers))):
            q = self._layers[k]
            earlier -= a[q]
            total = w[q] + earlier + later + given
            gradients = given + head_gradients + later
            if not with_second[q].backward_peaks[q + 1]:
                total = gradients + logits  # it has none, as nothing is trained in it or before
            activations = min(held, total - gradients - logits)
            yield Moment(
                name=f"backward pass of layer {k + 1}", activations=activations, logits=logits, gradients=gradients,
                temporary=total - activations - logits - gradients,
            )  # fmt: skip
            held -= a[q]
            later += g[q]
