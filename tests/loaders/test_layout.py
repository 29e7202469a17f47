"""Files laid out beforehand are what the safetensors library writes, readable whatever the length of their states."""

from __future__ import annotations

from pathlib import Path

import torch
from ftload.loaders.checkpoint.tensors import DTYPE_CODES
from ftload.loaders.plan.layout import METADATA, lay_out
from ftload.loaders.steps.step import OutputTensor
from safetensors import safe_open
from safetensors.torch import save_file


def _output(name: str, value: torch.Tensor, *, reserve: int | None = None) -> OutputTensor:
    return OutputTensor(
        name=name,
        shape=tuple(value.shape) if reserve is None else (reserve,),
        dtype=DTYPE_CODES[str(value.dtype).removeprefix("torch.")],
        component="mlp",
        counted_as="x",
        parameters=value.numel(),
        variable=reserve is not None,
    )


def _bytes(value: torch.Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


TENSORS = {
    "z": torch.arange(3, dtype=torch.uint8),
    "ä": torch.arange(5, dtype=torch.bfloat16),
    "m": torch.arange(2, dtype=torch.float32).reshape(1, 2),
    "a": torch.arange(7, dtype=torch.float64),
    "h": torch.arange(3, dtype=torch.float16),
    "i": torch.arange(4, dtype=torch.int64),
    "b": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
}


def test_fixed_sizes_give_the_librarys_own_bytes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs", metadata=METADATA)
    layout = lay_out(_output(name, value) for name, value in TENSORS.items())
    content = bytearray(layout.size)
    content[: layout.fixed_begin] = layout.head({})
    for name, offset in layout.offsets().items():
        content[offset : offset + len(_bytes(TENSORS[name]))] = _bytes(TENSORS[name])
    assert bytes(content) == (tmp_path / "theirs").read_bytes()


def test_states_of_any_length_leave_the_rest_in_place(tmp_path: Path) -> None:
    for length in (1, 17, 100):
        states = {"s": torch.arange(length, dtype=torch.uint8), "t": torch.arange(3, dtype=torch.uint8)}
        outputs = [_output(name, value) for name, value in TENSORS.items()]
        layout = lay_out([*outputs, *(_output(name, value, reserve=100) for name, value in states.items())])
        content = bytearray(layout.size)
        content[: layout.fixed_begin] = layout.head({name: _bytes(value) for name, value in states.items()})
        for name, offset in layout.offsets().items():
            content[offset : offset + len(_bytes(TENSORS[name]))] = _bytes(TENSORS[name])
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(content)
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == METADATA
            assert sorted(opened.keys()) == sorted({**TENSORS, **states})
            for name, value in {**TENSORS, **states}.items():
                assert torch.equal(opened.get_tensor(name), value)
    assert len({path.stat().st_size for path in tmp_path.iterdir()}) == 1
