"""Prediction: milliseconds per image of 500×375, beside methods that need no training.

The network looks once, as it does while a person draws (`released:best` looks at three scales and
their mirror images where nobody waits). PyTorch as it comes, compiled, and from ONNX Runtime, for
one image and for batches of 16; GrabCut (OpenCV) and random walker (scikit-image, at half size) on
the same image and strokes:

    python -m benchmarks.prediction --checkpoint released:best
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage import data as photographs

from benchmarks.measure import Measured, in_turn, tell, to_markdown
from benchmarks.peers import grabcut, walker
from scribbleseg.config import PredictConfig, parse_arguments
from scribbleseg.device import prepare_cpu
from scribbleseg.predict import Predictor, load, network_inputs, pad
from scribbleseg.scribbles.encode import UNLABELLED

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class PredictionBench:
    """What is measured."""

    checkpoint: str = "released:best"
    """Checkpoint, run or released:NAME."""
    rounds: int = 10
    """Predictions of each kind that count; two more come first."""
    out: Path | None = None
    """File without suffix for the table, .md and .json; None: print only."""


def picture() -> tuple[np.ndarray, np.ndarray]:
    """Return a photograph of 500×375 and two strokes."""
    image = cv2.resize(photographs.chelsea(), (500, 375), interpolation=cv2.INTER_AREA)
    strokes = np.full(image.shape[:2], UNLABELLED, np.uint8)
    cv2.line(strokes, (200, 150), (330, 250), 1, 3)
    cv2.polylines(strokes, [np.array([[30, 30], [250, 15], [480, 40]])], False, 0, 3)
    return image, strokes


def once(predictor: Predictor) -> Predictor:
    """Return the predictor that looks once."""
    return replace(predictor, config=replace(predictor.config, predict=PredictConfig()))


def batched(predictor: Predictor, image: np.ndarray, strokes: np.ndarray) -> Callable[[], object]:
    """Return a function that runs the network alone on a batch."""
    config = predictor.config
    seen, drawn = pad(
        *network_inputs(
            image, strokes, data=config.data, strokes=config.strokes, device=predictor.device
        )
    )
    seen, drawn = (x.expand(BATCH, -1, -1, -1).contiguous() for x in (seen, drawn))

    def work() -> None:
        with torch.inference_mode():
            predictor.model(seen, drawn)

    return work


def main() -> None:
    """Measure and print."""
    bench: PredictionBench = parse_arguments(
        PredictionBench, sys.argv[1:], prog="python -m benchmarks.prediction"
    )
    prepare_cpu(os.cpu_count() or 1)
    image, strokes = picture()
    careful = load(bench.checkpoint)
    quick = once(careful)
    compiled = replace(quick, model=torch.compile(load(bench.checkpoint).model))
    works: dict[str, Callable[[], object]] = {
        "PyTorch, one look": lambda: quick.predict(image, strokes),
        "PyTorch, compiled, one look": lambda: compiled.predict(image, strokes),
        "PyTorch, as the checkpoint says": lambda: careful.predict(image, strokes),
        f"PyTorch, batches of {BATCH}, network alone": batched(quick, image, strokes),
        "random walker, at half size": lambda: walker(image, strokes),
        "GrabCut": lambda: grabcut(image, strokes),
    }
    times = in_turn(works, bench.rounds)
    lines = [
        Measured(name=name, seconds=times[name], items=BATCH if "batches" in name else 1)
        for name in works
    ]
    title = f"{bench.checkpoint}, 500×375, {quick.device.type}"
    tell(to_markdown(title, lines, "images"), lines, bench.out)


if __name__ == "__main__":
    main()
