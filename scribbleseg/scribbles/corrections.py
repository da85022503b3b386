"""Corrections in training: one more stroke per image, where the network errs, made on the device.

As in RITM (arXiv 2102.06583), what a user would correct is the deepest point of an error; as in
ScribblePrompt (arXiv 2312.07381), the correction is a stroke. `simulate.correct` draws finer ones
for evaluation, from whole images on the CPU; these never wait for the device.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from scribbleseg.scribbles.encode import BACKGROUND, OBJECT

# Errors are searched on every k-th pixel, and are at most so many of these deep.
STEP = 4
MOST_DEPTH = 16
# A stroke reaches as far as the error around it is deep, and this much further, in pixels; lines
# drawn with OpenCV's thickness of 3, as the benchmark's are, cover 2 pixels on either side.
REACH = 12.0
HALF_WIDTH = 2.0


def corrected(
    strokes: Float[Tensor, "b 2 h w"],
    logits: Float[Tensor, "b 1 h w"],
    mask: UInt8[Tensor, "b h w"],
    radius: int,
) -> Float[Tensor, "b 2 h w"]:
    """Return encoded strokes with one more per image: straight, along its deepest error.

    Only wrong pixels of one kind are drawn on, so that all of it is true; it may go on beyond a gap
    in the error. Errors that fall between the pixels of a grid of `STEP` are left alone.

    Args:
        strokes: In [0, 1]; channel 0 object, channel 1 background.
        logits: What the network made of them.
        mask: 0 background, 1 object, 255 ignore.
        radius: Of the discs that encode strokes, in pixels; 0 for the strokes' own pixels.
    """
    found = logits[:, 0] > 0
    wrong = torch.stack([(mask == OBJECT) & ~found, (mask == BACKGROUND) & found], dim=1)
    return torch.maximum(strokes, _dilate(_deepest_lines(wrong), radius))


def _deepest_lines(wrong: Bool[Tensor, "b 2 h w"]) -> Float[Tensor, "b 2 h w"]:
    """Return 1 on a line through the deepest wrong point of each image, where it is wrong alike."""
    coarse = wrong[:, :, ::STEP, ::STEP].float()
    # Of equally deep points the one in the densest part, not the first one.
    depth = _depth(coarse)
    depth = depth + 0.5 * depth.clamp(max=1) * F.avg_pool2d(coarse, 9, stride=1, padding=4)
    place = depth.flatten(1).argmax(dim=1)
    deepest = depth.flatten(1).gather(1, place[:, None])
    height, width = depth.shape[-2:]
    kind = (place // (height * width))[:, None] == torch.arange(2, device=wrong.device)
    region = wrong & (kind & (deepest > 0))[:, :, None, None]
    rows, columns = (torch.arange(side, device=wrong.device) for side in wrong.shape[2:])
    y = rows[:, None] - STEP * _column(place // width % height)
    x = columns - STEP * _column(place % width)
    reach = STEP * _column(deepest[:, 0]) + REACH
    # The direction in which the error around the point stretches: its second moments' main axis.
    near = region.any(dim=1) * torch.exp(-(x**2 + y**2) / (2 * reach**2))
    xx, yy, xy = ((near * product).sum((1, 2)) for product in (x * x, y * y, x * y))
    angle = _column(torch.atan2(2 * xy, xx - yy) / 2)
    along = x * angle.cos() + y * angle.sin()
    across = y * angle.cos() - x * angle.sin()
    line = (across.abs() <= HALF_WIDTH) & (along.abs() <= reach)
    return (region & line[:, None]).float()


def _column(values: Tensor) -> Tensor:
    """Return one value per image in a shape that meets pixels."""
    return values[:, None, None]


def _depth(inside: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return how many times a pixel outlives that a region loses its rim, up to `MOST_DEPTH`.

    The image's border is a border of the regions, as where strokes are simulated.
    """
    depth = inside
    for _ in range(MOST_DEPTH - 1):
        inside = -F.max_pool2d(-F.pad(inside, (1, 1, 1, 1)), 3, stride=1)
        depth = depth + inside
    return depth


def _dilate(strokes: Float[Tensor, "b 2 h w"], radius: int) -> Float[Tensor, "b 2 h w"]:
    """Grow strokes of 0 and 1 by a disc."""
    if radius == 0:
        return strokes
    offsets = torch.arange(-radius, radius + 1, device=strokes.device)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).to(strokes)
    return (F.conv2d(strokes, disc.expand(2, 1, -1, -1), padding=radius, groups=2) > 0.5).float()
