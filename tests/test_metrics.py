"""Metrics against scikit-learn, SciPy and slow, obvious loops."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from sklearn.metrics import jaccard_score

from scribbleseg import distributed
from scribbleseg.metrics import (
    Counts,
    SegmentationMetrics,
    bootstrap_interval,
    boundary_iou,
    confusion,
    image_scores,
)
from tests.ranks import spawn

SCORES = ("object_iou", "background_iou", "miou", "boundary_iou")


def blob(generator: np.random.Generator, height: int, width: int, share: float = 0.5) -> np.ndarray:
    """Smooth random regions that cover `share` of the image, uint8 0/1."""
    noise = ndimage.gaussian_filter(generator.random((height, width)), 4)
    return (noise >= np.quantile(noise, 1 - share)).astype(np.uint8)


def pair(seed: int, height: int = 40, width: int = 57) -> tuple[np.ndarray, np.ndarray]:
    """A prediction (bool) and a target with all three values (uint8 0/1/255)."""
    generator = np.random.default_rng(seed)
    target = blob(generator, height, width)
    target[blob(generator, height, width, 0.1) == 1] = 255
    return blob(generator, height, width, 0.4).astype(bool), target


def slow_boundary_iou(prediction: np.ndarray, target: np.ndarray) -> float:
    """Boundary IoU by looking around every pixel; outside the image is not the object."""
    height, width = target.shape
    reach = max(1, round(0.02 * math.hypot(height, width)))

    def band(mask: np.ndarray) -> set[tuple[int, int]]:
        return {
            (y, x)
            for y, x in itertools.product(range(height), range(width))
            if mask[y, x]
            and any(
                not (0 <= v < height and 0 <= u < width and mask[v, u])
                for v in range(y - reach, y + reach + 1)
                for u in range(x - reach, x + reach + 1)
            )
        }

    ours = band((prediction != 0) & (target != 255))
    true = band(target == 1)
    return len(ours & true) / len(ours | true) if ours | true else 1.0


@pytest.mark.parametrize("seed", range(5))
def test_image_scores_equal_scikit_learn(seed: int) -> None:
    prediction, target = pair(seed)
    scores = image_scores(prediction, target)
    labelled = target != 255
    flat = target[labelled], prediction[labelled].astype(np.uint8)
    assert scores.object_iou == pytest.approx(jaccard_score(*flat, pos_label=1))
    assert scores.background_iou == pytest.approx(jaccard_score(*flat, pos_label=0))
    assert scores.miou == pytest.approx(jaccard_score(*flat, average="macro"))


def test_confusion_counts_every_labelled_pixel_once() -> None:
    prediction = np.array([[1, 1, 0, 0, 1, 0]], np.uint8)
    target = np.array([[1, 0, 1, 0, 255, 255]], np.uint8)
    assert confusion(prediction, target) == Counts(
        true_positive=1, false_positive=1, false_negative=1, true_negative=1
    )


def test_a_mask_of_0_and_255_is_a_prediction_too() -> None:
    prediction, target = pair(0)
    as_bytes = prediction.astype(np.uint8) * 255
    assert image_scores(as_bytes, target) == image_scores(prediction, target)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        (0, 0, (1.0, 1.0, 1.0, 1.0)),
        (1, 1, (1.0, 1.0, 1.0, 1.0)),
        (1, 0, (0.0, 0.0, 0.0, 0.0)),
        (0, 1, (0.0, 0.0, 0.0, 0.0)),
        (0, 255, (1.0, 1.0, 1.0, 1.0)),
        (1, 255, (1.0, 1.0, 1.0, 1.0)),
    ],
)
def test_empty_classes(predicted: int, true: int, expected: tuple[float, ...]) -> None:
    prediction = np.full((20, 30), predicted, np.uint8)
    target = np.full((20, 30), true, np.uint8)
    scores = image_scores(prediction, target)
    assert dataclasses.astuple(scores) == expected
    assert all(type(score) is float for score in dataclasses.astuple(scores))


@pytest.mark.parametrize(("height", "width"), [(40, 57), (3, 5), (1, 1), (1, 60), (110, 30)])
def test_boundary_iou_equals_the_definition(height: int, width: int) -> None:
    for seed in range(3):
        prediction, target = pair(seed, height, width)
        assert boundary_iou(prediction, target) == slow_boundary_iou(prediction, target)


def test_boundary_iou_of_large_images_equals_a_distance_transform() -> None:
    prediction, target = pair(1, 375, 500)

    def band(mask: np.ndarray) -> np.ndarray:
        # SciPy measures chessboard distance to the nearest zero; the frame is not the object.
        distance = ndimage.distance_transform_cdt(np.pad(mask, 1), metric="chessboard")
        return mask & (distance[1:-1, 1:-1] <= round(0.02 * 625))

    ours, true = band(prediction & (target != 255)), band(target == 1)
    assert boundary_iou(prediction, target) == (ours & true).sum() / (ours | true).sum()


def test_boundary_iou_punishes_a_rough_contour_more_than_iou_does() -> None:
    target = np.zeros((100, 100), np.uint8)
    target[10:90, 10:90] = 1
    shrunk = ndimage.binary_erosion(target, iterations=3)
    scores = image_scores(shrunk, target)
    assert scores.object_iou == pytest.approx(74**2 / 80**2)
    assert scores.boundary_iou == 0.0


def test_masks_of_different_sizes_are_refused() -> None:
    prediction, target = pair(0)
    # A TypeError where jaxtyping's checks are on, which see it first.
    with pytest.raises((ValueError, TypeError), match="56"):
        image_scores(prediction[:, 1:], target)


def test_per_image_and_pooled_figures_differ_and_equal_their_definitions() -> None:
    pairs = [pair(0), pair(1, 90, 20), pair(2, 15, 15)]
    metrics = SegmentationMetrics()
    single = [metrics.update(*both) for both in pairs]
    assert single == [image_scores(*both) for both in pairs]
    result = metrics.compute()

    for name in SCORES:
        assert result[name] == pytest.approx(np.mean([getattr(s, name) for s in single]))
    true = np.concatenate([target[target != 255] for _, target in pairs])
    ours = np.concatenate([p[t != 255] for p, t in pairs]).astype(np.uint8)
    assert result["pooled_object_iou"] == pytest.approx(jaccard_score(true, ours))
    assert result["pooled_background_iou"] == pytest.approx(jaccard_score(true, ours, pos_label=0))
    assert result["pooled_miou"] == pytest.approx(jaccard_score(true, ours, average="macro"))
    assert result["pooled_miou"] != pytest.approx(result["miou"], abs=1e-3)
    assert result["num_images"] == 3
    assert all(type(value) is float for value in result.values())


def test_no_image_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no image"):
        SegmentationMetrics().compute()


def test_reduce_on_one_process_changes_nothing() -> None:
    metrics = SegmentationMetrics()
    metrics.update(*pair(0))
    before = metrics.compute()
    metrics.reduce()
    assert metrics.compute() == before


def test_reduce_adds_sums_before_it_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [SegmentationMetrics(), SegmentationMetrics(), SegmentationMetrics()]
    whole = SegmentationMetrics()
    for index, rank in enumerate([0, 0, 0, 1]):  # Unequal shares; the third rank has no image.
        ranks[rank].update(*pair(index, 20 + 9 * index, 30))
        whole.update(*pair(index, 20 + 9 * index, 30))

    sent: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda t: sent.append(t) or t)
    for metrics in ranks:
        metrics.reduce()
    total = torch.stack(sent).sum(dim=0)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda t: total)
    for metrics in ranks:
        metrics.reduce()
        assert metrics.compute() == pytest.approx(whole.compute())


def _score_on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    metrics = SegmentationMetrics()
    for index in range(rank, 3, 2):
        metrics.update(*pair(index))
    metrics.reduce()
    torch.save(metrics.compute(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    spawn(_score_on_rank, (str(tmp_path),), 2)
    metrics = SegmentationMetrics()
    for index in range(3):
        metrics.update(*pair(index))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(metrics.compute())


def test_bootstrap_interval_equals_scipys() -> None:
    values = np.random.default_rng(0).beta(8, 2, size=120)
    low, high = bootstrap_interval(values.tolist(), np.random.default_rng(1))
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-3)
    error = values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=2e-3
    )


def test_bootstrap_interval_is_a_function_of_its_generator() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    first = bootstrap_interval(values, np.random.default_rng(3))
    assert bootstrap_interval(values, np.random.default_rng(3)) == first
    assert bootstrap_interval(values, np.random.default_rng(4)) != first
    narrow = bootstrap_interval(values, np.random.default_rng(3), level=0.5)
    assert first[0] < narrow[0] < narrow[1] < first[1]


def test_bootstrap_interval_of_one_value_is_that_value() -> None:
    assert bootstrap_interval([0.7], np.random.default_rng(0)) == pytest.approx((0.7, 0.7))


def test_bootstrap_interval_of_many_values_draws_in_pieces() -> None:
    values = np.random.default_rng(0).random(30_000)
    low, high = bootstrap_interval(values.tolist(), np.random.default_rng(0), num_resamples=100)
    assert low < values.mean() < high


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([0.5], 0.0), ([0.5], 1.0)])
def test_bootstrap_interval_refuses(values: list[float], level: float) -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        bootstrap_interval(values, np.random.default_rng(0), level=level)
