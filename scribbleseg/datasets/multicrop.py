"""Views of one image for DINO (arXiv 2104.14294), which takes them from BYOL (arXiv 2006.07733).

Two global views and some local ones (multi-crop, arXiv 2006.09882), each cropped, mirrored,
coloured, blurred and solarised on its own, as in the paper or more gently. We deviate in the
colours, for speed: hue turns about the grey axis (in YIQ, not HSV). That makes all changes linear
in RGB and their order irrelevant, so they are one matrix and each pixel is clipped once.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
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


@dataclass(frozen=True, kw_only=True)
class Colours:
    """How far the colours of views move; factors are drawn from 1 - x to 1 + x."""

    jitter: float
    """Probability that light, saturation and hue change."""
    light: float
    """Of the factors of brightness and contrast."""
    saturation: float
    """Of its factor."""
    hue: float
    """Turns, to both sides."""
    grey: float
    """Probability that a view is grey."""
    blur: tuple[float, float, float]
    """Probability of a blur in the first and the second global view, and in the local ones."""
    sigma: float
    """Largest standard deviation of a blur, in pixels of the view."""
    solarise: float
    """Probability that bright pixels of the second global view are inverted."""


# The paper's, which are BYOL's.
PAPER = Colours(
    jitter=0.8,
    light=0.4,
    saturation=0.2,
    hue=0.1,
    grey=0.2,
    blur=(1.0, 0.1, 0.5),
    sigma=2.0,
    solarise=0.2,
)
# Colour tells an object from what is around it: an encoder that is taught to overlook it has lost
# what few images and few strokes have to say.
GENTLE = Colours(
    jitter=1.0,
    light=0.2,
    saturation=0.2,
    hue=0.02,
    grey=0.0,
    blur=(0.2, 0.2, 0.2),
    sigma=1.0,
    solarise=0.0,
)


def resolve_crops(crops: CropsConfig, num_images: int) -> CropsConfig:
    """Fill in how large crops are and how their colours move, where that is None.

    From 20,000 images on it is the paper's for ImageNet: 0.4 to 1 and 0.05 to 0.4 of the area.
    Fewer images are soon known by heart unless the crops differ more. So global ones may be smaller
    there, down to 0.25, half-way to the 0.14 with which the authors train convolutional networks,
    and local crops end where the global ones begin, so that they are always parts, never the whole.
    Colours are the paper's from 20,000 images on too, and gentle for fewer: see `GENTLE`.
    """
    few = num_images < FEW_IMAGES
    return replace(
        crops,
        global_scale=crops.global_scale or ((0.25, 1.0) if few else (0.4, 1.0)),
        local_scale=crops.local_scale or ((0.05, 0.25) if few else (0.05, 0.4)),
        colours=crops.colours or ("gentle" if few else "paper"),
    )


@dataclass(frozen=True, kw_only=True)
class MultiCrop(Dataset[dict[str, Any]]):
    """Views of images; every draw is a function of (seed, epoch, sample)."""

    cache: ImageCache
    """Decoded images."""
    crops: CropsConfig
    """Number, sizes and scales of the views; see `resolve_crops` for what is None."""
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
        crops = resolve_crops(self.crops, len(self))
        assert crops.global_scale is not None and crops.local_scale is not None
        colours = PAPER if crops.colours == "paper" else GENTLE
        first, second, local = colours.blur
        large = partial(ViewKind, crops.global_size, crops.global_scale, colours)
        small = partial(ViewKind, crops.local_size, crops.local_scale, colours)
        return (
            large(blur=first, solarise=0.0),
            large(blur=second, solarise=colours.solarise),
            small(blur=local, solarise=0.0),
        )


@dataclass(frozen=True)
class ViewKind:
    """How one kind of view is drawn."""

    size: int
    """Side s, in pixels."""
    scale: tuple[float, float]
    """Least and most share of the image's area."""
    colours: Colours
    """How far they move."""
    blur: float
    """Probability of a Gaussian blur."""
    solarise: float
    """Probability that bright pixels are inverted."""

    def draw(
        self, image: UInt8[np.ndarray, "h w 3"], generator: np.random.Generator
    ) -> UInt8[np.ndarray, "s s 3"]:
        """Draw a view of an image; colours come last, because they are cheap on small pictures."""
        view = random_resized_crop(image, self.size, self.scale, generator)
        view = change_colours(view, self.colours, generator)
        if generator.random() < self.blur:
            sigma = generator.uniform(0.1, self.colours.sigma)
            view = cv2.GaussianBlur(view, (0, 0), sigmaX=sigma)
        if generator.random() < self.solarise:
            view = cv2.LUT(view, _SOLARISED)
        return view


def change_colours(
    image: UInt8[np.ndarray, "h w 3"], colours: Colours, generator: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Change light, saturation and hue, or turn the image grey, each by chance.

    Contrast is taken about the mean luma, which neither hue nor saturation changes: the factors
    can be applied in any order, and at once.
    """
    brightness = contrast = saturation = 1.0
    hue = 0.0
    if generator.random() < colours.jitter:
        brightness, contrast = generator.uniform(1 - colours.light, 1 + colours.light, 2)
        saturation = generator.uniform(1 - colours.saturation, 1 + colours.saturation)
        hue = 2 * math.pi * generator.uniform(-colours.hue, colours.hue)
    if generator.random() < colours.grey:
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
