"""The loss of a segmentation step: Dice + BCE and others, with deep supervision and partial labels.

The partial form (loss on stroke pixels only, for users who have no masks) needs no code of its own:
its target holds the strokes' labels and is 255, ignored, everywhere else.
"""

from collections.abc import Sequence

from jaxtyping import Float, UInt8
from torch import Tensor

from scribbleseg.config import LossConfig
from scribbleseg.losses.functional import (
    bce_loss,
    boundary_loss,
    dice_loss,
    focal_loss,
    lovasz_loss,
    resize_logits,
    split_target,
)


def segmentation_loss(
    logits: Float[Tensor, "b 1 h w"],
    side_logits: Sequence[Float[Tensor, "b 1 _h _w"]],
    target: UInt8[Tensor, "b h w"],
    config: LossConfig,
) -> Float[Tensor, ""]:
    """Return the mean over images of the weighted losses of all outputs.

    Args:
        logits: Object logits at the target's size.
        side_logits: Logits of coarser decoder levels, strides 2, 4, ...; resized to the target.
        target: 0 background, 1 object, 255 ignored.
        config: Weights. The output at stride 2^k counts side^k; the weights are divided by their
            sum, so that the learning rate does not depend on the depth.
    """
    truth, valid = split_target(target)
    weights = [config.side**level for level in range(len(side_logits) + 1)]
    terms = [
        (config.dice, dice_loss),
        (config.bce, bce_loss),
        (config.focal, focal_loss),
        (config.boundary, boundary_loss),
        (config.lovasz, lovasz_loss),
    ]
    total = logits.new_zeros((), dtype=truth.dtype)
    for weight, output in zip(weights, [logits, *side_logits], strict=True):
        # One that counts nothing is computed too: DDP waits for a gradient of every parameter.
        output = resize_logits(output, target.shape[-2:])
        for share, term in terms:
            if share > 0:
                total = total + weight * share * term(output, truth, valid).mean()
    return total / sum(weights)
