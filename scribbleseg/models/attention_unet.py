"""Attention-ResUNet with a guided decoder (Maji et al. 2022, doi 10.1016/j.bspc.2021.103077).

ResUNet's encoder, an additive attention gate on every skip (arXiv 1804.03999), and a side output at
every decoder level that has a loss of its own in training and is dropped at prediction time.

Where we deviate: the side outputs keep their level's resolution here, and whoever computes the loss
resizes the logits; there are no dropout layers.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from scribbleseg.config import ModelConfig
from scribbleseg.models.blocks import AttentionGate, ResidualBlock, UpBlock, call, make_head
from scribbleseg.models.encoder import Encoder, StrokePath, level_channels
from scribbleseg.models.unet import Output


class GuidedDecoder(nn.Module):
    """Gates, up-blocks and heads of every level, coarse to fine."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.recomputed = 0
        """Levels, the finest ones, whose activations are made again; see `set_recompute`."""
        channels = level_channels(config)
        pairs = list(zip(channels[-2::-1], channels[:0:-1], strict=True))
        self.gates = nn.ModuleList(
            AttentionGate(fine, coarse, config.norm) for fine, coarse in pairs
        )
        self.ups = nn.ModuleList(
            UpBlock(coarse, fine, config.norm, ResidualBlock) for fine, coarse in pairs
        )
        self.heads = nn.ModuleList(make_head(fine) for fine, _ in pairs)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return every level's decoded features and attention map, coarse to fine."""
        decoded: list[Tensor] = []
        maps: list[Tensor] = []
        x = features[-1]
        levels = range(len(features) - 2, -1, -1)
        for gate, up, level in zip(self.gates, self.ups, levels, strict=True):
            skip, recompute = features[level], self.training and level < self.recomputed
            attention = call(gate, skip, x, of=gate, recompute=recompute)
            x = up(x, skip, attention, recompute=recompute)
            decoded.append(x)
            maps.append(attention)
        return decoded, maps


class AttentionResUNet(nn.Module):
    """ResUNet whose skips are gated and whose decoder is guided at every level."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.encoder = Encoder(config, ResidualBlock)
        self.strokes = StrokePath(level_channels(config))
        self.decoder = GuidedDecoder(config)

    def forward(self, image: Float[Tensor, "b 3 h w"], strokes: Float[Tensor, "b 2 h w"]) -> Output:
        """Return logits at input size and, in training, those of every coarser decoder level."""
        decoded, _ = self.decoder(self.encoder(image, self.strokes.sides(strokes)))
        heads = list(self.decoder.heads)
        if not self.training:
            return Output(heads[-1](decoded[-1]))
        logits = [head(level) for head, level in zip(heads, decoded, strict=True)]
        return Output(logits[-1], tuple(logits[-2::-1]))

    def attention_maps(
        self, image: Float[Tensor, "b 3 h w"], strokes: Float[Tensor, "b 2 h w"]
    ) -> list[Float[Tensor, "b 1 h2 w2"]]:
        """Return the attention map of every skip in [0, 1], finest first."""
        _, maps = self.decoder(self.encoder(image, self.strokes.sides(strokes)))
        return maps[::-1]
