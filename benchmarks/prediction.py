"""Prediction: images of 500×375 per second, beside methods that need no training.

The network looks once, as it does while a person draws, and as often as its checkpoint says, which
it does where nobody waits (`released:best` at three scales and their mirror images). PyTorch as it
comes, compiled, and from ONNX Runtime, for one image and for batches of 16; GrabCut (OpenCV) and
random walker (scikit-image, at the image's own size and at half of it) on the same image and
strokes. Whole predictions come three in a row, as from a folder:

    python -m benchmarks.prediction --checkpoint released:best
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from skimage import data as photographs

from benchmarks.measure import Measured, OnDevice, in_turn, tell, to_markdown
from benchmarks.peers import grabcut, walker
from scribbleseg.cli import exit_status
from scribbleseg.config import PredictConfig, parse_arguments
from scribbleseg.datasets.transforms import to_network
from scribbleseg.export import BytesToLogits, export_onnx
from scribbleseg.predict import Predictor, load
from scribbleseg.scribbles.encode import UNLABELLED

BATCH = 16
# Predictions in a row: the first one finds the processor's caches full of the other methods' work.
ROW = 3


@dataclass(frozen=True, kw_only=True)
class PredictionBench(OnDevice):
    """What is measured."""

    checkpoint: str = "released:best"
    """Checkpoint, run or released:NAME."""
    rounds: int = 10
    """Rounds that count; one more comes first."""
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


def network_bytes(
    predictor: Predictor, image: np.ndarray, strokes: np.ndarray, batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the network looks at, as bytes, of sides that are multiples of 32."""
    config = predictor.config
    pixels, channels = to_network(
        image,
        strokes,
        long_side=config.data.long_side,
        encoding=config.strokes.encoding,
        radius=config.strokes.radius,
    )
    height, width = pixels.shape[-2:]
    border = (0, -width % 32, 0, -height % 32)
    pixels, channels = (F.pad(x, border).repeat(batch, 1, 1, 1) for x in (pixels, channels))
    return pixels, channels


def networks(
    bench: PredictionBench, place: str, image: np.ndarray, strokes: np.ndarray
) -> dict[str, Callable[[], object]]:
    """Return functions that run the network alone, for one image and for a batch.

    ONNX Runtime computes on the CPU, wherever PyTorch does.
    """
    predictor = load(bench.checkpoint, device=place)
    network = BytesToLogits(predictor.model, predictor.config.predict.threshold).eval()
    compiled: Any = torch.compile(network)
    with tempfile.TemporaryDirectory() as scratch:
        export_onnx(load(bench.checkpoint, device="cpu"), Path(scratch) / "model.onnx")
        session: Any = onnxruntime.InferenceSession(
            str(Path(scratch) / "model.onnx"), providers=["CPUExecutionProvider"]
        )
    works: dict[str, Callable[[], object]] = {}
    for batch in (1, BATCH):
        seen, drawn = network_bytes(predictor, image, strokes, batch)
        inputs = {"image": seen.numpy(), "strokes": drawn.numpy()}
        seen, drawn = seen.to(place), drawn.to(place)
        works[f"network alone, PyTorch, batch {batch}"] = partial(_infer, network, seen, drawn)
        works[f"network alone, compiled, batch {batch}"] = partial(_infer, compiled, seen, drawn)
        works[f"network alone, ONNX Runtime, batch {batch}"] = partial(session.run, None, inputs)
    return works


@torch.inference_mode()
def _infer(network: Callable[..., object], *inputs: torch.Tensor) -> object:
    return network(*inputs)


def in_a_row(work: Callable[[], object]) -> None:
    """Predict `ROW` times."""
    for _ in range(ROW):
        work()


def main() -> None:
    """Measure and print."""
    bench: PredictionBench = parse_arguments(
        PredictionBench, sys.argv[1:], prog="python -m benchmarks.prediction"
    )
    place = str(bench.prepare())
    image, strokes = picture()
    careful = load(bench.checkpoint, device=place)
    quick = once(careful)
    works: dict[str, Callable[[], object]] = {
        "one look": lambda: quick.predict(image, strokes),
        "as the checkpoint says": lambda: careful.predict(image, strokes),
        "random walker, at half size": lambda: walker(image, strokes),
        "random walker": lambda: walker(image, strokes, scale=1.0),
        "GrabCut": lambda: grabcut(image, strokes),
    }
    whole = {name: partial(in_a_row, work) for name, work in works.items()}
    alone = networks(bench, place, image, strokes)
    times = in_turn(alone | whole, bench.rounds, warm_up=1)
    lines = [
        Measured(
            name=name,
            seconds=seconds,
            items=ROW if name in whole else BATCH if name.endswith(f"batch {BATCH}") else 1,
        )
        for name, seconds in times.items()
    ]
    title = f"{bench.checkpoint}, 500×375, {quick.device.type}"
    tell(to_markdown(title, lines, "images"), lines, bench.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
