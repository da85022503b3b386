"""Views for DINO: their shapes, their randomness, and colours against torchvision's."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as oracle
from torch.utils.data import DataLoader

from scribbleseg.config import CropsConfig
from scribbleseg.datasets import multicrop, transforms
from scribbleseg.datasets.multicrop import (
    GENTLE,
    PAPER,
    MultiCrop,
    ViewKind,
    change_colours,
    resolve_crops,
)
from scribbleseg.datasets.pictures import ImageCache, list_images
from scribbleseg.datasets.transforms import random_resized_crop
from scribbleseg.datasets.workers import worker_init

CROPS = CropsConfig(global_size=48, local_size=32, num_local=3)


class Chosen(np.random.Generator):
    """A generator whose chances and values are written down."""

    def __init__(self, chances: list[float], values: list[Any]) -> None:
        super().__init__(np.random.PCG64(0))
        self.chances, self.values = iter(chances), iter(values)

    def random(self, *arguments: Any, **options: Any) -> Any:
        """Return the next chance."""
        return next(self.chances)

    def uniform(self, *arguments: Any, **options: Any) -> Any:
        """Return the next value or values."""
        return next(self.values)


@pytest.fixture(scope="module")
def cache(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageCache:
    """The tiny images, decoded."""
    folder = tmp_path_factory.mktemp("decoded")
    return ImageCache.open(list_images([tiny_data]), folder, max_short_side=100)


def make_views(cache: ImageCache, **changes: Any) -> MultiCrop:
    """Return views of the tiny images."""
    settings: dict[str, Any] = {"cache": cache, "crops": CROPS, "seed": 0}
    return MultiCrop(**settings | changes)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two samples are equal bit for bit."""
    assert one["stem"] == other["stem"]
    for name in ("global", "local"):
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("num_local", [0, 3])
def test_a_sample_has_the_shapes_it_promises(cache: ImageCache, num_local: int) -> None:
    crops = CropsConfig(global_size=48, local_size=32, num_local=num_local)
    views = make_views(cache, crops=crops)
    assert len(views) == len(cache) == 18
    sample = views[2, 5]
    assert sample["global"].shape == (2, 3, 48, 48)
    assert sample["local"].shape == (num_local, 3, 32, 32)
    assert sample["stem"] == cache.names[5]
    assert sample["global"].dtype == sample["local"].dtype == torch.uint8
    [batch] = DataLoader(views, batch_sampler=[[(0, 0), (0, 1)]])
    assert batch["global"].shape == (2, 2, 3, 48, 48)
    assert batch["local"].shape == (2, num_local, 3, 32, 32)


def test_no_two_views_are_alike(cache: ImageCache) -> None:
    views = make_views(cache)
    samples = [views[epoch, sample] for epoch in range(3) for sample in range(4)]
    samples.append(make_views(cache, seed=1)[0, 0])
    for name in ("global", "local"):
        seen = [view.numpy().tobytes() for sample in samples for view in sample[name]]
        assert len(set(seen)) == len(seen)


def test_the_same_key_repeats_in_any_process(cache: ImageCache) -> None:
    keys = [(epoch, sample) for epoch in range(2) for sample in range(6)]
    views = make_views(cache)
    expected = {key: views[key] for key in reversed(keys)}
    loader = DataLoader(
        views,
        sampler=keys,
        batch_size=None,
        num_workers=2,
        multiprocessing_context="forkserver",
        worker_init_fn=worker_init,
    )
    for key, loaded in zip(keys, loader, strict=True):
        assert_same(loaded, expected[key])
    assert_same(pickle.loads(pickle.dumps(views))[0, 0], expected[0, 0])


def test_global_generators_are_left_alone(cache: ImageCache) -> None:
    # Python's own is left out: beartype, which checks types under test, draws from it.
    def states() -> tuple[Any, ...]:
        _, keys, position, *_ = np.random.get_state()
        return keys.tobytes(), position, torch.get_rng_state().tolist()

    before = states()
    for sample in range(4):
        make_views(cache)[0, sample]
    assert states() == before


def test_the_number_of_local_views_leaves_the_global_ones_alone(cache: ImageCache) -> None:
    """An ablation over local views compares like with like."""
    few = make_views(cache, crops=CropsConfig(global_size=48, num_local=0))
    assert torch.equal(few[1, 2]["global"], make_views(cache)[1, 2]["global"])


@pytest.mark.parametrize("scale", [(0.05, 0.25), (0.25, 0.6), (0.3, 0.3)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375)])
def test_windows_keep_their_scale(height: int, width: int, scale: tuple[float, float]) -> None:
    windows = [
        transforms._draw_window(height, width, scale, 4 / 3, np.random.default_rng(seed))
        for seed in range(1000)
    ]
    shares = np.array([w.height * w.width / (height * width) for w in windows])
    ratios = np.array([w.width / w.height for w in windows])
    assert scale[0] * 0.97 < shares.min() and shares.max() < scale[1] * 1.03
    np.testing.assert_allclose(shares.mean(), sum(scale) / 2, rtol=0.05)
    assert 0.73 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.36
    tops = np.array([w.top / max(1, height - w.height) for w in windows])
    np.testing.assert_allclose(tops.mean(), 0.5, atol=0.04)


def test_views_see_the_scales_of_their_kind(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def record(image: np.ndarray, size: int, scale: tuple[float, float], draws: Any) -> np.ndarray:
        asked.append((size, scale))
        return random_resized_crop(image, size, scale, draws)

    monkeypatch.setattr(multicrop, "random_resized_crop", record)
    make_views(cache)[0, 0]
    assert asked == 2 * [(48, (0.25, 1.0))] + 3 * [(32, (0.05, 0.25))]


def test_half_of_the_crops_are_mirrored() -> None:
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[:, None], (60, 80, 3)).copy()
    crops = [
        random_resized_crop(ramp, 32, (0.3, 0.9), np.random.default_rng(seed))
        for seed in range(400)
    ]
    mirrored = [int(crop[0, 0, 0]) > int(crop[0, -1, 0]) for crop in crops]
    np.testing.assert_allclose(np.mean(mirrored), 0.5, atol=0.08)
    assert all(crop.shape == (32, 32, 3) for crop in crops)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (31, 2000)])
def test_any_shape_can_be_seen(height: int, width: int) -> None:
    kind = ViewKind(32, (0.05, 1.0), PAPER, blur=1.0, solarise=1.0)
    for seed in range(10):
        view = kind.draw(np.zeros((height, width, 3), np.uint8), np.random.default_rng(seed))
        assert view.shape == (32, 32, 3)


@pytest.fixture
def muted() -> np.ndarray:
    """Colours so near to grey that no change of theirs is clipped."""
    pixels = np.random.default_rng(0).integers(100, 150, (24, 32, 3), np.uint8)
    pixels[:12] -= np.array([0, 20, 10], np.uint8)
    return pixels


def test_colours_are_torchvisions(muted: np.ndarray) -> None:
    brightness, contrast, saturation = 1.15, 0.8, 1.2
    draws = Chosen([0.0, 1.0], [(brightness, contrast), saturation, 0.0])
    # In floats, so that the oracle does not round in between; in another order than any of ours.
    expected = torch.from_numpy(muted.transpose(2, 0, 1)).float() / 255
    expected = oracle.adjust_saturation(expected, saturation)
    expected = oracle.adjust_contrast(expected, contrast)
    expected = oracle.adjust_brightness(expected, brightness) * 255
    changed = change_colours(muted, PAPER, draws).transpose(2, 0, 1)
    assert np.abs(changed - expected.numpy()).max() < 0.7


def test_hue_turns_as_torchvisions_does_and_keeps_luma(muted: np.ndarray) -> None:
    turn = 0.08
    changed = change_colours(muted, PAPER, Chosen([0.0, 1.0], [(1.0, 1.0), 1.0, turn])).astype(
        float
    )
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs((changed - muted) @ luma).max() < 1
    picture = torch.from_numpy(muted.transpose(2, 0, 1))
    towards, away = (
        np.abs(oracle.adjust_hue(picture, sign * turn).numpy().transpose(1, 2, 0) - changed).mean()
        for sign in (1, -1)
    )
    assert towards < 0.5 * away
    assert towards < np.abs(changed - muted).mean()


def test_grey_is_grey_and_nothing_is_nothing(muted: np.ndarray) -> None:
    grey = change_colours(muted, PAPER, Chosen([1.0, 0.0], []))
    expected = oracle.rgb_to_grayscale(torch.from_numpy(muted.transpose(2, 0, 1)))[0].numpy()
    assert np.abs(grey.astype(int) - expected[..., None].astype(int)).max() <= 1
    np.testing.assert_array_equal(change_colours(muted, PAPER, Chosen([1.0, 1.0], [])), muted)


def test_colours_change_as_often_as_the_paper_says(muted: np.ndarray) -> None:
    changed = [change_colours(muted, PAPER, np.random.default_rng(seed)) for seed in range(800)]
    grey = np.mean([bool((np.ptp(image.astype(int), axis=2) <= 1).all()) for image in changed])
    same = np.mean([np.array_equal(image, muted) for image in changed])
    np.testing.assert_allclose(grey, 0.2, atol=0.04)
    np.testing.assert_allclose(same, 0.2 * 0.8, atol=0.04)


def test_gentle_colours_change_always_and_little(muted: np.ndarray) -> None:
    changed = [change_colours(muted, GENTLE, np.random.default_rng(seed)) for seed in range(200)]
    lights = np.array([image.mean() for image in changed]) / muted.mean()
    assert 0.75 < lights.min() < 0.85 and 1.15 < lights.max() < 1.25
    assert not any(np.array_equal(image, muted) for image in changed)
    # Where paper's views lose their colour or turn it, these keep which pixel is the bluer one.
    halves = [image[12:].astype(float).mean((0, 1)) - image[:12].mean((0, 1)) for image in changed]
    assert all(half[1] > half[2] > half[0] for half in halves)


@pytest.mark.parametrize(
    ("colours", "blurs", "solarised"),
    [("paper", (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)), ("gentle", (0.2, 0.2, 0.2), (0.0, 0.0, 0.0))],
)
def test_blur_and_solarise_fall_on_the_views_they_should(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch, colours: Any, blurs: Any, solarised: Any
) -> None:
    monkeypatch.setattr(multicrop, "change_colours", lambda image, colours, draws: image)
    # A bright checkerboard, larger than any view: a blur flattens it, solarising makes it dark.
    image = 160 + 90 * (np.indices((400, 400)).sum(0) % 2).astype(np.uint8)
    image = np.repeat(image[..., None], 3, axis=2)

    def cut(image: np.ndarray, size: int, scale: tuple[float, float], draws: Any) -> np.ndarray:
        return image[:size, :size].copy()

    monkeypatch.setattr(multicrop, "random_resized_crop", cut)
    kinds = make_views(cache, crops=replace(CROPS, colours=colours))._kinds
    for kind, blur, solarise in zip(kinds, blurs, solarised, strict=True):
        views = [kind.draw(image, np.random.default_rng(seed)) for seed in range(500)]
        dark = np.mean([view.mean() < 128 for view in views])
        # A sigma below 0.3 pixels, one in ten or five, changes next to nothing.
        flat = np.mean([np.ptp(view[8:-8, 8:-8].astype(int)) < 88 for view in views])
        np.testing.assert_allclose(dark, solarise, atol=0.05 * (solarise > 0))
        np.testing.assert_allclose(flat, 0.9 * blur, atol=0.07)


def test_solarise_is_pillows() -> None:
    levels = np.arange(256, dtype=np.uint8)
    picture = torch.from_numpy(levels.reshape(1, 16, 16))
    expected = oracle.solarize(picture, 128).numpy().ravel()
    np.testing.assert_array_equal(multicrop._SOLARISED[levels], expected)


def test_scales_and_colours_follow_the_number_of_images() -> None:
    for num_images, expected in (
        (1, ((0.25, 1.0), (0.05, 0.25), "gentle")),
        (19_999, ((0.25, 1.0), (0.05, 0.25), "gentle")),
        (20_000, ((0.4, 1.0), (0.05, 0.4), "paper")),
    ):
        crops = resolve_crops(CROPS, num_images)
        assert (crops.global_scale, crops.local_scale, crops.colours) == expected
        assert crops.num_local == CROPS.num_local
        assert resolve_crops(crops, 10**9) == crops
    own = CropsConfig(global_scale=(0.14, 1.0))
    assert resolve_crops(own, 100).global_scale == (0.14, 1.0)
    assert resolve_crops(own, 100).local_scale == (0.05, 0.25)
