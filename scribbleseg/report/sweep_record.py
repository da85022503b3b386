"""What the report knows about a sweep, read from its folder and those of its trials."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from scribbleseg.datasets.remote import inside
from scribbleseg.errors import InputError
from scribbleseg.manifest import is_plain_name
from scribbleseg.report.dimensions import Dimension, is_number, list_dimensions
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import SWEEP, Trial, choose, read_info, read_table, read_trials

INIT, SCRATCH = "init_from", "scratch"
"""Where trials may start from, and what they may start from besides pretraining runs."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the folder of a sweep says."""

    name: str
    """Its name."""
    uri: str
    """Where it is."""
    info: Mapping[str, Any]
    """sweep.json."""
    best: Mapping[str, Any]
    """best.json; empty until there is one."""
    trials: list[Trial]
    """All trials that were begun, in order."""
    histories: Mapping[int, list[dict[str, Any]]]
    """metrics.jsonl of each, by number."""

    @property
    def best_trial(self) -> Trial | None:
        """The trial that best.json names; until there is one, that of the highest score."""
        named = [trial for trial in self.trials if trial.number == self.best.get("trial")]
        return named[0] if named else choose(self.trials)

    @property
    def best_run(self) -> str | None:
        """URI of the run that holds the best checkpoint."""
        trial = self.best_trial
        name: Any = self.best.get("run") or (trial and trial.name)
        return inside(self.uri, name) if is_plain_name(name) else None

    @property
    def confirmed(self) -> list[Mapping[str, Any]]:
        """What sweep.json says of the trials that were trained again."""
        return [each for each in self.info.get("confirmed", []) if isinstance(each, Mapping)]

    @property
    def dimensions(self) -> list[Dimension]:
        """The hyper-parameters."""
        space = self.info.get("space")
        known = _merge(space) if isinstance(space, Mapping) else {}
        if pretrained := self.info.get("pretrained"):
            known |= {INIT: {"choice": [SCRATCH, *pretrained]}}
        return list_dimensions(known, self.trials)


def read_sweep(uri: str) -> Sweep:
    """Read the small files of a sweep and of its trials.

    Raises:
        InputError: Not the folder of a sweep, or damaged files of one.
    """
    folder = RunFolder.open(uri)
    info = read_info(folder)
    if info is None:
        raise InputError(f"{uri}: holds no {SWEEP}; expected the folder of a sweep, STORAGE/NAME")
    # The table knows trials whose folders were removed; the folders know what is newest.
    found = {trial.number: trial for trial in (*read_table(folder), *read_trials(folder))}
    return Sweep(
        name=folder.name,
        uri=uri,
        info=info,
        best=folder.best() or {},
        trials=[_tidy(found[number]) for number in sorted(found)],
        histories={
            number: folder.child(trial.name).read_metrics() for number, trial in found.items()
        },
    )


def _tidy(trial: Trial) -> Trial:
    """Return a trial with its parameters merged, and a score only where it is a number."""
    score = trial.score if is_number(trial.score) else None
    return replace(trial, score=score, params=_merge(trial.params))


def _merge(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters by their settings' names.

    Where a setting is drawn from other values for each network, its names say so in brackets, as
    in "init_from[resunet 16]"; a trial has one of them.
    """
    return {name.partition("[")[0] or name: value for name, value in params.items()}
