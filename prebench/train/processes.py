"""Several processes on one run: what one of them does for all. They come from torchrun or `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from accelerate import DistributedType, PartialState
from accelerate.utils import broadcast_object_list

from prebench.errors import ConfigError, PrebenchError
from prebench.runtime import choose_device, num_processes
from prebench.train.sharding import asked_for, every_process_loads

COPYING = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

ResultT = TypeVar("ResultT")


def join_processes(device: str) -> PartialState:
    """Meet the other processes of this run; without a launcher there are none.

    Args:
        device: the recipe's.

    Raises:
        ConfigError: the launcher asks for DeepSpeed, Megatron, or tensor or context parallelism.
    """
    if _asked_for("PARALLELISM_CONFIG"):
        raise ConfigError(
            "the launcher's use_parallelism_config: prebench gives each process examples of its own; leave it out"
        )
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _asked_for(name):
            raise ConfigError(
                f"the launcher asks for {name}, which clips model and predictor by one norm and steps before a loss is "
                "looked at; start it with `accelerate launch --use_fsdp --fsdp_version 2`, which spreads weights, "
                "gradients and optimiser states likewise"
            )
    every_process_loads()
    return PartialState(cpu=choose_device(device).type == "cpu")


def _asked_for(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def require_supported(kind: DistributedType) -> None:
    """Refuse what the loop has never been seen to train with.

    Args:
        kind: what accelerate chose.

    Raises:
        ConfigError: FSDP where there is no GPU, or a kind of device other than CPUs and GPUs.
    """
    if kind in COPYING and asked_for():
        raise ConfigError(
            f"the launcher asks for FSDP, but accelerate shards on GPUs alone and chose {kind.value}: start it with "
            "torchrun, which copies the model to every process (DDP)"
        )
    if kind not in COPYING and kind != DistributedType.FSDP:
        raise ConfigError(
            f"accelerate chose {kind.value}, but prebench copies the model to every process (DDP) or shards it with "
            "FSDP2: start it with `accelerate launch --multi_gpu`, `accelerate launch --use_fsdp --fsdp_version 2` or "
            "torchrun"
        )


def on_main(call: Callable[[], ResultT]) -> ResultT:
    """Run something in process 0 alone and return its result in every process, so that all agree.

    Args:
        call: may raise; its result must be small.

    Raises:
        PrebenchError: process 0 raised it; every process does.
    """
    if num_processes() == 1:
        return call()
    outcome: list[ResultT | PrebenchError | None] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = call()
        except PrebenchError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[1], PrebenchError):
        raise outcome[1]
    result: ResultT = outcome[0]  # type: ignore[assignment]
    return result


def leave_processes() -> None:
    """Part from the other processes, if there are any."""
    if num_processes() > 1:
        PartialState().destroy_process_group()
