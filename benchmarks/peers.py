"""Masks from the same strokes by methods that need no training, beside trained networks.

GrabCut (OpenCV), random walker (scikit-image) and nearest neighbours in colour (scikit-learn), each
at the image's own size unless said otherwise, and any checkpoints; the same images, strokes and
scores for all:

    python -m benchmarks.peers --root ../shared/data/scribble-voc --fold 0 --checkpoints runs/first

Objects are small, medium or large by thirds of the images; seconds are the median per image, and
leave out the reading of it.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8
from skimage.segmentation import random_walker
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.measure import Scored
from scribbleseg.cli import exit_status
from scribbleseg.config import parse_arguments
from scribbleseg.datasets.scenes import read_scene
from scribbleseg.device import num_cores, prepare_cpu
from scribbleseg.evaluate import object_share
from scribbleseg.metrics import SegmentationMetrics, bootstrap_interval
from scribbleseg.predict import load
from scribbleseg.scribbles.encode import BACKGROUND, OBJECT, UNLABELLED, dilate

Image = UInt8[np.ndarray, "h w 3"]
Labels = UInt8[np.ndarray, "h w"]
Method = Callable[[Image, Labels], Labels]

NUM_GRABCUT_ROUNDS = 5
NUM_NEIGHBOURS = 11
# Random walker takes some seven times as long at full size.
WALKER_SCALE = 0.5
WALKER_BETA = 130.0


@dataclass(frozen=True, kw_only=True)
class Peers(Scored):
    """What is compared on which images."""

    checkpoints: tuple[str, ...] = ()
    """Checkpoints, runs or released:NAME."""


def grabcut(image: Image, strokes: Labels) -> Labels:
    """Return GrabCut's mask; where no stroke is, it starts from the label of the nearest one."""
    mask = np.where(nearest_stroke(strokes) == OBJECT, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    mask = mask.astype(np.uint8)
    mask[strokes == OBJECT] = cv2.GC_FGD
    mask[strokes == BACKGROUND] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    bgr = np.ascontiguousarray(image[..., ::-1])
    cv2.grabCut(bgr, mask, (0, 0, 1, 1), *models, NUM_GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    return np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)


def nearest_stroke(strokes: Labels) -> Labels:
    """Return the label of each pixel's nearest stroke."""
    distances = [
        cv2.distanceTransform((strokes != label).view(np.uint8), cv2.DIST_L2, 5)
        for label in (BACKGROUND, OBJECT)
    ]
    return (distances[OBJECT] < distances[BACKGROUND]).astype(np.uint8)


def walker(image: Image, strokes: Labels, *, scale: float = WALKER_SCALE) -> Labels:
    """Return the random walker's mask, found at this share of the image's sides."""
    height, width = strokes.shape
    size = round(width * scale), round(height * scale)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    drawn = cv2.resize(dilate(strokes, 2), size, interpolation=cv2.INTER_NEAREST_EXACT)
    seeds = np.select([drawn == BACKGROUND, drawn == OBJECT], [1, 2], 0)
    found = random_walker(
        small / 255, seeds, beta=WALKER_BETA, mode="cg_j", tol=1e-4, channel_axis=-1
    )
    mask = (found == 2).astype(np.uint8)
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def colour_neighbours(image: Image, strokes: Labels) -> Labels:
    """Return the vote of the stroke pixels nearest in colour."""
    known = strokes != UNLABELLED
    neighbours = min(NUM_NEIGHBOURS, int(known.sum()))
    vote = KNeighborsClassifier(neighbours).fit(image[known], strokes[known])
    return vote.predict(image.reshape(-1, 3)).reshape(strokes.shape)


def network(checkpoint: str) -> Method:
    """Return a checkpoint's prediction as a method like the others."""
    return load(checkpoint).predict


def blind(checkpoint: str) -> Method:
    """Return the same without strokes: what the photograph alone tells."""
    predictor = load(checkpoint)

    def predict(image: Image, strokes: Labels) -> Labels:
        return predictor.predict(image, np.full_like(strokes, UNLABELLED))

    return predict


def score(name: str, method: Method, bench: Peers) -> str:
    """Return a method's line of the table."""
    metrics = SegmentationMetrics()
    mious: list[float] = []
    shares: list[float] = []
    seconds: list[float] = []
    for paths in bench.paths():
        scene = read_scene(paths)
        assert scene.mask is not None
        began = time.perf_counter()
        mask = method(scene.image, scene.scribbles)
        seconds.append(time.perf_counter() - began)
        # Nobody draws a stroke to see it overruled: all methods get their stroke pixels right.
        mask = np.where(scene.scribbles == UNLABELLED, mask, scene.scribbles)
        mious.append(metrics.update(mask, scene.mask).miou)
        shares.append(object_share(scene.mask))
    low, high = bootstrap_interval(mious, np.random.default_rng(0))
    thirds = np.array_split(np.array(mious)[np.argsort(shares)], 3)
    groups = " | ".join(f"{third.mean():.3f}" for third in thirds)
    return (
        f"| {name} | {np.mean(mious):.3f} ({low:.3f} to {high:.3f}) | "
        f"{metrics.compute()['pooled_miou']:.3f} | {groups} | {statistics.median(seconds):.2f} |"
    )


def main() -> None:
    """Measure and print."""
    bench: Peers = parse_arguments(Peers, sys.argv[1:], prog="python -m benchmarks.peers")
    prepare_cpu(num_cores())
    methods: dict[str, Method] = {
        f"colour, {NUM_NEIGHBOURS} nearest neighbours": colour_neighbours,
        "random walker, at half size": walker,
        "GrabCut": grabcut,
    }
    for checkpoint in bench.checkpoints:
        methods[f"{checkpoint} without strokes"] = blind(checkpoint)
        methods[checkpoint] = network(checkpoint)
    sys.stdout.write(
        f"{bench.part}; {num_cores()} cores\n\n"
        "| method | mIoU | pooled | small | medium | large | s per image |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
    )
    for name, method in methods.items():
        sys.stdout.write(score(name, method, bench) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(exit_status(main))
