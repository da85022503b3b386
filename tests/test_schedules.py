"""Learning rate and EMA decay as functions of the step."""

import math

import pytest

from scribbleseg.schedules import cosine, ema_decay, linear_warmup, warmup_cosine


def test_learning_rate_rises_linearly_then_falls_by_a_cosine_to_zero():
    factors = [warmup_cosine(step, num_steps=100, warmup=0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0)
    assert factors[77] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 67 / 90))


def test_no_warmup_starts_at_the_peak():
    assert warmup_cosine(0, num_steps=10, warmup=0.0) == 1


def test_ema_decay_warms_up_to_its_value():
    decays = [ema_decay(step, decay=0.99) for step in range(2000)]
    assert decays[0] == 0.1
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    assert ema_decay(5, decay=0.0) == 0.0


@pytest.mark.parametrize(("start", "end"), [(0.99, 1.0), (5e-4, 1e-6), (0.3, 0.3)])
def test_cosine_goes_from_start_to_end_and_stays(start, end):
    values = [cosine(step, num_steps=100, start=start, end=end) for step in range(121)]
    assert values[0] == pytest.approx(start)
    assert values[50] == pytest.approx((start + end) / 2)
    assert values[25] == pytest.approx(start + (end - start) * (1 - math.cos(math.pi / 4)) / 2)
    assert values[100:] == [end] * 21
    assert values == sorted(values, reverse=start > end)


def test_linear_warmup_goes_from_start_to_end_and_stays():
    values = [linear_warmup(step, num_warmup=4, start=0.02, end=0.04) for step in range(7)]
    assert values == pytest.approx([0.02, 0.025, 0.03, 0.035, 0.04, 0.04, 0.04])
    assert linear_warmup(0, num_warmup=0, start=0.02, end=0.04) == 0.04
