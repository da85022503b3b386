"""How many strokes until the mask is right: a simulated user draws where the largest error is.

The first strokes are one on the object and one on the background, of the benchmark's kind; each
further one is a curve inside the largest connected error:

    python -m benchmarks.interaction --root DATA --fold 0 --checkpoints released:best runs/first
"""

import sys
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from benchmarks.measure import Scored
from scribbleseg.cli import exit_status
from scribbleseg.config import parse_arguments, require
from scribbleseg.datasets.scenes import Scene, read_scene
from scribbleseg.device import num_cores, prepare_cpu
from scribbleseg.metrics import image_scores
from scribbleseg.predict import Predictor, load
from scribbleseg.scribbles.encode import UNLABELLED
from scribbleseg.scribbles.simulate import correct

TARGETS = (0.85, 0.90)
MOST_STROKES = 20
NUM_ROUNDS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Interaction(Scored):
    """Which checkpoints are tried on which images."""

    checkpoints: tuple[str, ...] = ("released:best",)
    """Checkpoints, runs or released:NAME."""
    strokes: int = MOST_STROKES
    """Most strokes per image; an image that does not get there counts as this many (6 or more)."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(
            self.strokes > NUM_ROUNDS_SHOWN,
            "strokes",
            self.strokes,
            f"{NUM_ROUNDS_SHOWN + 1} or more",
        )


@dataclass(frozen=True, kw_only=True)
class Session:
    """One image, corrected stroke by stroke."""

    ious: list[float]
    """IoU of the object after two strokes, three, ..."""
    wrong: int
    """Stroke pixels that the network itself left wrong, over all rounds and pixels drawn."""
    drawn: int
    """Stroke pixels, over all rounds."""

    def strokes_to(self, target: float, most: int) -> int:
        """Return the number of strokes after which the IoU was first reached."""
        return next((n for n, iou in enumerate(self.ious, start=2) if iou >= target), most)


def first_strokes(
    mask: UInt8[np.ndarray, "h w"], generator: np.random.Generator
) -> UInt8[np.ndarray, "h w"]:
    """Return one stroke on the object and one on the background."""
    strokes = np.full(mask.shape, UNLABELLED, np.uint8)
    for label in (1, 0):
        # As if all of the label were missed, and nothing else wrong.
        missed = np.where(mask == label, np.uint8(1 - label), mask)
        strokes = correct(missed, mask, strokes, generator)
    return strokes


def correct_scene(predictor: Predictor, scene: Scene, number: int, bench: Interaction) -> Session:
    """Draw until the last target is reached."""
    assert scene.mask is not None
    generator = np.random.default_rng(number)
    strokes = first_strokes(scene.mask, generator)
    ious: list[float] = []
    wrong = drawn = 0
    for _ in range(2, bench.strokes + 1):
        found = predictor.predict(scene.image, strokes, honour_strokes=False)
        known = strokes != UNLABELLED
        wrong += int((found[known] != strokes[known]).sum())
        drawn += int(known.sum())
        found = np.where(known, strokes, found)
        ious.append(image_scores(found, scene.mask).object_iou)
        if ious[-1] >= max(TARGETS) and len(ious) >= NUM_ROUNDS_SHOWN:
            break
        strokes = correct(found, scene.mask, strokes, generator)
    return Session(ious=ious, wrong=wrong, drawn=drawn)


def line(checkpoint: str, bench: Interaction) -> str:
    """Return a checkpoint's line of the table."""
    predictor = load(checkpoint)
    sessions = [
        correct_scene(predictor, read_scene(each), number, bench)
        for number, each in enumerate(tqdm(bench.paths(), desc=checkpoint))
    ]
    counts = [np.mean([s.strokes_to(t, bench.strokes) for s in sessions]) for t in TARGETS]
    reached = [np.mean([max(s.ious) >= t for s in sessions]) for t in TARGETS]
    rounds = [np.mean([s.ious[n] for s in sessions]) for n in range(NUM_ROUNDS_SHOWN)]
    wrong = sum(s.wrong for s in sessions) / sum(s.drawn for s in sessions)
    cells = [f"{count:.1f} ({share:.0%})" for count, share in zip(counts, reached, strict=True)]
    cells += [f"{iou:.3f}" for iou in rounds] + [f"{wrong:.2%}"]
    return f"| {checkpoint} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print."""
    bench: Interaction = parse_arguments(
        Interaction, sys.argv[1:], prog="python -m benchmarks.interaction"
    )
    prepare_cpu(num_cores())
    heads = [f"strokes to {target:.0%} (reached)" for target in TARGETS]
    heads += [f"IoU after {n} strokes" for n in range(2, 2 + NUM_ROUNDS_SHOWN)]
    heads += ["stroke pixels wrong before they are honoured"]
    sys.stdout.write(
        f"{bench.part}; object IoU; at most {bench.strokes} strokes; {num_cores()} cores\n\n"
        f"| checkpoint | {' | '.join(heads)} |\n| --- |{' --- |' * len(heads)}\n"
    )
    for checkpoint in bench.checkpoints:
        sys.stdout.write(line(checkpoint, bench) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(exit_status(main))
