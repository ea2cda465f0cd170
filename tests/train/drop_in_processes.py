"""Gradients of a DDP loop of one's own with PRe, one half of a batch per process (torchrun); argument: the result."""

from __future__ import annotations

import sys

import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from prebench import PredictiveRegularizer
from tests.train.gradients import WEIGHT, counts, objective, parts

if __name__ == "__main__":
    dist.init_process_group("gloo")
    processes = dist.get_world_size()
    targets, images = (count / processes for count in counts())  # the wrappers take means over processes
    term = objective()
    model = DistributedDataParallel(term.model)
    # A seed per process: they agree on process 0's predictor.
    regularizer = PredictiveRegularizer(model, weight=WEIGHT, seed=dist.get_rank())
    b = parts(processes)[dist.get_rank()]
    inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "pixel_values": b.pixel_values}
    (model(**inputs, labels=b.labels, num_items_in_batch=targets).loss + regularizer.loss(images)).backward()
    found = {f"model.{name}": p.grad for name, p in term.model.named_parameters() if p.grad is not None}
    names = [name.removeprefix("predictor.") for name in regularizer.state_dict()]
    found |= {f"regularizer.{n}": p.grad for n, p in zip(names, regularizer.parameters(), strict=True)}
    if dist.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in found.items()}, sys.argv[1])
    dist.destroy_process_group()
