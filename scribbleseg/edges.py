"""Edges finer than the network's grid: its probabilities, brought to the photograph's own outlines.

The guided filter (arXiv 1505.00996, its fast form): around each pixel, the probability is taken for
a linear function of colour. These functions are found at the network's scale, where the
probabilities are, and looked up with the photograph's own colours, at its own size.
"""

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

# Side of the windows in which a function is found, as a share of the image's longer side.
WINDOW = 1 / 30
# Colours that vary less than this (a variance; colours in [0, 1]) say nothing of the mask.
NOISE = 1e-4


def follow_edges(
    probability: Float32[np.ndarray, "h w"], image: UInt8[np.ndarray, "h2 w2 3"]
) -> Float32[np.ndarray, "h2 w2"]:
    """Return the probability of "object" at an image's own size, with the image's own edges.

    Args:
        probability: In [0, 1], at the network's scale.
        image: RGB, at its own size; 30 bytes of memory are needed for each of its pixels.

    Returns:
        In [0, 1].
    """
    height, width = probability.shape
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    side = 2 * max(1, round(WINDOW * max(height, width) / 2)) + 1
    slopes, offset = _local_lines(probability, small.astype(np.float32) / 255, side)
    size = image.shape[1], image.shape[0]
    found = cv2.resize(offset, size, interpolation=cv2.INTER_LINEAR)
    for channel in range(3):
        slope = cv2.resize(slopes[..., channel] / 255, size, interpolation=cv2.INTER_LINEAR)
        found += slope * image[..., channel]
    return found.clip(0, 1, out=found)


def _local_lines(
    values: Float32[np.ndarray, "h w"], colours: Float32[np.ndarray, "h w 3"], side: int
) -> tuple[Float32[np.ndarray, "h w 3"], Float32[np.ndarray, "h w"]]:
    """Return slopes and offset of the linear functions of colour that fit the values best.

    One function per window of `side` x `side` pixels; a pixel gets the mean of all that cover it.
    """

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, (side, side), borderType=cv2.BORDER_REFLECT_101)

    colour, value = mean(colours), mean(values)
    shared = mean(colours * values[..., None]) - colour * value[..., None]
    spread = np.empty((*values.shape, 3, 3), np.float32)
    for one in range(3):
        for other in range(one, 3):
            product = mean(colours[..., one] * colours[..., other])
            spread[..., one, other] = product - colour[..., one] * colour[..., other]
            spread[..., other, one] = spread[..., one, other]
    spread[..., range(3), range(3)] += NOISE
    slopes = np.linalg.solve(spread, shared[..., None])[..., 0]
    return mean(slopes), mean(value - (slopes * colour).sum(axis=-1))
