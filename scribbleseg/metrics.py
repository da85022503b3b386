"""Figures that say how good a mask is: per image, over a data set, and over ranks.

Two families that must not be confused. The *per-image* figures score every image on its own and
average the scores, so each image counts the same. The *pooled* figures add up pixels over the data
set before they divide, so large objects count more. Both are reported, under different names.

An IoU whose class is absent from both masks is 1: there was nothing to find and nothing was
claimed. Pixels whose target is 255 (ignore) count nowhere.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, UInt8

from scribbleseg import distributed

IGNORE = 255
BOUNDARY_RATIO = 0.02
"""Width of the boundary band, as a share of the image's diagonal (arXiv 2103.16562)."""

BinaryMask = Bool[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Pixels of one or more images, by what was predicted and what is true; object is positive."""

    true_positive: int
    """Object, predicted object."""
    false_positive: int
    """Background, predicted object."""
    false_negative: int
    """Object, predicted background."""
    true_negative: int
    """Background, predicted background."""

    @property
    def object_iou(self) -> float:
        """IoU of the object, in [0, 1]."""
        return _ratio(self.true_positive, self._num_mistakes)

    @property
    def background_iou(self) -> float:
        """IoU of the background, in [0, 1]."""
        return _ratio(self.true_negative, self._num_mistakes)

    @property
    def miou(self) -> float:
        """Mean of the two IoUs, in [0, 1]."""
        return (self.object_iou + self.background_iou) / 2

    @property
    def _num_mistakes(self) -> int:
        return self.false_positive + self.false_negative


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """The scores of one image, each in [0, 1]."""

    object_iou: float
    """IoU of the object."""
    background_iou: float
    """IoU of the background."""
    miou: float
    """Mean of the two."""
    boundary_iou: float
    """IoU of the object's inner boundary bands (arXiv 2103.16562)."""


def confusion(prediction: BinaryMask, target: UInt8[np.ndarray, "h w"]) -> Counts:
    """Count the pixels of one image.

    Args:
        prediction: object where it is not 0, (h, w).
        target: 0 background, 1 object, 255 ignore, (h, w).

    Raises:
        ValueError: the two differ in size.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {prediction.shape} but target is {target.shape}")
    is_object = target == 1
    claimed = prediction.astype(bool) & (target != IGNORE)
    true_positive = int(np.count_nonzero(claimed & is_object))
    num_claimed = int(np.count_nonzero(claimed))
    num_object = int(np.count_nonzero(is_object))
    num_labelled = int(np.count_nonzero(target != IGNORE))
    return Counts(
        true_positive=true_positive,
        false_positive=num_claimed - true_positive,
        false_negative=num_object - true_positive,
        true_negative=num_labelled - num_claimed - num_object + true_positive,
    )


def boundary_iou(prediction: BinaryMask, target: UInt8[np.ndarray, "h w"]) -> float:
    """IoU of the two objects' inner boundary bands (arXiv 2103.16562), in [0, 1].

    A band holds an object's pixels within 0.02 image diagonals of its contour; the image's edge
    counts as contour, as in the authors' code. Ignored pixels are cut out of both objects first.

    Args:
        prediction: object where it is not 0, (h, w).
        target: 0 background, 1 object, 255 ignore, (h, w).
    """
    distance = max(1, round(BOUNDARY_RATIO * math.hypot(*target.shape)))
    claimed = _boundary_band(prediction.astype(bool) & (target != IGNORE), distance)
    true = _boundary_band(target == 1, distance)
    return _ratio(int(np.count_nonzero(claimed & true)), int(np.count_nonzero(claimed ^ true)))


def image_scores(prediction: BinaryMask, target: UInt8[np.ndarray, "h w"]) -> ImageScores:
    """Score one image.

    Args:
        prediction: object where it is not 0, (h, w).
        target: 0 background, 1 object, 255 ignore, (h, w).

    Raises:
        ValueError: the two differ in size.
    """
    return _scores(confusion(prediction, target), boundary_iou(prediction, target))


class SegmentationMetrics:
    """Sums scores and pixel counts over images and ranks, and divides last.

    Use: `update` for every image, `reduce` once on every rank, then `compute`.
    """

    def __init__(self) -> None:
        self._scores = np.zeros(len(dataclasses.fields(ImageScores)))
        self._pixels = np.zeros(len(dataclasses.fields(Counts)))
        self._miou_squares = 0.0
        self._num_images = 0

    def update(self, prediction: BinaryMask, target: UInt8[np.ndarray, "h w"]) -> ImageScores:
        """Add one image and return its own scores.

        Args:
            prediction: object where it is not 0, (h, w).
            target: 0 background, 1 object, 255 ignore, (h, w).
        """
        counts = confusion(prediction, target)
        scores = _scores(counts, boundary_iou(prediction, target))
        self._scores += dataclasses.astuple(scores)
        self._pixels += dataclasses.astuple(counts)
        self._miou_squares += scores.miou**2
        self._num_images += 1
        return scores

    def reduce(self, device: torch.device | None = None) -> None:
        """Replace the sums by those over all ranks; every rank calls it, once, after its images.

        Args:
            device: where the process group reduces (NCCL: the rank's GPU); None: the CPU.
        """
        if distributed.world_size() == 1:
            return
        # float64 holds pixel counts up to 2^53 exactly, so one vector carries all sums.
        rest = [self._miou_squares, self._num_images]
        local = np.concatenate([self._scores, self._pixels, rest])
        total = distributed.all_reduce_sum(torch.tensor(local, device=device)).cpu().numpy()
        self._scores, self._pixels, rest = np.split(total, [len(self._scores), len(local) - 2])
        self._miou_squares, self._num_images = float(rest[0]), int(rest[1])

    def compute(self) -> dict[str, float]:
        """Return the figures of all images so far.

        Returns:
            `object_iou`, `background_iou`, `miou`, `boundary_iou`: means over images;
            `miou_error`: standard error of the `miou` (0 of one image);
            `pooled_object_iou`, `pooled_background_iou`, `pooled_miou`: of the summed pixels;
            `num_images`. All IoUs are in [0, 1].

        Raises:
            ValueError: no image was added.
        """
        if self._num_images == 0:
            raise ValueError("no image was scored, so there is no mean to compute")
        names = [field.name for field in dataclasses.fields(ImageScores)]
        means = (self._scores / self._num_images).tolist()
        pooled = Counts(
            **{
                field.name: round(pixels)
                for field, pixels in zip(
                    dataclasses.fields(Counts), self._pixels.tolist(), strict=True
                )
            }
        )
        figures = dict(zip(names, means, strict=True))
        count = self._num_images
        # Rounding can leave a variance of 0 just below it.
        variance = max(0.0, self._miou_squares / count - figures["miou"] ** 2)
        return {
            **figures,
            "miou_error": math.sqrt(variance / (count - 1)) if count > 1 else 0.0,
            "pooled_object_iou": pooled.object_iou,
            "pooled_background_iou": pooled.background_iou,
            "pooled_miou": pooled.miou,
            "num_images": float(self._num_images),
        }


def bootstrap_interval(
    values: Sequence[float],
    generator: np.random.Generator,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: one score per image (at least one).
        generator: source of the resampling.
        level: coverage of the interval, in (0, 1).
        num_resamples: number of resampled means.

    Returns:
        The interval's lower and upper end.

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    if not len(values) or not 0 < level < 1:
        raise ValueError(f"{len(values)} values at level {level}; expected 1 or more, in (0, 1)")
    sample = np.asarray(values, dtype=np.float64)
    # Some rows at a time: all resamples of a large data set would fill the memory.
    num_rows = max(1, 1_000_000 // len(sample))
    means = np.concatenate(
        [
            sample[generator.integers(len(sample), size=(rows, len(sample)))].mean(axis=1)
            for rows in _chunks(num_resamples, num_rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _scores(counts: Counts, boundary: float) -> ImageScores:
    return ImageScores(
        object_iou=counts.object_iou,
        background_iou=counts.background_iou,
        miou=counts.miou,
        boundary_iou=boundary,
    )


def _ratio(intersection: int, num_mistakes: int) -> float:
    """Intersection over union; 1 where both masks are empty."""
    union = intersection + num_mistakes
    return intersection / union if union else 1.0


def _boundary_band(mask: Bool[np.ndarray, "h w"], distance: int) -> Bool[np.ndarray, "h w"]:
    """Pixels of `mask` within `distance` (chessboard) of its contour or of the image's edge."""
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    inner = cv2.erode(
        mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=(0.0,)
    )
    return mask & (inner == 0)


def _chunks(total: int, size: int) -> list[int]:
    """Sizes of the pieces that `total` splits into, each at most `size`."""
    full, rest = divmod(total, size)
    return [size] * full + ([rest] if rest else [])
