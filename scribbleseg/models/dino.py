"""The networks of DINO (arXiv 2104.14294): backbone, head, student and teacher.

Design decisions:
- the student's forward takes every crop of the step at once, so that DDP sees one forward and
  reduces gradients once;
- the head standardises its input over the batch, and computes its logits in fp32;
- the teacher is a copy whose weights are only ever written by `update_teacher`.
"""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scribbleseg.config import DinoConfig
from scribbleseg.distributed import all_reduce_sum, differentiable_sum
from scribbleseg.models.encoder import Encoder
from scribbleseg.models.pretrained import PretrainedEncoder
from scribbleseg.models.vit import VitBackbone, VitEncoder

Network = TypeVar("Network", bound=nn.Module)


class ConvBackbone(nn.Module):
    """A convolutional encoder as DINO sees it: one vector per image."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.dim = encoder.channels[-1]

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the mean over positions of the coarsest features."""
        return self.encoder(image)[-1].mean(dim=(2, 3))


def standardise(features: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Return features of mean 0 and variance 1 over all rows of all ranks, in fp32."""
    x = features.float()
    count = all_reduce_sum(x.new_full((), len(x)))
    mean = differentiable_sum(x.sum(dim=0)) / count
    centred = x - mean
    variance = differentiable_sum(centred.square().sum(dim=0)) / count
    return centred * (variance + 1e-5).rsqrt()


def make_backbone(encoder: Encoder | VitEncoder | PretrainedEncoder) -> ConvBackbone | VitBackbone:
    """Return the encoder as DINO sees it: one vector per image."""
    assert not isinstance(encoder, PretrainedEncoder), "PretrainConfig refuses these"
    return VitBackbone(encoder) if isinstance(encoder, VitEncoder) else ConvBackbone(encoder)


class DinoHead(nn.Module):
    """Standardised input, three layers with GELU, a normalised bottleneck, cosines to prototypes.

    The paper's head has no batch normalisation. Ours standardises its input over the batch of all
    ranks, without parameters: the pooled features of a convolutional network share a large mean,
    under which the logits of all images are alike, and on small data sets teacher and student then
    agree on the uniform distribution within a few epochs (the loss stays at ln k).

    The last layer is weight-normalised with its gain fixed at 1: only the directions of its rows
    count, so the logits are cosines in [-1, 1]. Normalising in the forward needs neither hooks nor
    parametrisations, so the head can be copied and saved like any other module.
    """

    def __init__(self, in_dim: int, config: DinoConfig, out_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # As in the authors' code, the prototypes keep PyTorch's own initialisation.
        self.prototypes = nn.Linear(config.bottleneck_dim, out_dim, bias=False)

    def forward(self, features: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """Return the logits, in fp32."""
        x = self.mlp(standardise(features))
        # Cosines near 1 are 0.004 apart in bfloat16, a tenth of a nat at a temperature of 0.04.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(
                F.normalize(x.float(), dim=-1), F.normalize(self.prototypes.weight, dim=-1)
            )


class DinoNetwork(nn.Module):
    """The student, or the teacher: a backbone, (b, 3, h, w) to (b, d), and a head."""

    def __init__(self, backbone: nn.Module, head: DinoHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self, crops: Sequence[Float[Tensor, "_m 3 _s _s"]]
    ) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m d"]]:
        """Return logits and backbone features of all crops, concatenated in the given order.

        Args:
            crops: Normalised RGB, one tensor per resolution with all crops of that resolution on
                the batch axis: the backbone runs once for each, the head once for all.
        """
        features = torch.cat([self.backbone(same_size) for same_size in crops])
        return self.head(features), features


class Centre(nn.Module):
    """The running mean of the teacher's logits, a buffer so that it is saved with the rest."""

    value: Float[Tensor, " k"]

    def __init__(self, num_prototypes: int):
        super().__init__()
        self.register_buffer("value", torch.zeros(num_prototypes))


def make_teacher(student: Network) -> Network:
    """Return a copy of the student that shares no storage with it and takes no gradient.

    Keep it in training mode, as the authors do, except to look at its features. Its batch
    normalisation then uses the batch, as the student's does, and tracks running statistics of its
    own from the global crops that it sees. Those fit its present weights after some fifty steps.
    An average of the student's statistics would not: at a momentum of 0.99 it still holds the
    initial zeros and ones after hundreds of steps, and it mixes in the local crops.
    """
    return copy.deepcopy(student).requires_grad_(False).train()


def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's weights: momentum * teacher + (1 - momentum) * student.

    Buffers are left alone: `make_teacher` says why.

    Args:
        teacher: Changed in place.
        student: The bare module, after the optimiser's step.
        momentum: Share of the teacher that stays, [0, 1].
    """
    # The last argument, a count of updates, is ignored by an exponential average.
    get_ema_multi_avg_fn(momentum)(tuple(teacher.parameters()), tuple(student.parameters()), 0)


def hold_last_layer(head: DinoHead) -> None:
    """Drop the prototypes' gradients, so that the optimiser leaves them (the authors' code).

    Call it between backward and step in the first epochs, while the features are still noise.
    """
    head.prototypes.weight.grad = None
