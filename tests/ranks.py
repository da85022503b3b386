"""Processes that play the ranks of a run."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch.multiprocessing as mp

from scribbleseg.datasets.workers import prepare_workers


def spawn(function: Callable[..., None], arguments: Sequence[Any], num_ranks: int) -> None:
    """Call `function(rank, *arguments)` in a process per rank; raise what one of them raises."""
    # Forked from a process that has imported the library, which takes seconds, once for all tests.
    prepare_workers("scribbleseg.loops.segment")
    mp.start_processes(_play, (function, *arguments), nprocs=num_ranks, start_method="forkserver")


def _play(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    function(rank, *arguments)
    # Without Python's own end: where a thread of gloo lets go of the last tensor of a sum while the
    # interpreter is being taken down, PyTorch aborts the process ("terminate called without an
    # active exception"), once in some hundred ranks. Everything of ours has been checked by now.
    os._exit(0)
