"""Rank, world size and reductions that do nothing on one process: one code path serves all."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks; the input itself on one process."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def differentiable_sum(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks, through which gradients flow to every rank."""
    if world_size() == 1:
        return values
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values)


def broadcast_flag(flag: bool, device: torch.device) -> bool:
    """Return rank 0's `flag` on every rank."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.broadcast(value, src=0)
    return bool(value.item())


def broadcast_float(value: float, device: torch.device) -> float:
    """Return rank 0's `value` on every rank, in float32 where there are several."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, src=0)
    return float(shared.item())


def gather(value: T) -> list[T]:
    """Return every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def share_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers of `module` to every rank."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def reduce_gradients(network: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Say for a block of forward and backward whether ranks share gradients at its end.

    With gradient accumulation only the last part of a batch does.
    """
    if now or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` wrapped in DDP where there are several ranks, else `model` itself."""
    if world_size() == 1:
        return model
    device_ids = [device.index or 0] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)
