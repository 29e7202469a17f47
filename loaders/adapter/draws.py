"""The random numbers of one layer, as PEFT draws them while it wraps a whole model, one layer after another.

PEFT takes them from torch's one generator, so what a layer gets depends on all layers before it. Where each begins is
found by a rehearsal: every layer is wrapped on `meta`, where linear algebra costs nothing, and what would be drawn is
drawn. Then layers can be initialised in any order, several at a time.

Imported only where adapters are initialised: torch is imported here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class _From(TorchDispatchMode):
    """Everything drawn by this thread comes from `generator`; on `meta`, it is drawn and thrown away."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func is _aten.randn.default:
            drawn = torch.empty(args[0], dtype=kwargs.get("dtype"), device=kwargs.get("device"))
            func, args, kwargs = _aten.normal_.default, (drawn,), {}
        if not isinstance(args[0], torch.Tensor):
            raise NotImplementedError(f"PEFT draws by `{func}`, which was not known")
        values, *rest = args
        place = torch.empty(values.shape, dtype=values.dtype, device="cpu") if values.is_meta else values
        func(place, *rest, **{**kwargs, "generator": self._generator})
        return values


class Draws:
    """The state of the generator before each of some layers, in their order."""

    def __init__(self, rehearsals: list[Callable[[], object]]) -> None:
        """Each of `rehearsals` wraps a layer on `meta`."""
        self._rehearsals = rehearsals
        self._states: list[torch.Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Draw for the layer `number`, in this thread.

        The first one starts where torch's own generator stands, which is left alone.
        """
        generator = torch.Generator()
        generator.set_state(self._all_states()[number])
        with _From(generator):
            yield
        if not torch.equal(generator.get_state(), self._all_states()[number + 1]):
            raise AssertionError("the rehearsal drew other numbers than the layer took")

    def _all_states(self) -> list[torch.Tensor]:
        with self._lock:
            if not self._states:
                generator = torch.Generator()
                generator.set_state(torch.get_rng_state())
                states = [generator.get_state()]
                for rehearse in self._rehearsals:
                    with torch.device("meta"), _From(generator):
                        rehearse()
                    states.append(generator.get_state())
                self._states = states
            return self._states
