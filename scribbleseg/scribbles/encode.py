"""Strokes (0 background, 1 object, 255 unlabelled) to the network's two input channels.

Thin strokes vanish when an image is scaled down by nearest neighbour. So the order is always the
same: `shrink` from the image's own size, then `encode` at the network's. Discs follow RITM (arXiv
2102.06583).
"""

import math
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, UInt8
from skimage.graph import MCP_Geometric

from scribbleseg.config import Encoding

BACKGROUND = 0
OBJECT = 1
UNLABELLED = 255

# A step of one pixel across the sharpest edge is as long as this many on even ground.
EDGE_LENGTH = 200.0
# Discs up to this radius are faster to dilate by than distances are to find (20 times at 3).
SMALL_DISC = 14


def survive_radius(scale: float) -> int:
    """Return the smallest dilation that a one-pixel dot needs to survive a resize by `scale`.

    Nearest-neighbour sampling looks at one pixel in every 1 / scale, so the farthest pixel that it
    skips lies floor(ceil(1 / scale) / 2) away from a sample along each axis; the disc must reach
    that far along the diagonal.

    Args:
        scale: network pixels per image pixel (above 0).

    Returns:
        Radius in pixels of the original image; 0 for a scale of 1 or more.
    """
    if scale >= 1:
        return 0
    farthest = math.ceil(1 / scale) // 2
    return math.ceil(math.sqrt(2) * farthest)


def dilate(scribbles: UInt8[np.ndarray, "h w"], radius: int) -> UInt8[np.ndarray, "h w"]:
    """Grow the strokes of both kinds by a disc.

    Labelled pixels keep their label. Unlabelled pixels that both kinds reach take that of the
    nearer, and stay unlabelled where both are as near: a fine stroke beside another is not eaten
    up.

    Args:
        scribbles: 0 background, 1 object, 255 unlabelled.
        radius: radius of the disc in pixels (0 or more); 0 changes nothing.

    Returns:
        The grown strokes, coded alike.
    """
    if radius == 0:
        return scribbles.copy()
    near_object = _near(scribbles == OBJECT, radius)
    near_background = _near(scribbles == BACKGROUND, radius)
    grown = scribbles.copy()
    unlabelled = scribbles == UNLABELLED
    contested = unlabelled & near_object & near_background
    if contested.any():
        to_object, to_background = (
            _distance_to(scribbles == label) for label in (OBJECT, BACKGROUND)
        )
        near_object &= ~contested | (to_object < to_background)
        near_background &= ~contested | (to_background < to_object)
    grown[unlabelled & near_object] = OBJECT
    grown[unlabelled & near_background] = BACKGROUND
    return grown


def shrink(
    scribbles: UInt8[np.ndarray, "h w"], height: int, width: int
) -> UInt8[np.ndarray, "h2 w2"]:
    """Resize strokes to another size, dilated first so that no stroke vanishes for being thin.

    Strokes of both kinds that lie nearer to each other than the new pixels do may still.
    """
    scale = min(height / scribbles.shape[0], width / scribbles.shape[1])
    grown = dilate(scribbles, survive_radius(scale))
    # OpenCV's plain INTER_NEAREST samples corners, half a pixel off a picture's resize.
    return cv2.resize(grown, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def encode(
    image: UInt8[np.ndarray, "h w 3"],
    scribbles: UInt8[np.ndarray, "h w"],
    encoding: Encoding,
    radius: int,
) -> UInt8[np.ndarray, "2 h w"]:
    """Turn strokes into two channels: object strokes, then background strokes.

    Args:
        image: RGB, at the network's size; only `geodesic` looks at it.
        scribbles: 0 background, 1 object, 255 unlabelled, of the image's size.
        encoding: `raw`: 255 on the stroke's own pixels; `disc`: 255 within `radius` of them;
            `distance`: 255 on the stroke, falling linearly to 0 at `radius`; `geodesic`: the same
            with distances along the shortest path in the image, on which edges are long.
        radius: in network pixels (1 or more); `raw` ignores it.

    Returns:
        Channel 0 object, channel 1 background; 255 = on a stroke, 0 = far from it.
    """
    kinds = (scribbles == OBJECT, scribbles == BACKGROUND)
    if encoding == "geodesic":
        costs = _step_costs(image)
        return np.stack([_ramp(_geodesic_to(stroke, costs), radius) for stroke in kinds])
    return np.stack([_encode_one(stroke, encoding, radius) for stroke in kinds])


def _encode_one(
    stroke: Bool[np.ndarray, "h w"], encoding: Literal["raw", "disc", "distance"], radius: int
) -> UInt8[np.ndarray, "h w"]:
    """Encode the strokes of one kind."""
    if encoding == "raw" or not stroke.any():
        return stroke.view(np.uint8) * np.uint8(255)
    if encoding == "disc":
        return _near(stroke, radius).view(np.uint8) * np.uint8(255)
    return _ramp(_distance_to(stroke), radius)


def _near(stroke: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Return which pixels lie within `radius` of a stroke pixel."""
    if not stroke.any():
        return stroke
    if radius <= SMALL_DISC:
        return cv2.dilate(stroke.view(np.uint8), _disc(radius)).view(bool)
    # Distances are square roots of integers in float32; the slack absorbs their rounding.
    return _distance_to(stroke) <= radius + 1e-3


def _ramp(distance: Float[np.ndarray, "h w"], radius: int) -> UInt8[np.ndarray, "h w"]:
    """Return 255 at distance 0, falling linearly to 0 at `radius`."""
    return np.rint(255 * np.clip(1 - distance / radius, 0, 1)).astype(np.uint8)


def _distance_to(stroke: Bool[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Return the exact Euclidean distance of every pixel to the nearest stroke pixel."""
    elsewhere = (~stroke).view(np.uint8)
    return cv2.distanceTransform(elsewhere, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _step_costs(image: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "h w"]:
    """Return the length of a step at each pixel: 1 on even ground, more where colours change.

    The change is that of the strongest colour channel over two pixels, as a share of its range.
    """
    kernel = np.ones((3, 3), np.uint8)
    change = cv2.morphologyEx(image, cv2.MORPH_GRADIENT, kernel).max(axis=2)
    return 1 + EDGE_LENGTH * change.astype(np.float64) / 255


def _geodesic_to(
    stroke: Bool[np.ndarray, "h w"], costs: Float64[np.ndarray, "h w"]
) -> Float64[np.ndarray, "h w"]:
    """Return the length of the shortest path from every pixel to the nearest stroke pixel.

    Paths go to the eight neighbours; a step costs the mean of its two pixels' costs times its
    length (Dijkstra's exact search; Toivanen 1996, doi 10.1016/0167-8655(96)00010-4, sweeps).
    """
    if not stroke.any():
        return np.full(stroke.shape, np.inf)
    lengths, _ = MCP_Geometric(costs).find_costs(np.argwhere(stroke))
    return lengths


def _disc(radius: int) -> UInt8[np.ndarray, "d d"]:
    """Return a filled disc of side 2 radius + 1; OpenCV's ellipses are not quite round."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)
