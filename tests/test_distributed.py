"""Ranks as processes under gloo: sums of gradients, and how long they were waited for."""

import gc
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scribbleseg.distributed import DataParallel, data_parallel, reduce_gradients
from scribbleseg.stopwatch import Stopwatch
from tests import ranks

CPU = torch.device("cpu")


def spawn(function, folder, *arguments, num_ranks=2):
    """Call `function(rank, *arguments)` on every rank; return the results in rank order."""
    ranks.spawn(enter, (num_ranks, str(folder), function, arguments), num_ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def enter(rank, num_ranks, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks
    )
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def small_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def gradients(network, rank):
    """Of two steps, because DDP arranges its buckets anew after the first."""
    for step in range(2):
        network.zero_grad()
        inputs = torch.rand(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        with reduce_gradients(network, now=False):
            network(inputs[:2]).sum().backward()
        with reduce_gradients(network, now=True):
            network(inputs[2:]).sum().backward()
    return [parameter.grad for parameter in network.parameters()]


def ours_and_pytorchs(rank):
    theirs = DistributedDataParallel(small_network())
    with torch.random.fork_rng():
        ours = gradients(data_parallel(small_network(), CPU), rank)
    for step in range(2):
        theirs.zero_grad()
        inputs = torch.rand(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        theirs(inputs).sum().backward()
    return {"ours": ours, "theirs": [parameter.grad for parameter in theirs.parameters()]}


def test_gradients_are_those_of_pytorchs_own_ddp(tmp_path):
    first, second = spawn(ours_and_pytorchs, tmp_path)
    for ours, others, theirs in zip(first["ours"], second["ours"], first["theirs"], strict=True):
        assert torch.equal(ours, others)
        torch.testing.assert_close(ours, theirs)


def freed_after_use(rank):
    network = data_parallel(small_network(), CPU)
    gradients(network, rank)
    seen = weakref.ref(network)
    del network
    gc.collect()
    return torch.tensor(seen() is None)


def test_a_network_is_freed_with_its_run(tmp_path):
    """A sweep's process has many; and one that outlives Python's own end can crash it."""
    assert all(spawn(freed_after_use, tmp_path))


def waited_for_a_late_rank(rank):
    network = data_parallel(small_network(), CPU)
    assert isinstance(network, DataParallel)
    for _ in range(4):
        with reduce_gradients(network, now=False):
            network(torch.rand(1, 8)).sum().backward()
        dist.barrier()
        if rank == 1:
            time.sleep(0.5)
        with reduce_gradients(network, now=True):
            network(torch.rand(1, 8)).sum().backward()
    return torch.tensor(network.waited.seconds())


def test_a_rank_says_how_long_it_waited_for_another(tmp_path):
    early, late = spawn(waited_for_a_late_rank, tmp_path)
    # Of 2 s; on a busy machine the early one may be late itself, but not every time.
    assert early > 0.5 and late < early


def shared(rank):
    from scribbleseg.distributed import broadcast, gather

    return {"broadcast": broadcast({"epoch": rank}), "gather": gather(None if rank else "only 0")}


def test_what_one_rank_knows_all_know(tmp_path):
    expected = {"broadcast": {"epoch": 0}, "gather": ["only 0", None]}
    assert spawn(shared, tmp_path) == [expected, expected]


def test_on_one_process_a_network_stays_what_it_is():
    network = small_network()
    assert data_parallel(network, CPU) is network
    with reduce_gradients(network, now=False):
        network(torch.rand(1, 8)).sum().backward()
    assert network[0].weight.grad is not None


def test_a_stopwatch_adds_up_and_begins_anew():
    watch = Stopwatch()
    watch.add(1.0, 1.5)
    assert watch.seconds() == 0.5
    watch.add(3.0, 4.0)
    assert watch.take() == pytest.approx(1.5)
    assert watch.take() == 0.0
