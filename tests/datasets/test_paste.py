"""Copy-paste: what is pasted, where it lands, and what stays."""

import numpy as np
import pytest
from scipy import ndimage

from scribbleseg.datasets.paste import SIZES, paste

IMAGE = np.full((60, 80, 3), 40, np.uint8)
OTHER = np.full((50, 70, 3), 200, np.uint8)


def disc(height: int, width: int, radius: int) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    return ((y - height / 2) ** 2 + (x - width / 2) ** 2 <= radius**2).astype(np.uint8)


def test_image_and_mask_agree_and_nothing_else_changes() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[:5] = 255
    before = IMAGE.copy()
    areas: list[int] = []
    for seed in range(200):
        image, target = paste(IMAGE, mask, OTHER, disc(50, 70, 12), np.random.default_rng(seed))
        pasted = target == 1
        areas.append(int(pasted.sum()))
        assert ((target == mask) | pasted).all()
        # Away from the seam the picture is the one or the other.
        assert (image[pasted] > 110).all() and (image[~pasted] < 140).all()
        far = ~ndimage.binary_dilation(pasted, np.ones((7, 7)))
        np.testing.assert_array_equal(image[far], IMAGE[far])
    np.testing.assert_array_equal(IMAGE, before)
    whole = disc(50, 70, 12).sum()
    assert max(areas) > 0.9 * SIZES[1] ** 2 * whole
    assert max(areas) < 1.1 * SIZES[1] ** 2 * whole
    assert min(areas) > 0.8 * SIZES[0] ** 2 * whole / 4


def test_the_objects_own_pixels_arrive() -> None:
    """A column of the object is red: it is red in the result, mirrored or not."""
    other = OTHER.copy()
    other[:, :35] = (250, 0, 0)
    sides = set()
    for seed in range(40):
        image, mask = paste(
            IMAGE,
            np.zeros((60, 80), np.uint8),
            other,
            disc(50, 70, 20),
            np.random.default_rng(seed),
        )
        red = (image[..., 0] > 230) & (image[..., 1] < 20)
        grey = (image[..., 0] > 180) & (image[..., 1] > 180)
        assert (mask[red] == 1).all()
        if red.any() and grey.any():
            sides.add(bool(np.nonzero(red)[1].mean() < np.nonzero(grey)[1].mean()))
    assert sides == {True, False}


def test_a_scene_without_object_gives_nothing() -> None:
    mask = disc(60, 80, 10)
    image, target = paste(
        IMAGE, mask, OTHER, np.full((50, 70), 255, np.uint8), np.random.default_rng(0)
    )
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(target, mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (300, 2)])
def test_any_size_will_do(shape: tuple[int, int]) -> None:
    other, other_mask = np.zeros((*shape, 3), np.uint8), np.ones(shape, np.uint8)
    for seed in range(20):
        _, mask = paste(
            IMAGE, np.zeros((60, 80), np.uint8), other, other_mask, np.random.default_rng(seed)
        )
        assert (mask == 1).any()
