"""What a sweep adds to a trial: start, reports and checkpoints; and how many trials an hour has.

Trials of one worker run one after the other in a real sweep; the time from one trial's end to the
next one's, less the epochs that were trained and validated in between, is overhead. The first
trial, whose process has to start and to import torch, is left out:

    python -m benchmarks.sweep_overhead --root ../shared/data/scribble-voc
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Measured, tell, to_markdown
from scribbleseg.cli import exit_status
from scribbleseg.config import parse_arguments, require
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import TRIAL, read_trials


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What is measured."""

    root: str = "demo/data"
    """Folder of the data."""
    trials: int = 8
    """Trials of the sweep (3 or more)."""
    epochs: int = 3
    """Epochs of each, all of them validated and saved."""
    out: Path | None = None
    """File without suffix for the table, .md and .json; None: print only."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.trials >= 3, "trials", self.trials, "3 or more")


def main() -> None:
    """Measure and print."""
    asked: Overhead = parse_arguments(
        Overhead, sys.argv[1:], prog="python -m benchmarks.sweep_overhead"
    )
    with tempfile.TemporaryDirectory() as storage:
        sweeping = subprocess.run(
            [
                sys.executable, "-m", "tune.sweep", "core", f"--data.root={asked.root}",
                f"--storage={storage}", "--name=s", f"--num-trials={asked.trials}",
                f"--train.epochs={asked.epochs}", "--train.validate-every=1", "--max-concurrent=1",
                "--stopping=none", "--data.long-side=96", "--data.crop-size=96",
            ],
        )  # fmt: skip
        if sweeping.returncode:
            # It has said why.
            sys.exit(sweeping.returncode)
        folder = Path(storage) / "s"
        sweep = RunFolder.open(str(folder))
        ends: list[float] = []
        trained: list[float] = []
        for trial in read_trials(sweep):
            ends.append((folder / trial.name / TRIAL).stat().st_mtime)
            rows = sweep.child(trial.name).read_metrics()
            trained.append(sum(row["seconds"] for row in rows))
    pairs = list(itertools.pairwise(ends))
    whole = tuple(end - before for before, end in pairs)
    spent = tuple(total - seconds for total, seconds in zip(whole, trained[1:], strict=True))
    lines = [
        Measured(
            name=name,
            seconds=seconds,
            notes={
                "seconds": f"{statistics.median(seconds):.2f}",
                "per hour": f"{3600 / statistics.median(seconds):.0f}",
            },
        )
        for name, seconds in (
            ("overhead of a trial", spent),
            ("training and validating", tuple(trained[1:])),
            ("whole trial", whole),
        )
    ]
    tell(to_markdown(f"{len(spent)} trials after the first", lines, "times"), lines, asked.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
