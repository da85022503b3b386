"""How many epochs ASHA needs to find what random search found, replayed over the latter's curves.

The trials of a finished sweep without early stopping (`--search random --stopping none`) are gone
through again as a sweep with ASHA would, one leg at a time: by `tune.rungs`, as there, a trial that
may go on does so to its next rung, and where none may, the next one begins. The order decides
much, so many orders are tried:

    python -m benchmarks.asha_replay --sweep runs/random
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scribbleseg.cli import exit_status
from scribbleseg.config import FinetuneConfig, from_dict, parse_arguments, require
from scribbleseg.errors import InputError
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import SWEEP, read_trials, smoothed
from tune.rungs import furthest, promotable, rung_epochs, rung_scores

Curve = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What is replayed."""

    sweep: str
    """Folder of the sweep."""
    grace: int | None = None
    """Epochs before a trial stops for the first time; None: as in a sweep."""
    orders: int = 200
    """Random orders of the trials, besides the one they were drawn in (1 or more)."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(self.orders >= 1, "orders", self.orders, "1 or more")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What ASHA would have done."""

    epochs: int
    """Epochs that it would have trained."""
    best: float
    """Highest score that it would have found."""


def replay(curves: Sequence[Curve], rungs: Sequence[int]) -> Outcome:
    """Train trials, in the order given, as far as ASHA would.

    Args:
        curves: The validations of each trial, by epoch.
        rungs: See `rung_epochs`.
    """
    whole = {str(number): curve for number, curve in enumerate(curves)}
    seen: dict[str, Curve] = {}
    while True:
        scores = {name: rung_scores(curve, rungs) for name, curve in seen.items()}
        waiting = [name for name in seen if len(seen[name]) < len(whole[name])]
        unbegun = [name for name in whole if name not in seen]
        last_chance = furthest(scores, waiting) if len(waiting) == len(whole) else []
        able = promotable(scores, waiting) or unbegun or last_chance
        if not able:
            break
        goal = [*rungs, whole[able[0]][-1]["epoch"]][len(scores.get(able[0], ()))]
        seen[able[0]] = [row for row in whole[able[0]] if row["epoch"] <= goal]
    return Outcome(
        epochs=sum(curve[-1]["epoch"] for curve in seen.values()),
        best=max(smoothed(curve) or 0.0 for curve in seen.values()),
    )


def main() -> None:
    """Replay and print."""
    asked: Replay = parse_arguments(Replay, sys.argv[1:], prog="python -m benchmarks.asha_replay")
    sweep = RunFolder.open(asked.sweep)
    trials = read_trials(sweep)
    curves = [
        [row for row in sweep.child(trial.name).read_metrics() if "miou" in row]
        for trial in trials
        if trial.state == "finished"
    ]
    if not curves:
        raise InputError(f"{asked.sweep}: holds no finished trial")
    num_epochs = max(curve[-1]["epoch"] for curve in curves)
    settings = from_dict(FinetuneConfig, (sweep.read_json(SWEEP) or {}).get("settings", {}))
    rungs = rung_epochs(settings.train, asked.grace)
    whole = num_epochs * len(curves)
    highest = max(smoothed(curve) or 0.0 for curve in curves)
    generator = np.random.default_rng(0)
    orders = [range(len(curves))] + [
        generator.permutation(len(curves)) for _ in range(asked.orders)
    ]
    drawn, *others = [replay([curves[place] for place in order], rungs) for order in orders]
    shares = [outcome.epochs / whole for outcome in others]
    lost = [highest - outcome.best for outcome in others]
    minutes = statistics.fmean(trial.seconds for trial in trials) / 60
    few = sum(share <= 1 / 3 for share in shares)
    found = statistics.fmean(each == 0 for each in lost)
    sys.stdout.write(
        f"random search: {len(curves)} trials of {num_epochs} epochs, {minutes:.1f} minutes each, "
        f"best score {highest:.4f}\n"
        f"ASHA, in the order they were drawn: {drawn.epochs / whole:.3f} of the epochs, "
        f"best {drawn.best:.4f}\n"
        f"ASHA, over {asked.orders} random orders: {statistics.median(shares):.3f} of the epochs "
        f"(median; {min(shares):.3f} to {max(shares):.3f}; at most a third in {few}), "
        f"the same best in {100 * found:.0f} %, {statistics.fmean(lost):.4f} mIoU less on average\n"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
