"""Demo scenes: an object cut out of one photograph, pasted on another.

The photographs are those that scikit-image's package holds, so nothing is downloaded. The object's
colours are moved towards those of its surroundings: what tells them apart is the change of texture
at the outline, and the strokes, not colour alone.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from scribbleseg.datasets.scenes import read_image

WIDTH, HEIGHT = 250, 188
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "motorcycle_left.png",
    "rocket.jpg",
)

ShapeKind = Literal["blob", "polygon", "star", "ellipse", "ring"]
SHAPES: tuple[ShapeKind, ...] = ("blob", "polygon", "star", "ellipse", "ring")

# Outlines are drawn this much finer, so that averaging gives an edge one pixel soft.
_FINER = 4
_NUM_POINTS = 120


def photographs() -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Return the photographs that scenes are made of.

    Raises:
        InputError: this version of scikit-image does not hold one of them.
    """
    with resources.as_file(resources.files("skimage") / "data") as folder:
        return [read_image(Path(folder) / name) for name in PHOTOGRAPHS]


def draw_demo_scene(
    photos: Sequence[UInt8[np.ndarray, "_ _ 3"]], generator: np.random.Generator
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Draw an image of 250 x 188 pixels and its mask (0 background, 1 object)."""
    order = generator.permutation(len(photos))
    background = random_view(photos[int(order[0])], generator)
    texture = random_view(photos[int(order[1])], generator)
    opacity = random_object(generator)
    texture = adopt_colours(texture, background, share=generator.uniform(0.8, 1.0))
    image = background + opacity[..., None] * (texture - background)
    return image.round().clip(0, 255).astype(np.uint8), (opacity >= 0.5).astype(np.uint8)


def random_view(
    photo: UInt8[np.ndarray, "_ _ 3"], generator: np.random.Generator
) -> Float[np.ndarray, "h w 3"]:
    """Crop, mirror and recolour a photograph at random; values 0 to 255."""
    picture = Image.fromarray(photo)
    largest = min(picture.width / WIDTH, picture.height / HEIGHT)
    # A little less than all of the photograph, so that rounding cannot push the crop outside.
    scale = largest * generator.uniform(0.45, 0.99)
    left = generator.uniform(0, picture.width - scale * WIDTH)
    top = generator.uniform(0, picture.height - scale * HEIGHT)
    box = (left, top, left + scale * WIDTH, top + scale * HEIGHT)
    # Pillow resamples in integers, so the pixels are the same on every machine.
    view = picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(view, np.float64)
    if generator.random() < 0.5:
        pixels = pixels[:, ::-1]
    contrast = generator.uniform(0.75, 1.2)
    tint = generator.uniform(0.8, 1.2, size=3)
    return ((pixels - 128) * contrast + 128).clip(0, 255) * tint


def adopt_colours(
    texture: Float[np.ndarray, "h w 3"], model: Float[np.ndarray, "h w 3"], *, share: float
) -> Float[np.ndarray, "h w 3"]:
    """Move mean and spread of each channel towards those of `model`; share 1: all the way."""
    mean, spread = texture.mean((0, 1)), texture.std((0, 1))
    # A spread that grew several times would show the photograph's noise.
    gain = np.clip(model.std((0, 1)) / spread, 0.5, 2.0)
    adopted = (texture - mean) * gain + model.mean((0, 1))
    return texture + share * (adopted - texture)


def random_object(generator: np.random.Generator) -> Float[np.ndarray, "h w"]:
    """Draw an object of one to three parts of the same kind; opacity 0 to 1, 6 to 50 % covered."""
    while True:
        kind = SHAPES[generator.integers(len(SHAPES))]
        num_parts = int(generator.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))
        inside = np.zeros((HEIGHT * _FINER, WIDTH * _FINER), np.bool_)
        for _ in range(num_parts):
            radius = HEIGHT * generator.uniform(0.25, 0.55) / np.sqrt(num_parts)
            inside |= _random_part(kind, radius, generator)
        opacity = inside.reshape(HEIGHT, _FINER, WIDTH, _FINER).mean((1, 3))
        if 0.06 <= opacity.mean() <= 0.5:
            return opacity


def _random_part(
    kind: ShapeKind, radius: float, generator: np.random.Generator
) -> Bool[np.ndarray, "H W"]:
    """Draw one part on the finer grid; `radius` in pixels of the image."""
    outline = _unit_outline(kind, generator) * (radius, radius * generator.uniform(0.6, 1.0))
    angle = generator.uniform(0, 2 * np.pi)
    cosine, sine = np.cos(angle), np.sin(angle)
    turned = outline @ np.array([[cosine, sine], [-sine, cosine]])
    centre = generator.uniform(0.2, 0.8, size=2) * (WIDTH, HEIGHT)
    canvas = np.zeros((HEIGHT * _FINER, WIDTH * _FINER), np.uint8)
    points = np.rint((turned + centre) * _FINER).astype(np.int32)
    cv2.fillPoly(canvas, [points], 1)
    if kind == "ring":
        hole = turned * generator.uniform(0.35, 0.55) + generator.uniform(-0.1, 0.1, 2) * radius
        cv2.fillPoly(canvas, [np.rint((hole + centre) * _FINER).astype(np.int32)], 0)
    return canvas.astype(np.bool_)


def _unit_outline(kind: ShapeKind, generator: np.random.Generator) -> Float[np.ndarray, "n 2"]:
    """Return a closed outline around the origin whose radius is about 1."""
    angles = np.linspace(0, 2 * np.pi, _NUM_POINTS, endpoint=False)
    match kind:
        case "blob":
            radii = np.ones(_NUM_POINTS)
            for wave in range(2, 7):
                phase = generator.uniform(0, 2 * np.pi)
                radii += generator.uniform(0, 0.6 / wave) * np.cos(wave * angles + phase)
        case "polygon":
            num_corners = int(generator.integers(3, 8))
            angles = (np.arange(num_corners) + generator.uniform(-0.3, 0.3, num_corners)) * (
                2 * np.pi / num_corners
            )
            radii = generator.uniform(0.65, 1.1, num_corners)
        case "star":
            num_tips = int(generator.integers(5, 9))
            angles = np.arange(2 * num_tips) * (np.pi / num_tips)
            radii = np.where(np.arange(2 * num_tips) % 2, generator.uniform(0.4, 0.65), 1.1)
        case "ellipse" | "ring":
            radii = np.ones(_NUM_POINTS)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
