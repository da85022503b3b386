"""From a sweep's study to Ray Tune: legs are trained, followed, written down and chosen from."""

import logging
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.tune
from tqdm import tqdm

from scribbleseg.errors import InputError
from scribbleseg.manifest import BEST
from scribbleseg.report import tables
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import (
    Trial,
    choose,
    read_trial,
    refresh,
    seconds_left,
    smoothed,
    write_best,
    write_table,
    write_trial,
)
from tune.study import Study
from tune.trial import FAILED, Plan, run_trial

STATE = "tune"
"""Folder in the sweep's for what Tune writes for itself; it is read by nobody."""
REASON_LENGTH = 300


def search(
    plan: Plan,
    study: Study,
    ledger: "Ledger",
    concurrent: int,
) -> None:
    """Run the legs of a study until none is left.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    config = ray.tune.TuneConfig(
        # As many as the study hands out.
        num_samples=-1,
        max_concurrent_trials=concurrent,
        search_alg=study,
        # One process serves many legs: a new one would spend its first seconds on imports.
        reuse_actors=plan.launch.num_workers == 1,
        trial_dirname_creator=_run_name,
    )
    _fit(plan, config, {}, ledger)
    if not study.done:
        raise KeyboardInterrupt


def confirm(
    plan: Plan, sweep: RunFolder, chosen: Sequence[Trial], num_seeds: int, concurrent: int
) -> list[dict[str, Any]]:
    """Train trials again over other seeds, and make the winner the best of the sweep.

    Args:
        plan: What all runs have in common.
        sweep: The sweep's folder.
        chosen: The trials.
        num_seeds: Runs of each.
        concurrent: Runs at once.

    Returns:
        Of each trial of which no run can never succeed: "trial", "runs", the "scores" of these,
        their "mean" and "deviation" (None of one), best mean first.

    Raises:
        RuntimeError: a run was lost.
    """
    first = int(plan.base["train"]["seed"]) + 1
    repeats = [replace(trial, seed=first + n) for trial in chosen for n in range(num_seeds)]
    hopeless: dict[str, str] = {}
    for repeat in repeats:
        known = read_trial(sweep, repeat.name)
        if known is None:
            write_trial(sweep, replace(repeat, state="running", reason=""))
        elif known.state == "failed":
            hopeless[repeat.name] = known.reason
    names = [repeat.name for repeat in repeats]
    left = [name for name in names if name not in hopeless and not sweep.child(name).finished()]
    if left:
        config = ray.tune.TuneConfig(
            max_concurrent_trials=concurrent,
            reuse_actors=plan.launch.num_workers == 1,
            trial_dirname_creator=_run_name,
        )
        legs = {"run": ray.tune.grid_search(left), "until": None}
        follower = Follower(len(left))
        _fit(plan, config, legs, follower)
        hopeless |= follower.hopeless
    missing = [name for name in left if name not in hopeless and not sweep.child(name).finished()]
    for repeat in repeats:
        if repeat.name not in missing:
            state = "failed" if repeat.name in hopeless else "finished"
            reason = hopeless.get(repeat.name, "")
            write_trial(sweep, replace(repeat, state=state, reason=reason))
    if missing:
        raise RuntimeError(f"{', '.join(missing)}: not confirmed; give the same command again")
    found: list[dict[str, Any]] = []
    for trial in chosen:
        runs = [repeat.name for repeat in repeats if repeat.number == trial.number]
        lost = [name for name in runs if name in hopeless]
        if lost:
            tqdm.write(
                f"trial {trial.number} is not confirmed: {lost[0]}: {hopeless[lost[0]]}",
                file=sys.stderr,
            )
            continue
        scores = [smoothed(sweep.child(name).read_metrics()) or 0.0 for name in runs]
        found.append(
            {
                "trial": trial.number,
                "runs": runs,
                "scores": scores,
                "mean": statistics.fmean(scores),
                "deviation": statistics.stdev(scores) if num_seeds > 1 else None,
            }
        )
    if not found:
        return []
    found.sort(key=lambda each: -each["mean"])
    winner = found[0]
    score, run = max(zip(winner["scores"], winner["runs"], strict=True))
    facts = {key: winner[key] for key in ("trial", "mean", "deviation")}
    write_best(sweep, sweep.child(run), facts | {"score": score})
    return found


def _fit(
    plan: Plan, config: ray.tune.TuneConfig, space: dict[str, Any], callback: ray.tune.Callback
) -> None:
    """Let Tune run what `config` and `space` say."""
    worker = plan.resources
    if plan.launch.num_workers == 1:
        needs: dict[str, float] = {"cpu": worker.cpus, "gpu": worker.gpus}
    else:
        # The trial only waits for the workers that it starts; nothing at all is refused.
        needs = {"cpu": 0, "memory": 1e6}
    # What Tune wrote for an earlier start, it would go on writing to.
    state = RunFolder.open(plan.sweep).child(STATE)
    state.filesystem.delete_dir_contents(state.path, missing_dir_ok=True)
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(_trainable(plan), needs),
        param_space=space,
        tune_config=config,
        run_config=ray.tune.RunConfig(
            name=STATE,
            storage_path=plan.sweep,
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=plan.launch.max_failures),
            callbacks=[callback],
        ),
    )
    tuner.fit()
    state.filesystem.delete_dir_contents(state.path, missing_dir_ok=True)
    state.filesystem.delete_dir(state.path)


def _trainable(plan: Plan) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        run_trial(plan, config["run"], config["until"])

    return trial


def _run_name(trial: Any) -> str:
    return trial.config["run"]


class Follower(ray.tune.Callback):
    """Shows which confirming runs have ended."""

    def __init__(self, total: int):
        self.total = total
        self.num_ended = 0
        self.hopeless: dict[str, str] = {}
        """Why runs can never succeed, by name."""
        self.bar: Any = tqdm(total=total, unit="run", leave=False, disable=None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray: the run came to its end, or told why it never will."""
        result: dict[str, Any] = trial.last_result or {}
        if FAILED in result:
            self.hopeless[_run_name(trial)] = result[FAILED]
        self._say(trial, result.get(FAILED) or f"mIoU {result.get('miou', 0.0):.3f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray: the run failed more often than it is tried again."""
        self._say(trial, f"failed: {last_words(trial)}")

    def _say(self, trial: Any, words: str) -> None:
        self.num_ended += 1
        self.bar.update(1)
        tqdm.write(f"[{self.num_ended}/{self.total}] {_run_name(trial)}: {words}", file=sys.stderr)


def _is_confirmed(sweep: RunFolder) -> bool:
    try:
        best = sweep.read_json(BEST)
    except InputError:
        # A damaged one is written anew.
        return False
    return best is not None and str(best.get("run")).startswith("confirm_")


class Ledger(ray.tune.Callback):
    """Writes down how far trials are when they stop or go on: trial.json, trials.csv, best.json."""

    def __init__(self, study: Study, known: Iterable[Trial]):
        self.study = study
        self.sweep = study.sweep
        self.trials = {trial.number: trial for trial in known}
        """Those that have had a process, as they were when they last stopped."""
        self.num_trials = study.num_trials
        self.is_confirmed = _is_confirmed(self.sweep)
        """Whether the best is one that was trained again; it stays until others are."""
        self.bar: Any = tqdm(
            total=self.num_trials,
            initial=len(self.ended()),
            unit="trial",
            leave=False,
            disable=None,
        )
        if self.trials:
            self._write()

    def ended(self) -> list[Trial]:
        """Return the trials that have ended, or stopped for now, in order."""
        return [self.trials[number] for number in sorted(self.trials) if self.trials[number].ended]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray: a leg has got a process."""
        known = read_trial(self.sweep, _run_name(trial))
        assert known is not None
        before = self.trials.get(known.number)
        if before is None:
            self.trials[known.number] = known
            self._write()
        elif before.ended:
            self._note(replace(known, state="running"))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray: a leg came to its end, or told why it never can."""
        self._end(_run_name(trial), str((trial.last_result or {}).get(FAILED, "")))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray: a leg failed more often than it is tried again."""
        self._end(_run_name(trial), last_words(trial))

    def _end(self, name: str, reason: str) -> None:
        # One whose process never came to be has not been noted before.
        trial = read_trial(self.sweep, name)
        assert trial is not None
        trial = self.trials.get(trial.number, trial)
        # The study has heard of it first.
        state = self.study.states[name]
        self._note(refresh(self.sweep, replace(trial, state=state, reason=reason)))

    def _note(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._write(trial)
        self._say(trial)

    def _best(self) -> Trial | None:
        # One that goes on is as good as it was when it stopped.
        return choose(list(self.trials.values()))

    def _write(self, changed: Trial | None = None) -> None:
        best = self._best()
        try:
            if changed is not None:
                write_trial(self.sweep, changed)
            if best is not None and not self.is_confirmed:
                facts = {"trial": best.number, "score": best.score}
                write_best(self.sweep, self.sweep.child(best.name), facts)
            write_table(self.sweep, [self.trials[number] for number in sorted(self.trials)])
        except OSError as error:
            # What is lost is known from the runs: the next line, or the next start, mends it.
            tqdm.write(
                f"warning: {self.sweep.path}: could not be written: {error}", file=sys.stderr
            )

    def _say(self, trial: Trial) -> None:
        ended, best = self.ended(), self._best()
        # The place of the one that stopped will be taken.
        places = int(trial.ended)
        left = seconds_left(list(self.trials.values()), self.num_trials, places_left=places)
        score = "" if trial.score is None else f", mIoU {trial.score:.3f}"
        tqdm.write(
            f"[{len(ended)}/{self.num_trials}] {trial.name} "
            f"{trial.state if trial.ended else 'goes on'} after {trial.epochs} "
            f"epoch{'s' * (trial.epochs != 1)}, "
            f"{tables.duration(trial.seconds)}{score}"
            + (f" (best {best.score:.3f}, {best.name})" if best is not None else "")
            + (f"; {trial.reason}" if trial.reason else "")
            + (f"; about {tables.duration(left)} left" if left else ""),
            file=sys.stderr,
        )
        # A trial that goes on is no longer counted.
        self.bar.n = len(ended)
        self.bar.refresh()


def last_words(trial: Any) -> str:
    """Return the last line that Tune wrote about a failed trial, on this machine."""
    path = trial.error_file
    text = Path(path).read_text() if path and Path(path).is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:REASON_LENGTH] if lines else "no reason is known"
