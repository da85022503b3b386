"""Strokes that were drawn in colours, red for the object and green for the background, say."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ImageColor

from scribbleseg.datasets.files import eight_bits, open_picture
from scribbleseg.datasets.scenes import BACKGROUND, OBJECT, UNLABELLED
from scribbleseg.errors import InputError

NEAR = 48
"""Largest difference of any channel to a stroke's colour: its soft edges are left unlabelled."""


@dataclass(frozen=True, kw_only=True)
class StrokeColours:
    """Which colour of a drawing means what; all others mean nothing."""

    object: tuple[int, int, int]
    """Colour of object strokes, RGB."""
    background: tuple[int, int, int]
    """Colour of background strokes, RGB."""

    @staticmethod
    def parse(object_colour: str, background_colour: str) -> "StrokeColours":
        """Return the colours of two names, or of hexadecimal digits with or without a #.

        Raises:
            InputError: no colour, or two that cannot be told apart.
        """
        first, second = (_rgb(text) for text in (object_colour, background_colour))
        if max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 2 * NEAR:
            raise InputError(
                f"--stroke-colours is {object_colour} {background_colour}; expected two colours "
                f"that differ by more than {2 * NEAR} of 255 in a channel: OBJECT BACKGROUND"
            )
        return StrokeColours(object=first, background=second)


def _rgb(text: str) -> tuple[int, int, int]:
    for spelling in (text, f"#{text}"):
        try:
            red, green, blue, *_ = ImageColor.getrgb(spelling)
        except ValueError:
            continue
        return red, green, blue
    raise InputError(
        f"--stroke-colours holds {text!r}; expected two colours, OBJECT BACKGROUND, as red lime or "
        "ff0000 00ff00"
    )


def read_drawing(path: Path) -> UInt8[np.ndarray, "h w 4"]:
    """Return a PNG file as RGBA.

    Raises:
        InputError: the file cannot be read.
    """
    with open_picture(path, ("PNG",)) as picture:
        return np.array(eight_bits(picture).convert("RGBA"))


def to_labels(
    drawing: UInt8[np.ndarray, "h w 4"], colours: StrokeColours
) -> UInt8[np.ndarray, "h w"]:
    """Return 1 where the object's strokes are, 0 where those of the background are, 255 elsewhere.

    Pixels that are transparent for more than half have no stroke.
    """
    labels = np.full(drawing.shape[:2], UNLABELLED, np.uint8)
    for label, colour in ((OBJECT, colours.object), (BACKGROUND, colours.background)):
        distance = np.abs(drawing[..., :3].astype(np.int16) - np.array(colour)).max(axis=-1)
        labels[(distance <= NEAR) & (drawing[..., 3] >= 128)] = label
    return labels


def describe(drawing: UInt8[np.ndarray, "h w c"]) -> str:
    """Return what covers most: "colours 000000 (98.5%), 00ff00 (0.9%), ff0000 (0.6%)"."""
    red, green, blue = (drawing[..., channel].astype(np.uint32) for channel in range(3))
    values, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
    order = np.argsort(-counts)
    shares = [f"{values[i]:06x} ({counts[i] / counts.sum():.1%})" for i in order[:4]]
    more = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return f"colours {', '.join(shares)}{more}"
