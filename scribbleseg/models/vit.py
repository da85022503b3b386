"""A vision transformer (arXiv 2010.11929) as the encoder of a segmentation network.

Design decisions:
- timm's ViT-Tiny or ViT-Small: 12 blocks, a CLS token, learned positions on a 224 x 224 grid that
  are resampled to the image's size (arXiv 2104.14294 does so for its small crops); no dropout;
- the encoder sees RGB and is what DINO pretrains; all else belongs to the segmentation network;
- patches are too coarse for outlines, so a small convolutional stem on RGB fills the fine levels;
- strokes enter twice, both times through `StrokePath`, whose contribution starts at zero: added to
  the patch embeddings, so that attention carries them over the whole image, and at every level of
  the pyramid, so that they keep their place to the pixel;
- height and width are padded to multiples of the patch size, and the logits are cropped again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scribbleseg.config import ModelConfig, NormName
from scribbleseg.models.blocks import ConvBlock, make_head, resize_to
from scribbleseg.models.encoder import Encoder, Side, StrokePath, level_channels
from scribbleseg.models.unet import Decoder, Output

DEPTHS = (3, 6, 9, 12)
"""Blocks, counted from 1, whose patch features the segmentation network sees."""
STEM_LEVELS = 3
"""Levels of the convolutional stem: strides 1, 2 and 4."""


def pad_to_multiple(
    x: Float[Tensor, "b c h w"], multiple: int, mode: Literal["replicate", "constant"]
) -> Float[Tensor, "b c h2 w2"]:
    """Extend to the right and downwards, by the last pixels (replicate) or by zeros (constant)."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode=mode)


class VitEncoder(nn.Module):
    """The vision transformer: RGB in, patch features of several depths or one CLS token out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # timm takes seconds to import; the convolutional networks do without it.
        from timm.models import vision_transformer

        match config.vit:
            case "tiny":
                build = vision_transformer.vit_tiny_patch16_224
            case "small":
                build = vision_transformer.vit_small_patch16_224
            case _:
                assert_never(config.vit)
        self.patch_size = config.patch_size
        # Any: timm's types leave open what this call settles (a CLS token, learned positions).
        self.vit: Any = build(
            pretrained=False, patch_size=config.patch_size, num_classes=0, dynamic_img_size=True
        )

    @property
    def dim(self) -> int:
        """Channels of the patch features and of the CLS token."""
        return self.vit.embed_dim

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        side: Float[Tensor, "b {self.dim} h2 w2"] | None = None,
    ) -> list[Float[Tensor, "b {self.dim} h2 w2"]]:
        """Return the patch features after each block of `DEPTHS`, passed through the final norm.

        Args:
            image: Normalised RGB of any size; h2 and w2 are its size over the patch size, up.
            side: Added to the patch embeddings; None for RGB alone.
        """
        maps: list[Tensor] = []
        tokens = self._tokens(image, side)
        for number, block in enumerate(self.vit.blocks, start=1):
            tokens = block(tokens)
            if number in DEPTHS:
                patches = self.vit.norm(tokens)[:, 1:]
                maps.append(patches.transpose(1, 2).unflatten(2, self._grid(image)))
        return maps

    def embed(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b {self.dim}"]:
        """Return the CLS token after the final norm, which DINO trains (arXiv 2104.14294)."""
        return self.vit.norm(self.vit.blocks(self._tokens(image))[:, 0])

    def attention_of_cls(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b heads h2 w2"]:
        """Return how much the CLS token attends to each patch in the last block, by head.

        The rest of each head's sum of 1 is its attention to the CLS token itself.
        """
        last = self.vit.blocks[-1]
        tokens = last.norm1(self.vit.blocks[:-1](self._tokens(image)))
        # b image, n token, h head, c channel of a head. Fused attention keeps no weights, so they
        # are computed again from queries and keys.
        qkv = last.attn.qkv(tokens).unflatten(2, (3, last.attn.num_heads, -1))
        query, key = qkv[:, 0, 0], qkv[:, :, 1]
        logits = torch.einsum("bhc,bnhc->bhn", query, key) * last.attn.scale
        return logits.softmax(dim=-1)[..., 1:].unflatten(2, self._grid(image))

    def _grid(self, image: Tensor) -> tuple[int, int]:
        """Return the number of patches down and across."""
        height, width = image.shape[-2:]
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def _tokens(self, image: Tensor, side: Tensor | None = None) -> Tensor:
        """Return CLS token and patch embeddings (b, 1 + h2 * w2, d) with their positions."""
        # The image continues with its last pixels: zeros would be an edge to see.
        patches = self.vit.patch_embed(pad_to_multiple(image, self.patch_size, "replicate"))
        if side is not None:
            patches = patches + side.permute(0, 2, 3, 1)
        cls = self.vit.cls_token.expand(len(image), -1, -1)
        return torch.cat([cls, patches.flatten(1, 2)], dim=1) + self._positions(self._grid(image))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the learned positions (1, 1 + h2 * w2, d), resampled to another grid."""
        learned_grid = self.vit.patch_embed.grid_size
        if grid == learned_grid:
            return self.vit.pos_embed
        cls, patches = self.vit.pos_embed[:, :1], self.vit.pos_embed[:, 1:]
        patches = patches.transpose(1, 2).unflatten(2, learned_grid)
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


class VitBackbone(nn.Module):
    """What DINO trains of the transformer: an image becomes its CLS token."""

    def __init__(self, encoder: VitEncoder):
        super().__init__()
        self.encoder = encoder

    @property
    def dim(self) -> int:
        """Length of the embedding."""
        return self.encoder.dim

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return one embedding per image."""
        return self.encoder.embed(image)


class TokenBlock(nn.Module):
    """One coarse level of the pyramid: reduce the transformer's maps, resize them, convolve."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormName):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, out_channels, 1)
        self.block = ConvBlock(out_channels, out_channels, norm)

    def forward(
        self, maps: Float[Tensor, "b c h w"], side: Float[Tensor, "b s h2 w2"]
    ) -> Float[Tensor, "b s h2 w2"]:
        """Return the features of this level, which has the size of its strokes' `side`."""
        return self.block(resize_to(self.reduce(maps), side), side)


class Pyramid(nn.Module):
    """Levels at strides 1, 2, 4, ..., patch size: fine ones from a stem, coarse ones from maps."""

    def __init__(self, config: ModelConfig, channels: Sequence[int], dim: int):
        super().__init__()
        self.stem = Encoder(replace(config, depth=STEM_LEVELS), ConvBlock)
        self.tokens = nn.ModuleList(
            TokenBlock(dim * len(DEPTHS), out_channels, config.norm)
            for out_channels in channels[STEM_LEVELS:]
        )

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        maps: Sequence[Float[Tensor, "b d h2 w2"]],
        fine_sides: Sequence[Side],
        coarse_sides: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the features of every level, finest first, each with its strokes added inside."""
        together = torch.cat(list(maps), dim=1)
        coarse = zip(self.tokens, coarse_sides, strict=True)
        fine = self.stem(image, fine_sides)
        return [*fine, *(block(together, side) for block, side in coarse)]


class VitUNet(nn.Module):
    """Vision transformer, convolutional pyramid, the common decoder and one 1x1 head.

    The coarsest stride is the patch size, so the number of levels follows from it and `model.depth`
    is not used; `model.width` is that of the pyramid and the decoder. Pretraining hands over
    `encoder.*`; everything else starts afresh.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = level_channels(replace(config, depth=config.patch_size.bit_length()))
        self.encoder = VitEncoder(config)
        # Patch embeddings and coarsest level have the same stride: they share the path's last
        # level, and `forward` parts what it returns.
        self.strokes = StrokePath([*channels[:-1], channels[-1] + self.encoder.dim])
        self.pyramid = Pyramid(config, channels, self.encoder.dim)
        self.decoder = Decoder(channels, config.norm, ConvBlock)
        self.head = make_head(config.width)

    def forward(self, image: Float[Tensor, "b 3 h w"], strokes: Float[Tensor, "b 2 h w"]) -> Output:
        """Return logits at input size from a normalised image and encoded strokes in [0, 1]."""
        height, width = image.shape[-2:]
        # Padded here already, so that the levels of stem and transformer lie on one another.
        image = pad_to_multiple(image, self.encoder.patch_size, "replicate")
        strokes = pad_to_multiple(strokes, self.encoder.patch_size, "constant")
        sides = self.strokes.sides(strokes)
        *coarse, last = (side() for side in sides[STEM_LEVELS:])
        to_pyramid, to_patches = last.tensor_split([last.shape[1] - self.encoder.dim], dim=1)
        maps = self.encoder(image, to_patches)
        features = self.pyramid(image, maps, sides[:STEM_LEVELS], [*coarse, to_pyramid])
        return Output(self.head(self.decoder(features))[..., :height, :width])
