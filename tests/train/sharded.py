"""Gradients of the tiny objective under DDP and under `fully_shard`, one half of a batch per process (torchrun).

Argument: the folder for `ddp.safetensors` and `fully_shard.safetensors`, which process 0 writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from prebench.model.visual_states import language_model
from tests.train.gradients import WEIGHT, counts, objective, parts


def sharded() -> dict[str, torch.Tensor]:
    """Return the full gradients of an objective whose every parameter is spread over the processes."""
    term = objective()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in language_model(term.model).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(term, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in term.parameters()), "a parameter is not sharded"
    backward(term, term)
    return {name: p.grad.full_tensor() for name, p in term.named_parameters() if p.grad is not None}


def copied() -> dict[str, torch.Tensor]:
    term = objective()
    backward(DistributedDataParallel(term), term)
    return {name: p.grad for name, p in term.named_parameters() if p.grad is not None}


def backward(wrapped: torch.nn.Module, term: torch.nn.Module) -> None:
    batch = parts(dist.get_world_size())[dist.get_rank()]
    wrapped.train()
    loss = wrapped(batch).total(*counts(), WEIGHT) * dist.get_world_size()  # the wrapper takes the mean
    loss.backward()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name, gradients in (("ddp", copied()), ("fully_shard", sharded())):
        if dist.get_rank() == 0:
            save_file(
                {key: value.contiguous() for key, value in gradients.items()}, Path(sys.argv[1]) / f"{name}.safetensors"
            )
    dist.destroy_process_group()
