"""Faults on a cluster of hosts on this machine: what each costs, and that nothing of a run is lost.

    python -m tests.cluster.proof --out DIR [--faults worker node ...]

A first run is left in peace. Then each fault is done to a run with the same settings, in its second
epoch, two steps after a checkpoint. Such a run has survived when it comes to its end, no more is
computed twice than lies between two checkpoints, its metrics.jsonl holds every epoch once with the
same figures, and its final weights are the same, bit by bit.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from scribbleseg.runs import RunFolder
from tests.cluster.cluster import Cluster, open_cluster
from tests.cluster.faults import FAULTS, Run
from tests.cluster.hosts import BIN, missing

EPOCHS = 3
STEPS_PER_EPOCH = 6
INTERVAL = 3
# 64 demo images, of which a fold is held out; half of the others in batches of 4.
SETTINGS = (
    *("--data.share", "0.5", "--data.long-side", "64", "--data.crop-size", "64"),
    *("--data.num-workers", "0", "--model.width", "8", "--model.depth", "3"),
    *("--train.batch-size", "4", "--train.epochs", str(EPOCHS), "--train.validate-every", "1"),
    *("--train.save-steps", str(INTERVAL)),
)
TWO_WORKERS = ("--launch.num-workers", "2", "--launch.cpus-per-worker", "1")
# These measure time, or what a process saw since it began.
NOT_COMPARED = ("seconds", "waiting", "all_reduce")
# What batch normalisation over other shares of a batch may do to so short a run.
NOISE = 0.05


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fault did to a run."""

    fault: str
    done: str
    """What was done, in words."""
    ended: bool
    """Whether the run came to its end."""
    error: str
    """What went wrong in the proof; empty where nothing did."""
    metrics_whole: bool
    """Whether metrics.jsonl holds each epoch once, in order; with the undisturbed run's figures,
    where as many workers end the run as began it.
    """
    same_workers: bool
    """Whether as many workers ended the run as began it."""
    weights_equal: bool
    """Whether the final weights are those of the undisturbed run, bit by bit."""
    miou: float
    """Of the last epoch."""
    miou_undisturbed: float
    steps_lost: int
    """Steps that were computed twice."""
    interval: int
    """Steps between two checkpoints."""
    seconds_to_resume: float
    """The longest time without a step since the fault, or its notice."""

    @property
    def survived(self) -> bool:
        """Whether nothing was lost."""
        same = self.weights_equal or (
            not self.same_workers and abs(self.miou - self.miou_undisturbed) <= NOISE
        )
        return self.ended and self.metrics_whole and same and self.steps_lost <= self.interval


def prepare(cluster: Cluster) -> tuple[str, ...]:
    """Make the data; return the arguments of all runs but for their name."""
    data = cluster.room.folder / "data"
    cluster.desk.run(BIN / "scribbleseg", "data", "demo", "--out", data)
    storage = cluster.room.shared / "runs"
    return ("demo", "--data.root", str(data), "--storage", str(storage), *SETTINGS, *TWO_WORKERS)


def start(cluster: Cluster, name: str, arguments: tuple[str, ...]) -> Run:
    """Submit a run."""
    return Run(
        cluster=cluster,
        name=name,
        arguments=arguments,
        steps_per_epoch=STEPS_PER_EPOCH,
    )


def disturb(cluster: Cluster, name: str, arguments: tuple[str, ...]) -> Outcome:
    """Do a fault to a run that is compared with the run `undisturbed`, which has ended."""
    fault = FAULTS[name]
    run = start(cluster, name, (*arguments, *fault.arguments))
    began, error = time.time(), ""
    try:
        run.wait_for_step(STEPS_PER_EPOCH + INTERVAL - 1)
        began = time.time()
        fault.inject(run)
        run.job.expect()
    except (OSError, RuntimeError, subprocess.SubprocessError) as caught:
        # The other faults are still of interest.
        error = str(caught)
    folder, reference = folder_of(cluster, name), folder_of(cluster, "undisturbed")
    rows, expected = figures(folder), figures(reference)
    if not fault.same_workers:
        rows, expected = ([{"epoch": row["epoch"]} for row in each] for each in (rows, expected))
    return Outcome(
        fault=name,
        done=fault.text,
        ended=not error and folder.finished(),
        error=error,
        metrics_whole=rows == expected,
        same_workers=fault.same_workers,
        weights_equal=same_weights(folder, reference),
        miou=last_miou(folder),
        miou_undisturbed=last_miou(reference),
        steps_lost=steps_lost(run),
        interval=INTERVAL,
        seconds_to_resume=seconds_to_resume(run, began),
    )


def folder_of(cluster: Cluster, name: str) -> RunFolder:
    """Return a run's folder as seen from outside the room."""
    return RunFolder.at(str(cluster.room.outside(cluster.room.shared / "runs")), name)


def figures(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what differs between any two runs."""
    rows = folder.read_metrics()
    return [{key: row[key] for key in row if key not in NOT_COMPARED} for row in rows]


def last_miou(folder: RunFolder) -> float:
    """Return the mIoU of the last epoch that was written down; 0 before the first."""
    return float(next((row["miou"] for row in reversed(folder.read_metrics())), 0.0))


def same_weights(one: RunFolder, other: RunFolder) -> bool:
    """Say whether the last checkpoints of two runs hold the same weights, bit by bit."""
    states = []
    for folder in (one, other):
        last = folder.last(hashed=True)
        if last is None:
            return False
        states.append(load_file(f"{folder.checkpoint_path(last)}/model.safetensors"))
    first, second = states
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def steps_lost(run: Run) -> int:
    """Return how many steps were computed more than once."""
    steps = [note.step for note in run.notes(0) if note.step]
    return len(steps) - len(set(steps))


def seconds_to_resume(run: Run, began: float) -> float:
    """Return the longest time between two steps, of those that ended after a fault."""
    times = [note.time for note in run.notes(0) if note.step]
    return max((b - a for a, b in pairwise(times) if b > began), default=float("nan"))


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table for people."""
    survived = sum(outcome.survived for outcome in outcomes)
    lines = [
        f"{survived} of {len(outcomes)} survived. Hosts share {os.cpu_count()} cores, load "
        f"{os.getloadavg()[2]:.0f}; "
        f"{INTERVAL} steps between checkpoints, {EPOCHS} epochs of {STEPS_PER_EPOCH}, "
        "2 workers on 2 nodes.",
        "",
        "| fault | survived | metrics | weights | steps lost | of | s to resume |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        lines.append(
            f"| {outcome.done} | {'yes' if outcome.survived else 'NO'} "
            f"| {'whole' if outcome.metrics_whole else 'DIFFER'} "
            f"| {weights_in_words(outcome)} "
            f"| {outcome.steps_lost} | {outcome.interval} | {outcome.seconds_to_resume:.0f} |"
        )
    return "\n".join(lines) + "\n"


def weights_in_words(outcome: Outcome) -> str:
    """Return how the final weights compare."""
    if outcome.weights_equal:
        return "equal"
    return f"differ: mIoU {outcome.miou:.3f}, undisturbed {outcome.miou_undisturbed:.3f}"


def main() -> int:
    """Run the proof; the exit status is 1 if a run was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.proof")
    parser.add_argument("--out", type=Path, required=True, help="folder for table and logs")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    asked = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.stderr.write(f"hosts cannot be made here: {reason}\n")
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    off = ["three"] if "added" in asked.faults else []
    with open_cluster(["one", "two", "three"], head_cpus=0, off=off) as cluster:
        try:
            say("up")
            cluster.up()
            arguments = prepare(cluster)
            say("undisturbed")
            if not start(cluster, "undisturbed", arguments).job.wait():
                raise RuntimeError("the undisturbed run failed")
            for fault in (name for name in FAULTS if name in asked.faults):
                say(fault)
                outcomes.append(disturb(cluster, fault, arguments))
                say(str(outcomes[-1]))
                record = [asdict(each) | {"survived": each.survived} for each in outcomes]
                (asked.out / "faults.json").write_text(json.dumps(record, indent=2) + "\n")
                (asked.out / "faults.md").write_text(as_markdown(outcomes))
                cluster.restore(afresh=not outcomes[-1].ended)
            cluster.down()
        finally:
            for part in ("logs", "traces"):
                source = cluster.room.folder / part
                subprocess.run(["cp", "-r", source, asked.out], check=False)
    sys.stdout.write(as_markdown(outcomes))
    return int(not all(outcome.survived for outcome in outcomes))


def say(line: str) -> None:
    """Tell whoever waits."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


if __name__ == "__main__":
    sys.exit(main())
