"""The mathematics of DINO, self-distillation with no labels (arXiv 2104.14294), as pure functions.

Letters: g global crops (the teacher's), n crops in all (the student's: the g global ones first, in
the teacher's order, then the local ones), b images per rank, k prototypes, d channels. Everything
is computed in fp32, also inside autocast: only pointwise operations and sums follow the casts, none
of which autocast lowers.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from scribbleseg.distributed import all_reduce_sum, world_size


def teacher_probabilities(
    logits: Float[Tensor, "g b k"], centre: Float[Tensor, " k"], temperature: float
) -> Float[Tensor, "g b k"]:
    """Return softmax((logits - centre) / temperature), through which no gradient flows.

    Centring keeps one prototype from winning always, sharpening (a temperature below the student's)
    keeps all from being equal; together they avoid both collapses (section 3.1).
    """
    return ((logits.detach().float() - centre) / temperature).softmax(dim=-1)


def dino_loss(
    student_logits: Float[Tensor, "n b k"],
    teacher: Float[Tensor, "g b k"],
    student_temperature: float,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of student and teacher in nats (equation 3), 0 or more.

    The mean over images and over the g (n - 1) pairs of a global crop i of the teacher and another
    crop j of the student of -sum_k p_ik log q_jk. It is ln k for a uniform student, and no less for
    a uniform teacher: a run whose loss stays there has collapsed.

    Args:
        student_logits: Of all crops; the first g are those that the teacher saw.
        teacher: From `teacher_probabilities`.
        student_temperature: Temperature of the student's softmax, above 0.
    """
    num_global, num_crops = len(teacher), len(student_logits)
    log_student = (student_logits.float() / student_temperature).log_softmax(dim=-1)
    # The cross-entropy is linear in both factors, so the sum over all pairs is a product of two
    # sums; the pairs of a crop with itself are taken off. No pair needs a tensor of its own.
    same = (teacher * log_student[:num_global]).sum(dim=0)
    others = teacher.sum(dim=0) * log_student.sum(dim=0) - same
    return -others.sum(dim=-1).mean() / (num_global * (num_crops - 1))


def batch_mean(logits: Float[Tensor, "g b k"], weight: float = 1.0) -> Float[Tensor, " k"]:
    """Return the mean of the teacher's logits over crops, images and ranks, without gradient.

    Args:
        logits: Of this rank's images.
        weight: Number of these images over the mean number per rank: 1 where ranks hold equally
            many.
    """
    return all_reduce_sum(weight * logits.detach().float().mean(dim=(0, 1))) / world_size()


def next_centre(
    centre: Float[Tensor, " k"], mean: Float[Tensor, " k"], momentum: float
) -> Float[Tensor, " k"]:
    """Return momentum * centre + (1 - momentum) * mean (equation 4)."""
    return momentum * centre + (1 - momentum) * mean


def teacher_entropy(probabilities: Float[Tensor, "g b k"]) -> Float[Tensor, ""]:
    """Return the mean entropy of the teacher's distributions in nats, from 0 to ln k.

    It goes to 0 or to ln k in a collapse. Every crop of the teacher stands in equally many pairs of
    `dino_loss`, so that loss minus this entropy is the mean KL divergence (equation 5), which goes
    to 0 when the output is the same for all images.
    """
    return torch.special.entr(probabilities).sum(dim=-1).mean()


def effective_rank(features: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Return in how many directions features vary, from 1 to d.

    The exponential of the entropy of the shares that the eigenvalues of the channels' correlations
    have in their sum (Roy and Vetterli 2007; arXiv 2210.02885 judges encoders by it). Channels
    that are copies of others add nothing to it, nor do those that are constant or hold NaN.
    """
    x = features.detach().float()
    x = x - x.mean(dim=0)
    x = (x / x.square().mean(dim=0).sqrt().clamp(min=1e-5)).nan_to_num(0, 0, 0)
    values = torch.linalg.eigvalsh(x.T @ x).clamp(min=0)
    return torch.special.entr(values / values.sum().clamp(min=1e-12)).sum().exp()


def feature_deviation(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Return how far features differ between images: 0 in a collapse, at most 1 / sqrt(d).

    The standard deviation over this rank's batch of the L2-normalised features, averaged over
    channels (arXiv 2011.10566, section 4.1). Features that are never negative share a mean and stay
    well below the upper end.
    """
    normalised = F.normalize(features.detach().float(), dim=-1)
    return normalised.std(dim=0, correction=0).mean()
