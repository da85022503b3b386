"""The report's tables: figures of one run, several runs side by side, and the facts of a run.

Cells are plain text; the page escapes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scribbleseg.config import flatten
from scribbleseg.evaluate import BOOTSTRAP_SEED, METRIC_NAMES, Evaluation
from scribbleseg.metrics import bootstrap_interval

NOTHING = "–"
PRETRAINING_FIGURES = {
    "probe_miou": "Probe mIoU",
    "loss": "Loss",
    "entropy": "Teacher's entropy",
    "kl": "KL divergence",
    "deviation": "Spread",
    "dimensions": "Dimensions",
}
"""Metrics of pretraining runs in their table, and their columns' titles."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    header: list[str]
    """One word or two per column."""
    rows: list[list[str]]
    """As many cells as the header has."""
    note: str = ""
    """What a reader must know to read the figures right."""
    highlighted: int | None = None
    """Index of the row that stands out."""


def figures_table(evaluation: Evaluation) -> Table:
    """Return the means, intervals and pooled figures of one network."""
    rows = [
        [
            label,
            share(evaluation.means[name]),
            interval(evaluation.intervals[name]),
            share(evaluation.pooled.get(name)),
        ]
        for name, label in METRIC_NAMES.items()
    ]
    return Table(
        header=["", "Mean over images", "95 % interval", "Pooled"],
        rows=rows,
        note=how_scored(evaluation),
    )


def how_scored(evaluation: Evaluation) -> str:
    """Return in two sentences what the figures were computed on, and how."""
    settings = evaluation.settings
    strokes = "take" if settings["honour_strokes"] else "do not take"
    how = ", averaged with the mirrored input" if settings["flip"] else ""
    how += ", along the image's own edges" if settings["edges"] else ""
    scales = ", ".join(f"{scale:.3g}" for scale in settings["scales"])
    how += f", averaged over looks at {scales} of the network's size" if scales != "1" else ""
    line = settings["threshold"]
    how += f", object from a probability of {line:g} on" if line != 0.5 else ""
    least = settings["part_threshold"]
    how += f", parts without a stroke from {least:g} on" if least > line else ""
    return (
        f"{len(evaluation.rows)} images of {evaluation.part}, each at its own size{how}; "
        f"pixels under a stroke {strokes} its label. Intervals are bootstrapped over images; "
        "pooled figures sum pixels over all images first."
    )


def comparison_table(
    names: Sequence[str],
    evaluations: Sequence[Evaluation | None],
    facts: Sequence[Mapping[str, str]],
) -> Table:
    """Return one row per run: its architecture and its figures.

    Args:
        names: The runs.
        evaluations: Their figures, None where there are none.
        facts: What `run_facts` says of each.
    """
    rows: list[list[str]] = []
    for name, evaluation, fact in zip(names, evaluations, facts, strict=True):
        figures = [NOTHING] * (len(METRIC_NAMES) + 3)
        if evaluation is not None:
            means = [share(evaluation.means[metric]) for metric in METRIC_NAMES]
            figures = [
                means[0],
                interval(evaluation.intervals["miou"]),
                difference(evaluation, evaluations[0]),
                *means[1:],
                share(evaluation.pooled["miou"]),
            ]
        rows.append([name, fact.get("Architecture", NOTHING), *figures])
    first, *others = METRIC_NAMES.values()
    header = ["Run", "Architecture", first, "95 % interval", "To the first run", *others]
    scored = {how_scored(evaluation) for evaluation in evaluations if evaluation is not None}
    note = "The runs were scored on different images or in different ways."
    if len(scored) == 1:
        note = (
            f"{scored.pop()} Differences to the first run are those of mIoU, image by image, with "
            "their own interval: where it holds 0, the two may be equally good."
        )
    return Table(header=[*header, "Pooled mIoU"], rows=rows, note=note if any(evaluations) else "")


def pretraining_table(
    names: Sequence[str],
    histories: Sequence[Sequence[Mapping[str, Any]]],
    facts: Sequence[Mapping[str, str]],
) -> Table:
    """Return one row per pretraining run: its architecture and its last figures.

    Args:
        names: The runs.
        histories: Their metrics.jsonl.
        facts: What `run_facts` says of each.
    """
    rows: list[list[str]] = []
    for name, history, fact in zip(names, histories, facts, strict=True):
        figures = [share(last(history, key)) for key in PRETRAINING_FIGURES]
        rows.append(
            [name, *(fact.get(key, NOTHING) for key in ("Architecture", "Epochs")), *figures]
        )
    return Table(
        header=["Pretraining run", "Architecture", "Epochs", *PRETRAINING_FIGURES.values()],
        rows=rows,
        note="The last epoch's figures; those of the probe from the last epoch that had one.",
    )


def last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the last value of a metric; None where there is none."""
    values = (row[key] for row in reversed(history) if isinstance(row.get(key), int | float))
    return next(values, None)


def difference(evaluation: Evaluation, base: Evaluation | None) -> str:
    """Return by how much mIoU differs from another network's on the same images, paired.

    The images' own difficulty, which dominates the interval of each mean, cancels in the pairs.
    """
    if base is None or base is evaluation:
        return NOTHING
    if [row.stem for row in base.rows] != [row.stem for row in evaluation.rows]:
        return NOTHING
    gains = [row.miou - other.miou for row, other in zip(evaluation.rows, base.rows, strict=True)]
    low, high = bootstrap_interval(gains, np.random.default_rng(BOOTSTRAP_SEED))
    return f"{sum(gains) / len(gains):+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")


def scores_table(evaluation: Evaluation) -> Table:
    """Return every image's figures, best first."""
    ordered = sorted(evaluation.rows, key=lambda row: (-row.miou, row.stem))
    return Table(
        header=["Image", *METRIC_NAMES.values(), "Share of object"],
        rows=[
            [
                row.stem,
                *(share(getattr(row, name)) for name in METRIC_NAMES),
                share(row.object_share),
            ]
            for row in ordered
        ],
    )


def run_facts(
    info: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    num_parameters: int | None,
) -> dict[str, str]:
    """Return what there is to know about a run, by label; what is unknown is left out.

    Args:
        info: Its run.json.
        history: Its metrics.jsonl.
        best: Its best.json.
        num_parameters: Of the network.
    """
    config = flatten(info.get("config", {}))
    planned = config.get("train.epochs")
    versions: Mapping[str, Any] = info.get("versions") or {}
    facts: dict[str, Any] = {
        "Architecture": config.get("model.architecture"),
        "Parameters": num_parameters and millions(num_parameters),
        "Prototypes": flatten(info.get("resolved", {})).get("dino.out_dim"),
        "Epochs": f"{len(history)} of {planned}" if planned else len(history),
        "Best epoch": best and best.get("epoch"),
        "Wall time": duration(info.get("wall_time")),
        "Workers": info.get("world_size"),
        "Seed": info.get("seed"),
        "Started": info.get("started"),
        "Git commit": _short(info.get("git_commit")),
        "Data fingerprint": _short(info.get("data_fingerprint")),
        "Settings hash": info.get("config_hash"),
        "Images": ", ".join(config.get("data.roots") or []),
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    }
    return {label: str(value) for label, value in facts.items() if value not in (None, "")}


def _short(digest: Any) -> str | None:
    return str(digest)[:12] if digest else None


def millions(count: int) -> str:
    """Return a count in millions."""
    return f"{count / 1e6:.2f} million"


def share(value: float | None) -> str:
    """Return a share with three decimals, or a dash."""
    return NOTHING if value is None else f"{value:.3f}"


def interval(ends: tuple[float, float]) -> str:
    """Return an interval as text."""
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def duration(seconds: Any) -> str | None:
    """Return seconds as hours and minutes, minutes and seconds, or seconds; None if unknown."""
    if not isinstance(seconds, int | float):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
