"""Stroke matching, held against loops over positions and strokes."""

import math

import pytest
import torch
from torch import Tensor

from scribbleseg.models.matching import HEAD_CHANNELS, NUM_HEADS, StrokeMatch


def slow(embedded: Tensor, strokes: Tensor, cell: int, scale: Tensor) -> Tensor:
    """Compare one position with one cell of strokes at a time."""
    _, height, width = embedded.shape
    out = torch.zeros(2 * NUM_HEADS, height, width)
    for kind in range(2):
        for head in range(NUM_HEADS):
            part = embedded[head * HEAD_CHANNELS : (head + 1) * HEAD_CHANNELS]
            keys: list[Tensor] = []
            for top in range(0, height, cell):
                for left in range(0, width, cell):
                    weights = strokes[kind, top : top + cell, left : left + cell]
                    if weights.sum() > 0:
                        window = part[:, top : top + cell, left : left + cell]
                        keys.append((window * weights).sum(dim=(1, 2)) / weights.sum())
            for y in range(height):
                for x in range(width):
                    here = part[:, y, x]
                    cosines = [float(here @ key / (here.norm() * key.norm())) for key in keys]
                    powers = [math.exp(float(scale[head]) * value) for value in [*cosines, -1.0]]
                    soft = math.log(sum(powers) / len(powers)) / float(scale[head])
                    out[kind * NUM_HEADS + head, y, x] = soft
    return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell", [1, 2])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_it_equals_the_loops(cell: int, size: tuple[int, int], training: bool) -> None:
    torch.manual_seed(0)
    match = StrokeMatch(10, 12, cell).train(training)
    features = torch.randn(2, 10, *size)
    strokes = (torch.rand(2, 2, *size) > 0.8).float() * torch.rand(2, 2, *size)
    strokes[1, 0] = 0
    with torch.no_grad():
        match.log_scale += torch.randn(NUM_HEADS, 1, 1)
        embedded = match.embed(features)
        found = match._similarity(embedded, strokes)
        scale = match.log_scale.exp().flatten()
    for one in range(2):
        wanted = slow(embedded[one], strokes[one], cell, scale)
        torch.testing.assert_close(found[one], wanted, rtol=1e-4, atol=1e-4)


def test_it_starts_at_zero_and_learns_without_strokes_too() -> None:
    torch.manual_seed(0)
    match = StrokeMatch(10, 12, 2)
    features = torch.randn(1, 10, 6, 8, requires_grad=True)
    none = torch.zeros(1, 2, 6, 8)
    assert not match(features, none).any()
    torch.nn.init.normal_(match.project.weight)
    similarity = match._similarity(match.embed(features), none)
    torch.testing.assert_close(similarity, torch.full_like(similarity, -1.0))
    match(features, none).sum().backward()
    for parameter in match.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert features.grad is not None and features.grad.isfinite().all()


def test_a_scale_beyond_what_exponentials_can_hold_gives_numbers() -> None:
    torch.manual_seed(0)
    match = StrokeMatch(10, 12, 1)
    torch.nn.init.constant_(match.log_scale, math.log(500))
    torch.nn.init.normal_(match.project.weight)
    strokes = (torch.rand(1, 2, 6, 8) > 0.8).float()
    similarity = match._similarity(match.embed(torch.randn(1, 10, 6, 8)), strokes)
    assert similarity.isfinite().all() and similarity.abs().max() <= 1
    similarity.sum().backward()
    for parameter in match.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_what_looks_like_the_object_stroke_is_most_similar_to_it() -> None:
    """Two textures, a stroke on each: every position sides with the stroke of its own."""
    torch.manual_seed(0)
    match = StrokeMatch(2, 4, 1)
    truth = torch.rand(8, 8) > 0.5
    features = torch.stack([truth, ~truth]).float()[None]
    strokes = torch.zeros(1, 2, 8, 8)
    for kind, where in enumerate((truth, ~truth)):
        y, x = torch.nonzero(where)[0]
        strokes[0, kind, y, x] = 1
    with torch.no_grad():
        similarity = match._similarity(match.embed(features), strokes)[0]
    to_object, to_background = similarity.split(NUM_HEADS)
    assert ((to_object > to_background).all(dim=0) == truth).all()
