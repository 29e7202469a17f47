"""One of two data-parallel processes: `torchrun … two_processes.py CHECKPOINT OUT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.experts.test_training import adapted, few_tokens

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = DistributedDataParallel(adapted(Path(sys.argv[1])).train())
for _ in range(2):  # the second fails where the first left a gradient out
    model.zero_grad()
    ids = few_tokens(rank)
    model(input_ids=ids, labels=ids).loss.backward()
gradients = {name: one.grad for name, one in model.module.named_parameters() if one.requires_grad}
torch.save(gradients, Path(sys.argv[2]) / f"{rank}.pt")
torch.distributed.destroy_process_group()
os._exit(0)  # gloo's threads outlive the group: one that frees a tensor while Python is torn down aborts the process
