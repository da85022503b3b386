"""The parts that the networks share: normalisation, convolution blocks, attention gate, resizing.

Every block takes an optional `side` tensor that is added to its first convolution's output, before
the normalisation: the place where strokes enter an encoder that was trained on RGB alone.
"""

import functools
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scribbleseg.config import NormName

# (in channels, out channels, norm, stride) -> one of the blocks below.
BlockType = Callable[[int, int, NormName, int], "ConvBlock | ResidualBlock"]

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])

# Length of the vector of weights with which a head begins.
HEAD_NORM = 2.0


def make_norm(norm: NormName, channels: int) -> nn.Module:
    """Return batch normalisation, or group normalisation (arXiv 1803.08494).

    Groups have 8 channels, or more where 8 do not divide the channels.
    """
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(math.gcd(channels // 8, channels), channels)
        case _:
            assert_never(norm)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a padded 3x3 convolution without bias: a normalisation follows it."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def make_head(channels: int) -> nn.Conv2d:
    """Return the 1x1 convolution that makes logits from normalised, rectified features.

    It begins with half of the features for the object, half against it, all with the same weight,
    and no bias: logits then have a mean near 0 and a deviation near 1. PyTorch's own start has less
    than a third of that, off balance by chance. AdamW takes dozens of steps to grow out of it,
    more with some seeds than with others.
    """
    head = nn.Conv2d(channels, 1, 1)
    signs = torch.ones(channels)
    signs[1::2] = -1
    weight = HEAD_NORM / math.sqrt(channels) * signs.view_as(head.weight)
    head.load_state_dict({"weight": weight, "bias": torch.zeros(1)})
    return head


def resize_to(x: Float[Tensor, "b c h w"], like: Tensor) -> Float[Tensor, "b c h2 w2"]:
    """Resize bilinearly to the height and width of `like`, which need not be twice those of `x`."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def convolve(conv: nn.Conv2d, *parts: Tensor) -> Tensor:
    """Return a bias-free convolution of the parts, as if they were concatenated along channels.

    A convolution of a concatenation is the sum of the parts' own. Nothing is copied into one piece
    that gradients would keep in memory, nor is its gradient cut into windows, which PyTorch's
    layers on CPUs are slow to take.
    """
    if len(parts) == 1:
        return conv(parts[0])
    weights = conv.weight.split([part.shape[1] for part in parts], dim=1)
    sums = [
        F.conv2d(part, weight, stride=conv.stride, padding=conv.padding)
        for part, weight in zip(parts, weights, strict=True)
    ]
    return functools.reduce(Tensor.add_, sums)


def call(
    work: Callable[..., Result], *inputs: Tensor | None, of: nn.Module, recompute: bool
) -> Result:
    """Call a module, or a method of it; with `recompute`, its activations are made again.

    Training deep networks with sublinear memory (arXiv 1604.06174): only what goes in is kept until
    gradients need the rest.
    """
    if not recompute:
        return work(*inputs)
    found: Any = checkpoint(
        work,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _still_statistics(of)),
    )
    return found


@contextmanager
def _still_statistics(block: nn.Module) -> Generator[None]:
    """Keep batch normalisation from counting a batch again that it has already seen."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=norm.weight.device)
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each normalised and rectified (arXiv 1505.04597, padded).

    With stride 2 the input is max-pooled first, as in the paper.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: NormName, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm1 = make_norm(norm, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.norm2 = make_norm(norm, out_channels)

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        """Map (b, in, h, w) to (b, out, ceil(h / stride), ceil(w / stride))."""
        return self.second(*self.first(x, side=side))

    def first(self, *parts: Tensor, side: Tensor | None = None) -> tuple[Tensor]:
        """Return what `second` takes; the input may come in parts, one after the other."""
        if self.stride > 1:
            parts = tuple(F.max_pool2d(part, self.stride, ceil_mode=True) for part in parts)
        x = convolve(self.conv1, *parts)
        if side is not None:
            x = x + side
        return (F.relu(self.norm1(x), inplace=True),)

    def second(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return F.relu(self.norm2(self.conv2(x)), inplace=True)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (arXiv 1512.03385).

    The shortcut is a normalised 1x1 convolution where the shape changes. Stride 2 averages 2x2
    pixels in front of it (arXiv 1812.01187, ResNet-D), so that no pixel is thrown away.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: NormName, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm1 = make_norm(norm, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.norm2 = make_norm(norm, out_channels)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity(),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                make_norm(norm, out_channels),
            )

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        """Map (b, in, h, w) to (b, out, ceil(h / stride), ceil(w / stride))."""
        return self.second(*self.first(x, side=side))

    def first(self, *parts: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what `second` takes: the first convolution's features, and the shortcut's.

        The input may come in parts, one after the other.
        """
        y = convolve(self.conv1, *parts)
        if side is not None:
            y = y + side
        return F.relu(self.norm1(y), inplace=True), self._shortcut(*parts)

    def _shortcut(self, *parts: Tensor) -> Tensor:
        if not self.shortcut:
            (x,) = parts
            return x
        pool, conv, norm = self.shortcut
        assert isinstance(conv, nn.Conv2d)
        return norm(convolve(conv, *(pool(part) for part in parts)))

    def second(self, y: Tensor, shortcut: Tensor) -> Tensor:
        """Return the block's output."""
        return F.relu(self.norm2(self.conv2(y)) + shortcut, inplace=True)


class UpBlock(nn.Module):
    """One decoder level: reduce, resize to the skip's true size, convolve beside the skip."""

    def __init__(self, in_channels: int, skip_channels: int, norm: NormName, block: BlockType):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, skip_channels, 1)
        self.block = block(2 * skip_channels, skip_channels, norm, 1)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        skip: Float[Tensor, "b s h2 w2"],
        attention: Float[Tensor, "b 1 h2 w2"] | None = None,
        *,
        recompute: bool = False,
    ) -> Float[Tensor, "b s h2 w2"]:
        """Return the features of this level from those of the coarser one and the skip.

        The skip is multiplied by `attention`, if any. With `recompute`, activations are made again
        in two parts: those of the finest level, whose gradients come first, would otherwise all be
        in memory beside everything else that is kept.
        """
        halfway = call(self._first, x, skip, attention, of=self, recompute=recompute)
        return call(self.block.second, *halfway, of=self.block, recompute=recompute)

    def _first(self, x: Tensor, skip: Tensor, attention: Tensor | None) -> tuple[Tensor, ...]:
        if attention is not None:
            skip = skip * attention
        # A 1x1 convolution commutes with the resizing and is four times cheaper before it. Nothing
        # keeps a name that would keep its memory.
        parts = (resize_to(self.reduce(x), skip), skip)
        if not torch.is_grad_enabled():  # Then one wide convolution is faster than two and a sum.
            parts = (torch.cat(parts, dim=1),)
        return self.block.first(*parts)


class AttentionGate(nn.Module):
    """Additive attention on a skip (arXiv 1804.03999): where should the decoder look?

    alpha = sigmoid(psi(relu(theta(skip) + phi(gating)))), one value per pixel of the skip. The
    paper gates at half the skip's resolution; here the gating signal is resized up instead, so that
    the map is as fine as the skip.
    """

    def __init__(self, skip_channels: int, gating_channels: int, norm: NormName):
        super().__init__()
        hidden = max(8, skip_channels // 2)
        self.theta = nn.Conv2d(skip_channels, hidden, 1, bias=False)
        self.phi = nn.Conv2d(gating_channels, hidden, 1)
        self.norm = make_norm(norm, hidden)
        self.psi = nn.Conv2d(hidden, 1, 1)

    def forward(
        self, skip: Float[Tensor, "b c h w"], gating: Float[Tensor, "b g h2 w2"]
    ) -> Float[Tensor, "b 1 h w"]:
        """Return the attention map in [0, 1]; the caller multiplies the skip by it."""
        # phi is 1x1 and linear, so it commutes with the resizing and is cheaper before it.
        query = resize_to(self.phi(gating), skip)
        return self.psi(F.relu(self.norm(self.theta(skip) + query), inplace=True)).sigmoid()
