"""Edges: the guided filter against windows fitted one by one, and what it must not do."""

import numpy as np
import pytest

from scribbleseg.edges import NOISE, WINDOW, _local_lines, follow_edges


def slow(values: np.ndarray, colours: np.ndarray, side: int) -> np.ndarray:
    """Fit each window by ridge regression and average what the windows say of each pixel."""
    height, width = values.shape
    reach = side // 2
    pad = ((reach, reach), (reach, reach))
    values = np.pad(values, pad, mode="reflect").astype(float)
    colours = np.pad(colours, (*pad, (0, 0)), mode="reflect").astype(float)
    lines = np.zeros((height, width, 4))
    for y in range(height):
        for x in range(width):
            seen = colours[y : y + side, x : x + side].reshape(-1, 3)
            wanted = values[y : y + side, x : x + side].reshape(-1)
            centred = seen - seen.mean(axis=0)
            gram = centred.T @ centred / len(seen) + NOISE * np.eye(3)
            slope = np.linalg.solve(gram, centred.T @ (wanted - wanted.mean()) / len(seen))
            lines[y, x] = [*slope, wanted.mean() - slope @ seen.mean(axis=0)]
    lines = np.pad(lines, (*pad, (0, 0)), mode="reflect")
    return np.array(
        [
            [lines[y : y + side, x : x + side].reshape(-1, 4).mean(axis=0) for x in range(width)]
            for y in range(height)
        ]
    )


def test_lines_equal_those_fitted_window_by_window() -> None:
    draws = np.random.default_rng(0)
    values = draws.random((9, 12), np.float32)
    colours = draws.random((9, 12, 3), np.float32)
    slopes, offset = _local_lines(values, colours, 5)
    wanted = slow(values, colours, 5)
    np.testing.assert_allclose(slopes, wanted[..., :3], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(offset, wanted[..., 3], rtol=1e-3, atol=1e-3)


def test_at_the_networks_own_scale_it_is_the_guided_filter() -> None:
    draws = np.random.default_rng(1)
    image = draws.integers(0, 256, (30, 45, 3), np.uint8)
    probability = draws.random((30, 45), np.float32)
    side = 2 * max(1, round(WINDOW * 45 / 2)) + 1
    lines = slow(probability, image.astype(np.float32) / 255, side)
    wanted = (lines[..., :3] * image / 255).sum(axis=-1) + lines[..., 3]
    np.testing.assert_allclose(
        follow_edges(probability, image), wanted.clip(0, 1), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 150)])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_what_is_sure_everywhere_stays_so_on_any_photograph(
    size: tuple[int, int], value: float
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    seen = tuple(max(1, side // 2) for side in size)
    found = follow_edges(np.full(seen, value, np.float32), image)
    assert found.shape == size and found.dtype == np.float32
    np.testing.assert_allclose(found, value, atol=1e-3)
