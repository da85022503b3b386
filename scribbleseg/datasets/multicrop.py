"""Views of one image for DINO (arXiv 2104.14294), which takes them from BYOL (arXiv 2006.07733).

Two global views and some local ones (multi-crop, arXiv 2006.09882), each cropped, mirrored,
coloured, blurred and solarised on its own. Probabilities and ranges are the paper's. We deviate in
the colours, for speed: hue turns about the grey axis (in YIQ, not HSV). That makes all changes
linear in RGB and their order irrelevant, so they are one matrix and each pixel is clipped once.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from scribbleseg.config import CropsConfig
from scribbleseg.datasets.pictures import ImageCache
from scribbleseg.datasets.transforms import generator, random_resized_crop

FEW_IMAGES = 20_000

_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_TO_RGB = np.linalg.inv(_TO_YIQ)
# Inverts what is brighter than the middle.
_SOLARISED = np.minimum(np.arange(256), 255 - np.arange(256)).astype(np.uint8)


def resolve_scales(crops: CropsConfig, num_images: int) -> CropsConfig:
    """Fill in the shares of the image's area that crops have, where they are None.

    From 20,000 images on they are the paper's for ImageNet: 0.4 to 1 and 0.05 to 0.4. Fewer images
    are soon known by heart unless the views differ more. So global crops may be smaller there, down
    to 0.25, half-way to the 0.14 with which the authors train convolutional networks, and local
    crops end where the global ones begin, so that they are always parts, never the whole.
    """
    few = num_images < FEW_IMAGES
    return replace(
        crops,
        global_scale=crops.global_scale or ((0.25, 1.0) if few else (0.4, 1.0)),
        local_scale=crops.local_scale or ((0.05, 0.25) if few else (0.05, 0.4)),
    )


@dataclass(frozen=True, kw_only=True)
class MultiCrop(Dataset[dict[str, Any]]):
    """Views of images; every draw is a function of (seed, epoch, sample)."""

    cache: ImageCache
    """Decoded images."""
    crops: CropsConfig
    """Number, sizes and scales of the views; see `resolve_scales` for those that are None."""
    seed: int
    """First part of the key of every draw."""

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return all views of one image.

        Args:
            key: Epoch, and position in the cache.

        Returns:
            "global": uint8 (2, 3, s, s), RGB; "local": uint8 (n, 3, s2, s2), n may be 0; "stem":
            the image's name.
        """
        epoch, sample = key
        draws = generator(self.seed, epoch, sample)
        image = self.cache[sample]
        first, second, local = self._kinds
        return {
            "global": _stack([first.draw(image, draws), second.draw(image, draws)], first.size),
            "local": _stack(
                [local.draw(image, draws) for _ in range(self.crops.num_local)], local.size
            ),
            "stem": self.cache.entries[sample].name,
        }

    @cached_property
    def _kinds(self) -> tuple["ViewKind", "ViewKind", "ViewKind"]:
        crops = resolve_scales(self.crops, len(self))
        assert crops.global_scale is not None and crops.local_scale is not None
        return (
            ViewKind(crops.global_size, crops.global_scale, blur=1.0, solarise=0.0),
            ViewKind(crops.global_size, crops.global_scale, blur=0.1, solarise=0.2),
            ViewKind(crops.local_size, crops.local_scale, blur=0.5, solarise=0.0),
        )


@dataclass(frozen=True)
class ViewKind:
    """How one kind of view is drawn."""

    size: int
    """Side s, in pixels."""
    scale: tuple[float, float]
    """Least and most share of the image's area."""
    blur: float
    """Probability of a Gaussian blur."""
    solarise: float
    """Probability that bright pixels are inverted."""

    def draw(
        self, image: UInt8[np.ndarray, "h w 3"], generator: np.random.Generator
    ) -> UInt8[np.ndarray, "s s 3"]:
        """Draw a view of an image; colours come last, because they are cheap on small pictures."""
        view = random_resized_crop(image, self.size, self.scale, generator)
        view = change_colours(view, generator)
        if generator.random() < self.blur:
            view = cv2.GaussianBlur(view, (0, 0), sigmaX=generator.uniform(0.1, 2.0))
        if generator.random() < self.solarise:
            view = cv2.LUT(view, _SOLARISED)
        return view


def change_colours(
    image: UInt8[np.ndarray, "h w 3"], generator: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Jitter the colours of four images in five, and turn one in five grey.

    Contrast is taken about the mean luma, which neither hue nor saturation changes: the factors
    can be applied in any order, and at once.
    """
    brightness = contrast = saturation = 1.0
    hue = 0.0
    if generator.random() < 0.8:
        brightness, contrast = generator.uniform(0.6, 1.4, 2)
        saturation = generator.uniform(0.8, 1.2)
        hue = 2 * math.pi * generator.uniform(-0.1, 0.1)
    if generator.random() < 0.2:
        saturation = 0.0
    cos, sin = saturation * math.cos(hue), saturation * math.sin(hue)
    matrix = _TO_RGB @ np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]) @ _TO_YIQ
    middle = _LUMA @ cv2.mean(image)[:3]
    offset = np.full((3, 1), (1 - contrast) * middle)
    return cv2.transform(image, brightness * np.hstack([contrast * matrix, offset]))


def _stack(views: list[UInt8[np.ndarray, "s s 3"]], size: int) -> UInt8[Tensor, "n 3 s s"]:
    """Put views, maybe none, into one tensor, channels first."""
    stacked = np.empty((len(views), 3, size, size), np.uint8)
    for place, view in zip(stacked, views, strict=True):
        place[...] = view.transpose(2, 0, 1)
    return torch.from_numpy(stacked)
