"""The folder of a sweep, written and read by storage alone: no Ray, no Optuna, no live object.

```
STORAGE/NAME/
  sweep.json          what is searched: space, base settings, seed, how many trials
  trials.csv          one line per trial, rewritten whole whenever a trial starts, stops or ends
  best.json           which run and which of its checkpoints is best
  trial_0000/ ...     a run folder each (see `scribbleseg.runs`), and trial.json: what was drawn for
                      it, and how it ended
  confirm_0000_s1/    the same for each time that a promising trial was trained again
```
"""

import csv
import io
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, Literal, cast

from scribbleseg.errors import InputError
from scribbleseg.manifest import BEST, is_plain_name, shown
from scribbleseg.runs import RunFolder

SWEEP = "sweep.json"
TRIAL = "trial.json"
TABLE = "trials.csv"

State = Literal["running", "finished", "stopped", "failed"]
STATES: tuple[State, ...] = ("running", "finished", "stopped", "failed")

SMOOTHED = 3
"""Consecutive validations that a trial's score is the mean of."""

# What sweep.json holds, where it holds it.
_INFO = {
    "space": dict,
    "settings": dict,
    "pretrained": list,
    "num_trials": int,
    "confirm": (str, NoneType),
    "confirmed": list,
    "wall_time": (int, float),
    "finished": bool,
}
_TRIAL_NAME = re.compile(r"trial_\d{4,9}")
_FIGURES = ("number", "state", "epochs", "score", "miou", "best_epoch", "seconds", "reason")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a sweep."""

    number: int
    """From 0, in the order in which they were drawn."""
    state: State = "running"
    """running (or waiting for a place); stopped early, to go on should it come to be among the best
    that got there; finished; or failed.
    """
    epochs: int = 0
    """Epochs done."""
    score: float | None = None
    """mIoU that it is chosen by, see `smoothed`; None: it was not validated yet."""
    miou: float | None = None
    """Validation mIoU of its best checkpoint."""
    best_epoch: int | None = None
    """Epoch of that checkpoint."""
    seconds: float = 0.0
    """Wall time of its training."""
    reason: str = ""
    """Why it failed."""
    params: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())
    """What was drawn for it, by the space's names."""
    seed: int | None = None
    """Seed that it is trained again with, to confirm it; None: it is the trial itself."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        again = self.seed is not None
        return f"confirm_{self.number:04d}_s{self.seed}" if again else f"trial_{self.number:04d}"

    @property
    def ended(self) -> bool:
        """Whether it is not trained now, and perhaps never again."""
        return self.state != "running"


def smoothed(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the best mean mIoU of `SMOOTHED` consecutive validations; None without any.

    A single validation is best partly by luck; its neighbours share its merit but not its luck.
    Where there are fewer, all are averaged.
    """
    values = [float(row["miou"]) for row in history if "miou" in row]
    if not values:
        return None
    size = min(SMOOTHED, len(values))
    windows = [values[start : start + size] for start in range(len(values) - size + 1)]
    return max(map(statistics.fmean, windows))


def choose(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial of the highest score that has a checkpoint; the earliest of equals."""
    ranked = rank(trials)
    return ranked[0] if ranked else None


def rank(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have a score and a checkpoint, best first, the earliest of equals."""
    able = [trial for trial in trials if trial.score is not None and trial.best_epoch is not None]
    return sorted(able, key=lambda trial: (-cast(float, trial.score), trial.number))


def write_trial(sweep: RunFolder, trial: Trial) -> None:
    """Write what a trial's own run does not know: what was drawn for it, and how it ended.

    Raises:
        OSError: it cannot be written; an older file stays.
    """
    known = {key: getattr(trial, key) for key in ("number", "params", "seed", "state", "reason")}
    sweep.child(trial.name).write_json(TRIAL, known)


def read_info(sweep: RunFolder) -> dict[str, Any] | None:
    """Read sweep.json; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    info = sweep.read_json(SWEEP)
    for key, value in (info or {}).items():
        if not isinstance(value, _INFO.get(key, object)):
            raise InputError(
                f"{sweep.path}/{SWEEP}: {key} is {shown(value)}, not what a sweep writes"
            )
    return info


def read_trial(sweep: RunFolder, name: str) -> Trial | None:
    """Read a trial, or its confirmation, from its run folder; None where it was never begun.

    Raises:
        InputError: its files are damaged.
    """
    known = sweep.child(name).read_json(TRIAL)
    if known is None:
        return None
    match known:
        case {
            "number": int(number),
            "params": dict(params),
            "seed": int() | None as seed,
            "state": state,
            "reason": str(reason),
        } if state in STATES:
            trial = Trial(number=number, params=params, seed=seed, state=state, reason=reason)
            return refresh(sweep, trial)
        case _:
            raise InputError(f"{sweep.path}/{name}/{TRIAL}: not what a sweep writes there")


def refresh(sweep: RunFolder, trial: Trial) -> Trial:
    """Return a trial with the figures that its run folder has now."""
    run = sweep.child(trial.name)
    history, best = run.read_metrics(), run.best() or {}
    return replace(
        trial,
        epochs=int(history[-1]["epoch"]) if history else 0,
        score=smoothed(history),
        miou=best.get("value"),
        best_epoch=best.get("epoch"),
        seconds=float((run.read_record() or {}).get("wall_time", 0.0)),
    )


def read_trials(sweep: RunFolder) -> list[Trial]:
    """Read all trials from their run folders, in order.

    Raises:
        InputError: a file of theirs is damaged.
    """
    names = [name for name in sweep.list_folders() if _TRIAL_NAME.fullmatch(name)]
    found = [read_trial(sweep, name) for name in names]
    return sorted((trial for trial in found if trial), key=lambda trial: trial.number)


def write_table(sweep: RunFolder, trials: Sequence[Trial]) -> None:
    """Write trials.csv: one line per trial, a column for each of its figures and parameters.

    Raises:
        OSError: it cannot be written; an older file stays.
    """
    names = sorted({name for trial in trials for name in trial.params})
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*_FIGURES, *names])
    for trial in trials:
        known, drawn = [getattr(trial, name) for name in _FIGURES], trial.params
        lines.writerow(
            ["" if value is None else value for value in known]
            # JSON tells 8 from "8" and null from nothing at all.
            + [json.dumps(drawn[name]) if name in drawn else "" for name in names]
        )
    sweep.write_file(TABLE, text.getvalue().encode())


def read_table(sweep: RunFolder) -> list[Trial]:
    """Read trials.csv; an empty list where there is none.

    Raises:
        InputError: it is not a table of trials.
    """
    content = sweep.read_file(TABLE)
    if content is None:
        return []
    try:
        rows = csv.DictReader(io.StringIO(content.decode()))
        missing = set(_FIGURES) - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))} in its first line")
        return [_parse(row) for row in rows]
    except (KeyError, ValueError, TypeError, RecursionError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{sweep.path}/{TABLE}: not a table of trials ({reason})") from None


def _parse(row: Mapping[str, str]) -> Trial:
    """Turn a line of trials.csv into a trial."""
    if row["state"] not in STATES:
        raise ValueError(f"state {row['state']!r}")
    return Trial(
        number=int(row["number"]),
        state=row["state"],
        epochs=int(row["epochs"]),
        score=_finite(row["score"]) if row["score"] else None,
        miou=_finite(row["miou"]) if row["miou"] else None,
        best_epoch=int(row["best_epoch"]) if row["best_epoch"] else None,
        seconds=_finite(row["seconds"]),
        reason=row["reason"],
        params={
            name: json.loads(text) for name, text in row.items() if name not in _FIGURES and text
        },
    )


def _finite(text: str) -> float:
    """Return a number that can be ranked and added up."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def write_best(sweep: RunFolder, run: RunFolder, facts: Mapping[str, Any]) -> None:
    """Record which run of the sweep is best; its own best.json says which checkpoint.

    Args:
        sweep: The sweep.
        run: One of its runs, which has saved a checkpoint.
        facts: What else there is to say, such as the score it was chosen by.

    Raises:
        OSError: it cannot be written; the older record stays.
    """
    best = run.best()
    assert best is not None, f"{run.path} has saved nothing"
    sweep.write_json(BEST, {"run": run.name, **best, **facts})


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """How far a sweep is, from its folder alone."""

    name: str
    """The sweep's name."""
    finished: bool
    """Whether it came to its end."""
    num_trials: int
    """Trials that were asked for."""
    trials: list[Trial]
    """Those that were begun."""
    best: dict[str, Any] | None
    """Content of best.json."""
    seconds_left: float | None
    """Time to the end at the pace of the trials that have ended; None where none has."""

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state, of those states that occur, and those that wait."""
        found = Counter(trial.state for trial in self.trials)
        waiting = {"waiting": self.num_trials - len(self.trials)}
        counts = {str(state): found[state] for state in STATES} | waiting
        return {state: count for state, count in counts.items() if count > 0}


def is_sweep(uri: str) -> bool:
    """Say whether a folder is a sweep's.

    Raises:
        InputError: a storage that cannot be reached.
    """
    return RunFolder.open(uri).read_json(SWEEP) is not None


def status(uri: str) -> SweepStatus:
    """Say how far a sweep is.

    Args:
        uri: the sweep's folder, as local path or URI.

    Raises:
        InputError: no sweep is there, or its files are damaged.
    """
    sweep = RunFolder.open(uri)
    record = read_info(sweep)
    if record is None:
        raise InputError(f"{uri}: holds no {SWEEP}; expected the folder of a sweep, STORAGE/NAME")
    # The table is as old as the last start, stop or end of a trial; runs in progress know more.
    trials = [trial if trial.ended else refresh(sweep, trial) for trial in read_table(sweep)]
    num_trials = record.get("num_trials", len(trials))
    best = sweep.best()
    if best is not None and not is_plain_name(best.get("run")):
        raise InputError(f"{uri}/{BEST}: does not name the run that is best; expected 'run': NAME")
    return SweepStatus(
        name=sweep.name,
        finished=record.get("finished") is True,
        num_trials=num_trials,
        trials=trials,
        best=best,
        seconds_left=seconds_left(trials, num_trials),
    )


def seconds_left(trials: Sequence[Trial], num_trials: int, *, places_left: int = 0) -> float | None:
    """Return the time to the end of a sweep at the pace of its trials that have ended.

    Each one in progress is expected to take as long as those that took longer than it has so far.

    Args:
        trials: Those that were begun; those in progress say how many are trained at once.
        num_trials: How many there will be.
        places_left: How many more could be trained at once.
    """
    spent = [trial.seconds for trial in trials if trial.state in ("finished", "stopped")]
    if not spent:
        return None
    unbegun = max(0, num_trials - len(trials))
    running = [trial.seconds for trial in trials if not trial.ended]
    left = unbegun * statistics.fmean(spent)
    for seconds in running:
        longer = [each for each in spent if each > seconds]
        left += statistics.fmean(longer) - seconds if longer else 0.0
    return left / max(1, len(running) + places_left)
