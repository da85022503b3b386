"""How many epochs ASHA needs to find what random search found, replayed over the latter's curves.

The trials of a finished sweep without early stopping (`--search random --stopping none`) are gone
through again one after the other; Ray's own ASHA, as a sweep sets it up, sees each validation and
says when it would have stopped the trial. The order decides much, so many orders are tried:

    python -m benchmarks.asha_replay --sweep runs/random
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import TrialScheduler

from scribbleseg.cli import exit_status
from scribbleseg.config import parse_arguments
from scribbleseg.errors import InputError
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import read_trials, smoothed
from train.worker import figures_of_last
from tune.carrier import stop_early

Curve = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What is replayed."""

    sweep: str
    """Folder of the sweep."""
    grace: int | None = None
    """Epochs before a trial can be stopped; None: as in a sweep."""
    orders: int = 200
    """Random orders of the trials, besides the one they were drawn in."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What ASHA would have done."""

    epochs: int
    """Epochs that it would have trained."""
    best: float
    """Highest score that it would have found."""


def replay(curves: Sequence[Curve], num_epochs: int, grace: int | None) -> Outcome:
    """Go through trials in this order, each to its end or to where ASHA stops it.

    Args:
        curves: The validations of each trial, by epoch.
        num_epochs: Length of a trial.
        grace: See `Replay`.
    """
    scheduler = stop_early(num_epochs, grace)
    # It looks at a trial's name and at nothing of the controller.
    controller: Any = None
    epochs, scores = 0, [0.0]
    for number, curve in enumerate(curves):
        trial: Any = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(controller, trial)
        seen: list[dict[str, Any]] = []
        for row in curve:
            seen.append(row)
            told = figures_of_last(seen)
            if scheduler.on_trial_result(controller, trial, told) == TrialScheduler.STOP:
                break
        epochs += seen[-1]["epoch"]
        scores.append(smoothed(seen) or 0.0)
    return Outcome(epochs=epochs, best=max(scores))


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
    whole = num_epochs * len(curves)
    highest = max(smoothed(curve) or 0.0 for curve in curves)
    generator = np.random.default_rng(0)
    orders = [range(len(curves))] + [
        generator.permutation(len(curves)) for _ in range(asked.orders)
    ]
    outcomes = [
        replay([curves[place] for place in order], num_epochs, asked.grace) for order in orders
    ]
    shares = [outcome.epochs / whole for outcome in outcomes]
    lost = [highest - outcome.best for outcome in outcomes]
    minutes = statistics.fmean(trial.seconds for trial in trials) / 60
    found = statistics.fmean(each == 0 for each in lost)
    sys.stdout.write(
        f"random search: {len(curves)} trials of {num_epochs} epochs, {minutes:.1f} minutes each, "
        f"best score {highest:.4f}\n"
        f"ASHA, in the order they were drawn: {shares[0]:.3f} of the epochs, best "
        f"{outcomes[0].best:.4f}\n"
        f"ASHA, over {asked.orders} random orders: {statistics.median(shares):.3f} of the epochs "
        f"(median; {min(shares[1:]):.3f} to {max(shares[1:]):.3f}), the same best in "
        f"{100 * found:.0f} %, {statistics.fmean(lost):.4f} mIoU less on average\n"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
