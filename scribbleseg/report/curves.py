"""Curves over epochs and distributions over images, as SVG to be put into a page.

Charts carry no names of runs or files: those stand in the page's own legend, as escaped text.
"""

import io
import itertools
import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, BLACK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#000000"
INK, FAINT = "#3d4248", "#e3e5e8"

# Okabe and Ito's colours, without the yellow that paper swallows: told apart by everybody. The
# dashes tell lines apart where there is no colour at all.
COLOURS = (BLUE, RED, GREEN, "#cc79a7", ORANGE, "#56b4e9", BLACK)
DASHES: tuple[tuple[int, ...], ...] = ((), (6, 2), (2, 2), (6, 2, 2, 2))

COMPARED = {
    "loss": "Training loss",
    "miou": "mIoU",
    "object_iou": "Object IoU",
    "background_iou": "Background IoU",
}
"""Metrics that runs are compared by, and the titles of their charts."""
PRETRAINING = {
    "loss": "Pretraining loss",
    "probe_miou": "Probe mIoU",
    "entropy": "Teacher's entropy",
    "kl": "KL divergence, teacher to student",
    "deviation": "Spread of features",
    "dimensions": "Share of dimensions",
    "grad_norm": "Gradient norm",
}
"""The same for pretraining runs."""
SHARES = {"miou", "object_iou", "background_iou", "probe_miou", "deviation", "dimensions"}
"""Metrics that lie in [0, 1]."""

WIDTH_INCHES, HEIGHT_INCHES = 5.6, 3.0

Marker = Literal["dot", "ring", "cross"]


@dataclass(frozen=True)
class Line:
    """One curve of a chart and its entry in the legend."""

    label: str
    """What the legend calls it; any text."""
    epochs: list[float]
    """Horizontal positions."""
    values: list[float]
    """Vertical positions, finite."""
    colour: str = BLUE
    """CSS colour."""
    dash: tuple[int, ...] = ()
    """Lengths of strokes and gaps in points; () is a solid line."""
    marker: Marker | None = None
    """What the legend shows instead of a line, where the chart has points."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing, its title and its legend."""

    title: str
    """One short line."""
    svg: str
    """The drawing: an <svg> element without scripts or text from outside."""
    lines: list[Line]
    """The legend; empty where there is nothing to tell apart."""
    note: str = ""
    """One sentence under the drawing."""


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return the epochs and the values of one metric; epochs without a finite one are left out."""
    points = [
        (float(entry["epoch"]), float(entry[key]))
        for entry in history
        if _is_finite(entry.get("epoch")) and _is_finite(entry.get(key))
    ]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def styles() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield colours and dashes for any number of lines; the first 28 differ from one another."""
    return itertools.cycle((colour, dash) for dash in DASHES for colour in COLOURS)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    best_epoch: int | None = None,
    level: float | None = None,
    share: bool = False,
    note: str = "",
) -> Chart:
    """Draw curves over epochs.

    Args:
        title: One short line; also keeps the ids of this drawing apart from others on the page.
        lines: The curves; those without points stand in no legend.
        best_epoch: Marked by a vertical line.
        level: Marked by a horizontal line.
        share: The values lie in [0, 1], and the axis ends there.
        note: One sentence under the drawing; "" says which epoch is marked.
    """
    drawn = [line for line in lines if line.values]
    with quiet_axes(title) as (figure, axes):
        for line in drawn:
            axes.plot(
                line.epochs,
                line.values,
                color=line.colour,
                linewidth=1.8,
                linestyle=(0, line.dash) if line.dash else "-",
                marker="o" if len(line.values) == 1 else None,
            )
        if best_epoch is not None:
            axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        if level is not None:
            axes.axhline(level, color=ORANGE, linewidth=1.2, linestyle=(0, (4, 2)))
            low, high = axes.get_ylim()
            # The line must not lie on the drawing's edge.
            axes.set_ylim(low, max(high, level + (level - low) / 20))
        if share and drawn:
            low = min(min(line.values) for line in drawn)
            high = max(max(line.values) for line in drawn)
            axes.set_ylim(max(0.0, math.floor(low * 10 - 0.2) / 10), min(1.0, high + 0.05))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if best_epoch is not None and not note:
            note = f"Dotted: the best epoch, {best_epoch:g}."
        return Chart(title=title, svg=to_svg(figure), lines=drawn, note=note)


def distribution(title: str, values: Sequence[float]) -> Chart:
    """Draw how many images score how high, in bins of 0.05 over [0, 1], and their median."""
    middle = sorted(values)[len(values) // 2]
    with quiet_axes(title) as (figure, axes):
        edges = [index / 20 for index in range(21)]
        axes.hist(values, bins=edges, color=BLUE, edgecolor="white", linewidth=1.0)
        axes.axvline(middle, color=INK, linewidth=1.2, linestyle=(0, (1, 2)), zorder=3)
        axes.set_xlim(math.floor(min(values) * 10) / 10 - 0.01, 1.01)
        axes.set_xlabel("mIoU of one image")
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        note = f"Dotted: the median image, {middle:.3f}."
        return Chart(title=title, svg=to_svg(figure), lines=[], note=note)


def follow(history: Sequence[Mapping[str, Any]], best_epoch: int | None) -> list[Chart]:
    """Return the curves of one run: loss and IoU, as far as there is something to draw.

    Args:
        history: The run's metrics.jsonl.
        best_epoch: Epoch of its best checkpoint.
    """
    loss = Line("mean of the epoch", *series(history, "loss"), colour=BLACK)
    ious = [
        Line("Background IoU", *series(history, "background_iou"), colour=ORANGE, dash=DASHES[1]),
        Line("mIoU", *series(history, "miou"), colour=BLACK),
        Line("Object IoU", *series(history, "object_iou"), colour=BLUE),
    ]
    charts: list[Chart] = []
    if loss.values:
        charts.append(line_chart("Training loss", [loss]))
    if any(line.values for line in ious):
        charts.append(line_chart("Validation IoU", ious, best_epoch=best_epoch, share=True))
    return [*charts, *_waits(history)]


def follow_pretraining(history: Sequence[Mapping[str, Any]], out_dim: int | None) -> list[Chart]:
    """Return the curves of one pretraining run, as far as there is something to draw.

    Args:
        history: The run's metrics.jsonl.
        out_dim: Prototypes of its head, if known.
    """

    def line(label: str, key: str, colour: str = BLACK, dash: tuple[int, ...] = ()) -> Line:
        return Line(label, *series(history, key), colour=colour, dash=dash)

    ignorance, note = None, "Cross-entropy of teacher and student, in nats."
    if out_dim is not None:
        ignorance = math.log(out_dim)
        note = f"Dashed: ln({out_dim}) = {ignorance:.2f}, where nothing has been learned."
    loss, miou = line("mean of the epoch", "loss"), line("nearest stroke", "probe_miou", BLUE)
    entropy = line("teacher's entropy", "entropy", BLUE)
    divergence = line("KL divergence, teacher to student", "kl", RED, DASHES[1])
    spread = line("mean of the epoch", "deviation")
    used = line("mean over levels", "dimensions")
    norm = line("mean of the epoch, before clipping", "grad_norm")
    charts = [
        line_chart("Pretraining loss", [loss], level=ignorance, note=note),
        line_chart(
            "Probe mIoU",
            [miou],
            share=True,
            note="Each pixel takes the label of the stroke nearest in feature space.",
        ),
        line_chart(
            "Entropy and KL divergence",
            [entropy, divergence],
            note="In nats; their sum is the loss. An entropy of 0: one prototype takes all images.",
        ),
        line_chart(
            "Spread of features", [spread], share=True, note="Towards 0 all images look alike."
        ),
        line_chart(
            "Share of dimensions",
            [used],
            share=True,
            note="Effective rank of the features over their channels; low: they copy each other.",
        ),
        line_chart("Gradient norm", [norm]),
    ]
    return [*(chart for chart in charts if chart.lines), *_waits(history)]


def _waits(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return what a step waited for, in one chart; none where it was not measured."""
    lines = [
        Line("data", *series(history, "waiting"), colour=BLACK),
        Line("sums of gradients", *series(history, "all_reduce"), colour=BLUE, dash=DASHES[1]),
    ]
    note = "Share of a step that no device computes in, as a mean over workers."
    chart = line_chart("Waiting", lines, share=True, note=note)
    return [chart] if chart.lines else []


def compare(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    titles: Mapping[str, str] = COMPARED,
) -> list[Chart]:
    """Return one chart per metric with all runs in it.

    Args:
        runs: Name and metrics.jsonl of each; on different storages two may share a name.
        titles: The metrics, and what their charts are called.
    """
    charts: list[Chart] = []
    for key, title in titles.items():
        lines = [
            Line(name, *series(history, key), colour=colour, dash=dash)
            for (name, history), (colour, dash) in zip(
                runs, itertools.islice(styles(), len(runs)), strict=True
            )
        ]
        if any(line.values for line in lines):
            charts.append(line_chart(title, lines, share=key in SHARES))
    return charts


@contextmanager
def quiet_axes(
    title: str, *, width: float = WIDTH_INCHES, height: float = HEIGHT_INCHES
) -> Generator[tuple[Any, Any]]:
    """Give a figure with quiet axes; matplotlib's settings are changed only meanwhile.

    They are typed Any because matplotlib's own types leave every keyword unknown.

    Args:
        title: Keeps the ids of this drawing apart from others on the page.
        width: Of the figure, in inches; two of the usual ones fill the page.
        height: Of the figure, in inches.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        # Names of settings may hold anything, dollars and backslashes too.
        "text.parse_math": False,
        "font.size": 9,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with cast(Any, mpl).rc_context(settings):
        figure: Any = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="both", length=0)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        yield figure, axes


def to_svg(figure: Any) -> str:
    """Return the figure as an <svg> element that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'^<svg ([^>]*?)width="[^"]*"([^>]*?)height="[^"]*"', r"<svg \1\2", text)
