"""Augmentation and training samples: geometry, randomness, and what survives."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import DataLoader

from scribbleseg.config import AugmentConfig, StrokesConfig
from scribbleseg.datasets import transforms
from scribbleseg.datasets.cache import SceneCache
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.datasets.transforms import (
    Augmentation,
    TrainSamples,
    fitted_size,
    generator,
    normalise,
    to_network,
)
from scribbleseg.datasets.workers import worker_init
from scribbleseg.errors import InputError
from scribbleseg.scribbles.encode import encode, shrink


def painted(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a picture whose channels are the mask, the object strokes, the background strokes."""
    generator = np.random.default_rng(height)
    mask = np.zeros((height, width), np.uint8)
    scribbles = np.full((height, width), 255, np.uint8)
    for _ in range(6):
        centre = tuple(int(value) for value in generator.uniform(0, (width, height)))
        cv2.circle(mask, centre, min(height, width) // 6, 1, -1)
    for label in (0, 1):
        for _ in range(3):
            ends = generator.uniform(0, (width, height), (2, 2)).astype(int).tolist()
            cv2.line(scribbles, *ends, label, min(height, width) // 12)
    image = 255 * np.stack([mask, scribbles == 1, scribbles == 0], axis=2).astype(np.uint8)
    return image, scribbles, mask


def interior(region: np.ndarray, margin: int) -> np.ndarray:
    """Return the pixels of a region that are further than `margin` from its border and the edge."""
    square = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    return cv2.erode(
        region.astype(np.uint8), square, borderType=cv2.BORDER_CONSTANT, borderValue=0
    ).astype(bool)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave colour and texture alone."""

    class Nothing:
        def set_random_state(self, *states: object) -> None:
            pass

        def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
            return {"image": image}

    monkeypatch.setattr(transforms, "_texture_pipeline", lambda strength: Nothing())


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (97, 640)])
def test_image_strokes_and_mask_move_together(height: int, width: int, strength: float) -> None:
    image, scribbles, mask = painted(height, width)
    augment = Augmentation(crop_size=128, strength=strength)
    for seed in range(6):
        picture, strokes, target = augment(image, scribbles, mask, np.random.default_rng(seed))
        assert target is not None
        assert picture.shape == (128, 128, 3)
        assert strokes.shape == target.shape == (128, 128)
        shown = picture >= 128
        inside = target != 255
        # Away from borders, where a resize blends, all three agree.
        for value in (0, 1):
            sure = interior(inside & (target == value), 2)
            assert (shown[..., 0][sure] == value).all()
        # Strokes were dilated: they hold what the picture shows of them, and little more.
        for channel, label in ((1, 1), (2, 0)):
            assert (strokes[interior(shown[..., channel], 2)] == label).all()
            around = cv2.dilate(picture[..., channel], np.ones((13, 13)))
            assert (around[strokes == label] > 0).all()


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_thin_strokes_survive_strong_shrinking(strength: float) -> None:
    height, width = 900, 1200
    image = np.zeros((height, width, 3), np.uint8)
    scribbles = np.full((height, width), 255, np.uint8)
    scribbles[100:800:100, 100:1100:100] = 1
    scribbles[150:800:100, 150:1100:100] = 0
    augment = Augmentation(crop_size=48, strength=strength)
    for seed in range(20):
        draws = np.random.default_rng(seed)
        seen = scribbles
        if strength > 0:
            seen = transforms._draw_view(height, width, strength, draws).of(scribbles)
        strokes = augment(image, scribbles, None, np.random.default_rng(seed))[1]
        for label in (0, 1):
            dots = cv2.connectedComponents((strokes == label).astype(np.uint8))[0] - 1
            assert dots == (seen == label).sum()


def test_strength_zero_is_the_whole_image_and_nothing_random() -> None:
    image, scribbles, mask = painted(375, 500)
    augment = Augmentation(crop_size=128, strength=0.0)
    first = augment(image, scribbles, mask, np.random.default_rng(0))
    second = augment(image, scribbles, mask, np.random.default_rng(1))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    picture, strokes, target = first
    assert target is not None
    np.testing.assert_array_equal(
        picture[16:112], cv2.resize(image, (128, 96), interpolation=cv2.INTER_AREA)
    )
    for rows in (slice(0, 16), slice(112, 128)):
        assert not picture[rows].any()
        assert (strokes[rows] == 255).all()
        assert (target[rows] == 255).all()
    assert not (target[16:112] == 255).any()


def test_ignored_pixels_stay_ignored() -> None:
    image, scribbles, _ = painted(120, 160)
    mask = np.full((120, 160), 255, np.uint8)
    mask[:, :80] = 1
    for seed in range(5):
        target = Augmentation(64, 1.0)(image, scribbles, mask, np.random.default_rng(seed))[2]
        assert target is not None
        assert set(np.unique(target)) <= {1, 255}


def test_crops_keep_their_ranges() -> None:
    height, width = 375, 500
    for strength in (0.25, 1.0, 2.0):
        views = [
            transforms._draw_view(height, width, strength, np.random.default_rng(seed))
            for seed in range(400)
        ]
        areas = np.array([view.height * view.width / (height * width) for view in views])
        ratios = np.array([view.width / view.height for view in views])
        assert areas.min() > 0.25**strength * 0.98
        assert areas.max() <= 1
        assert np.abs(np.log(ratios)).max() < strength * np.log(4 / 3) + 0.02
        for view in views:
            assert 0 <= view.top <= height - view.height
            assert 0 <= view.left <= width - view.width
        mirrored = np.mean([view.mirrored for view in views])
        upended = np.mean([view.upended for view in views])
        np.testing.assert_allclose(mirrored, min(0.5, 0.5 * strength), atol=0.08)
        np.testing.assert_allclose(upended, 0.1 * strength, atol=0.06)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (31, 2000)])
def test_any_shape_can_be_cropped(height: int, width: int) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    labels = np.zeros((height, width), np.uint8)
    for seed in range(10):
        outputs = Augmentation(32, 2.0)(image, labels, labels, np.random.default_rng(seed))
        assert [output.shape[:2] for output in outputs if output is not None] == 3 * [(32, 32)]


def test_strength_scales_all_of_it() -> None:
    """Crops get smaller, and colours move further from those of the untouched crop."""
    image = np.random.default_rng(0).integers(60, 200, (12, 16, 3), np.uint8)
    image = cv2.resize(image, (160, 120), interpolation=cv2.INTER_CUBIC)
    labels = np.zeros((120, 160), np.uint8)
    areas, changes = [], []
    for strength in (0.1, 0.5, 1.0, 2.0):
        area = change = 0.0
        for seed in range(60):
            draws = np.random.default_rng(seed)
            view = transforms._draw_view(120, 160, strength, draws)
            touched = Augmentation(64, strength)(image, labels, None, np.random.default_rng(seed))
            untouched = transforms._resize_image(view.of(image), 64, 64)
            area += view.height * view.width
            change += np.abs(touched[0].astype(float) - untouched).mean()
        areas.append(area)
        changes.append(change)
    assert areas == sorted(areas, reverse=True)
    assert changes == sorted(changes)
    assert changes[-1] > 3 * changes[0]


def test_streams_never_meet() -> None:
    first = {
        generator(seed, epoch, sample).integers(2**63)
        for seed in range(4)
        for epoch in range(10)
        for sample in range(50)
    }
    assert len(first) == 4 * 10 * 50


@pytest.fixture(scope="module")
def cache(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SceneCache:
    """The tiny samples, decoded."""
    scenes = list_scenes(tiny_data, "train", need_masks=True)
    return SceneCache.open(scenes, tmp_path_factory.mktemp("decoded"))


def make_samples(cache: SceneCache, **changes: Any) -> TrainSamples:
    """Return training samples of the tiny data."""
    settings: dict[str, Any] = {
        "cache": cache,
        "indices": list(range(len(cache))),
        "crop_size": 48,
        "strokes": StrokesConfig(),
        "augment": AugmentConfig(),
        "seed": 0,
    }
    return TrainSamples(**settings | changes)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two samples are equal bit for bit."""
    assert one["stem"] == other["stem"]
    for name in ("image", "strokes", "mask"):
        assert torch.equal(one[name], other[name]), name


def test_a_sample_has_the_shapes_of_the_contract(cache: SceneCache) -> None:
    samples = make_samples(cache, indices=[3, 1])
    assert len(samples) == 2
    sample = samples[0, 1]
    assert sample["stem"] == cache.stems[1]
    assert sample["image"].shape == (3, 48, 48)
    assert sample["strokes"].shape == (2, 48, 48)
    assert sample["mask"].shape == (48, 48)
    assert {sample[name].dtype for name in ("image", "strokes", "mask")} == {torch.uint8}
    assert all(sample[name].is_contiguous() for name in ("image", "strokes", "mask"))
    assert set(sample["mask"].unique().tolist()) <= {0, 1, 255}


def test_the_same_key_repeats_and_others_differ(cache: SceneCache) -> None:
    samples, again, other = make_samples(cache), make_samples(cache), make_samples(cache, seed=1)
    # In another order, with draws of global generators in between: nothing depends on either.
    repeated = {}
    for key in ((2, 3), (1, 3), (0, 0)):
        random.random(), np.random.default_rng().random(), torch.rand(1)
        repeated[key] = again[key]
    for key, sample in repeated.items():
        assert_same(samples[key], sample)
        assert not torch.equal(other[key]["image"], sample["image"])
    for name in ("image", "mask"):
        assert not torch.equal(repeated[2, 3][name], repeated[1, 3][name])
    twins = make_samples(cache, indices=[0, 0])
    assert not torch.equal(twins[0, 0]["image"], twins[0, 1]["image"])


def test_global_generators_are_left_alone(cache: SceneCache) -> None:
    # Python's own is left out: beartype, which checks types under test, draws from it.
    def states() -> tuple[Any, ...]:
        _, keys, position, *_ = np.random.get_state()
        return keys.tobytes(), position, torch.get_rng_state().tolist()

    before = states()
    for position in range(4):
        make_samples(cache, augment=AugmentConfig(strength=2.0))[0, position]
    assert states() == before


def test_loader_workers_change_nothing(cache: SceneCache) -> None:
    keys = [(epoch, sample) for epoch in range(2) for sample in range(6)]
    samples = make_samples(cache, augment=AugmentConfig(strength=2.0))
    loader = DataLoader(
        samples,
        sampler=keys,
        batch_size=None,
        num_workers=2,
        multiprocessing_context="forkserver",
        worker_init_fn=worker_init,
    )
    for key, loaded in zip(keys, loader, strict=True):
        assert_same(loaded, samples[key])


def test_samples_can_be_pickled_after_use(cache: SceneCache) -> None:
    samples = make_samples(cache)
    expected = samples[0, 0]
    assert_same(pickle.loads(pickle.dumps(samples))[0, 0], expected)


def test_texture_touches_the_image_only(cache: SceneCache, request: pytest.FixtureRequest) -> None:
    keys = [(epoch, sample) for epoch in range(4) for sample in range(4)]
    touched = [make_samples(cache, augment=AugmentConfig(strength=2.0))[key] for key in keys]
    request.getfixturevalue("plain")
    untouched = [make_samples(cache, augment=AugmentConfig(strength=2.0))[key] for key in keys]
    assert sum(
        not torch.equal(one["image"], other["image"])
        for one, other in zip(touched, untouched, strict=True)
    ) > 0.9 * len(keys)
    for one, other in zip(touched, untouched, strict=True):
        assert torch.equal(one["strokes"], other["strokes"])
        assert torch.equal(one["mask"], other["mask"])


def test_simulated_strokes_replace_the_real_ones_by_chance(cache: SceneCache) -> None:
    def strokes(probability: float) -> list[torch.Tensor]:
        config = StrokesConfig(encoding="raw", simulate_probability=probability)
        samples = make_samples(cache, strokes=config, augment=AugmentConfig(strength=0.0))
        return [samples[0, position]["strokes"] for position in range(len(samples))]

    real, mixed, simulated = strokes(0.0), strokes(0.5), strokes(1.0)
    assert all(not torch.equal(a, b) for a, b in zip(real, simulated, strict=True))
    kept = sum(torch.equal(a, b) for a, b in zip(real, mixed, strict=True))
    assert 0 < kept < len(real)


def test_simulated_strokes_agree_with_the_mask(cache: SceneCache) -> None:
    config = StrokesConfig(encoding="raw", simulate_probability=1.0, style="mixed")
    samples = make_samples(cache, strokes=config, crop_size=80)
    for position in range(len(samples)):
        sample = samples[1, position]
        for channel, label in ((0, 1), (1, 0)):
            wrong = (sample["strokes"][channel] > 0) & (sample["mask"] == 1 - label)
            # Only dilation, by two pixels of the original, can carry a stroke over the border.
            assert wrong.float().mean() < 0.01


def test_strokes_can_be_the_target(tiny_root: Path, tmp_path: Path) -> None:
    for path in (tiny_root / "train" / "ground_truth").iterdir():
        path.unlink()
    cache = SceneCache.open(list_scenes(tiny_root, "train", need_masks=False), tmp_path)
    samples = make_samples(
        cache, crop_size=32, supervision="strokes", augment=AugmentConfig(strength=0.0)
    )
    sample = samples[0, 0]
    scribbles = cache[0].scribbles
    expected = np.full((32, 32), 255, np.uint8)
    expected[5:26] = shrink(scribbles, 21, 32)
    np.testing.assert_array_equal(sample["mask"].numpy(), expected)
    np.testing.assert_array_equal(
        sample["strokes"].numpy(), encode(np.zeros((32, 32, 3), np.uint8), expected, "disc", 3)
    )


def test_masks_that_are_missing_are_told_at_once(tiny_root: Path, tmp_path: Path) -> None:
    (tiny_root / "train" / "ground_truth" / "c.png").unlink()
    cache = SceneCache.open(list_scenes(tiny_root, "train", need_masks=False), tmp_path)
    with pytest.raises(InputError, match=r"1 of 3 .*\(first: c\).*--loss.supervision strokes"):
        make_samples(cache)
    assert len(make_samples(cache, indices=[0, 1])) == 2


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(375, 500, (192, 256)), (500, 375, (256, 192)), (30, 40, (192, 256)), (1, 4000, (1, 256))],
)
def test_prediction_sees_the_whole_image_at_its_long_side(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    image, scribbles, _ = painted(height, width) if height > 1 else _strip(width)
    pixels, strokes = to_network(image, scribbles, long_side=256, encoding="distance", radius=5)
    assert fitted_size(height, width, 256) == expected
    assert pixels.shape == (1, 3, *expected)
    assert strokes.shape == (1, 2, *expected)
    assert pixels.dtype == strokes.dtype == torch.uint8
    for channel, label in ((0, 1), (1, 0)):
        assert bool(strokes[0, channel].any()) == bool((scribbles == label).any())


def _strip(width: int) -> tuple[np.ndarray, np.ndarray, None]:
    """Return an image of one row with one stroke pixel."""
    scribbles = np.full((1, width), 255, np.uint8)
    scribbles[0, 1234] = 1
    return np.zeros((1, width, 3), np.uint8), scribbles, None


def test_training_without_augmentation_sees_what_prediction_sees(cache: SceneCache) -> None:
    strokes = StrokesConfig(simulate_probability=0.0)
    samples = make_samples(cache, strokes=strokes, augment=AugmentConfig(strength=0.0))
    scene = cache[0]
    pixels, encoded = to_network(
        scene.image, scene.scribbles, long_side=48, encoding="disc", radius=strokes.radius
    )
    height, width = pixels.shape[2:]
    top, left = (48 - height) // 2, (48 - width) // 2
    window = (slice(None), slice(top, top + height), slice(left, left + width))
    assert torch.equal(samples[0, 0]["image"][window], pixels[0])
    assert torch.equal(samples[0, 0]["strokes"][window], encoded[0])


def test_normalise_is_torchvisions() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    expected = torchvision.transforms.functional.normalize(
        images / 255, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD
    )
    torch.testing.assert_close(normalise(images), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("before", [None, "0"])
def test_importing_albumentations_leaves_the_environment(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "NO_ALBUMENTATIONS_UPDATE"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    transforms._import_albumentations()
    assert os.environ.get(name) == before
