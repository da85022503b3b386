"""Dice, BCE and the other terms, against slow loops over pixels."""

import math

import pytest
import torch

from scribbleseg.config import LossConfig
from scribbleseg.losses.functional import (
    bce_loss,
    boundary_loss,
    dice_loss,
    focal_loss,
    lovasz_loss,
    split_target,
)
from scribbleseg.losses.segmentation import segmentation_loss


def case(seed=0, size=(2, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size[0], 1, *size[1:], generator=generator)
    target = torch.tensor([0, 1, 255], dtype=torch.uint8)[
        torch.randint(3, size, generator=generator)
    ]
    return logits, target


def slow_dice(logits, target):
    losses = []
    for image, truth in zip(logits[:, 0].tolist(), target.tolist(), strict=True):
        overlap = total = 0.0
        for row, truth_row in zip(image, truth, strict=True):
            for logit, label in zip(row, truth_row, strict=True):
                if label != 255:
                    probability = 1 / (1 + math.exp(-logit))
                    overlap += probability * label
                    total += probability + label
        losses.append(1 - (2 * overlap + 1) / (total + 1))
    return torch.tensor(losses)


def slow_bce(logits, target):
    losses = []
    for image, truth in zip(logits[:, 0].tolist(), target.tolist(), strict=True):
        terms = []
        for row, truth_row in zip(image, truth, strict=True):
            for logit, label in zip(row, truth_row, strict=True):
                if label != 255:
                    probability = 1 / (1 + math.exp(-logit))
                    terms.append(-math.log(probability if label else 1 - probability))
        losses.append(sum(terms) / len(terms))
    return torch.tensor(losses)


@pytest.mark.parametrize("seed", range(3))
def test_dice_and_bce_equal_slow_loops(seed):
    logits, target = case(seed)
    truth, valid = split_target(target)
    torch.testing.assert_close(dice_loss(logits, truth, valid), slow_dice(logits, target))
    torch.testing.assert_close(bce_loss(logits, truth, valid), slow_bce(logits, target))


def slow_focal(logits, target):
    losses = []
    for image, truth in zip(logits[:, 0], target, strict=True):
        terms = []
        for logit, label in zip(image[truth != 255], truth[truth != 255], strict=True):
            probability = 1 / (1 + math.exp(-float(logit)))
            right = probability if label else 1 - probability
            terms.append(-((1 - right) ** 2) * math.log(right))
        losses.append(sum(terms) / len(terms))
    return torch.tensor(losses)


def slow_boundary(logits, target):
    losses = []
    for image, truth in zip(logits[:, 0], target, strict=True):
        terms = []
        for y, x in (truth != 255).nonzero().tolist():
            window = truth[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5]
            if (window == 0).any() and (window == 1).any():
                probability = 1 / (1 + math.exp(-float(image[y, x])))
                terms.append(-math.log(probability if truth[y, x] else 1 - probability))
        losses.append(sum(terms) / max(1, len(terms)))
    return torch.tensor(losses)


def slow_lovasz(logits, target):
    """Integrate over t what IoU loses when all pixels whose hinge error exceeds t are wrong."""
    losses = []
    for image, truth in zip(logits[:, 0], target, strict=True):
        values, label = image[truth != 255], truth[truth != 255] == 1
        errors = (1 - values * torch.where(label, 1, -1)).relu()
        loss, below = 0.0, 0.0
        for threshold in errors.sort().values.tolist():
            wrong = errors > below
            iou = (label & ~wrong).sum() / (label | wrong).sum().clamp(min=1)
            loss += (threshold - below) * (1 - float(iou))
            below = threshold
        losses.append(loss)
    return torch.tensor(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("fast", "slow"),
    [(focal_loss, slow_focal), (boundary_loss, slow_boundary), (lovasz_loss, slow_lovasz)],
)
def test_the_other_terms_equal_slow_loops(fast, slow, seed):
    logits, target = case(seed, size=(2, 16, 21))
    # A large object, so that not every pixel is near an outline.
    target[:, 6:] = 1
    target[0, :, 12:] = 255
    truth, valid = split_target(target)
    torch.testing.assert_close(fast(logits, truth, valid), slow(logits, target))


def test_all_terms_are_added_by_their_weights():
    logits, target = case(size=(2, 12, 12))
    config = LossConfig(dice=0.0, bce=0.0, focal=2.0, boundary=0.5, lovasz=3.0)
    parts = 2 * slow_focal(logits, target) + 0.5 * slow_boundary(logits, target)
    expected = (parts + 3 * slow_lovasz(logits, target)).mean()
    torch.testing.assert_close(segmentation_loss(logits, (), target, config), expected)


def test_ignored_pixels_have_no_gradient():
    logits, target = case()
    logits.requires_grad_()
    segmentation_loss(logits, (), target, LossConfig()).backward()
    assert (logits.grad[:, 0][target == 255] == 0).all()
    assert (logits.grad[:, 0][target != 255] != 0).all()


@pytest.mark.parametrize("term", [focal_loss, boundary_loss, lovasz_loss])
def test_an_image_that_is_wholly_ignored_costs_nothing(term):
    logits, target = case()
    assert not term(logits, *split_target(torch.full_like(target, 255))).any()


def test_an_image_that_is_wholly_ignored_or_without_object_gives_a_finite_loss():
    logits, _ = case()
    for value in (0, 255):
        target = torch.full((2, 6, 5), value, dtype=torch.uint8)
        assert segmentation_loss(logits, (), target, LossConfig()).isfinite()
    assert segmentation_loss(torch.full((1, 1, 4, 4), -50.0), (), torch.zeros(
        1, 4, 4, dtype=torch.uint8), LossConfig()) < 1e-6  # fmt: skip


@pytest.mark.parametrize(("dice", "bce"), [(1.0, 0.0), (0.0, 2.0), (0.5, 1.5)])
def test_the_weights_mix_dice_and_bce(dice, bce):
    logits, target = case()
    expected = (dice * slow_dice(logits, target) + bce * slow_bce(logits, target)).mean()
    actual = segmentation_loss(logits, (), target, LossConfig(dice=dice, bce=bce))
    torch.testing.assert_close(actual, expected)


def test_side_outputs_are_resized_weighted_and_normalised():
    logits, target = case(size=(2, 8, 12))
    side = logits[..., ::2, ::2].contiguous()
    coarse = logits[..., ::4, ::4].contiguous()
    config = LossConfig(side=0.5)

    def alone(output):
        resized = torch.nn.functional.interpolate(
            output, size=(8, 12), mode="bilinear", align_corners=False
        )
        return segmentation_loss(resized, (), target, config)

    expected = (alone(logits) + 0.5 * alone(side) + 0.25 * alone(coarse)) / 1.75
    torch.testing.assert_close(segmentation_loss(logits, (side, coarse), target, config), expected)
    main_only = segmentation_loss(logits, (side, coarse), target, LossConfig(side=0.0))
    torch.testing.assert_close(main_only, alone(logits))


def test_an_output_that_counts_nothing_has_a_gradient_all_the_same():
    # DDP fails where a parameter gets none.
    logits, target = case(size=(2, 8, 12))
    side = logits[..., ::2, ::2].clone().requires_grad_()
    segmentation_loss(logits, (side,), target, LossConfig(side=0.0)).backward()
    assert side.grad is not None and not side.grad.any()


def test_the_loss_of_a_batch_is_the_mean_over_its_images():
    logits, target = case(size=(4, 6, 5))
    halves = [segmentation_loss(logits[i::2], (), target[i::2], LossConfig()) for i in (0, 1)]
    whole = segmentation_loss(logits, (), target, LossConfig())
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_half_precision_logits_are_summed_in_fp32():
    logits, target = case(size=(1, 64, 64))
    half = segmentation_loss(logits.bfloat16(), (), target, LossConfig())
    assert half.dtype == torch.float32
    full = segmentation_loss(logits.bfloat16().float(), (), target, LossConfig())
    torch.testing.assert_close(half, full)
