"""Training samples: joint augmentation of image, strokes and mask, with one strength.

The only module that knows albumentations (2.0.8, pinned). Geometry is ours, because strokes have to
be dilated between the crop and its resize by an amount that depends on the crop; it comes first, so
that colours are changed on the small picture. Every draw comes from the generator that is passed in.
"""

import os
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from scribbleseg.config import AugmentConfig, Encoding, StrokesConfig
from scribbleseg.datasets.cache import SceneCache
from scribbleseg.scribbles.encode import UNLABELLED, dilate, encode, survive_radius
from scribbleseg.scribbles.simulate import simulate

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Box = tuple[int, int, int, int]


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the generator of one sample in one epoch; no two of them share a stream."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, sample]))


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flips and colours, all scaled by one strength."""

    crop_size: int
    """Side of the square that comes out, in network pixels."""
    strength: float
    """0: the whole image fitted into the square, nothing random; 1: the 2025 report's; at most 2."""

    def __call__(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        scribbles: UInt8[np.ndarray, "h w"],
        mask: UInt8[np.ndarray, "h w"] | None,
        generator: np.random.Generator,
    ) -> tuple[
        UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"], UInt8[np.ndarray, "s s"] | None
    ]:
        """Augment one sample.

        Args:
            image: RGB.
            scribbles: 0 background, 1 object, 255 unlabelled.
            mask: 0 background, 1 object, 255 ignore; None where there is none.
            generator: every draw comes from it.

        Returns:
            Image, strokes and mask as squares of `crop_size`; pixels from outside the image are
            black, 255 and 255. Strokes are dilated as far as the down-scaling asks.
        """
        size = self.crop_size
        if self.strength == 0:
            return (
                _fit(image, size, 0),
                _fit(dilate(scribbles, survive_radius(size / max(scribbles.shape))), size, 255),
                None if mask is None else _fit(mask, size, 255),
            )
        box = _draw_crop(scribbles.shape, self.strength, generator)
        mirror = generator.random() < 0.5 * min(self.strength, 1)
        upend = generator.random() < 0.1 * self.strength
        strokes = _crop(scribbles, box)
        strokes = dilate(strokes, survive_radius(size / max(strokes.shape)))
        image = _flip(_resize_image(_crop(image, box), size, size), mirror, upend)
        strokes = _flip(_resize_labels(strokes, size, size), mirror, upend)
        if mask is not None:
            mask = _flip(_resize_labels(_crop(mask, box), size, size), mirror, upend)
        return self._recolour(image, generator), strokes, mask

    @cached_property
    def _colours(self) -> Any:
        return _colour_pipeline(self.strength)

    def _recolour(
        self, image: UInt8[np.ndarray, "s s 3"], generator: np.random.Generator
    ) -> UInt8[np.ndarray, "s s 3"]:
        self._colours.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        return self._colours(image=image)["image"]


def _colour_pipeline(strength: float) -> Any:
    A = _albumentations()
    s = strength

    def p(base: float) -> float:
        return min(1.0, base * s)

    return A.Compose(
        [
            A.ColorJitter(
                brightness=0.4 * s, contrast=0.4 * s, saturation=0.4 * s, hue=min(0.5, 0.1 * s), p=p(0.8)
            ),
            A.ToGray(p=p(0.1)),
            A.OneOf(
                [
                    A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 0.1 + 1.4 * s)),
                    A.Sharpen(alpha=(0.0, min(1.0, 0.4 * s)), lightness=(1.0, 1.0)),
                ],
                p=p(0.3),
            ),
            A.GaussNoise(std_range=(0.0, 0.05 * s), p=p(0.2)),
            A.CoarseDropout(
                num_holes_range=(1, 3),
                hole_height_range=(0.05, 0.05 + 0.1 * s),
                hole_width_range=(0.05, 0.05 + 0.1 * s),
                p=p(0.2),
            ),
        ]
    )


def _albumentations() -> Any:
    before = os.environ.get("NO_ALBUMENTATIONS_UPDATE")
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    try:
        import albumentations
    finally:
        if before is None:
            del os.environ["NO_ALBUMENTATIONS_UPDATE"]
        else:
            os.environ["NO_ALBUMENTATIONS_UPDATE"] = before
    return albumentations


def _draw_crop(shape: tuple[int, int], strength: float, generator: np.random.Generator) -> Box:
    """Draw a window inside the image: top, left, height, width."""
    height, width = shape
    area = generator.uniform(0.25**strength, 1) * height * width
    widest = (4 / 3) ** strength
    ratio = np.exp(generator.uniform(-1, 1) * np.log(widest))
    w, h = min(np.sqrt(area * ratio), width), min(np.sqrt(area / ratio), height)
    w, h = min(w, h * widest), min(h, w * widest)
    w, h = max(1, round(w)), max(1, round(h))
    top = int(generator.integers(height - h + 1))
    left = int(generator.integers(width - w + 1))
    return top, left, h, w


def _crop(pixels: np.ndarray, box: Box) -> np.ndarray:
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def _flip(pixels: np.ndarray, mirror: bool, upend: bool) -> np.ndarray:
    return np.ascontiguousarray(pixels[:: -1 if upend else 1, :: -1 if mirror else 1])


def _resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def _resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _fitted_size(shape: tuple[int, ...], long_side: int) -> tuple[int, int]:
    scale = long_side / max(shape[:2])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _fit(pixels: np.ndarray, size: int, fill: int) -> np.ndarray:
    height, width = _fitted_size(pixels.shape, size)
    resize = _resize_image if pixels.ndim == 3 else _resize_labels
    square = np.full((size, size, *pixels.shape[2:]), fill, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = resize(pixels, height, width)
    return square


@dataclass(frozen=True, kw_only=True)
class TrainSamples(Dataset[dict[str, Any]]):
    """Augmented training samples; every draw is a function of (seed, epoch, sample)."""

    cache: SceneCache
    indices: list[int]
    crop_size: int
    strokes: StrokesConfig
    augment: AugmentConfig
    seed: int
    supervision: Literal["mask", "strokes"] = "mask"

    @cached_property
    def _augmentation(self) -> Augmentation:
        return Augmentation(self.crop_size, self.augment.strength)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, sample = key
        rng = generator(self.seed, epoch, sample)
        scene = self.cache[self.indices[sample]]
        scribbles, target = scene.scribbles, scene.mask
        if self.supervision == "strokes":
            target = scene.scribbles
        elif rng.random() < self.strokes.simulate_probability:
            assert target is not None
            scribbles = simulate(
                target,
                rng,
                style=self.strokes.style,
                width=self.strokes.width,
                length=self.strokes.length,
                count=self.strokes.count,
                misplaced=self.strokes.misplaced,
            )
        image, scribbles, target = self._augmentation(scene.image, scribbles, target, rng)
        assert target is not None
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "strokes": torch.from_numpy(
                encode(scribbles, self.strokes.encoding, self.strokes.radius)
            ),
            "mask": torch.from_numpy(target),
            "stem": scene.stem,
        }


def worker_init(worker: int) -> None:
    """Keep OpenCV to one thread in a loader process; its own threads would fight the loader's."""
    cv2.setNumThreads(0)


def to_network(
    image: UInt8[np.ndarray, "h w 3"],
    scribbles: UInt8[np.ndarray, "h w"],
    *,
    long_side: int,
    encoding: Encoding,
    radius: int,
) -> tuple[UInt8[Tensor, "1 3 h2 w2"], UInt8[Tensor, "1 2 h2 w2"]]:
    """Bring one image and its strokes to the network's scale, for prediction.

    Args:
        image: RGB.
        scribbles: 0 background, 1 object, 255 unlabelled.
        long_side: longer side of the result, in network pixels.
        encoding: see `encode`.
        radius: see `encode`.

    Returns:
        The image (see `normalise`) and the encoded strokes (divide by 255).
    """
    height, width = _fitted_size(scribbles.shape, long_side)
    grown = dilate(scribbles, survive_radius(min(height / scribbles.shape[0], width / scribbles.shape[1])))
    strokes = encode(_resize_labels(grown, height, width), encoding, radius)
    small = _resize_image(image, height, width)
    return (
        torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)))[None],
        torch.from_numpy(strokes)[None],
    )


def normalise(images: UInt8[Tensor, "b 3 h w"]) -> Float32[Tensor, "b 3 h w"]:
    """Scale pixels to ImageNet's mean 0 and standard deviation 1, on the tensor's own device."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std
