"""Runs -> scores -> tables: means over seeds, and paired differences over images."""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from scribbleseg.config import FinetuneConfig
from scribbleseg.datasets.remote import inside
from scribbleseg.evaluate import BOOTSTRAP_SEED, METRIC_NAMES, Row, evaluate
from scribbleseg.metrics import bootstrap_interval
from scribbleseg.predict import load
from scribbleseg.report.tables import Table
from scribbleseg.runs import RunFolder
from train.launch import LaunchConfig, call_remotely, start_ray

METRICS = ("object_iou", "background_iou", "miou")
STARTS = {"scratch": "from scratch", "DINO": "DINO", "practice": "practice"}
"""What a network can start from, as a table's name and as its title."""
TITLES = STARTS | {f"{start}-scratch": f"{start} − scratch" for start in ("DINO", "practice")}


class Cell(NamedTuple):
    """One cell of the design: its runs differ in their seed alone."""

    start: str
    """scratch, DINO or practice."""
    architecture: str
    share: float


class Figure(NamedTuple):
    """One number of the tables, with what says how sure it is."""

    table: str
    """One of STARTS, or a difference: DINO-scratch, practice-scratch."""
    architecture: str
    share: float
    """Share of the training labels."""
    metric: str
    """object_iou, background_iou or miou, averaged over images."""
    mean: float
    """Mean over seeds."""
    deviation: float | None = None
    """Standard deviation over seeds; None with one seed, and of differences."""
    low: float | None = None
    """Lower end of a difference's 95 % interval over images."""
    high: float | None = None
    """Its upper end."""

    def text(self) -> str:
        """Return it as a cell of a table."""
        if self.low is not None and self.high is not None:
            interval = f"({self.low:+.3f} to {self.high:+.3f})"
            return f"{self.mean:+.3f} {interval}".replace("-", "−")
        return f"{self.mean:.3f}" + ("" if self.deviation is None else f" ± {self.deviation:.3f}")


def figures(scores: Mapping[Cell, Sequence[Sequence[Row]]]) -> list[Figure]:
    """Return all figures, table by table.

    Args:
        scores: Every image's scores, of each seed of each cell.
    """
    found: list[Figure] = []
    for cell, metric in itertools.product(scores, METRICS):
        means = _grid(scores[cell], metric).mean(axis=1)
        deviation = float(means.std(ddof=1)) if len(means) > 1 else None
        found.append(Figure(*cell, metric, float(means.mean()), deviation))
    for cell, metric in itertools.product(scores, METRICS):
        if cell.start != "scratch":
            ours, theirs = scores[cell], scores[cell._replace(start="scratch")]
            mean, *ends = paired_difference(ours, theirs, metric)
            difference = cell._replace(start=f"{cell.start}-scratch")
            found.append(Figure(*difference, metric, mean, None, *ends))
    return sorted(found, key=lambda figure: list(TITLES).index(figure.table))


def paired_difference(
    ours: Sequence[Sequence[Row]], theirs: Sequence[Sequence[Row]], metric: str
) -> tuple[float, float, float]:
    """Return how much better ours are, image by image, with a 95 % bootstrap interval over images.

    Args:
        ours: Every image's scores, of each seed; an image's are averaged over the seeds first.
        theirs: The same images' scores.
        metric: Which score.

    Returns:
        The mean difference, and the interval's lower and upper end.
    """
    gains = _grid(ours, metric).mean(axis=0) - _grid(theirs, metric).mean(axis=0)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    return float(gains.mean()), *bootstrap_interval(gains.tolist(), generator)


def score_all(runs: Sequence[tuple[str, FinetuneConfig]], launch: LaunchConfig) -> list[list[Row]]:
    """Score the last checkpoints of finished runs, on a cluster where the data are.

    Args:
        runs: Where each of them is, and the settings that say on which images it was validated.
        launch: Whether there is a cluster.

    Raises:
        InputError: what is wrong with the data.
    """
    if launch.is_local:
        return [score(uri, config) for uri, config in runs]
    start_ray(launch)
    return call_remotely(score, runs)


def score(uri: str, config: FinetuneConfig) -> list[Row]:
    """Score the last checkpoint of a finished run on the images that it was validated on."""
    epoch, data = RunFolder.open(uri).last(), config.data
    split = data.split if data.fold is not None else data.val_split
    assert epoch is not None and split is not None, f"{uri} is not finished, or never validated"
    predictor = load(inside(uri, f"checkpoint_{epoch:04d}"))
    scored = evaluate(predictor, data.root, split, None, fold=data.fold, cache_dir=data.cache_dir)
    return scored.rows


def _grid(seeds: Sequence[Sequence[Row]], metric: str) -> np.ndarray:
    """Return the scores as (seeds, images)."""
    return np.array([[getattr(row, metric) for row in rows] for rows in seeds])


def to_tables(found: Sequence[Figure], note: str) -> list[Table]:
    """Return a table for every start and every difference, as far as there are figures.

    Args:
        found: From `figures`, in its order.
        note: What stands below the last one.
    """
    made: list[Table] = []
    for number, (name, group) in enumerate(itertools.groupby(found, lambda each: each.table), 1):
        rows = [
            [architecture, percent(share), *(figure.text() for figure in cell)]
            for (architecture, share), cell in itertools.groupby(group, lambda each: each[1:3])
        ]
        labels = [METRIC_NAMES[metric] for metric in METRICS]
        made.append(Table(header=[f"Table {number}: {TITLES[name]}", "Labels", *labels], rows=rows))
    return [*made[:-1], replace(made[-1], note=note)]


def to_csv(found: Sequence[Figure]) -> str:
    """Return one line per figure."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Figure._fields, *found])
    return text.getvalue()


def to_markdown(results: Sequence[Table]) -> str:
    """Return the tables as a text file."""
    lines = ["# Ways to start", ""]
    for table in results:
        cells = [table.header, ["---"] * len(table.header), *table.rows]
        lines += [*(f"| {' | '.join(row)} |" for row in cells), "", table.note]
    return "\n".join(lines) + "\n"


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:g} %"
