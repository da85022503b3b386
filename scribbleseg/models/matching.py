"""Stroke matching: every position is compared with what lies under the strokes.

Convolutions carry a stroke's meaning across the image, layer by layer, to say "this looks like
that". Here it is one step, as in FEELVOS (arXiv 1902.09513), which carries masks through a film:
the similarity of each position's features to those under the object strokes, and to those under the
background strokes. With plain colours for features it would be a nearest-neighbour classifier.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NUM_HEADS = 4
HEAD_CHANNELS = 16
# The levels on which positions are compared (level k has stride 2^k), and the cells of the strokes.
MATCHED = {3: 2, 4: 1}


class StrokeMatches(nn.ModuleList):
    """Adds to a decoder's skips at strides 8 and 16 what `StrokeMatch` says about them."""

    def __init__(self, encoder_channels: Sequence[int], skip_channels: Sequence[int]):
        """Take the channels of all levels, stride 1 first."""
        super().__init__(
            StrokeMatch(encoder_channels[level], skip_channels[level], cell)
            for level, cell in MATCHED.items()
        )

    def forward(
        self,
        encoded: Sequence[Tensor],
        skips: Sequence[Tensor],
        strokes: Float[Tensor, "b 2 h w"],
    ) -> list[Tensor]:
        """Return the skips, stride 1 first, those at strides 8 and 16 with the comparison's part.

        Args:
            encoded: Features of all levels, stride 1 first: what is compared.
            skips: What goes to the decoder, of the same sizes.
            strokes: Encoded in [0, 1], at the input's size.
        """
        skips = list(skips)
        for match, level in zip(self, MATCHED, strict=True):
            drawn = F.max_pool2d(strokes, 2**level, ceil_mode=True)
            skips[level] = skips[level] + match(encoded[level], drawn)
        return skips


class StrokeMatch(nn.Module):
    """Similarity of features to those under the strokes; its contribution starts at zero."""

    def __init__(self, in_channels: int, out_channels: int, cell: int):
        super().__init__()
        self.cell = cell
        self.embed = nn.Conv2d(in_channels, NUM_HEADS * HEAD_CHANNELS, 1)
        self.log_scale = nn.Parameter(torch.full((NUM_HEADS, 1, 1), 2.0))
        self.project = nn.Conv2d(2 * NUM_HEADS, out_channels, 1, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(
        self, features: Float[Tensor, "b c h w"], strokes: Float[Tensor, "b 2 h w"]
    ) -> Float[Tensor, "b d h w"]:
        """Return what the comparison says about each position.

        Args:
            features: Of an encoder's level.
            strokes: Object and background strokes in [0, 1], max-pooled to that level. Those in a
                cell of `cell` x `cell` positions are compared as one, by their mean.
        """
        # Similarities are sharpened by a factor: in bfloat16 their differences would drown.
        with torch.autocast(features.device.type, enabled=False):
            return self.project(self._similarity(self.embed(features.float()), strokes.float()))

    def _similarity(
        self, embedded: Float[Tensor, "b e h w"], strokes: Float[Tensor, "b 2 h w"]
    ) -> Float[Tensor, "b s h w"]:
        """Return soft maxima of cosines, in [-1, 1]: per head, over each kind of strokes.

        log(mean(exp(scale * cosine))) / scale, over the cells that strokes lie in and one more with
        a cosine of -1: without any strokes, nothing is similar. The mean, not the sum: long strokes
        must not count for more than short ones.
        """
        height, width = embedded.shape[-2:]
        points = F.normalize(embedded.unflatten(1, (NUM_HEADS, HEAD_CHANNELS)), dim=2).flatten(3)
        scale = self.log_scale.exp()
        similarities: list[Tensor] = []
        for stroke in strokes.split(1, dim=1):
            share = F.avg_pool2d(stroke, self.cell, ceil_mode=True)
            sums = F.avg_pool2d(embedded * stroke, self.cell, ceil_mode=True)
            keys = F.normalize(sums.unflatten(1, (NUM_HEADS, HEAD_CHANNELS)), dim=2).flatten(3)
            present = (share > 0).float().flatten(2)[..., None]
            if not (self.training or stroke.is_cuda or torch.compiler.is_compiling()):
                # Few cells have strokes; but a step must not wait for a GPU to say which, and what
                # is compiled has shapes that do not depend on values.
                drawn = present.amax(dim=(0, 1, 3)).nonzero().squeeze(1)
                keys, present = keys[..., drawn], present[:, :, drawn]
            # Cosines end at 1, so what is raised ends at 0, and no maximum has to be looked for:
            # each pass over all pairs takes as long as a convolution.
            raised = (points.transpose(2, 3) @ (scale * keys)).sub_(scale).exp_()
            total = (raised @ present).squeeze(-1) + (-2 * scale.squeeze(-1)).exp()
            # Where the scale is so large that nothing is left, as little as float32 can hold.
            mean = total.clamp(min=torch.finfo(total.dtype).tiny) / (1 + present.sum(dim=2))
            similarities.append(1 + mean.log() / scale.squeeze(-1))
        return torch.cat(similarities, dim=1).unflatten(2, (height, width))
