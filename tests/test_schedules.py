"""Learning rate and EMA decay as functions of the step."""

import math

import pytest

from scribbleseg.schedules import ema_decay, warmup_cosine


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
