"""Successive halving without waiting for one another: which trials go on, and how far.

ASHA (arXiv 1810.05934, algorithm 2). A trial is trained to a rung, a certain epoch, and stops there
until it is among the best 1 / `FACTOR` of all trials that have reached the rung; then it goes on to
the next one, which is `FACTOR` times as far, and from the highest to its end. Whenever there is
room, a trial that may go on does, one on the highest rung first; where none may, a new one begins.

Where we deviate: a trial's score at a rung is its best validation up to there, because early ones
jump up and down; and the last epoch is no rung, whatever it would be by its number.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from scribbleseg.config import TrainConfig

FACTOR = 3


def rung_epochs(train: TrainConfig, grace: int | None) -> tuple[int, ...]:
    """Return the epochs at which trials stop, in order; none where the first would be the last.

    Args:
        train: Length of a trial, and which of its epochs are validated: only those are rungs.
        grace: The first rung, or where it is not validated, the next epoch that is; None: a ninth
            of the trial.
    """
    rungs: list[int] = []
    epoch = grace or max(1, train.epochs // FACTOR**2)
    while epoch < train.epochs:
        epoch = next(each for each in range(epoch, train.epochs + 1) if train.validates(each))
        rungs.append(epoch)
        epoch *= FACTOR
    return tuple(rung for rung in rungs if rung < train.epochs)


def rung_scores(history: Sequence[Mapping[str, Any]], rungs: Sequence[int]) -> tuple[float, ...]:
    """Return a trial's score at each rung that it has reached.

    Args:
        history: Its epochs, "epoch" and, where it was validated, "miou" of each.
        rungs: See `rung_epochs`.
    """
    reached = history[-1]["epoch"] if history else 0
    return tuple(
        max(
            (float(row["miou"]) for row in history if row["epoch"] <= rung and "miou" in row),
            default=-math.inf,
        )
        for rung in rungs
        if rung <= reached
    )


def promotable(scores: Mapping[str, Sequence[float]], waiting: Collection[str]) -> list[str]:
    """Return the trials that may go on: those of the highest rung first, of each the best first.

    Args:
        scores: See `rung_scores`, by trial; of equal ones the first is the better.
        waiting: The trials that wait, each at the last rung that it has reached.
    """
    found: list[str] = []
    for rung in reversed(range(max(map(len, scores.values()), default=0))):
        recorded = [name for name, reached in scores.items() if len(reached) > rung]
        best = sorted(recorded, key=lambda name: -scores[name][rung])[: len(recorded) // FACTOR]
        found += [name for name in best if name in waiting and len(scores[name]) == rung + 1]
    return found


def furthest(scores: Mapping[str, Sequence[float]], waiting: Collection[str]) -> list[str]:
    """Return the best of the waiting trials on the highest rung, alone; nothing where none waits.

    It goes on where no other will come and none has finished, so that every search has an end.
    """
    able = [name for name in scores if name in waiting and scores[name]]
    return sorted(able, key=lambda name: (-len(scores[name]), -scores[name][-1]))[:1]
