"""FSDP2: weights, gradients and optimiser states spread over the processes, and whole again where they are saved.

Accelerate shards (`accelerate launch --use_fsdp --fsdp_version 2`); here is what the loop must know of it. Functions
that make something whole are collective: every process calls them. On a model that is not sharded they do nothing.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from prebench.errors import ConfigError


def asked_for() -> bool:
    """Tell whether the launcher asks accelerate for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def every_process_loads() -> None:
    """Let every process load all weights of pretrained parts: their hashes are read everywhere.

    Where accelerate's `fsdp_cpu_ram_efficient_loading` is on, which is its default, transformers would fill the weights
    of all processes but one with whatever lies in memory.
    """
    if asked_for():
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def sharding_plugin(bf16: bool) -> FullyShardedDataParallelPlugin | None:
    """Return accelerate's settings from the launcher's; None where it does not ask for FSDP.

    A unit is a decoder layer or a layer of the vision tower, unless the launcher names classes. In bfloat16 weights are
    gathered and computed with in bfloat16; gradients are summed, and losses returned, in float32, as under DDP.

    Raises:
        ConfigError: the launcher asks for a kind of sharding that is not supported.
    """
    if not asked_for():
        return None
    for name, refused, remedy in (
        ("VERSION", lambda value: value != "2", "set fsdp_version: 2"),
        ("OFFLOAD_PARAMS", _true, "set fsdp_offload_params: false; more processes need less memory each"),
        ("ACTIVATION_CHECKPOINTING", _true, "the recipe's train.gradient_checkpointing does that"),
        ("AUTO_WRAP_POLICY", lambda value: value.upper() == "SIZE_BASED_WRAP", "take TRANSFORMER_BASED_WRAP"),
    ):
        value = os.environ.get(f"FSDP_{name}", "1" if name == "VERSION" else "")
        if refused(value):
            raise ConfigError(f"the launcher's fsdp_{name.lower()} {value}: prebench does not train so; {remedy}")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    return FullyShardedDataParallelPlugin(auto_wrap_policy="TRANSFORMER_BASED_WRAP", mixed_precision_policy=policy)


def _true(value: str) -> bool:
    return value.lower() == "true"


def is_sharded(module: nn.Module) -> bool:
    """Tell whether the module's weights are spread over the processes."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor's whole value; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return the whole values, the sharded ones on the CPU, one after another; {} where they are not kept.

    Args:
        tensors: the same names in every process.
        keep: whether this process needs them.
    """
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor] | None:
    """Return the state dict of a sharded model to be written, tied weights once; None of one that is not sharded."""
    if not is_sharded(model):
        return None
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return gathered({name: value for name, value in model.state_dict().items() if name not in tied}, keep)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return a whole value, which every process has, spread as `tensor` is; numbers stay as they are."""
    if not isinstance(tensor, DTensor) or value.dim() == 0:
        return value
    mesh = tensor.device_mesh
    # No source: each process cuts its part out of what it has.
    return distribute_tensor(value.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None)


def spread_state(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a flat optimiser state (`prebench.train.optimizer_state`) spread as the optimiser's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {name: like(parameters[int(name.partition(".")[0])], value) for name, value in flat.items()}


def whole_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module with all its weights, which shares nothing with it."""
    parts = {id(p): nn.Parameter(whole(p.detach()).clone(), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, dict(parts))


@contextmanager
def computable(wrapped: nn.Module) -> Iterator[None]:
    """Let parts of a wrapped module be called on their own inside the block; layers gather themselves."""
    if not isinstance(wrapped, FSDPModule):
        yield
        return
    wrapped.unshard()
    try:
        yield
    finally:
        wrapped.reshard()


def to_cpu(module: nn.Module) -> None:
    """Move a module to the CPU; sharded weights are made whole there, to be saved and not to be trained further."""
    if not is_sharded(module):
        module.to("cpu")
        return
    parts: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in parts:  # tied weights stay tied
                parts[id(parameter)] = nn.Parameter(whole(parameter.detach()).cpu(), parameter.requires_grad)
            setattr(owner, name, parts[id(parameter)])
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[name] = buffer.cpu()
