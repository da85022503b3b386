"""The encoder: RGB in, one feature map per resolution level out.

It is a module of its own because DINO pretrains it on RGB alone. Strokes enter through
`StrokePath`, whose contribution starts at zero, so that a pretrained encoder's weights load
unchanged and its first features are the pretrained ones.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scribbleseg.config import ModelConfig
from scribbleseg.models.blocks import BlockType, call


def level_channels(config: ModelConfig) -> list[int]:
    """Return the channels of each level: doubled from level to level, up to 16 x width."""
    return [config.width * 2 ** min(level, 4) for level in range(config.depth)]


class Encoder(nn.Module):
    """Levels of blocks at strides 1, 2, 4, ...; level k has stride 2^k."""

    def __init__(self, config: ModelConfig, block: BlockType):
        super().__init__()
        self.channels = channels = level_channels(config)
        """Of the features, finest first."""
        self.recompute = False
        """Make activations again in the backward pass, for memory's sake; see `blocks.call`."""
        self.levels = nn.ModuleList(
            block(in_channels, out_channels, config.norm, 1 if level == 0 else 2)
            for level, (in_channels, out_channels) in enumerate(
                zip([3, *channels[:-1]], channels, strict=True)
            )
        )

    def forward(
        self, image: Float[Tensor, "b 3 h w"], sides: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Return the features of every level, finest first.

        Args:
            image: Normalised RGB; height and width of at least 32.
            sides: One tensor per level, added inside that level; None for RGB alone.
        """
        features: list[Tensor] = []
        x: Tensor = image
        for index, level in enumerate(self.levels):
            side = None if sides is None else sides[index]
            x = call(level, x, side, recompute=self.recompute and self.training)
            features.append(x)
        return features


class StrokePath(nn.Module):
    """Carries strokes to every level of an encoder; its contribution starts at zero.

    There is one level for each entry of `channels`, at strides 1, 2, 4, ... Strokes are max-pooled
    on the way down, so that a thin one is still there at stride 32.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        hidden = 16
        self.lift = nn.ModuleList(nn.Conv2d(2, hidden, 3, padding=1) for _ in channels)
        self.project = nn.ModuleList(nn.Conv2d(hidden, c, 1, bias=False) for c in channels)
        for layer in self.project:
            assert isinstance(layer, nn.Conv2d)
            nn.init.zeros_(layer.weight)

    def forward(self, strokes: Float[Tensor, "b 2 h w"]) -> list[Float[Tensor, "b c h2 w2"]]:
        """Return one tensor per level, finest first, from strokes encoded in [0, 1]."""
        sides: list[Tensor] = []
        for index, (lift, project) in enumerate(zip(self.lift, self.project, strict=True)):
            if index > 0:
                strokes = F.max_pool2d(strokes, 2, ceil_mode=True)
            sides.append(project(F.relu(lift(strokes), inplace=True)))
        return sides
