"""Segmentation losses as pure functions of logits and targets, one value per image.

Shapes: logits (b, 1, h, w) of any float type; target (b, h, w) with 0 background, 1 object,
255 ignored. Everything is computed in fp32. One value per image makes the mean over a batch equal
the mean of the means over ranks, so that DDP changes nothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

IGNORE = 255


def split_target(
    target: UInt8[Tensor, "b h w"],
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b 1 h w"]]:
    """Return (object, valid): 1 where the target is object, and 1 where it is not ignored."""
    target = target[:, None]
    return (target == 1).float(), (target != IGNORE).float()


def dice_loss(
    logits: Float[Tensor, "b 1 h w"],
    truth: Float[Tensor, "b 1 h w"],
    valid: Float[Tensor, "b 1 h w"],
    smooth: float = 1.0,
) -> Float[Tensor, " b"]:
    """Return 1 - soft Dice per image (Sudre et al. 2017, arXiv 1707.03237), in [0, 1].

    1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth) over the pixels that are not ignored.
    `smooth`, in pixels, makes an image without object a perfect score when none is predicted.
    """
    probability = logits.float().sigmoid() * valid
    truth = truth * valid
    overlap = (probability * truth).sum(dim=(1, 2, 3))
    total = probability.sum(dim=(1, 2, 3)) + truth.sum(dim=(1, 2, 3))
    return 1 - (2 * overlap + smooth) / (total + smooth)


def bce_loss(
    logits: Float[Tensor, "b 1 h w"],
    truth: Float[Tensor, "b 1 h w"],
    valid: Float[Tensor, "b 1 h w"],
) -> Float[Tensor, " b"]:
    """Return the binary cross-entropy per image, in nats, averaged over pixels not ignored.

    An image whose every pixel is ignored scores 0.
    """
    per_pixel = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
    return (per_pixel * valid).sum(dim=(1, 2, 3)) / valid.sum(dim=(1, 2, 3)).clamp(min=1)


def resize_logits(logits: Float[Tensor, "b 1 h w"], size: torch.Size) -> Float[Tensor, "b 1 h2 w2"]:
    """Resize logits bilinearly to a target's (height, width)."""
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
