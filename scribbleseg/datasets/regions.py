"""Regions of photographs as masks that nobody drew: something to practise strokes on.

A region is a segment of a photograph (Felzenszwalb and Huttenlocher 2004, IJCV 59) that has grown
over neighbours of like colour to the size of an object. Where it ends is there to be seen, so a
network that is given strokes on it and beside it can learn to follow edges, colours and textures,
and to trust strokes, from photographs without a label. What an object is it does not learn there.
"""

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from skimage.segmentation import felzenszwalb

from scribbleseg.datasets.pictures import scale_down

# Segments are looked for at this shorter side, in pixels: finer ones are texture.
_SHORT_SIDE = 240
_SMALLEST_SEGMENT = 200
# felzenszwalb's scale: larger ones give larger segments.
_SCALES = (100.0, 1500.0)
# Share of the picture at which a region stops to grow, and the shares that are accepted.
_SIZES = (0.02, 0.3)
_ACCEPTED = (0.02, 0.6)
# Distance in CIELAB (0 to 255 per channel) at which a neighbour is a third as likely to be joined.
_COLOUR_DISTANCE = 40.0
_NUM_TRIES = 20


def random_region(
    image: UInt8[np.ndarray, "h w 3"], generator: np.random.Generator
) -> UInt8[np.ndarray, "h w"] | None:
    """Draw a region of a photograph, of 2 to 60 % of its pixels.

    A pure function of the image and the generator.

    Args:
        image: RGB, any size.
        generator: Every draw comes from it.

    Returns:
        Mask, 0 and 1; None where the photograph has no such region, as one of a single colour.
    """
    height, width = image.shape[:2]
    small = scale_down(image, _SHORT_SIDE / min(height, width))
    for _ in range(_NUM_TRIES):
        segments = felzenszwalb(
            small,
            scale=_log_uniform(_SCALES, generator),
            sigma=0.8,
            min_size=_SMALLEST_SEGMENT,
        )
        chosen = _grow(segments, small, _log_uniform(_SIZES, generator), generator)
        # A smoother outline than that of segments, which follow the noise.
        mask = cv2.medianBlur(chosen[segments], 5)
        mask = cv2.resize(mask.astype(np.float32), (width, height)) > 0.5
        if _ACCEPTED[0] <= mask.mean() <= _ACCEPTED[1]:
            return mask.astype(np.uint8)
    return None


def _grow(
    segments: Int[np.ndarray, "h w"],
    image: UInt8[np.ndarray, "h w 3"],
    size: float,
    generator: np.random.Generator,
) -> UInt8[np.ndarray, " n"]:
    """Choose a segment, and neighbours of what is chosen until it has `size` of the picture.

    Neighbours with which most of their border is shared, and those of like colour, are likelier.
    """
    area = np.bincount(segments.ravel()) / segments.size
    colours = _mean_colours(segments, image)
    borders = _shared_borders(segments)
    of_border = borders / borders.sum(1, keepdims=True).clip(1)
    chosen = np.zeros(len(area), np.bool_)
    weight = np.sqrt(area)
    while weight.any():
        chosen[generator.choice(len(area), p=weight / weight.sum())] = True
        if area[chosen].sum() >= size:
            break
        colour = np.average(colours[chosen], axis=0, weights=area[chosen])
        alike = np.exp(-np.linalg.norm(colours - colour, axis=1) / _COLOUR_DISTANCE)
        weight = np.where(chosen, 0, of_border[:, chosen].sum(1) * alike)
    return chosen.astype(np.uint8)


def _mean_colours(
    segments: Int[np.ndarray, "h w"], image: UInt8[np.ndarray, "h w 3"]
) -> Float[np.ndarray, "n 3"]:
    """Return each segment's mean colour in CIELAB, as OpenCV scales it: 0 to 255."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float64)
    flat = segments.ravel()
    sums = [np.bincount(flat, weights=lab[..., channel].ravel()) for channel in range(3)]
    return np.stack(sums, axis=1) / np.bincount(flat)[:, None]


def _shared_borders(segments: Int[np.ndarray, "h w"]) -> Float[np.ndarray, "n n"]:
    """Return how many pixels' sides each pair of segments shares; symmetric, zero with itself."""
    number = int(segments.max()) + 1
    pairs = np.concatenate(
        [
            (segments[:, :-1] * number + segments[:, 1:]).ravel(),
            (segments[:-1] * number + segments[1:]).ravel(),
        ]
    )
    counts = np.bincount(pairs, minlength=number * number).reshape(number, number)
    both = (counts + counts.T).astype(np.float64)
    np.fill_diagonal(both, 0)
    return both


def _log_uniform(bounds: tuple[float, float], generator: np.random.Generator) -> float:
    """Draw between two bounds, as likely between 1 and 2 as between 2 and 4."""
    return float(np.exp(generator.uniform(*np.log(bounds))))
