"""Rungs, and who goes on from them, by tables made by hand; and a search replayed by them."""

import math

import pytest

from benchmarks.asha_replay import replay
from scribbleseg.config import TrainConfig
from tune.rungs import furthest, promotable, rung_epochs, rung_scores


@pytest.mark.parametrize(
    ("epochs", "validate_every", "grace", "rungs"),
    [
        (18, 1, None, (2, 6)),
        (40, 1, None, (4, 12, 36)),
        (2, 1, None, (1,)),
        (9, 1, 3, (3,)),
        # The last epoch is no rung.
        (9, 1, 9, ()),
        (9, 1, 20, ()),
        (1, 1, None, ()),
        # Rungs are validated.
        (30, 5, 2, (5, 15)),
        (30, 7, None, (7, 21)),
        (30, 20, None, (20,)),
        (30, 40, None, ()),
    ],
)
def test_rungs_are_validated_epochs_each_three_times_as_far(epochs, validate_every, grace, rungs):
    train = TrainConfig(epochs=epochs, validate_every=validate_every)
    assert rung_epochs(train, grace) == rungs


def test_the_score_at_a_rung_is_the_best_validation_up_to_it():
    mious = [0.1, 0.4, 0.3, 0.2, 0.5, 0.4]
    history = [{"epoch": epoch, "miou": miou} for epoch, miou in enumerate(mious, start=1)]
    assert rung_scores(history, (1, 3, 6)) == (0.1, 0.4, 0.5)
    assert rung_scores(history[:5], (1, 3, 6)) == (0.1, 0.4)
    assert rung_scores([], (1, 3, 6)) == () == rung_scores(history, ())
    assert rung_scores([{"epoch": 1, "loss": 1.0}], (1, 3)) == (-math.inf,)


A_TO_F = {"a": (0.5,), "b": (0.4,), "c": (0.6,), "d": (0.3,), "e": (0.6,), "f": (0.1,)}


@pytest.mark.parametrize(
    ("scores", "waiting", "names"),
    [
        ({}, "", ""),
        # Of fewer than three, none is among the best third.
        ({"a": (0.5,), "b": (0.4,)}, "ab", ""),
        ({"a": (0.5,), "b": (0.4,), "c": (0.6,)}, "abc", "c"),
        # Of equal ones the first comes first.
        (A_TO_F, "abcdef", "ce"),
        (A_TO_F, "abdef", "e"),
        # One that has gone on takes up its place below.
        (A_TO_F | {"c": (0.6, 0.7)}, "abcdef", "e"),
        (A_TO_F | {"c": (0.6, 0.7), "e": (0.6, 0.8)}, "abcdef", ""),
        # The highest rung comes first, whatever the scores.
        (
            A_TO_F | {name: (0.9, 0.1) for name in "xy"} | {"z": (0.9, 0.2), "w": (1.0,)},
            "abcdefwxyz",
            "zw",
        ),
        # One that still runs counts, but does not go on again.
        ({"a": (0.5,), "b": (0.4,), "c": (0.6,)}, "ab", ""),
    ],
)
def test_the_best_third_of_a_rung_goes_on(scores, waiting, names):
    assert promotable(scores, list(waiting)) == list(names)


def test_where_no_other_will_come_the_best_of_those_that_came_furthest_goes_on():
    scores = {"a": (0.9,), "b": (0.5, 0.6), "c": (0.5, 0.7), "d": (0.5, 0.7), "e": ()}
    assert furthest(scores, list("abcde")) == ["c"]
    assert furthest(scores, list("ab")) == ["b"]
    assert furthest(scores, ["e"]) == furthest(scores, []) == []


def curve(miou, epochs=9):
    return [{"epoch": epoch, "miou": miou} for epoch in range(1, epochs + 1)]


@pytest.mark.parametrize(
    ("mious", "rungs", "epochs"),
    [
        # Without rungs all are trained to their end.
        ([0.1, 0.2, 0.3], (), 27),
        # One of three goes on to the second rung, and because no other comes, to its end.
        ([0.1, 0.2, 0.3], (1, 3), 1 + 1 + 9),
        # Two alone: the better one has its chance all the same.
        ([0.2, 0.1], (1, 3), 9 + 1),
        # The best first: three of nine go on, and one of these.
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], (1, 3), 9 * 1 + 3 * 2 + 6),
        # The best last: from the third on each goes on, and from the fifth on each to its end.
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], (1, 3), 9 * 1 + 7 * 2 + 5 * 6),
    ],
)
def test_a_replay_trains_as_few_epochs_as_the_rungs_say(mious, rungs, epochs):
    outcome = replay([curve(miou) for miou in mious], rungs)
    assert outcome.epochs == epochs and outcome.best == pytest.approx(max(mious))
