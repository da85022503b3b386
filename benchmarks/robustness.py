"""What a network makes of strokes that are shorter, thicker, fewer, wrong, or of another style.

Strokes are simulated from the masks, with the same draws for all variants of an image. One thing is
changed at a time:

    python -m benchmarks.robustness --root DATA --fold 0 --checkpoints released:best runs/first

Which tenth of a stroke is kept matters more than networks differ: `--draws 3` simulates three times
and takes each image's mean; `--groups length` leaves out what is not asked for.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float64, UInt8
from matplotlib.figure import Figure

from benchmarks.measure import Scored
from scribbleseg.cli import exit_status
from scribbleseg.config import parse_arguments, require
from scribbleseg.datasets.scenes import Scene, read_scene
from scribbleseg.device import num_cores, prepare_cpu
from scribbleseg.metrics import image_scores
from scribbleseg.predict import Predictor, load
from scribbleseg.scribbles.encode import BACKGROUND, UNLABELLED
from scribbleseg.scribbles.simulate import simulate

LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.05)
# OpenCV's thickness of 1 draws 1 pixel, of 3 the benchmark's strokes.
WIDTHS = (1, 3, 5, 9, 15)
MISPLACED = (0.0, 0.02, 0.05, 0.1)
STYLES = ("curve", "skeleton", "line")

Group = Literal["own", "length", "thickness", "misplaced", "style"]
GROUPS: tuple[Group, ...] = get_args(Group)
# For this share of the strokes' length it is said how much of its mIoU a network keeps.
SHORT = 0.1

Labels = UInt8[np.ndarray, "h w"]
Scores = Float64[np.ndarray, "images"]
Variant = tuple[str, str]
"""Group and name."""


@dataclass(frozen=True, kw_only=True)
class Robustness(Scored):
    """Which checkpoints are tried on which images."""

    checkpoints: tuple[str, ...] = ("released:best",)
    """Checkpoints, runs or released:NAME."""
    groups: tuple[Group, ...] = GROUPS
    """What is changed (one or more)."""
    draws: int = 1
    """Simulated strokes per image and variant, whose scores are averaged (1 or more)."""
    figure: Path | None = None
    """File for the curves; None: print only."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(len(self.groups) > 0, "groups", self.groups, f"one or more of {', '.join(GROUPS)}")
        require(self.draws >= 1, "draws", self.draws, "1 or more")


def variants() -> dict[Variant, dict[str, Any]]:
    """Return what is changed of simulated strokes, by group and name."""
    return (
        {("length", f"{length:g}"): {"length": length} for length in LENGTHS}
        | {("thickness", f"{width}"): {"width": float(width)} for width in WIDTHS}
        | {("misplaced", f"{share:g}"): {"misplaced": share} for share in MISPLACED}
        | {("style", style): {"style": style} for style in STYLES}
    )


def fewer(strokes: Labels) -> Labels:
    """Return strokes without those on the background."""
    return np.where(strokes == BACKGROUND, np.uint8(UNLABELLED), strokes)


def strokes_of(scene: Scene, number: int, bench: Robustness) -> dict[Variant, list[Labels]]:
    """Return an image's strokes in all variants that are asked for, each draw's."""
    mask = scene.mask
    assert mask is not None
    drawn = {
        name: [
            # A draw's strokes are the same however many others there are.
            simulate(mask, np.random.default_rng([number, draw] if draw else number), **change)
            for draw in range(bench.draws)
        ]
        for name, change in variants().items()
        if name[0] in bench.groups
    }
    own = {("own", "all"): [scene.scribbles], ("own", "on the object"): [fewer(scene.scribbles)]}
    return (own if "own" in bench.groups else {}) | drawn


def score(predictor: Predictor, bench: Robustness) -> dict[Variant, Scores]:
    """Return each image's mIoU in each variant, the mean of its draws."""
    scores: dict[Variant, list[float]] = {}
    for number, each in enumerate(bench.paths()):
        scene = read_scene(each)
        assert scene.mask is not None
        for name, draws in strokes_of(scene, number, bench).items():
            # Wrong strokes are not honoured in any variant: the network must see through them.
            masks = [predictor.predict(scene.image, it, honour_strokes=False) for it in draws]
            mean = fmean(image_scores(mask, scene.mask).miou for mask in masks)
            scores.setdefault(name, []).append(mean)
    return {name: np.array(values) for name, values in scores.items()}


def kept(part: Scores, whole: Scores) -> tuple[float, float, float]:
    """Return the ratio of two means over the same images, with a 95 % bootstrap interval."""
    resamples = np.random.default_rng(0).integers(len(part), size=(10_000, len(part)))
    ratios = part[resamples].mean(axis=1) / whole[resamples].mean(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(part.mean() / whole.mean()), float(low), float(high)


def draw(found: dict[str, dict[Variant, Scores]], groups: Sequence[str], path: Path) -> None:
    """Write the curves of all checkpoints."""
    figure = Figure(figsize=(1 + 3.3 * len(groups), 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        for checkpoint, scores in found.items():
            curve = [(name, each.mean()) for (kind, name), each in scores.items() if kind == group]
            axes.plot(*zip(*curve, strict=True), marker="o", label=checkpoint)
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
    prepare_cpu(num_cores())
    found = {name: score(load(name), bench) for name in bench.checkpoints}
    heads = "".join(f" {name} |" for name in found)
    sys.stdout.write(
        f"{bench.part}; mIoU, simulated strokes: {bench.draws} draw(s); {num_cores()} cores\n\n"
        f"| strokes | |{heads}\n| --- | --- |" + " --- |" * len(found) + "\n"
    )
    for kind, name in next(iter(found.values())):
        cells = "".join(f" {scores[kind, name].mean():.3f} |" for scores in found.values())
        sys.stdout.write(f"| {kind} | {name} |{cells}\n")
    if "length" in bench.groups:
        for name, scores in found.items():
            share, low, high = kept(scores["length", f"{SHORT:g}"], scores["length", "1"])
            sys.stdout.write(
                f"{name} keeps {share:.3f} ({low:.3f} to {high:.3f}) of its mIoU at {SHORT:g} of "
                "the length\n"
            )
    curves = [group for group in bench.groups if group in ("length", "thickness", "misplaced")]
    if bench.figure is not None and curves:
        draw(found, curves, bench.figure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
