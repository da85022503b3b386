"""Drawings of a sweep's trials: scores in order, curves, parameters side by side, importance.

The only text from outside that stands in them are names and values of settings, which matplotlib
escapes. What cannot be drawn is a sentence that says why.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from scribbleseg.report.curves import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    WIDTH_INCHES,
    Chart,
    Line,
    Marker,
    quiet_axes,
    series,
    to_svg,
)
from scribbleseg.report.dimensions import (
    MIN_TRIALS,
    NUM_BEST,
    Dimension,
    shorten,
    varying,
)
from scribbleseg.report.tables import NOTHING
from scribbleseg.sweeps import State, Trial

GREY, SKY = "#b4bac0", "#56b4e9"
STATE_STYLES: dict[State, tuple[str, Marker]] = {
    "finished": (GREEN, "dot"),
    "stopped": (ORANGE, "ring"),
    "failed": (RED, "cross"),
    "running": (GREY, "ring"),
}
"""Colour and point of each state; the best trial is blue in all charts."""
MOST_AXES = 10
"""Parameters that stand side by side legibly."""
ABSENT = -0.16
"""Height at which a line passes a parameter that its trial does not have."""
BAND = 0.1
"""Height over which lines through the same choice are spread by their score."""


def score_history(trials: Sequence[Trial], best: Trial | None) -> Chart | str:
    """Draw the score of each trial in the order they were drawn, and the best so far."""
    scored = [(trial, trial.score) for trial in trials if trial.score is not None]
    if not scored:
        return "There is no history of scores: no trial has been validated yet."
    title = "Scores in the order of trials"
    unscored = [trial.number for trial in trials if trial.state == "failed" and trial.score is None]
    numbers = [float(trial.number) for trial, _ in scored]
    leading = list(itertools.accumulate((score for _, score in scored), max))
    legend = [Line("best so far", numbers, leading)]
    with quiet_axes(title) as (figure, axes):
        axes.step(numbers, leading, where="post", color=BLUE, linewidth=1.4)
        for state, (colour, marker) in STATE_STYLES.items():
            points = [(float(t.number), score) for t, score in scored if t.state == state]
            epochs, values = [x for x, _ in points], [y for _, y in points]
            if points or (state == "failed" and unscored):
                legend.append(Line(state, epochs, values, colour=colour, marker=marker))
            _scatter(axes, epochs, values, colour, marker)
        if best is not None and best.score is not None:
            axes.plot(best.number, best.score, "o", color=BLUE, markersize=8, zorder=4)
        # Without a height, they stand on the floor.
        low, high = axes.get_ylim()
        floor = low - 0.04 * (high - low)
        _scatter(axes, list(map(float, unscored)), [floor] * len(unscored), *STATE_STYLES["failed"])
        axes.set_xlabel("trial")
        axes.set_ylabel("mIoU")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        notes = [f"Large and blue: trial {best.number}, the best."] if best is not None else []
        if unscored:
            notes.append("Crosses at the bottom failed before their first validation.")
        return Chart(title=title, svg=to_svg(figure), lines=legend, note=" ".join(notes))


def _scatter(
    axes: Any, across: list[float], heights: list[float], colour: str, marker: Marker
) -> None:
    """Draw one point per trial as the legend shows it."""
    axes.plot(
        across,
        heights,
        "x" if marker == "cross" else "o",
        color=colour,
        markerfacecolor=colour if marker == "dot" else "white",
        markersize=4.5,
        markeredgewidth=1.3,
        zorder=3,
    )


def learning_curves(
    trials: Sequence[Trial],
    histories: Mapping[int, Sequence[Mapping[str, Any]]],
    best: Trial | None,
) -> Chart | str:
    """Draw the validation mIoU of all trials over their epochs, the best one's on top.

    Args:
        trials: The trials.
        histories: metrics.jsonl of each, by number.
        best: The trial that stands out.
    """
    title = "Validation mIoU of all trials"
    curves = [(trial, *series(histories.get(trial.number, ()), "miou")) for trial in trials]
    curves = [(trial, epochs, values) for trial, epochs, values in curves if values]
    if not curves:
        return "There are no learning curves: no trial has been validated yet."
    legend: dict[str, Line] = {}
    with quiet_axes(title) as (figure, axes):
        for trial, epochs, values in curves:
            stands_out = trial == best
            line = Line(
                f"trial {trial.number}, the best" if stands_out else trial.state,
                epochs,
                values,
                colour=BLUE if stands_out else STATE_STYLES[trial.state][0],
            )
            axes.plot(
                epochs,
                values,
                color=line.colour,
                linewidth=2.2 if stands_out else 0.8,
                alpha=1.0 if stands_out else 0.65,
                zorder=3 if stands_out else 2,
                marker="o" if len(values) == 1 else None,
                markersize=3,
            )
            legend.setdefault(line.label, line)
        axes.set_xlabel("epoch")
        axes.set_ylabel("mIoU")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        lines = sorted(legend.values(), key=lambda line: line.colour != BLUE)
        return Chart(title=title, svg=to_svg(figure), lines=lines)


def parallel_coordinates(
    dimensions: Sequence[Dimension], trials: Sequence[Trial], best: Trial | None
) -> Chart | str:
    """Draw each trial as a line through its parameters to its score, the best ones on top.

    Args:
        dimensions: The hyper-parameters, the most telling ones last: they stand beside the score.
        trials: The trials; those without a score are left out.
        best: The trial that stands out.
    """
    scored = [trial for trial in trials if trial.score is not None]
    if len(scored) < 2:
        return "There are no parallel coordinates: fewer than two trials have a score."
    varied = varying(dimensions, scored)
    if not varied:
        return "There are no parallel coordinates: all trials have the same parameters."
    shown = varied[-MOST_AXES:]
    ranked = sorted(scored, key=lambda trial: (trial != best, -(trial.score or 0.0), trial.number))
    score = _score_dimension([trial.score or 0.0 for trial in ranked])
    num_next = min(len(ranked) - 1, max(1, round(len(ranked) / 5)))
    title = "Parameters of all trials, and their scores"
    with quiet_axes(title, width=2 * WIDTH_INCHES + 0.6, height=3.9) as (figure, axes):
        axes.grid(visible=False)
        for rank, trial in enumerate(ranked):
            end = score.place(trial.score)
            heights = [_height(dimension, trial, end) for dimension in shown]
            colour, width = _emphasis(rank, num_next)
            axes.plot([*heights, end], color=colour, linewidth=width, zorder=3 - rank / len(ranked))
        for place, dimension in enumerate([*shown, score]):
            lacked = dimension is not score and _is_lacked(dimension, scored)
            _draw_axis(axes, place, dimension, lacked=lacked)
        _label_axes(axes, [dimension.name for dimension in shown])
        legend = [
            Line("the best trial", [], [], colour=BLUE),
            Line("the second best" if num_next == 1 else f"the next {num_next}", [], [], SKY),
        ]
        if len(ranked) > num_next + 1:
            legend.append(Line("others", [], [], colour=GREY))
        note = _what_is_missing(dimensions, varied, shown, scored)
        return Chart(title=title, svg=to_svg(figure), lines=legend, note=note)


def _score_dimension(scores: Sequence[float]) -> Dimension:
    """Return the axis of scores; where all are alike, they lie in its middle."""
    margin = 0.0 if min(scores) < max(scores) else 0.01
    return Dimension(
        name="mIoU score", choices=None, low=min(scores) - margin, high=max(scores) + margin
    )


def _height(dimension: Dimension, trial: Trial, score: float) -> float:
    """Return where a trial's line passes a parameter; through a choice, better ones higher."""
    if dimension.name not in trial.params:
        return ABSENT + BAND / 2 * (score - 0.5)
    height = dimension.place(trial.params[dimension.name])
    if dimension.choices is None:
        return height
    return height + min(BAND, 0.5 / len(dimension.choices)) * (score - 0.5)


def _emphasis(rank: int, num_next: int) -> tuple[str, float]:
    """Return colour and width of a line."""
    if rank == 0:
        return BLUE, 2.4
    return (SKY, 1.3) if rank <= num_next else (GREY, 0.7)


def _is_lacked(dimension: Dimension, trials: Sequence[Trial]) -> bool:
    """Say whether some trial does not have a parameter."""
    return any(dimension.name not in trial.params for trial in trials)


def _draw_axis(axes: Any, place: int, dimension: Dimension, *, lacked: bool) -> None:
    """Draw one upright axis, and name places on it."""
    margin = 0.0 if dimension.choices is None else BAND / 2
    axes.plot([place, place], [-margin, 1 + margin], color=INK, linewidth=0.9, zorder=4)
    for height, text in [*dimension.ticks, *([(ABSENT, NOTHING)] if lacked else [])]:
        axes.plot([place - 0.012, place], [height, height], color=INK, linewidth=0.9, zorder=4)
        axes.text(
            place - 0.025,
            height,
            text,
            ha="right",
            va="center",
            fontsize=8,
            color=INK,
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.6},
        )


def _label_axes(axes: Any, names: Sequence[str]) -> None:
    """Write the parameters' names under their axes, section and setting on two lines."""
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(-0.32, len(names) + 0.06)
    axes.set_yticks([])
    texts = ["\n".join(map(shorten, name.rsplit(".", 1))) for name in names]
    axes.set_xticks(range(len(names) + 1), [*texts, "mIoU\nscore"])


def _what_is_missing(
    dimensions: Sequence[Dimension],
    varied: Sequence[Dimension],
    shown: Sequence[Dimension],
    trials: Sequence[Trial],
) -> str:
    """Return what a reader must know who looks for a parameter or for a line."""
    notes: list[str] = []
    constant = [each.name for each in dimensions if each not in varied]
    fewer = [each.name for each in varied if each not in shown]
    if constant:
        notes.append(f"The same in all of these trials, and not shown: {', '.join(constant)}.")
    if fewer:
        notes.append(f"Of least importance, and not shown: {', '.join(fewer)}.")
    if any(each.choices is not None for each in shown):
        notes.append("Through the same choice, lines of better trials pass higher.")
    if any(_is_lacked(each, trials) for each in shown):
        notes.append(f"{NOTHING}: the trial does not have this parameter.")
    return " ".join(notes)


def judged(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that importance is computed from: ended, not failed, with a score."""
    states = ("finished", "stopped")
    return [trial for trial in trials if trial.state in states and trial.score is not None]


def importance_chart(shares: Mapping[str, float], num_trials: int) -> Chart | str:
    """Draw how much each parameter sets the best trials apart, the most important one on top.

    Args:
        shares: What `importances` returned; empty where it could not be computed.
        num_trials: Trials that it was computed from.
    """
    if num_trials < MIN_TRIALS:
        return (
            f"There is no importance of parameters: {num_trials} trials have ended with a score, "
            f"and below {MIN_TRIALS} it would be chance."
        )
    if len(shares) < 2:
        return "There is no importance of parameters: fewer than two of them vary."
    title = "Importance of parameters"
    ordered = sorted(shares.items(), key=lambda pair: pair[1])
    with quiet_axes(title, height=0.55 + 0.29 * len(ordered)) as (figure, axes):
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        values = [value for _, value in ordered]
        axes.barh(range(len(ordered)), values, height=0.62, color=BLUE)
        for place, value in enumerate(values):
            axes.text(value + max(values) / 60, place, f"{value:.0%}", va="center", color=INK)
        names = [".".join(map(shorten, name.rsplit(".", 1))) for name, _ in ordered]
        axes.set_yticks(range(len(ordered)), names)
        axes.set_xticks([])
        axes.set_xlim(0, max(values) * 1.12)
        note = (
            f"How much a parameter's values set the best {NUM_BEST} of {num_trials} trials apart "
            "from all (PED-ANOVA, arXiv 2304.10255). "
            + ("A hint at most, by so few trials. " if num_trials < 10 * MIN_TRIALS else "")
            + "Stopped trials count with the score they had."
        )
        return Chart(title=title, svg=to_svg(figure), lines=[], note=note)
