"""Simulated strokes: what they promise on any mask, and how they compare with the benchmark's."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from scribbleseg.datasets.scenes import list_scenes, read_mask, read_scribbles
from scribbleseg.scribbles.simulate import correct, simulate

STYLES = ("curve", "skeleton", "line", "mixed")


def blobs(seed: int, height: int = 180, width: int = 240, *, ignore: bool = False) -> np.ndarray:
    """Return smooth random shapes: background, object, and ignored strips if asked for."""
    field = np.random.default_rng(seed).standard_normal((height, width))
    field = ndimage.gaussian_filter(field, 12)
    mask = (field > np.quantile(field, 0.7)).astype(np.uint8)
    if ignore:
        mask[np.abs(field - np.quantile(field, 0.7)) < 0.004] = 255
        mask[:, 50:60] = 255
    return mask


def num_strokes(strokes: np.ndarray, label: int) -> int:
    """Return the number of connected strokes of a label."""
    return cv2.connectedComponents((strokes == label).astype(np.uint8), connectivity=8)[0] - 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(3))
def test_strokes_agree_with_the_mask_and_leave_ignored_pixels(seed: int, style: str) -> None:
    mask = blobs(seed, ignore=True)
    strokes = simulate(mask, np.random.default_rng(seed), style=style, width=5.0, count=3)
    drawn = strokes != 255
    assert strokes.dtype == np.uint8
    assert strokes.shape == mask.shape
    np.testing.assert_array_equal(strokes[drawn], mask[drawn])
    assert (strokes == 0).any() and (strokes == 1).any()


@pytest.mark.parametrize("style", STYLES)
def test_it_is_a_function_of_mask_and_generator(style: str) -> None:
    mask = blobs(0)
    first, again, other = (
        simulate(mask, np.random.default_rng(seed), style=style, count=2, misplaced=0.2)
        for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(mask, blobs(0))


def test_mixed_draws_each_style() -> None:
    mask = blobs(1)
    seen = set()
    for seed in range(12):
        mixed = simulate(mask, np.random.default_rng(seed), style="mixed")
        for style in ("curve", "skeleton", "line"):
            generator = np.random.default_rng(seed)
            generator.integers(3)  # The draw of the style.
            if (simulate(mask, generator, style=style) == mixed).all():
                seen.add(style)
    assert seen == {"curve", "skeleton", "line"}


def hard_masks() -> dict[str, np.ndarray]:
    """Return masks whose classes leave little room."""
    dot = np.zeros((375, 500), np.uint8)
    dot[371, 3] = 1
    line = np.zeros((375, 500), np.uint8)
    line[200, :] = 1
    frame = np.ones((375, 500), np.uint8)
    frame[1:-1, 1:-1] = 0
    thick_frame = 1 - np.pad(np.ones((345, 470), np.uint8), 15)
    large = np.zeros((1500, 2001), np.uint8)
    large[601, 601] = 1  # Between the pixels that are looked at.
    large[::4, 1000] = 255
    checkers = np.indices((40, 40)).sum(axis=0).astype(np.uint8) % 2
    return {
        "dot": dot,
        "its complement": 1 - dot,
        "line": line,
        "frame": frame,
        "thick frame": thick_frame,
        "checkers": checkers,
        "large image": large,
        "small image": np.pad(np.ones((5, 5), np.uint8), 3),
        "one row": np.array([[0, 0, 0, 1, 1]], np.uint8),
    }


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", hard_masks())
def test_every_class_that_exists_has_a_stroke(name: str, style: str) -> None:
    mask = hard_masks()[name]
    strokes = simulate(mask, np.random.default_rng(0), style=style)
    assert set(np.unique(strokes)) - {255} == set(np.unique(mask)) - {255}
    drawn = strokes != 255
    np.testing.assert_array_equal(strokes[drawn], mask[drawn])


def test_a_short_stretch_of_a_path_that_left_its_class_still_is_a_stroke() -> None:
    """Noise, thin all over: a smoothed skeleton runs beside it, and so do parts of it."""
    for seed in range(60):
        generator = np.random.default_rng(seed)
        noise = (generator.random(generator.integers(3, 30, 2)) < generator.random()).astype(
            np.uint8
        )
        strokes = simulate(noise, generator, style="skeleton", width=1.0, length=0.05)
        assert set(np.unique(strokes)) - {255} == set(np.unique(noise))


@pytest.mark.parametrize("value", [0, 1])
def test_a_class_that_does_not_exist_has_none(value: int) -> None:
    strokes = simulate(np.full((90, 120), value, np.uint8), np.random.default_rng(0))
    assert set(np.unique(strokes)) == {value, 255}


def test_nothing_is_drawn_where_all_is_ignored() -> None:
    strokes = simulate(np.full((9, 9), 255, np.uint8), np.random.default_rng(0))
    assert (strokes == 255).all()


def test_small_parts_are_passed_over() -> None:
    mask = np.zeros((375, 500), np.uint8)
    mask[100:250, 100:300] = 1
    mask[300:308, 400:408] = 1  # 64 pixels
    for seed in range(5):
        strokes = simulate(mask, np.random.default_rng(seed))
        assert (strokes[100:250, 100:300] == 1).any()
        assert not (strokes[300:308, 400:408] == 1).any()


@pytest.mark.parametrize("seed", range(8))
def test_a_curve_is_a_parabola(seed: int) -> None:
    mask = np.zeros((375, 500), np.uint8)
    cv2.ellipse(mask, (250, 190), (180, 90), 20.0 * seed, 0, 360, 1, -1)
    y, x = np.nonzero(simulate(mask, np.random.default_rng(seed)) == 1)
    residuals = []
    for running, following in ((x, y), (y, x)):
        # The middle line of the stroke: its mean at every position.
        places = np.unique(running)
        middle = np.array([following[running == place].mean() for place in places])
        # At its ends the stroke is cut off square to its direction.
        places, middle = places[3:-3], middle[3:-3]
        fit = np.polynomial.Polynomial.fit(places, middle, 2)
        residuals.append(np.sqrt(np.mean((fit(places) - middle) ** 2)))
    # The points of a curve are rounded to whole pixels.
    assert min(residuals) < 1


def test_a_skeleton_runs_along_the_middle() -> None:
    mask = np.zeros((375, 500), np.uint8)
    mask[150:220, 40:460] = 1
    for seed in range(4):
        strokes = simulate(mask, np.random.default_rng(seed), style="skeleton")
        x = np.nonzero(strokes == 1)[1]
        middle = (strokes[:, 100:400] == 1) & (np.abs(np.arange(375) - 184.5) > 8)[:, None]
        assert np.ptp(x) > 150
        assert not middle.any()


def test_a_line_is_straight_or_bent_once() -> None:
    mask = np.zeros((375, 500), np.uint8)
    mask[20:350, 20:480] = 1
    straight = 0
    for seed in range(20):
        strokes = simulate(mask, np.random.default_rng(seed), style="line", width=1.0)
        points = np.argwhere(strokes == 1)
        spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
        straight += bool(spread[1] / np.sqrt(len(points)) < 0.5)
    assert 4 <= straight <= 16


def test_width_scales_the_area() -> None:
    mask = np.zeros((375, 500), np.uint8)
    mask[40:340, 60:440] = 1
    areas = [
        (simulate(mask, np.random.default_rng(0), width=width) == 1).sum()
        for width in (1.0, 3.0, 9.0, 2.6)
    ]
    assert areas[0] < areas[1] == areas[3] < areas[2]
    # OpenCV draws lines of thickness 3 and 9 as 5 and 11 pixels wide.
    np.testing.assert_allclose(areas[2] / areas[1], 11 / 5, rtol=0.15)


def test_length_is_the_share_that_is_kept() -> None:
    mask = np.zeros((375, 500), np.uint8)
    mask[40:340, 60:440] = 1

    def mean_area(length: float) -> float:
        areas = [
            (simulate(mask, np.random.default_rng(seed), length=length) == 1).sum()
            for seed in range(12)
        ]
        return float(np.mean(areas))

    whole = mean_area(1.0)
    np.testing.assert_allclose(mean_area(0.5) / whole, 0.5, atol=0.05)
    np.testing.assert_allclose(mean_area(0.1) / whole, 0.1, atol=0.03)


def test_count_is_the_most_strokes_of_a_part() -> None:
    mask = np.zeros((375, 500), np.uint8)
    mask[20:350, 20:480] = 1
    found = [
        num_strokes(simulate(mask, np.random.default_rng(seed), count=4, length=0.03), 1)
        for seed in range(40)
    ]
    assert set(found) >= {1, 2, 3, 4}
    assert max(found) == 4


@pytest.mark.parametrize("misplaced", [0.1, 0.5])
def test_misplaced_is_the_share_with_the_wrong_label(misplaced: float) -> None:
    wrong = total = 0
    for seed in range(6):
        mask = blobs(seed, 375, 500)
        strokes = simulate(mask, np.random.default_rng(seed), misplaced=misplaced)
        drawn = strokes != 255
        wrong += int((strokes[drawn] != mask[drawn]).sum())
        total += int(drawn.sum())
    np.testing.assert_allclose(wrong / total, misplaced, atol=0.04)


def test_large_images_get_the_same_strokes() -> None:
    """Lengths scale with the image; the width is the caller's."""
    mask = blobs(3, 375, 500)
    large = np.kron(mask, np.ones((4, 4), np.uint8))
    shares = []
    for labels, width in ((mask, 3.0), (large, 18.0)):
        drawn = [
            simulate(labels, np.random.default_rng(seed), width=width) != 255 for seed in range(5)
        ]
        shares.append(np.mean(drawn))
    # Thickness 18 covers four times the 5 pixels of thickness 3.
    np.testing.assert_allclose(shares[1] / shares[0], 1, atol=0.1)


def test_strokes_match_the_benchmark(benchmark: Path) -> None:
    """Shares of stroke pixels and strokes per part lie within 20 % of the real ones."""
    real = np.zeros((2, 2))
    simulated = np.zeros((2, 2))
    for number, paths in enumerate(list_scenes(benchmark, "train", need_masks=True)[::2]):
        assert paths.ground_truth is not None
        mask = read_mask(paths.ground_truth)
        pairs = (
            (real, read_scribbles(paths.scribbles)),
            (simulated, simulate(mask, np.random.default_rng(number))),
        )
        for totals, strokes in pairs:
            for label in (0, 1):
                # The parts of the mask are the same for both, so the numbers of strokes compare.
                totals[label] += (strokes == label).mean(), num_strokes(strokes, label)
    np.testing.assert_allclose(simulated / real, 1, atol=0.2)


def test_a_correction_lies_in_the_largest_error_and_says_what_is_true() -> None:
    mask = np.zeros((120, 160), np.uint8)
    mask[20:90, 20:90] = 1
    mask[:, 150:] = 255
    strokes = np.full(mask.shape, 255, np.uint8)
    strokes[5, 5:20] = 0
    before = strokes.copy()
    # Missed: a strip of 70 x 20 of the object; false: 30 x 30 of the background; and what is
    # ignored, which is the largest.
    prediction = mask.copy()
    prediction[20:90, 20:40] = 0
    prediction[90:120, 110:140] = 1
    corrected = correct(prediction, mask, strokes, np.random.default_rng(0))
    drawn = corrected != strokes
    assert drawn.sum() >= 20
    assert (corrected[drawn] == 1).all()
    assert drawn[20:90, 20:40].sum() == drawn.sum()
    np.testing.assert_array_equal(strokes, before)
    # The next largest is the false one.
    prediction[20:90, 20:40] = 1
    again = correct(prediction, mask, corrected, np.random.default_rng(0))
    drawn = again != corrected
    assert (again[drawn] == 0).all() and drawn[90:120, 110:140].sum() == drawn.sum() > 0
    np.testing.assert_array_equal(correct(mask % 255, mask, again, np.random.default_rng(0)), again)


def test_an_error_of_one_pixel_is_corrected_too() -> None:
    mask = np.zeros((30, 40), np.uint8)
    prediction = mask.copy()
    prediction[3, 39] = 1
    strokes = np.full(mask.shape, 255, np.uint8)
    corrected = correct(prediction, mask, strokes, np.random.default_rng(0))
    assert corrected[3, 39] == 0 and (corrected != 255).sum() == 1
