"""DINO's loss, centre and signs of collapse, against slow loops written from the paper."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from scribbleseg.losses.dino import (
    batch_mean,
    dino_loss,
    effective_rank,
    feature_deviation,
    next_centre,
    teacher_entropy,
    teacher_probabilities,
)
from tests.ranks import spawn

# Global crops, all crops, images, prototypes, temperatures of student and teacher.
every_case = pytest.mark.parametrize(
    ("num_global", "num_crops", "num_images", "num_prototypes", "warm", "cold"),
    [
        (2, 2, 1, 2, 0.1, 0.04),
        (2, 4, 3, 5, 0.1, 0.07),
        (2, 8, 2, 16, 0.2, 0.02),
        (1, 2, 4, 7, 1.0, 1.0),
        (1, 3, 2, 3, 0.1, 0.04),
        (3, 5, 2, 11, 0.5, 0.1),
        (3, 3, 1, 4, 0.1, 0.04),
    ],
)


def case(num_global, num_crops, num_images, num_prototypes, seed=0):
    """Student's and teacher's logits, cosines as the head gives them, and a centre."""
    generator = torch.Generator().manual_seed(seed)

    def cosines(*shape):
        return 2 * torch.rand(*shape, generator=generator) - 1

    student = cosines(num_crops, num_images, num_prototypes)
    teacher = cosines(num_global, num_images, num_prototypes)
    return student, teacher, 0.3 * cosines(num_prototypes)


def slow_softmax(logits, temperature):
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def slow_probabilities(teacher, centre, temperature):
    return [
        [
            slow_softmax([t - c for t, c in zip(image, centre, strict=True)], temperature)
            for image in crop
        ]
        for crop in teacher
    ]


def slow_loss(student, probabilities, temperature):
    terms = []
    for i, teacher_crop in enumerate(probabilities):
        for j, student_crop in enumerate(student):
            if i == j:
                continue
            for p, logits in zip(teacher_crop, student_crop, strict=True):
                q = slow_softmax(logits, temperature)
                terms.append(-sum(a * math.log(b) for a, b in zip(p, q, strict=True)))
    return sum(terms) / len(terms)


def slow_centre(centre, teacher, momentum):
    rows = [image for crop in teacher for image in crop]
    return [
        momentum * c + (1 - momentum) * sum(row[index] for row in rows) / len(rows)
        for index, c in enumerate(centre)
    ]


@every_case
@pytest.mark.parametrize("seed", range(2))
def test_loss_equals_slow_loops(
    num_global, num_crops, num_images, num_prototypes, warm, cold, seed
):
    student, teacher, centre = case(num_global, num_crops, num_images, num_prototypes, seed)
    probabilities = teacher_probabilities(teacher, centre, cold)
    expected = slow_probabilities(teacher.tolist(), centre.tolist(), cold)
    torch.testing.assert_close(probabilities, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    loss = dino_loss(student, probabilities, warm)
    assert loss.item() == pytest.approx(slow_loss(student.tolist(), expected, warm), rel=1e-4)


@every_case
def test_the_gradient_equals_that_of_the_sum_over_pairs(
    num_global, num_crops, num_images, num_prototypes, warm, cold
):
    student, teacher, centre = case(num_global, num_crops, num_images, num_prototypes)
    probabilities = teacher_probabilities(teacher, centre, cold)
    student.requires_grad_()
    (fast,) = torch.autograd.grad(dino_loss(student, probabilities, warm), student)
    pairs = [
        torch.nn.functional.cross_entropy(student[j] / warm, probabilities[i])
        for i in range(num_global)
        for j in range(num_crops)
        if i != j
    ]
    (slow,) = torch.autograd.grad(torch.stack(pairs).mean(), student)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-4)


def test_a_crop_is_not_compared_with_itself():
    student, teacher, centre = case(1, 3, 2, 5)
    student.requires_grad_()
    dino_loss(student, teacher_probabilities(teacher, centre, 0.04), 0.1).backward()
    assert (student.grad[0] == 0).all()
    assert (student.grad[1:] != 0).all()


def test_no_gradient_reaches_the_teacher():
    student, teacher, centre = case(2, 4, 3, 5)
    for tensor in (student, teacher, centre):
        tensor.requires_grad_()
    probabilities = teacher_probabilities(teacher, centre.detach(), 0.04)
    assert not probabilities.requires_grad
    assert not batch_mean(teacher).requires_grad
    dino_loss(student, probabilities, 0.1).backward()
    assert teacher.grad is None
    assert student.grad is not None


@every_case
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centre_equals_slow_loops_and_the_old_one_is_kept(
    num_global, num_crops, num_images, num_prototypes, warm, cold, momentum
):
    _, teacher, centre = case(num_global, num_crops, num_images, num_prototypes)
    before = centre.clone()
    expected = slow_centre(centre.tolist(), teacher.tolist(), momentum)
    after = next_centre(centre, batch_mean(teacher), momentum)
    torch.testing.assert_close(after, torch.tensor(expected))
    assert torch.equal(centre, before)


def centre_on_rank(rank, path):
    """Save the centre after one step on half of the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    _, teacher, centre = case(2, 2, 6, 5)
    mine = teacher[:, 3 * rank : 3 * rank + 3]
    torch.save(next_centre(centre, batch_mean(mine), 0.9), f"{path}.{rank}")
    dist.destroy_process_group()


def test_two_ranks_have_the_centre_of_one_process_with_the_whole_batch(tmp_path):
    path = tmp_path / "group"
    spawn(centre_on_rank, (path,), 2)
    first, second = (torch.load(f"{path}.{rank}") for rank in range(2))
    assert torch.equal(first, second)
    _, teacher, centre = case(2, 2, 6, 5)
    torch.testing.assert_close(first, next_centre(centre, batch_mean(teacher), 0.9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_is_computed_in_fp32_under_autocast(dtype):
    student, teacher, centre = case(2, 8, 4, 4096)
    student, teacher = student.to(dtype), teacher.to(dtype)
    features = student[0]

    def compute(student, teacher, features):
        probabilities = teacher_probabilities(teacher, centre, 0.02)
        return (
            dino_loss(student, probabilities, 0.1),
            batch_mean(teacher),
            teacher_entropy(probabilities),
            feature_deviation(features),
        )

    with torch.autocast("cpu", dtype=dtype):
        lowered = compute(student, teacher, features)
    full = compute(student.float(), teacher.float(), features.float())
    for a, b in zip(lowered, full, strict=True):
        assert a.dtype == torch.float32
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_logits_far_outside_the_cosines_give_a_finite_loss():
    student, teacher, centre = case(2, 4, 3, 5)
    student = (1e4 * student).requires_grad_()
    loss = dino_loss(student, teacher_probabilities(1e4 * teacher, centre, 0.02), 0.1)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("num_prototypes", [4, 1024])
def test_a_uniform_collapse_shows_as_ln_k(num_prototypes):
    student, teacher, _ = case(2, 4, 3, num_prototypes)
    uniform = torch.full_like(teacher, 1 / num_prototypes)
    assert teacher_entropy(uniform).item() == pytest.approx(math.log(num_prototypes), rel=1e-5)
    flat = dino_loss(torch.zeros_like(student), uniform, 0.1)
    assert flat.item() == pytest.approx(math.log(num_prototypes), rel=1e-5)
    assert dino_loss(student, uniform, 0.1) > flat


def test_a_collapse_to_one_prototype_shows_as_no_entropy_and_no_divergence():
    one_hot = torch.zeros(2, 3, 8)
    one_hot[..., 5] = 1
    assert teacher_entropy(one_hot) == 0
    assert dino_loss(100 * one_hot[[0, 0, 1, 1]], one_hot, 0.1) == 0


@every_case
def test_the_loss_is_the_teachers_entropy_plus_the_divergence_of_the_pairs(
    num_global, num_crops, num_images, num_prototypes, warm, cold
):
    student, teacher, centre = case(num_global, num_crops, num_images, num_prototypes)
    probabilities = teacher_probabilities(teacher, centre, cold)
    divergences = [
        torch.nn.functional.kl_div(
            (student[j] / warm).log_softmax(-1), probabilities[i], reduction="batchmean"
        )
        for i in range(num_global)
        for j in range(num_crops)
        if i != j
    ]
    torch.testing.assert_close(
        dino_loss(student, probabilities, warm) - teacher_entropy(probabilities),
        torch.stack(divergences).mean(),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize(("num_pixels", "num_directions"), [(50, 3), (400, 8), (400, 32)])
def test_the_effective_rank_is_that_of_the_channels_correlations(num_pixels, num_directions):
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(num_pixels, num_directions, generator=generator)
    mixing = torch.randn(num_directions, 32, generator=generator)
    features = 5 + torch.linspace(1, 9, 32) * (directions @ mixing)
    values = np.linalg.eigvalsh(np.corrcoef(features.double().numpy(), rowvar=False))
    shares = values[values > 1e-9] / values[values > 1e-9].sum()
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(features).item() == pytest.approx(expected, rel=1e-3)
    assert 1 <= effective_rank(features) <= num_directions + 1e-3


def test_copies_and_constants_add_no_rank():
    features = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    assert effective_rank(features).item() == pytest.approx(4, rel=0.01)
    copies = torch.cat([features, -2 * features, torch.full((4000, 3), 7.0)], dim=1)
    assert effective_rank(copies).item() == pytest.approx(4, rel=0.01)
    copies[7, 8] = math.nan
    assert effective_rank(copies).item() == pytest.approx(4, rel=0.01)
    assert effective_rank(features[:1].expand(9, -1)).item() == pytest.approx(1, abs=1e-5)
    assert effective_rank(features[:1]).item() == pytest.approx(1, abs=1e-5)


def test_feature_deviation_tells_spread_from_collapsed_features():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, 64, generator=generator)
    assert feature_deviation(spread).item() == pytest.approx(1 / math.sqrt(64), rel=0.02)
    assert feature_deviation(spread[:1].expand(10, -1)).item() == pytest.approx(0, abs=1e-6)
    # Length alone is no information: the head sees it, but the cosines of a neighbour do not.
    scaled = spread[:1] * torch.arange(1.0, 11.0)[:, None]
    assert feature_deviation(scaled).item() == pytest.approx(0, abs=1e-6)
    assert feature_deviation(spread[:1]) == 0
