"""The encoder: RGB in, one feature map per resolution level out.

It is a module of its own because DINO pretrains it on RGB alone. Strokes enter through
`StrokePath`, whose contribution starts at zero, so that a pretrained encoder's weights load
unchanged and its first features are the pretrained ones.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scribbleseg.config import ModelConfig
from scribbleseg.models.blocks import BlockType, call

# Makes the tensor (b, channels, h, w) that is added inside a level.
Side = Callable[[], Tensor]


def level_channels(config: ModelConfig) -> list[int]:
    """Return the channels of each level: doubled from level to level, up to 16 x width."""
    return [config.width * 2 ** min(level, 4) for level in range(config.depth)]


class Encoder(nn.Module):
    """Levels of blocks at strides 1, 2, 4, ...; level k has stride 2^k."""

    def __init__(self, config: ModelConfig, block: BlockType):
        super().__init__()
        self.channels = channels = level_channels(config)
        """Of the features, finest first."""
        self.recomputed = 0
        """Levels, the finest ones, whose activations are made again; see `set_recompute`."""
        self.levels = nn.ModuleList(
            block(in_channels, out_channels, config.norm, 1 if level == 0 else 2)
            for level, (in_channels, out_channels) in enumerate(
                zip([3, *channels[:-1]], channels, strict=True)
            )
        )

    def forward(
        self, image: Float[Tensor, "b 3 h w"], sides: Sequence[Side] | None = None
    ) -> list[Tensor]:
        """Return the features of every level, finest first.

        Args:
            image: Normalised RGB; height and width of at least 32.
            sides: Makes what is added inside a level, level by level; None for RGB alone.
        """
        features: list[Tensor] = []
        x: Tensor = image
        for index, level in enumerate(self.levels):
            side = None if sides is None else sides[index]
            enter = partial(_enter, level, side)
            again = self.training and index < self.recomputed
            x = call(enter, x, of=level, recompute=again)
            features.append(x)
        return features


def _enter(level: nn.Module, side: Side | None, x: Tensor) -> Tensor:
    """Return a level's features; what is added inside it is made here, and again if they are."""
    return level(x, None if side is None else side())


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
        return [side() for side in self.sides(strokes)]

    def sides(self, strokes: Float[Tensor, "b 2 h w"]) -> list[Side]:
        """Return what makes each level's tensor, finest first, for who wants it made later."""
        sides: list[Side] = []
        for index in range(len(self.lift)):
            if index > 0:
                strokes = F.max_pool2d(strokes, 2, ceil_mode=True)
            sides.append(partial(self._side, index, strokes))
        return sides

    def _side(self, index: int, strokes: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b c h w"]:
        return self.project[index](F.relu(self.lift[index](strokes), inplace=True))
