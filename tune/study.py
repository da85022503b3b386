"""The search as Ray Tune sees it: Optuna draws, the sweep's folder remembers.

Neither Optuna's study nor Tune's own state is ever read back from a file. When a sweep goes on, the
trials in its folder are handed out again first, with the parameters that they have; each reports
what it has behind it, and so the study and the scheduler come to know what they knew.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from scribbleseg.config import FinetuneConfig
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import Trial, smoothed, write_trial
from tune.spaces import Draws, Pretrained, Space, defaults, draw
from tune.trial import FAILED

NUM_STARTUP = 8
"""Trials that are drawn at random before the sampler has an opinion."""


def make_search(
    space: Space,
    base: FinetuneConfig,
    pretrained: Sequence[Pretrained],
    known: Sequence[Trial],
    *,
    kind: str,
    seed: int,
) -> OptunaSearch:
    """Return Optuna's search over a space: what is known first, or else the base's own settings.

    Args:
        space: What is searched.
        base: Settings that the drawn ones are put over.
        pretrained: Runs that a trial may start from.
        known: Trials of this sweep that were begun.
        kind: tpe (multivariate, arXiv 1907.10902) or random.
        seed: Of the sampler. It is moved on by the known trials: a sampler that starts again must
            not draw again what it drew before.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = defaults(space, base)
    points = [trial.params for trial in known] or ([first] if first is not None else [])
    with warnings.catch_warnings():
        # Multivariate and grouped sampling are settled enough for us, but not for Optuna.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind == "random":
            sampler = optuna.samplers.RandomSampler(seed=seed + len(known))
        else:
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=NUM_STARTUP,
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=seed + len(known),
            )

    def one(trial: Draws) -> None:
        # What is drawn, OptunaSearch notes by itself.
        draw(trial, space, base, pretrained)

    return OptunaSearch(
        one,
        metric="miou",
        mode="max",
        points_to_evaluate=points,
        sampler=sampler,
    )


class Study(Searcher):
    """Gives every set of parameters its number and its run folder, and scores what comes back."""

    def __init__(self, search: OptunaSearch, sweep: RunFolder, known: Sequence[Trial]):
        super().__init__(metric="miou", mode="max")
        self.search = search
        self.sweep = sweep
        self.waiting = list(known)
        self.next_number = 1 + max((trial.number for trial in known), default=-1)
        # By Tune's trial, then by epoch, because an attempt that is repeated reports again.
        self.seen: dict[str, dict[int, float]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next run: first those that are known, in their order, then new ones."""
        params: dict[str, Any] = self.search.suggest(trial_id) or {}
        if self.waiting:
            trial = self.waiting.pop(0)
            assert trial.params == params, f"{trial.name} has {trial.params}, Optuna gave {params}"
        else:
            trial = Trial(number=self.next_number, params=params)
            self.next_number += 1
            write_trial(self.sweep, trial)
        self.seen[trial_id] = {}
        return {"run": trial.name}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Note a validation."""
        if "miou" in result:
            self.seen[trial_id][int(result["epoch"])] = float(result["miou"])

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna the trial's score; a failed one has none."""
        result = result or {}
        self.on_trial_result(trial_id, result)
        seen = self.seen.pop(trial_id)
        score = smoothed([{"miou": value} for _, value in sorted(seen.items())])
        failed = error or FAILED in result
        told = None if failed or score is None else {"miou": score}
        self.search.on_trial_complete(trial_id, told, error=failed)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing worth reading: the sweep's folder is what a sweep goes on from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing, see `save`."""
