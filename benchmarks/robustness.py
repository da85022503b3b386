"""What a network makes of strokes that are shorter, thicker, fewer, wrong, or of another style.

Strokes are simulated from the masks, with the same draws for all variants of an image. One thing is
changed at a time:

    python -m benchmarks.robustness --root DATA --fold 0 --checkpoints released:best runs/first
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from benchmarks.measure import Scored
from scribbleseg.cli import exit_status
from scribbleseg.config import parse_arguments
from scribbleseg.datasets.scenes import Scene, read_scene
from scribbleseg.device import prepare_cpu
from scribbleseg.metrics import SegmentationMetrics
from scribbleseg.predict import Predictor, load
from scribbleseg.scribbles.encode import BACKGROUND, UNLABELLED
from scribbleseg.scribbles.simulate import simulate

LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.05)
# OpenCV's thickness of 1 draws 1 pixel, of 3 the benchmark's strokes.
WIDTHS = (1, 3, 5, 9, 15)
MISPLACED = (0.0, 0.02, 0.05, 0.1)
STYLES = ("curve", "skeleton", "line")

Labels = UInt8[np.ndarray, "h w"]


@dataclass(frozen=True, kw_only=True)
class Robustness(Scored):
    """Which checkpoints are tried on which images."""

    checkpoints: tuple[str, ...] = ("released:best",)
    """Checkpoints, runs or released:NAME."""
    figure: Path | None = None
    """File for the curves; None: print only."""


def variants() -> dict[tuple[str, str], dict[str, Any]]:
    """Return what is changed of simulated strokes, by group and name."""
    return (
        {("length", f"{length:g}"): {"length": length} for length in LENGTHS}
        | {("thickness", f"{width}"): {"width": float(width)} for width in WIDTHS}
        | {("wrong share", f"{share:g}"): {"misplaced": share} for share in MISPLACED}
        | {("style", style): {"style": style} for style in STYLES}
    )


def fewer(strokes: Labels) -> Labels:
    """Return strokes without those on the background."""
    return np.where(strokes == BACKGROUND, np.uint8(UNLABELLED), strokes)


def strokes_of(scene: Scene, number: int) -> dict[tuple[str, str], Labels]:
    """Return an image's strokes in all variants."""
    assert scene.mask is not None
    drawn = {
        name: simulate(scene.mask, np.random.default_rng(number), **change)
        for name, change in variants().items()
    }
    own = {
        ("own strokes", "all"): scene.scribbles,
        ("own strokes", "object"): fewer(scene.scribbles),
    }
    return own | drawn


def mious(predictor: Predictor, bench: Robustness) -> dict[tuple[str, str], float]:
    """Return the mean mIoU of each variant."""
    metrics: dict[tuple[str, str], SegmentationMetrics] = {}
    for number, each in enumerate(bench.paths()):
        scene = read_scene(each)
        assert scene.mask is not None
        for name, strokes in strokes_of(scene, number).items():
            # Wrong strokes are not honoured in any variant: the network must see through them.
            mask = predictor.predict(scene.image, strokes, honour_strokes=False)
            metrics.setdefault(name, SegmentationMetrics()).update(mask, scene.mask)
    return {name: each.compute()["miou"] for name, each in metrics.items()}


def draw(found: dict[str, dict[tuple[str, str], float]], path: Path) -> None:
    """Write the curves of all checkpoints."""
    groups = ("length", "thickness", "wrong share")
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(groups), sharey=True)
    for axes, group in zip(panels, groups, strict=True):
        for checkpoint, values in found.items():
            own = [(name, value) for (kind, name), value in values.items() if kind == group]
            axes.plot(*zip(*own, strict=True), marker="o", label=checkpoint)
        axes.set_xlabel(group)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mIoU")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and print."""
    bench: Robustness = parse_arguments(
        Robustness, sys.argv[1:], prog="python -m benchmarks.robustness"
    )
    prepare_cpu(os.cpu_count() or 1)
    found = {name: mious(load(name), bench) for name in bench.checkpoints}
    heads = "".join(f" {name} |" for name in found)
    sys.stdout.write(f"{bench.part}; mIoU; {os.cpu_count()} cores\n\n| strokes | |{heads}\n")
    sys.stdout.write("| --- | --- |" + " --- |" * len(found) + "\n")
    for kind, name in next(iter(found.values())):
        cells = "".join(f" {values[kind, name]:.3f} |" for values in found.values())
        sys.stdout.write(f"| {kind} | {name} |{cells}\n")
    if bench.figure is not None:
        draw(found, bench.figure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
