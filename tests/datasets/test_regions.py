"""Regions of photographs: what is drawn, and from what."""

import numpy as np
import pytest

from scribbleseg.datasets import regions
from scribbleseg.datasets.regions import random_region


def patchwork(height: int = 120, width: int = 160, cell: int = 40) -> np.ndarray:
    """Return squares of far apart colours, with a little noise."""
    generator = np.random.default_rng(3)
    colours = generator.permutation(np.linspace(0, 255, (height // cell) * (width // cell)))
    grey = np.kron(colours.reshape(height // cell, width // cell), np.ones((cell, cell)))
    image = np.stack([grey, 255 - grey, np.roll(grey, cell, axis=1)], axis=2)
    return (image + generator.normal(0, 1, image.shape)).clip(0, 255).astype(np.uint8)


def test_a_region_is_a_function_of_image_and_generator():
    image = patchwork()
    first, again, other = (random_region(image, np.random.default_rng(n)) for n in (0, 0, 1))
    assert first is not None and again is not None and other is not None
    assert first.dtype == np.uint8 and first.shape == (120, 160)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_regions_end_where_colours_do():
    for seed in range(10):
        mask = random_region(patchwork(), np.random.default_rng(seed))
        assert mask is not None
        cells = mask.reshape(3, 40, 4, 40).mean((1, 3))
        # A cell is in or out; a smoothed outline is off by a pixel or two.
        assert ((cells < 0.15) | (cells > 0.85)).all()
        assert 0.02 <= mask.mean() <= 0.6


def test_regions_are_of_many_sizes():
    sizes: set[int] = set()
    for seed in range(30):
        mask = random_region(patchwork(), np.random.default_rng(seed))
        assert mask is not None
        cells = mask.reshape(3, 40, 4, 40).mean((1, 3)).round()
        sizes.add(int(cells.sum()))
    assert len(sizes) >= 3


def test_a_large_photograph_gets_a_mask_of_its_own_size():
    small = patchwork()
    large = np.kron(small, np.ones((6, 6, 1), np.uint8))
    mask = random_region(large, np.random.default_rng(0))
    assert mask is not None and mask.shape == (720, 960)
    cells = mask.reshape(3, 240, 4, 240).mean((1, 3))
    assert ((cells < 0.15) | (cells > 0.85)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (90, 120)])
def test_a_photograph_of_one_colour_has_no_region(shape: tuple[int, int]):
    image = np.full((*shape, 3), 90, np.uint8)
    assert random_region(image, np.random.default_rng(0)) is None


def test_borders_and_colours_against_loops():
    generator = np.random.default_rng(0)
    segments = generator.integers(0, 5, (7, 9))
    expected = np.zeros((5, 5))
    for y in range(7):
        for x in range(9):
            for down, right in ((0, 1), (1, 0)):
                if y + down < 7 and x + right < 9:
                    one, two = segments[y, x], segments[y + down, x + right]
                    if one != two:
                        expected[one, two] += 1
                        expected[two, one] += 1
    np.testing.assert_array_equal(regions._shared_borders(segments), expected)

    greys = generator.integers(0, 256, 5).astype(np.uint8)
    image = np.repeat(greys[segments][..., None], 3, axis=2)
    colours = regions._mean_colours(segments, image)
    # Grey has no colour: 128 in OpenCV's CIELAB, and a lightness that rises with it.
    np.testing.assert_allclose(colours[:, 1:], 128)
    np.testing.assert_array_equal(np.argsort(colours[:, 0]), np.argsort(greys))


def test_growth_prefers_like_colours():
    # The wide strip in the middle is nearly always first; it borders on both others as much, and
    # one has nearly its colour.
    segments = np.repeat([0, 1, 2], [5, 80, 5])[None].repeat(60, axis=0)
    image = np.array([[100] * 3, [110] * 3, [250] * 3], np.uint8)[segments]
    generators = [np.random.default_rng(seed) for seed in range(60)]
    chosen = [regions._grow(segments, image, 0.9, generator).tolist() for generator in generators]
    assert all(sum(each) == 2 and each[1] for each in chosen)
    assert chosen.count([1, 1, 0]) > 2 * chosen.count([0, 1, 1])
