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
FOCUS = 2
"""Exponent of the focal loss; the paper's."""
BAND = 4
"""Pixels on both sides of an object's outline that `boundary_loss` looks at."""


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
    return _mean_over(valid, _cross_entropy(logits, truth))


def focal_loss(
    logits: Float[Tensor, "b 1 h w"],
    truth: Float[Tensor, "b 1 h w"],
    valid: Float[Tensor, "b 1 h w"],
) -> Float[Tensor, " b"]:
    """Return the focal loss per image (arXiv 1708.02002), over pixels not ignored.

    Cross-entropy times (1 - p)^2, where p is the probability of the true label: what is already
    right counts for little. Unlike the paper's it does not weigh the two labels differently.
    """
    wrong = (logits.float().sigmoid() - truth).abs()
    return _mean_over(valid, wrong**FOCUS * _cross_entropy(logits, truth))


def boundary_loss(
    logits: Float[Tensor, "b 1 h w"],
    truth: Float[Tensor, "b 1 h w"],
    valid: Float[Tensor, "b 1 h w"],
) -> Float[Tensor, " b"]:
    """Return the binary cross-entropy per image over the pixels near an outline.

    Near are those within a square of side 2 x 4 + 1 that holds both labels; an image without any
    scores 0.
    """
    labels = torch.cat([truth, 1 - truth], dim=1) * valid
    near = F.max_pool2d(labels, 2 * BAND + 1, 1, BAND).prod(dim=1, keepdim=True) * valid
    return _mean_over(near, _cross_entropy(logits, truth))


def lovasz_loss(
    logits: Float[Tensor, "b 1 h w"],
    truth: Float[Tensor, "b 1 h w"],
    valid: Float[Tensor, "b 1 h w"],
) -> Float[Tensor, " b"]:
    """Return the Lovász hinge per image (arXiv 1705.08790): a convex bound of 1 - IoU of object.

    Hinge errors, largest first, each times what IoU loses when its pixel joins the wrong ones.
    """
    truth = (truth * valid).flatten(1)
    errors = 1 - logits.float().flatten(1) * (2 * truth - 1)
    # Below zero they count for nothing, and they come last.
    errors = errors.masked_fill(valid.flatten(1) == 0, -1.0)
    errors, order = errors.sort(dim=1, descending=True)
    truth = truth.gather(1, order)
    total = truth.sum(dim=1, keepdim=True)
    intersection = total - truth.cumsum(dim=1)
    union = total + (1 - truth).cumsum(dim=1)
    lost = 1 - intersection / union
    steps = torch.diff(lost, dim=1, prepend=lost.new_zeros(len(lost), 1))
    return (errors.relu() * steps).sum(dim=1)


def _cross_entropy(
    logits: Float[Tensor, "b 1 h w"], truth: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, "b 1 h w"]:
    """Return the binary cross-entropy of every pixel, in nats."""
    return F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")


def _mean_over(
    pixels: Float[Tensor, "b 1 h w"], values: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, " b"]:
    """Return the mean of the values at the pixels that are 1; 0 where there is none."""
    return (values * pixels).sum(dim=(1, 2, 3)) / pixels.sum(dim=(1, 2, 3)).clamp(min=1)


def resize_logits(logits: Float[Tensor, "b 1 h w"], size: torch.Size) -> Float[Tensor, "b 1 h2 w2"]:
    """Resize logits bilinearly to a target's (height, width)."""
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
