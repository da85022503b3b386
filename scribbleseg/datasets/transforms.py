"""Training samples: image, strokes and mask augmented together, by one strength.

The only module that knows albumentations (2.0.8, pinned: the MIT package is no longer maintained).
Geometry is our own few lines, because strokes are dilated between the crop and its resize by an
amount that depends on the crop; it comes first, so that colours change on the small picture.

Randomness is a function: `generator(seed, epoch, sample)` feeds every draw of a sample, whichever
process makes it. albumentations keeps random states of its own, which loader workers would repeat
in every epoch; `Augmentation` replaces them before each call.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from scribbleseg.config import AugmentConfig, Encoding, StrokesConfig
from scribbleseg.datasets.cache import SceneCache
from scribbleseg.datasets.paste import paste
from scribbleseg.errors import InputError
from scribbleseg.scribbles.encode import UNLABELLED, encode, shrink
from scribbleseg.scribbles.simulate import simulate

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the source of every draw of one sample in one epoch; no two share a stream."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, sample]))


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop, flips, and changes of colour and texture."""

    crop_size: int
    """Side of the squares that come out, in network pixels."""
    strength: float
    """Scales every range and probability, in [0, 2]: 0 = nothing random, 1 = the 2025 report's."""

    def __call__(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        scribbles: UInt8[np.ndarray, "h w"],
        mask: UInt8[np.ndarray, "h w"] | None,
        generator: np.random.Generator,
    ) -> tuple[
        UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"], UInt8[np.ndarray, "s s"] | None
    ]:
        """Augment one sample; the geometry is the same for all three.

        Strength 0 fits the whole image into the square; what is left of the square is black, its
        strokes unlabelled, its mask ignored.

        Args:
            image: RGB.
            scribbles: 0 background, 1 object, 255 unlabelled.
            mask: 0 background, 1 object, 255 ignore; None where there is none.
            generator: Every draw comes from it.

        Returns:
            Image, strokes and mask of side s = `crop_size`, coded as they came; strokes are dilated
            as far as they need to survive the down-scaling.
        """
        height, width = scribbles.shape
        if self.strength == 0:
            view = _View(top=0, left=0, height=height, width=width)
            size = fitted_size(height, width, self.crop_size)
        else:
            view = _draw_view(height, width, self.strength, generator)
            size = (self.crop_size, self.crop_size)
        image = view.turn(_pad(_resize_image(view.of(image), *size), self.crop_size, 0))
        strokes = _pad(shrink(view.of(scribbles), *size), self.crop_size, UNLABELLED)
        strokes = view.turn(strokes)
        if mask is not None:
            mask = _pad(_resize_labels(view.of(mask), *size), self.crop_size, UNLABELLED)
            mask = view.turn(mask)
        if self.strength > 0:
            self._texture.set_random_state(generator, random.Random(int(generator.integers(2**63))))
            image = self._texture(image=image)["image"]
        return image, strokes, mask

    @cached_property
    def _texture(self) -> Any:
        # Built where it is first used, in the loader's worker: importing albumentations takes a
        # second, and a process that only predicts never does.
        return _texture_pipeline(self.strength)


@dataclass(frozen=True, kw_only=True)
class TrainSamples(Dataset[dict[str, Any]]):
    """Augmented training samples; every draw is a function of (seed, epoch, sample)."""

    cache: SceneCache
    """Decoded scenes."""
    indices: Sequence[int]
    """Positions in the cache of the scenes to train on."""
    crop_size: int
    """Side of a sample, in network pixels."""
    strokes: StrokesConfig
    """Encoding and simulation of strokes."""
    augment: AugmentConfig
    """Augmentation."""
    seed: int
    """First part of the key of every draw."""
    supervision: Literal["mask", "strokes"] = "mask"
    """What the target is: the mask, or the scene's own strokes (nothing is simulated then)."""

    def __post_init__(self) -> None:
        """Check that there is a target for every sample."""
        have_masks = self.cache.have_masks
        bare = [self.cache.stems[index] for index in self.indices if not have_masks[index]]
        if self.supervision == "mask" and bare:
            raise InputError(
                f"ground_truth: {len(bare)} of {len(self)} training samples have no mask (first: "
                f"{bare[0]}); add them, or train on strokes alone with --loss.supervision strokes"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return one sample.

        Args:
            key: Epoch, and position in `indices`.

        Returns:
            "image": uint8 (3, s, s), RGB; "strokes": uint8 (2, s, s), see `encode`; "mask": uint8
            (s, s), 0 background, 1 object, 255 ignore; "stem".
        """
        epoch, sample = key
        draws = generator(self.seed, epoch, sample)
        scene = self.cache[self.indices[sample]]
        image, scribbles, mask = scene.image, scene.scribbles, scene.mask
        if self.supervision == "strokes":
            mask = None
        elif mask is not None:
            simulated = draws.random() < self.strokes.simulate_probability
            if draws.random() < self.augment.paste_probability:
                image, mask = self._pasted(image, mask, draws)
                simulated = True
            if simulated:
                scribbles = self._simulated(mask, draws)
        image, scribbles, mask = self._augmentation(image, scribbles, mask, draws)
        encoded = encode(image, scribbles, self.strokes.encoding, self.strokes.radius)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "strokes": torch.from_numpy(encoded),
            # Strokes as targets are those that the network sees: none is lost by scaling down.
            "mask": torch.from_numpy(scribbles if mask is None else mask),
            "stem": scene.stem,
        }

    def _pasted(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        mask: UInt8[np.ndarray, "h w"],
        draws: np.random.Generator,
    ) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
        """Return a scene with the object of another training scene in it."""
        other = self.cache[self.indices[int(draws.integers(len(self)))]]
        assert other.mask is not None
        return paste(image, mask, other.image, other.mask, draws)

    def _simulated(
        self, mask: UInt8[np.ndarray, "h w"], draws: np.random.Generator
    ) -> UInt8[np.ndarray, "h w"]:
        """Return strokes of a width and length that differ from sample to sample."""
        return simulate(
            mask,
            draws,
            style=self.strokes.style,
            width=draws.uniform(*self.strokes.width),
            length=draws.uniform(*self.strokes.length),
            count=self.strokes.count,
            misplaced=self.strokes.misplaced,
        )

    @cached_property
    def _augmentation(self) -> Augmentation:
        return Augmentation(self.crop_size, self.augment.strength)


def random_resized_crop(
    image: UInt8[np.ndarray, "h w 3"],
    size: int,
    scale: tuple[float, float],
    generator: np.random.Generator,
) -> UInt8[np.ndarray, "s s 3"]:
    """Cut a window of sides 3:4 to 4:3 out of an image; make it a square, mirrored half the time.

    Args:
        image: RGB.
        size: Side s of the square that comes out, in pixels.
        scale: Least and most share of the image's area in the window, in (0, 1].
        generator: Every draw comes from it.
    """
    height, width = image.shape[:2]
    window = _draw_window(height, width, scale, 4 / 3, generator)
    square = _resize_image(window.of(image), size, size)
    return replace(window, mirrored=bool(generator.random() < 0.5)).turn(square)


def to_network(
    image: UInt8[np.ndarray, "h w 3"],
    scribbles: UInt8[np.ndarray, "h w"],
    *,
    long_side: int,
    encoding: Encoding,
    radius: int,
) -> tuple[UInt8[Tensor, "1 3 h2 w2"], UInt8[Tensor, "1 2 h2 w2"]]:
    """Bring an image and its strokes to the network's scale, for prediction.

    Args:
        image: RGB.
        scribbles: 0 background, 1 object, 255 unlabelled.
        long_side: Longer side of what comes out, in network pixels.
        encoding: See `encode`.
        radius: See `encode`.

    Returns:
        The image (to be `normalise`d), and the encoded strokes (to be divided by 255).
    """
    height, width = scribbles.shape
    size = fitted_size(height, width, long_side)
    image = _resize_image(image, *size)
    encoded = encode(image, shrink(scribbles, *size), encoding, radius)
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1))
    return torch.from_numpy(pixels)[None], torch.from_numpy(encoded)[None]


def normalise(images: UInt8[Tensor, "b 3 h w"]) -> Float32[Tensor, "b 3 h w"]:
    """Turn RGB bytes into the network's input: ImageNet's mean is 0, its deviation 1."""
    mean, deviation = (
        # Filled on the device: a copy to a GPU would wait for all that it has still to do.
        torch.stack([torch.full((), value, device=images.device) for value in values])
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    mean, deviation = mean.view(1, 3, 1, 1), deviation.view(1, 3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(deviation)


def fitted_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Return height and width scaled so that the longer one is `long_side`; at least 1."""
    scale = long_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True, kw_only=True)
class _View:
    """A window of the image, and how it is flipped."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False
    upended: bool = False

    def of(self, pixels: UInt8[np.ndarray, "h w *c"]) -> UInt8[np.ndarray, "h2 w2 *c"]:
        """Return the window of an array, without a copy."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]

    def turn(self, pixels: UInt8[np.ndarray, "h w *c"]) -> UInt8[np.ndarray, "h w *c"]:
        """Flip what the window was resized to: the square is smaller than most windows."""
        if self.mirrored:
            pixels = cv2.flip(pixels, 1)
        return cv2.flip(pixels, 0) if self.upended else pixels


def _draw_view(height: int, width: int, strength: float, generator: np.random.Generator) -> _View:
    """Draw a crop and its flips.

    At strength 1 the crop has 25 to 100 % of the image's area and sides of 3:4 to 4:3; half of the
    crops are mirrored and one in ten stands on its head (photographs are upright, so that is rare).
    """
    scale, widest = (0.25**strength, 1.0), (4 / 3) ** strength
    return replace(
        _draw_window(height, width, scale, widest, generator),
        mirrored=bool(generator.random() < min(0.5, 0.5 * strength)),
        upended=bool(generator.random() < 0.1 * strength),
    )


def _draw_window(
    height: int,
    width: int,
    scale: tuple[float, float],
    widest: float,
    generator: np.random.Generator,
) -> _View:
    """Draw a window: its share of the image's area from `scale`, its sides up to 1 to `widest`.

    A window that is too long for the image is cut, not drawn again.
    """
    area = height * width * generator.uniform(*scale)
    ratio = widest ** generator.uniform(-1, 1)
    crop_height, crop_width = min(height, (area / ratio) ** 0.5), min(width, (area * ratio) ** 0.5)
    crop_height = max(1, round(min(crop_height, crop_width * widest)))
    crop_width = max(1, round(min(crop_width, crop_height * widest)))
    return _View(
        top=int(generator.integers(height - crop_height + 1)),
        left=int(generator.integers(width - crop_width + 1)),
        height=crop_height,
        width=crop_width,
    )


def _texture_pipeline(strength: float) -> Any:
    """Return the albumentations pipeline that changes colour and texture of a uint8 image."""
    albumentations = _import_albumentations()

    def chance(probability: float) -> float:
        return min(1.0, probability * strength)

    return albumentations.Compose(
        [
            albumentations.ColorJitter(
                brightness=0.4 * strength,
                contrast=0.4 * strength,
                saturation=0.4 * strength,
                hue=0.1 * strength,
                p=chance(0.8),
            ),
            albumentations.ToGray(p=chance(0.1)),
            albumentations.GaussianBlur(
                blur_limit=0, sigma_limit=(0.1, 0.1 + 1.4 * strength), p=chance(0.2)
            ),
            albumentations.Sharpen(
                alpha=(0.0, 0.4 * strength), lightness=(1.0, 1.0), p=chance(0.1)
            ),
            albumentations.GaussNoise(std_range=(0.0, 0.05 * strength), p=chance(0.2)),
            # Erases the picture only: strokes and mask stay, so that what is hidden is inferred.
            albumentations.CoarseDropout(
                num_holes_range=(1, 3),
                hole_height_range=(0.05, 0.05 + 0.15 * strength),
                hole_width_range=(0.05, 0.05 + 0.15 * strength),
                fill="random_uniform",
                p=chance(0.2),
            ),
        ]
    )


def _import_albumentations() -> Any:
    """Import albumentations without its question to the network whether it is up to date.

    It asks at import unless an environment variable forbids it. The variable is set for the length
    of the import only: an import must not change what the user's own programs see.
    """
    name = "NO_ALBUMENTATIONS_UPDATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import albumentations
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return albumentations


def _resize_image(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Resize a picture; area averages do not alias where it shrinks."""
    shrinks = height < image.shape[0] or width < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)


def _resize_labels(
    labels: UInt8[np.ndarray, "h w"], height: int, width: int
) -> UInt8[np.ndarray, "h2 w2"]:
    """Resize labels by nearest neighbour.

    OpenCV's plain INTER_NEAREST samples corners, half a pixel off the picture's resize.
    """
    return cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _pad(pixels: UInt8[np.ndarray, "h w *c"], size: int, fill: int) -> UInt8[np.ndarray, "s s *c"]:
    """Put pixels into the middle of a square of this value."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    square = np.full((size, size, *pixels.shape[2:]), fill, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square
