"""UNet and ResUNet, which differ in their block: encoder, strokes' side path, decoder, head.

Design decisions:
- any height and width of at least 32: levels halve by rounding up, the decoder resizes to each
  skip's true size;
- the decoder has as many channels at each level as the skip that enters it;
- logits at input size; the head is one 1x1 convolution.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from scribbleseg.config import ModelConfig, NormName
from scribbleseg.models.blocks import BlockType, UpBlock, make_head
from scribbleseg.models.encoder import Encoder, StrokePath, level_channels
from scribbleseg.models.matching import StrokeMatches


class Output(NamedTuple):
    """What every segmentation network returns."""

    logits: Float[Tensor, "b 1 h w"]
    """Object logits at the input's size; sigmoid gives the probability of object."""
    side_logits: tuple[Float[Tensor, "b 1 h2 w2"], ...] = ()
    """In training, logits of coarser decoder levels for deep supervision: strides 2, 4, ..."""


class Decoder(nn.Module):
    """The common decoder: one `UpBlock` per skip, coarse to fine."""

    def __init__(self, channels: Sequence[int], norm: NormName, block: BlockType):
        super().__init__()
        self.recomputed = 0
        """Levels, the finest ones, whose activations are made again; see `set_recompute`."""
        self.ups = nn.ModuleList(
            UpBlock(coarse, fine, norm, block)
            for fine, coarse in zip(channels[-2::-1], channels[:0:-1], strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> Float[Tensor, "b c h w"]:
        """Return the finest features from those of every encoder level, finest first."""
        x = features[-1]
        levels = range(len(features) - 2, -1, -1)
        for up, level in zip(self.ups, levels, strict=True):
            x = up(x, features[level], recompute=self.training and level < self.recomputed)
        return x


class UNet(nn.Module):
    """UNet (arXiv 1505.04597), padded, with normalisation and resized upsampling.

    With `ConvBlock` it is the paper's; with `ResidualBlock` (arXiv 1512.03385) in encoder and
    decoder it is ResUNet (arXiv 1711.10684).
    """

    def __init__(self, config: ModelConfig, block: BlockType):
        super().__init__()
        channels = level_channels(config)
        self.encoder = Encoder(config, block)
        self.strokes = StrokePath(channels)
        self.decoder = Decoder(channels, config.norm, block)
        self.head = make_head(config.width)
        self.matches = StrokeMatches(channels, channels) if config.matching else None

    def forward(self, image: Float[Tensor, "b 3 h w"], strokes: Float[Tensor, "b 2 h w"]) -> Output:
        """Return logits at input size from a normalised image and encoded strokes in [0, 1]."""
        features = self.encoder(image, self.strokes.sides(strokes))
        if self.matches is not None:
            features = self.matches(features, features, strokes)
        return Output(self.head(self.decoder(features)))
