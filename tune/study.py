"""The search as Ray Tune sees it: Optuna draws, the sweep's folder remembers.

Neither Optuna's study nor Tune's own state is ever read back from a file. When a sweep goes on,
Optuna is told of the trials in its folder, with the parameters and scores that they have, and their
validations say which rungs they have reached.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from scribbleseg.config import FinetuneConfig
from scribbleseg.loops.steps import Row
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import State, Trial, smoothed, write_trial
from tune.rungs import furthest, promotable, rung_scores
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
    first = defaults(space, base, pretrained)
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
    """Hands out legs: how far each run of the sweep is to be trained next.

    A leg leads from a run's start, or from where it stopped, to the next rung or to the run's end
    (see `tune.rungs`), and is one trial of Tune's. First come the runs that were cut off in
    mid-leg, then those that may go on, then new ones, until there are `num_trials`.

    Optuna can be told of a run once: when it first stops, even if it goes on later. A run that goes
    on at once is told of at its next stop. A sweep that is started again tells of all that have
    stopped or ended as they are by then.
    """

    def __init__(
        self,
        search: OptunaSearch,
        sweep: RunFolder,
        known: Sequence[Trial],
        rungs: Sequence[int],
        num_trials: int,
    ):
        """Take in what is known; see `settle` for its states."""
        super().__init__(metric="miou", mode="max")
        self.search = search
        self.sweep = sweep
        self.rungs = rungs
        self.num_trials = num_trials
        self.next_number = 1 + max((trial.number for trial in known), default=-1)
        self.states: dict[str, State] = {}
        """State of each run, by name."""
        self.histories: dict[str, list[Row]] = {}
        """Epochs of each run when it last stopped; a failed one has no part in the search."""
        self.queue: list[str] = []
        """Runs that have a leg to go, and wait for a place."""
        self.live: dict[str, str] = {}
        """The run of each trial of Tune's that has not ended."""
        self.told: set[str] = set()
        """Runs of which Optuna knows the score."""
        for trial in known:
            params = search.suggest(trial.name)
            assert trial.params == params, f"{trial.name} has {trial.params}, Optuna gave {params}"
            self._note(trial.name, trial.state)
            if trial.ended:
                self._tell(trial.name)
            else:
                self.queue.append(trial.name)
        self._let_go_on()

    @property
    def done(self) -> bool:
        """Whether no leg is left, nor on its way."""
        return len(self.states) >= self.num_trials and not self.queue and not self.live

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return a leg, the name of its "run" and the epoch "until" which it leads, None: the last.

        Or None where the next one depends on those that run, or `FINISHED`.
        """
        if self.done:
            # A word, which Ray's annotation does not foresee.
            return cast(Any, Searcher.FINISHED)
        if self.queue:
            name = self.queue.pop(0)
        elif len(self.states) < self.num_trials:
            name = self._draw()
        else:
            return None
        self.live[trial_id] = name
        rung = len(rung_scores(self.histories[name], self.rungs))
        return {"run": name, "until": self.rungs[rung] if rung < len(self.rungs) else None}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take in how a leg ended, and decide who goes on."""
        name = self.live.pop(trial_id)
        if error or FAILED in (result or {}):
            self._note(name, "failed")
        else:
            self._note(name, "finished" if self.sweep.child(name).finished() else "stopped")
        self._let_go_on()
        if self.states[name] != "running":
            self._tell(name)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing worth reading: the sweep's folder is what a sweep goes on from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing, see `save`."""

    def _draw(self) -> str:
        name = Trial(number=self.next_number).name
        params: dict[str, Any] = self.search.suggest(name) or {}
        write_trial(self.sweep, Trial(number=self.next_number, params=params))
        self.next_number += 1
        self.states[name], self.histories[name] = "running", []
        return name

    def _note(self, name: str, state: State) -> None:
        self.states[name] = state
        self.histories[name] = [] if state == "failed" else saved_history(self.sweep.child(name))

    def _let_go_on(self) -> None:
        """Give those that may go on another leg."""
        scores = {name: rung_scores(rows, self.rungs) for name, rows in self.histories.items()}
        waiting = [name for name, state in self.states.items() if state == "stopped"]
        names = promotable(scores, waiting)
        if not names and self.done and "finished" not in self.states.values():
            names = furthest(scores, waiting)
        for name in names:
            self.states[name] = "running"
        self.queue += names

    def _tell(self, name: str) -> None:
        """Tell Optuna a run's score; a failed one has none."""
        if name in self.told:
            return
        self.told.add(name)
        score = smoothed(self.histories[name])
        result = None if score is None else {"miou": score}
        self.search.on_trial_complete(name, result, error=self.states[name] == "failed")


def saved_history(run: RunFolder) -> list[Row]:
    """Return the epochs of a run that it would go on after: those up to its last checkpoint."""
    last = run.last() or 0
    return [row for row in run.read_metrics() if row["epoch"] <= last]


def settle(sweep: RunFolder, known: Sequence[Trial], rungs: Sequence[int]) -> list[Trial]:
    """Return trials with the states that their runs tell of, and write those that differ.

    A driver that was killed could not write how the last legs ended. A run that is neither at its
    end nor at a rung was cut off: it is "running", and will go on.

    Raises:
        OSError: a trial's file cannot be written.
    """
    settled = [
        replace(trial, state=_state(sweep.child(trial.name), trial, rungs)) for trial in known
    ]
    for before, trial in zip(known, settled, strict=True):
        if trial != before:
            write_trial(sweep, trial)
    return settled


def _state(run: RunFolder, trial: Trial, rungs: Sequence[int]) -> State:
    if trial.state == "failed":
        return "failed"
    if run.finished():
        return "finished"
    history = saved_history(run)
    return "stopped" if history and history[-1]["epoch"] in rungs else "running"
