"""Corrections in training: true, where the error is deepest, and encoded like any other stroke."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from scribbleseg.scribbles.corrections import STEP, corrected
from scribbleseg.scribbles.encode import encode

SIDE = 96


def blobs(seed: int, shape: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """Return a random region of round parts."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    return ndimage.gaussian_filter(noise, 8) > 0


def as_logits(found: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(found, 1.0, -1.0).astype(np.float32))[None, None]


def correct(found: np.ndarray, mask: np.ndarray, radius: int = 0) -> np.ndarray:
    """Return the correction of one image, (2, h, w)."""
    nothing = torch.zeros(1, 2, *mask.shape)
    pixels = torch.from_numpy(mask.astype(np.uint8))[None]
    return corrected(nothing, as_logits(found), pixels, radius)[0].numpy()


def chessboard_depth(region: np.ndarray) -> np.ndarray:
    """Return how deep a pixel lies, by plain erosion; the image's border is a border."""
    depth = np.zeros(region.shape, int)
    while region.any():
        depth += region
        region = ndimage.binary_erosion(region, np.ones((3, 3)), border_value=0)
    return depth


@pytest.mark.parametrize("shape", [(96, 96), (61, 130), (150, 40), (33, 47)])
@pytest.mark.parametrize("seed", range(4))
def test_a_correction_is_true_and_starts_from_the_deepest_error(shape, seed: int) -> None:
    mask, found = blobs(seed, shape), blobs(seed + 100, shape)
    line = correct(found, mask).astype(bool)
    missed, false = mask & ~found, found & ~mask
    assert line.any(axis=(1, 2)).sum() == 1
    assert not (line[0] & ~missed).any() and not (line[1] & ~false).any()
    # On the grid on which errors are searched, one of the deepest points is drawn on.
    depths = np.stack([chessboard_depth(each[::STEP, ::STEP]) for each in (missed, false)])
    drawn = line[:, ::STEP, ::STEP]
    assert depths[drawn].max() == depths.max()


@pytest.mark.parametrize("degrees", [0, 35, 90, 145])
def test_it_runs_along_a_long_error(degrees: int) -> None:
    rows, columns = np.mgrid[:120, :160]
    y, x, angle = rows - 60, columns - 70, np.deg2rad(degrees)
    mask = np.abs(y * np.cos(angle) - x * np.sin(angle)) < 7
    rows, columns = np.nonzero(correct(np.zeros_like(mask), mask)[0])
    points = np.stack([columns - columns.mean(), rows - rows.mean()])
    lengths, axes = np.linalg.eigh(np.cov(points))
    direction = np.rad2deg(np.arctan2(axes[1, 1], axes[0, 1]))
    assert lengths[1] > 9 * lengths[0]
    assert abs((direction - degrees + 90) % 180 - 90) < 6


def test_of_an_error_that_is_everything_the_middle_is_drawn_on() -> None:
    """As of a network that has learned nothing yet: no pixel wins because it is the first."""
    rows, columns = np.nonzero(correct(np.zeros((SIDE, SIDE)), np.ones((SIDE, SIDE)))[0])
    assert abs(rows.mean() - SIDE / 2) < 8 and abs(columns.mean() - SIDE / 2) < 8


def test_nothing_is_drawn_where_nothing_is_wrong_or_nobody_knows() -> None:
    mask = blobs(0).astype(np.uint8)
    strokes = torch.rand(1, 2, SIDE, SIDE)
    for found, truth in ((mask == 1, mask), (mask == 0, np.full_like(mask, 255))):
        same = corrected(strokes, as_logits(found), torch.from_numpy(truth)[None], 3)
        assert torch.equal(same, strokes)


def test_every_image_of_a_batch_has_its_own() -> None:
    masks = np.stack([blobs(seed) for seed in range(3)])
    found = np.stack([blobs(seed) for seed in (10, 11, 2)])
    logits = torch.cat([as_logits(each) for each in found])
    pixels = torch.from_numpy(masks.astype(np.uint8))
    together = corrected(torch.zeros(3, 2, SIDE, SIDE), logits, pixels, 2)
    for lines, its, mask in zip(together, found, masks, strict=True):
        assert np.array_equal(lines.numpy(), correct(its, mask, 2))


@pytest.mark.parametrize("radius", [0, 1, 3, 6])
def test_corrections_are_encoded_as_other_strokes_are(radius: int) -> None:
    mask, found = blobs(3), blobs(4)
    line = correct(found, mask)
    scribbles = np.full((SIDE, SIDE), 255, np.uint8)
    scribbles[line[0] > 0], scribbles[line[1] > 0] = 1, 0
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    expected = encode(image, scribbles, "disc" if radius else "raw", max(radius, 1))
    assert np.array_equal(255 * correct(found, mask, radius), expected)
