"""`python -m train.finetune`, slowed down, with every step of every rank written down.

    TRACE=FOLDER python -m tests.cluster.traced RECIPE ...

Faults are timed by this record, and what they cost is counted in it. FOLDER/pause holds the seconds
by which each step is slowed down. Nothing else is changed.
"""

import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import train.finetune
from scribbleseg.cli import exit_status
from scribbleseg.distributed import rank
from scribbleseg.loops import segment
from train.command import finetune_rank


@dataclass(frozen=True, kw_only=True)
class Note:
    """That something was done, when, and by whom."""

    time: float
    """Seconds since 1970."""
    host: str
    pid: int
    """As the host counts."""
    rank: int
    """-1: the driver."""
    step: int
    """Optimiser steps done; 0: it has just begun."""


def write_down(rank: int, step: int) -> None:
    """Add a note to this process's file."""
    host, pid = socket.gethostname(), os.getpid()
    note = Note(time=time.time(), host=host, pid=pid, rank=rank, step=step)
    with Path(os.environ["TRACE"], f"{host}-{pid}.jsonl").open("a") as file:
        file.write(json.dumps(asdict(note)) + "\n")


def read_trace(folder: Path) -> list[Note]:
    """Return all notes, in the order of time."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted((Note(**json.loads(line)) for line in lines), key=lambda note: note.time)


def traced_worker(payload: dict[str, Any]) -> dict[str, str]:
    """Run one rank; see `train.command.finetune_rank`."""
    take_step = segment.train_step

    def step(state: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(float(Path(os.environ["TRACE"], "pause").read_text()))
        loss = take_step(state, *args, **kwargs)
        write_down(rank(), state.progress.step + 1)
        return loss

    write_down(rank(), 0)
    segment.train_step = step
    return finetune_rank(payload)


def main() -> None:
    """Run the command."""
    # By the module's own name, so that workers find it.
    from tests.cluster import traced

    write_down(-1, 0)
    train.finetune.finetune_rank = traced.traced_worker
    train.finetune.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_status(main))
