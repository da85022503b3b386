"""Corrections in training: true, where the error is deepest, and encoded like any other stroke."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from scribbleseg.scribbles.corrections import STEP, corrected
from scribbleseg.scribbles.encode import encode

SIDE = 96


def blobs(seed: int) -> np.ndarray:
    """Return a random region of round parts."""
    noise = np.random.default_rng(seed).standard_normal((SIDE, SIDE))
    return ndimage.gaussian_filter(noise, 8) > 0


def as_logits(found: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(found, 1.0, -1.0).astype(np.float32))[None, None]


def correct(found: np.ndarray, mask: np.ndarray, radius: int = 0) -> np.ndarray:
    """Return the correction of one image, (2, h, w)."""
    nothing = torch.zeros(1, 2, *mask.shape)
    pixels = torch.from_numpy(mask.astype(np.uint8))[None]
    return corrected(nothing, as_logits(found), pixels, radius)[0].numpy()


@pytest.mark.parametrize("seed", range(8))
def test_a_correction_is_true_and_lies_on_the_deepest_error(seed: int) -> None:
    mask, found = blobs(seed), blobs(seed + 100)
    line = correct(found, mask).astype(bool)
    missed, false = mask & ~found, found & ~mask
    assert line.any(axis=(1, 2)).sum() == 1
    assert not (line[0] & ~missed).any() and not (line[1] & ~false).any()
    # An oracle that looks at every pixel: nothing is deeper than what was found, but for the grid.
    # Beyond the image an error goes on, as it may.
    deepest = [
        ndimage.distance_transform_cdt(np.pad(region, SIDE, "edge"), "chessboard")[
            SIDE:-SIDE, SIDE:-SIDE
        ]
        for region in (missed, false)
    ]
    reached = max(
        depth[drawn].max() for depth, drawn in zip(deepest, line, strict=True) if drawn.any()
    )
    assert reached >= max(depth.max() for depth in deepest) - 2 * STEP


def test_it_runs_along_a_long_error() -> None:
    mask, found = np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), bool)
    mask[40:52, 8:88] = True
    rows, columns = np.nonzero(correct(found, mask)[0])
    assert np.ptp(columns) > 20 and np.ptp(rows) <= 5


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
