"""A recipe's script, run by its trainer's own Python as it was printed, and watched: `watched.py SCRIPT FOLDER`.

FOLDER gets `before.safetensors`, what is trained as it was when the first forward pass began, and `facts.json`.
With `--until-forward` the run ends before the first forward pass: Liger's kernels need a GPU. With `--fsdp` accelerate
takes its FSDP on CPUs too, which it has for GPUs alone.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from watched_step import StepWatch


class Watch:
    """What is seen of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {"losses": [], "step": {}}
        self.step = StepWatch(self.facts["step"])

    def see(self, model: torch.nn.Module) -> None:
        """The model before its first step."""
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.facts["trained"] = sum(value.numel() for value in trained.values())
        self.facts["dtypes"] = sorted({str(value.dtype) for value in trained.values()})
        self.facts["frozen"] = sorted({str(value.dtype) for value in model.parameters() if not value.requires_grad})
        self.facts["sharded"] = [name for name, value in model.named_parameters() if isinstance(value, DTensor)]
        forwards = [getattr(module.forward, "__func__", module.forward) for module in model.modules()]
        self.facts["liger"] = sorted(
            {one.__qualname__ for one in forwards if one.__module__.startswith("liger_kernel")}
        )
        self.facts["attention"] = model.config._attn_implementation
        self.facts["checkpointing"] = any(getattr(one, "gradient_checkpointing", False) for one in model.modules())
        values = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().contiguous().clone()
            for name, value in trained.items()
        }
        if PartialState().is_main_process:
            save_file(values, self.folder / "before.safetensors")

    def see_packed(self, model: torch.nn.Module) -> None:
        """Which parameters are 4-bit, before accelerate makes others of them."""
        self.facts["packed"] = [name for name, value in model.named_parameters() if hasattr(value, "quant_state")]

    def see_batch(self, model: torch.nn.Module, _: Any, batch: dict[str, Any]) -> None:
        """The first batch, row by row without padding: token ids, and labels."""
        if "batch" in self.facts:
            return
        ids, labels = batch["input_ids"], batch["labels"]
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            rows = [(row[keep], said[keep]) for row, said, keep in zip(ids, labels, mask.bool(), strict=True)]
        elif "position_ids" in batch:
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()[1:]
            rows = list(zip(ids[0].tensor_split(starts), labels[0].tensor_split(starts), strict=True))
        else:  # several conversations in a row, told apart by what each token may look at
            rows = list(zip(ids, labels, strict=True))
        self.facts["batch"] = [[row.tolist(), said.tolist()] for row, said in rows]

    def write(self) -> None:
        if PartialState().is_main_process:
            (self.folder / "facts.json").write_text(json.dumps(self.facts))


def main(script: str, folder: str, *options: str) -> None:
    watch = Watch(Path(folder))
    prepare, backward = Accelerator.prepare, Accelerator.backward

    def watched_prepare(accelerator: Accelerator, *things: Any, **more: Any) -> Any:
        for thing in things:
            if isinstance(thing, torch.nn.Module):
                watch.see_packed(thing)
                thing.register_forward_pre_hook(watch.see_batch, with_kwargs=True)
        prepared = prepare(accelerator, *things, **more)
        for thing in prepared if isinstance(prepared, tuple | list) else (prepared,):
            if isinstance(thing, torch.nn.Module):
                watch.step.watch(thing)
        return prepared

    def watched_backward(accelerator: Accelerator, loss: torch.Tensor, **more: Any) -> None:
        watch.facts["losses"].append(loss.item())
        watch.step.before_backward()
        backward(accelerator, loss, **more)

    def first_forward(module: torch.nn.Module, _: Any) -> None:
        if "trained" in watch.facts or not hasattr(module, "get_output_embeddings"):
            return
        watch.see(module)
        if "--until-forward" in options:
            watch.write()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            raise SystemExit

    Accelerator.prepare, Accelerator.backward = watched_prepare, watched_backward
    torch.nn.modules.module.register_module_forward_pre_hook(first_forward)
    if "--fsdp" in options:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    runpy.run_path(script, run_name="__main__")
    watch.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
