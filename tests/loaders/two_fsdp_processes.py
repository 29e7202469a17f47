"""One of two FSDP2 processes on a CPU: `torchrun … two_fsdp_processes.py OUT PREPARED…`; each takes one step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from ftload.loaders.load import load_prepared
from torch.distributed.tensor import DTensor

TOKENS = (2, 24)
"""Two sequences, one for each process."""


def batch() -> torch.Tensor:
    return torch.randint(3, 90, TOKENS, generator=torch.Generator().manual_seed(1))


def loaded(directory: str | Path) -> Any:
    """Without dropout, and with an adapter whose B is not zero: else A has no gradient."""
    model, _ = load_prepared(directory)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """Its step is the gradient itself, where AdamW's first is little more than its sign."""
    return torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: _whole(one).detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def _whole(parameter: Any) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _step(accelerator: Accelerator, directory: str) -> dict[str, Any]:
    model = loaded(directory)
    states = {name: one.quant_state for name, one in model.named_parameters() if hasattr(one, "quant_state")}
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    parameters = dict(model.named_parameters())
    before = trained(model)
    ids = batch()[accelerator.process_index :: accelerator.num_processes]
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    after = trained(model)
    return {
        "losses": accelerator.gather(loss.detach().float().reshape(1)),
        "change": {name: after[name] - value for name, value in before.items()},
        "quantised": list(states),
        "statistics": _bytes_of(states.values()),
        "held": {name: one.to_local().nbytes for name, one in parameters.items() if isinstance(one, DTensor)},
        "nbytes": {name: one.nbytes for name, one in parameters.items()},
    }


def _bytes_of(states: Iterable[Any]) -> int:
    """What they hold, the offset aside; experts share the maps."""
    tensors = [
        tensor
        for state in states
        for one in (state, state.state2)
        for tensor in ((one.absmax, one.code) if one is not None else ())
    ]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def main(out: Path, directories: list[str]) -> None:
    PartialState(cpu=True)
    for directory in directories:
        AcceleratorState._reset_state()  # a plugin keeps the class of the first model's layers
        # accelerate has FSDP for GPUs alone; what it does then is the same on a CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )  # fmt: skip
        accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
        assert accelerator.is_fsdp2
        result = _step(accelerator, directory)
        if accelerator.is_main_process:
            torch.save(result, out / f"{Path(directory).name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)  # as two_processes.py of tests/experts does, and for its reason
