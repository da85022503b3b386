"""The hyper-parameters of a sweep: what their values lie between, and which of them matter."""

import contextlib
import json
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scribbleseg.report.tables import NOTHING
from scribbleseg.sweeps import Trial

MIN_TRIALS = 10
"""Trials below which nothing is said of importance."""
NUM_BEST = 5
"""Trials that importance is about: what sets them apart? PED-ANOVA asks for five or more."""
LONGEST_LABEL = 20


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One hyper-parameter: where its values lie on a line from 0 to 1."""

    name: str
    """Dotted key of the setting."""
    choices: tuple[str, ...] | None
    """All values in order, as text; None: it is a number between `low` and `high`."""
    low: int | float = 0.0
    """Lowest number; where both ends are whole numbers, so are all."""
    high: int | float = 1.0
    """Highest number; above `low`."""
    log: bool = False
    """Whether the line is logarithmic."""

    def place(self, value: Any) -> float:
        """Return where a value lies: 0 the lowest or first, 1 the highest or last."""
        if self.choices is not None:
            return self.choices.index(to_text(value)) / max(1, len(self.choices) - 1)
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.log
            else (self.low, self.high, float(value))
        )
        return (value - low) / (high - low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts that name the line: every choice, or the ends and the middle."""
        if self.choices is not None:
            return [(self.place(choice), shorten(choice)) for choice in self.choices]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [(self.place(value), f"{value:.3g}") for value in (self.low, middle, self.high)]

    @property
    def extent(self) -> str:
        """What the values were drawn from, in words."""
        if self.choices is not None:
            return ", ".join(self.choices)
        return f"{self.low:.3g} to {self.high:.3g}" + (", logarithmic" if self.log else "")

    def remark(self, value: Any) -> str:
        """Say whether a number lies so near an end that better ones may lie beyond it."""
        if self.choices is not None or is_whole(self.low, self.high, value):
            return ""
        place = self.place(value)
        if 0.05 < place < 0.95:
            return ""
        return (
            "the best is near the lower end" if place <= 0.05 else "the best is near the upper end"
        )


def list_dimensions(space: Mapping[str, Any], trials: Sequence[Trial]) -> list[Dimension]:
    """Return all hyper-parameters of a sweep: those of its space in order, then what else is drawn.

    Args:
        space: What sweep.json says of each: {"choice": [...]}, {"range": [low, high]} or
            {"log": [low, high]}.
        trials: The trials; values of theirs that lie outside the space widen it.
    """
    names = dict.fromkeys([*space, *(name for trial in trials for name in trial.params)])
    return [
        _dimension(
            name,
            space.get(name),
            [trial.params[name] for trial in trials if name in trial.params],
        )
        for name in names
    ]


def _dimension(name: str, drawn_from: Any, values: Sequence[Any]) -> Dimension:
    """Return one hyper-parameter from what it is drawn from and what was drawn."""
    log, known = False, list[Any]()
    match drawn_from:
        case {"range": [low, high]} if is_number(low) and is_number(high):
            known = [low, high]
        case {"log": [low, high]} if is_number(low) and is_number(high):
            log, known = True, [low, high]
        case {"choice": [*choices]}:
            texts = [to_text(value) for value in (*choices, *values)]
            return Dimension(name=name, choices=tuple(dict.fromkeys(texts)))
        case _:
            pass
    known += values
    if all(is_number(value) for value in known) and len(set(known)) > 1:
        low, high = min(known), max(known)
        return Dimension(name=name, choices=None, low=low, high=high, log=log and low > 0)
    return Dimension(name=name, choices=tuple(dict.fromkeys(map(to_text, known))))


def varying(dimensions: Sequence[Dimension], trials: Sequence[Trial]) -> list[Dimension]:
    """Return those hyper-parameters that are not the same in all trials."""
    return [
        each
        for each in dimensions
        if len({to_text(trial.params.get(each.name, NOTHING)) for trial in trials}) > 1
    ]


def importances(dimensions: Sequence[Dimension], trials: Sequence[Trial]) -> dict[str, float]:
    """Return by how much each hyper-parameter sets the best trials apart, the sum being 1.

    PED-ANOVA (arXiv 2304.10255), with parameters that only some trials have (arXiv 2601.20800):
    the density of a parameter's values among the best `NUM_BEST` trials, held against its density
    among all.

    Args:
        dimensions: Hyper-parameters that vary.
        trials: Trials that have a score, more than `NUM_BEST`.
    """
    # Optuna takes seconds to import, and no other page needs it.
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    spaces = {
        each.name: FloatDistribution(each.low, each.high, log=each.log)
        if each.choices is None
        else CategoricalDistribution(each.choices)
        for each in dimensions
    }
    with _quiet(optuna.logging):
        study = optuna.create_study(direction="maximize")
        for trial in trials:
            params = {
                each.name: to_text(value) if each.choices is not None else float(value)
                for each in dimensions
                if (value := trial.params.get(each.name, ...)) is not ...
            }
            study.add_trial(
                optuna.create_trial(
                    params=params,
                    distributions={name: spaces[name] for name in params},
                    value=trial.score,
                )
            )
        best = min(0.5, max(0.1, NUM_BEST / len(trials)))
        return get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(target_quantile=best)
        )


@contextlib.contextmanager
def _quiet(logging: Any) -> Generator[None]:
    """Keep Optuna from announcing studies and experimental parts of itself meanwhile."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def is_number(value: Any) -> bool:
    """Say whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(*values: Any) -> bool:
    """Say whether all values are whole numbers."""
    return all(isinstance(value, int) for value in values)


def to_text(value: Any) -> str:
    """Return a value as it is read; equal values have equal texts."""
    if isinstance(value, str):
        return value
    if is_number(value):
        return str(value) if isinstance(value, int) else f"{value:.6g}"
    return str(value) if value is None or isinstance(value, bool) else json.dumps(value)


def shorten(text: str) -> str:
    """Return a text that is short enough for a drawing: of a path, the end tells most."""
    plain = "".join(letter if " " <= letter <= "~" else "?" for letter in text)
    return plain if len(plain) <= LONGEST_LABEL else f"…{plain[1 - LONGEST_LABEL :]}"
