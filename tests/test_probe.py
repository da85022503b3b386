"""The probe: planted features, a slow loop as an oracle, real encoders, pictures."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scribbleseg.config import Architecture, ModelConfig, ProbeConfig
from scribbleseg.datasets.scenes import Scene, read_scene
from scribbleseg.errors import InputError
from scribbleseg.models import build_model
from scribbleseg.models.vit import VitEncoder
from scribbleseg.probe import (
    attention_picture,
    dense_features,
    dimensions,
    feature_picture,
    levels_that_count,
    list_probe_scenes,
    nearest_stroke_logits,
    probe,
)
from tests.conftest import write_scenes

CONFIG = ProbeConfig(long_side=96)


class Planted(nn.Module):
    """Stands in for an encoder."""

    def __init__(self, features: Callable[[Tensor], list[Tensor]]):
        super().__init__()
        self.features = features
        self.was_training: list[bool] = []

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the planted features."""
        self.was_training.append(self.training)
        return self.features(image)


COLOUR = Planted(lambda image: [image, F.avg_pool2d(image, 4), F.avg_pool2d(image, 8)])
NOISE = Planted(lambda image: [torch.randn(1, 16, *image.shape[2:], generator=seeded())])
COLLAPSED = Planted(lambda image: [torch.ones_like(image)])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def scene(height: int = 120, width: int = 170) -> Scene:
    """Return a red square on blue, with one stroke on each."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : -height // 4, width // 4 : -width // 3] = 1
    image = np.where(mask[..., None] == 1, [230, 30, 20], [20, 40, 220]).astype(np.uint8)
    strokes = np.full_like(mask, 255)
    strokes[height // 2, width // 3 : width // 2] = 1
    strokes[2, 3 : width // 2] = 0
    return Scene(stem="planted", image=image, scribbles=strokes, mask=mask)


def encoder_of(architecture: Architecture) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(architecture=architecture, width=8, depth=6)).encoder


def test_planted_features_are_told_from_noise():
    scenes = [scene(), scene(90, 64), scene(301, 40)]
    assert probe(COLOUR, scenes, CONFIG, "cpu") > 0.93
    assert probe(NOISE, scenes, CONFIG, "cpu") < 0.5
    # Nothing is nearer to the object's stroke, so everything is background.
    background = np.mean([(each.mask == 0).mean() / 2 for each in scenes])
    assert probe(COLLAPSED, scenes, CONFIG, "cpu") == pytest.approx(background)


def test_logits_equal_a_loop_over_pixels_and_strokes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("scribbleseg.probe.CHUNK", 7)
    features = torch.randn(5, 6, 9, generator=seeded())
    strokes = torch.rand(2, 6, 9, generator=seeded()) < 0.2
    found = nearest_stroke_logits(features, strokes)
    for y in range(6):
        for x in range(9):
            best = [-2.0, -2.0]
            for kind, row, column in strokes.nonzero().tolist():
                cosine = F.cosine_similarity(features[:, y, x], features[:, row, column], dim=0)
                best[kind] = max(best[kind], cosine.item())
            assert found[y, x].item() == pytest.approx(best[0] - best[1], abs=1e-5)


@pytest.mark.parametrize(
    ("kinds", "expected"), [((True, False), 1), ((False, True), -1), ((False, False), -1)]
)
def test_one_kind_of_stroke_is_everywhere(kinds: tuple[bool, bool], expected: int):
    strokes = torch.zeros(2, 4, 5, dtype=torch.bool)
    strokes[:, 1, 1] = torch.tensor(kinds)
    found = nearest_stroke_logits(torch.randn(3, 4, 5, generator=seeded()), strokes)
    torch.testing.assert_close(found, torch.full((4, 5), float(expected)))


def test_every_level_counts_the_same():
    sizes = [(3, 32, 24), (40, 16, 12), (7, 8, 6), (5, 2, 2)]
    maps = [
        10.0**number * torch.randn(1, *size, generator=seeded())
        for number, size in enumerate(sizes)
    ]
    together = dense_features(maps, (8, 6)).flatten(1)
    alone = [dense_features([each], (8, 6)).flatten(1) for each in maps]
    assert together.shape == (55, 48)
    torch.testing.assert_close(
        together.T @ together, torch.stack([each.T @ each for each in alone]).mean(dim=0)
    )
    # Fine maps shrink by averages.
    averages = F.normalize(F.avg_pool2d(maps[0], 4), dim=1)[0].flatten(1)
    torch.testing.assert_close(alone[0], averages)


@pytest.mark.parametrize(
    ("strides", "kept"),
    [([1, 2, 4, 8, 16, 32], [4, 8, 16]), ([1, 2], [2]), ([16, 16, 16, 16], [16, 16, 16, 16])],
)
def test_levels_of_strides_4_to_16_count(strides: list[int], kept: list[int]):
    image = torch.zeros(1, 3, 64, 96)
    maps = [torch.zeros(1, 5, 64 // stride, 96 // stride) for stride in strides]
    assert [96 // each.shape[-1] for each in levels_that_count(maps, image)] == kept


def test_a_one_pixel_stroke_survives():
    dotted = scene(400, 400)
    dotted.scribbles[:] = 255
    dotted.scribbles[201, 203], dotted.scribbles[7, 9] = 1, 0
    assert probe(COLOUR, [dotted], CONFIG, "cpu") > 0.93


def test_dimensions_are_a_mean_over_levels_whatever_their_size():
    views = torch.randn(20, 3, 64, 48, generator=seeded())
    assert dimensions(COLOUR, views) == pytest.approx(1, abs=0.01)
    # One direction of 4 channels at one level, all 3 of 3 at the other.
    half = Planted(lambda image: [image[:, :1].repeat(1, 4, 1, 1), image[..., ::32, ::32]])
    assert dimensions(half, views) == pytest.approx((1 / 4 + 1) / 2, abs=0.01)
    assert set(half.was_training) == {False} and half.training
    assert dimensions(COLLAPSED, views) == pytest.approx(1 / 3)


def test_dimensions_tell_a_rich_encoder_from_one_whose_channels_are_copies():
    encoder = encoder_of("unet")
    views = torch.randn(16, 3, 64, 64, generator=seeded())
    rich = dimensions(encoder, views)
    with torch.no_grad():
        for kernel in (each for each in encoder.parameters() if each.ndim == 4):
            kernel.copy_(kernel[:1].expand_as(kernel))
    assert dimensions(encoder, views) < 0.2 < 0.4 < rich


@pytest.mark.parametrize("architecture", ["unet", "resunet", "vit_unet"])
def test_real_encoders_are_seen_and_left_as_they_were(architecture: Architecture):
    encoder = encoder_of(architecture)
    frozen = next(module for module in encoder.modules() if not list(module.children()))
    frozen.eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = probe(encoder, [scene(), scene(64, 20)], CONFIG, "cpu")
    assert 0 <= found <= 1
    assert found == probe(encoder.eval(), [scene(), scene(64, 20)], CONFIG, "cpu")
    assert 0 < dimensions(encoder, torch.rand(3, 3, 64, 64, generator=seeded())) <= 1
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)


def test_every_module_returns_to_its_mode_even_after_an_error():
    def fail(image: Tensor) -> list[Tensor]:
        raise RuntimeError("out of memory")

    planted = Planted(fail)
    planted.child = nn.Identity().eval()
    with pytest.raises(RuntimeError, match="out of memory"):
        probe(planted, [scene()], CONFIG, "cpu")
    assert planted.was_training == [False]
    assert planted.training and not planted.child.training
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("architecture", ["resunet", "vit_unet"])
def test_feature_picture_has_the_networks_scale_and_repeats(architecture: Architecture):
    encoder = encoder_of(architecture)
    picture = feature_picture(encoder, scene(), CONFIG, "cpu")
    assert picture.shape == (68, 96, 3)
    assert picture.dtype == np.uint8
    assert (picture.min(), picture.max()) == (0, 255)
    np.testing.assert_array_equal(picture, feature_picture(encoder, scene(), CONFIG, "cpu"))


def test_feature_picture_parts_what_the_features_part():
    shown = feature_picture(COLOUR, scene(96, 96), CONFIG, "cpu").astype(int)
    inside, outside = shown[40:60, 32:56].mean(axis=(0, 1)), shown[:24].mean(axis=(0, 1))
    assert abs(inside - outside).max() > 200
    assert not feature_picture(COLLAPSED, scene(), CONFIG, "cpu").any()


def test_attention_picture_is_grey_at_the_networks_scale():
    encoder = encoder_of("vit_unet")
    assert isinstance(encoder, VitEncoder)
    picture = attention_picture(encoder, scene(), CONFIG, "cpu")
    assert picture.shape == (68, 96, 3)
    assert (picture.min(), picture.max()) == (0, 255)
    assert (picture == picture[..., :1]).all()


def test_scenes_are_spread_over_those_with_masks(tmp_path: Path):
    write_scenes(tmp_path, "train", 9)
    config = ProbeConfig(root=str(tmp_path), num_images=3)
    assert [int(each.stem[-3:]) for each in list_probe_scenes(config)] == [0, 4, 8]
    truth = tmp_path / "train" / "ground_truth"
    (truth / "scene_0_008.png").unlink()
    assert list_probe_scenes(config)[-1].stem == "scene_0_007"
    assert len(list_probe_scenes(ProbeConfig(root=str(tmp_path), num_images=99))) == 8
    shutil.rmtree(truth)
    with pytest.raises(InputError, match="ground_truth: found no mask.*--probe.split"):
        list_probe_scenes(config)
    with pytest.raises(InputError, match="no such split"):
        list_probe_scenes(ProbeConfig(root=str(tmp_path), split="nowhere"))
    assert list_probe_scenes(ProbeConfig()) == []


def test_benchmark_images_run(benchmark: Path):
    config = ProbeConfig(root=str(benchmark), num_images=4, long_side=128)
    scenes = [read_scene(paths) for paths in list_probe_scenes(config)]
    assert len(scenes) == 4
    assert 0 <= probe(encoder_of("resunet"), scenes, config, "cpu") <= 1
