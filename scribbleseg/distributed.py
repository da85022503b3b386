"""Rank, world size and reductions that do nothing on one process: one code path serves all."""

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from scribbleseg.stopwatch import Moment, Stopwatch, moment

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


def broadcast_float(value: float, device: torch.device) -> float:
    """Return rank 0's `value` on every rank, in float32 where there are several."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, src=0)
    return float(shared.item())


def broadcast(value: T) -> T:
    """Return rank 0's `value`, anything that can be pickled, on every rank."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


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


@dataclass(kw_only=True)
class GradientWait:
    """How long backward waited for sums of gradients.

    A holder of its own: hooks that knew their network would keep it alive for ever.
    """

    device: torch.device
    waited: Stopwatch = field(default_factory=Stopwatch)
    computed: Moment | None = None
    """When the latest gradient of the present backward was computed."""

    def take_down(self, _: Tensor) -> None:
        """Note that a parameter's gradient is there; of several, the last one's time stays."""
        self.computed = moment(self.device)

    def note(self) -> None:
        """Take down how long backward, which has just ended, waited."""
        if self.computed is not None:
            self.waited.add(self.computed, moment(self.device))
            self.computed = None


class DataParallel(DistributedDataParallel):
    """PyTorch's DDP, which also says how long it waits for the other ranks.

    DDP sums gradients in buckets, most of them while backward still computes. What passes from the
    last gradient to the end of backward is what the network, and ranks that are late, cost: the
    rest hides behind backward. Other reductions (metrics, the centre of DINO, the statistics of
    batch normalisation) are not counted.

    The times are taken where gradients are computed, not where they are sent: Python that runs in
    the threads of gloo, as a hook of DDP's does, can abort a process that is about to end.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__(model, device_ids=[device.index or 0] if device.type == "cuda" else None)
        self.gradient_wait = GradientWait(device=device)
        hooks = [
            parameter.register_post_accumulate_grad_hook(self.gradient_wait.take_down)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        # The bare model lives on, and may be wrapped again.
        weakref.finalize(self, _remove, hooks)

    @property
    def waited(self) -> Stopwatch:
        """Time spent waiting for sums of gradients."""
        return self.gradient_wait.waited


def _remove(hooks: list[RemovableHandle]) -> None:
    """Take hooks away."""
    for hook in hooks:
        hook.remove()


@contextmanager
def reduce_gradients(network: nn.Module, now: bool) -> Generator[None]:
    """Say for a block that ends with backward whether ranks share gradients in it.

    With gradient accumulation only the last part of a batch does.
    """
    if not isinstance(network, DataParallel):
        yield
    elif now:
        yield
        network.gradient_wait.note()
    else:
        with network.no_sync():
            yield


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` wrapped in DDP where there are several ranks, else `model` itself."""
    return model if world_size() == 1 else DataParallel(model, device)
