"""Learning rates at the points where the formula is easy."""

import pytest

from train.optim.schedule import Cosine, Polynomial


def test_polynomial_golden_values():
    rate = Polynomial(epochs=45, base_lr=8.0, end_lr=0.0, power=2, warmup_epochs=5)
    expected = {0: 0.0, 1: 1.6, 2.5: 4.0, 5: 8.0, 15: 4.5, 25: 2.0, 35: 0.5, 45: 0.0}
    assert {epoch: rate(epoch) for epoch in expected} == pytest.approx(expected, abs=1e-15)


def test_polynomial_ends_at_its_end_rate_and_stays_there():
    rate = Polynomial(epochs=90, base_lr=10.0, end_lr=0.0001, warmup_epochs=5, decay_epochs=40)
    assert rate(45) == rate(60) == rate(90) == 0.0001
    assert rate(25) == pytest.approx(0.0001 + (10 - 0.0001) / 4, rel=1e-15)


def test_power_one_is_a_line():
    rate = Polynomial(epochs=10, base_lr=1.0, end_lr=0.5, power=1, warmup_epochs=0)
    assert [rate(epoch) for epoch in (0, 5, 10)] == [1.0, 0.75, 0.5]


def test_cosine_golden_values():
    rate = Cosine(epochs=25, base_lr=4.0, end_lr=1.0, warmup_epochs=5)
    third = 5 + 20 / 3  # cos(pi / 3) = 1/2
    expected = {0: 0.0, 4: 3.2, 5: 4.0, third: 1 + 3 * 0.75, 15: 2.5, 25: 1.0, 30: 1.0}
    assert {epoch: rate(epoch) for epoch in expected} == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("made", [Polynomial, Cosine])
@pytest.mark.parametrize("warmup, decay", [(5, None), (0, None), (5, 12.5), (2.5, 30)])
def test_rates_rise_to_the_base_and_fall_from_there(made, warmup, decay):
    rate = made(epochs=20, base_lr=3.0, end_lr=0.01, warmup_epochs=warmup, decay_epochs=decay)
    epochs = [step / 39 for step in range(20 * 39 + 1)]
    before = [rate(epoch) for epoch in epochs if epoch < warmup]
    after = [rate(epoch) for epoch in epochs if epoch >= warmup]
    assert before == sorted(before)
    assert after == sorted(after, reverse=True)
    assert rate(warmup) == 3.0 and max(before, default=0.0) < 3.0
    assert min(after) >= 0.01


@pytest.mark.parametrize(
    "made, arguments, named",
    [
        (Polynomial, {"base_lr": 0.0}, "schedule.base_lr=0.0"),
        (Polynomial, {"end_lr": -1.0}, "schedule.end_lr=-1.0"),
        (Polynomial, {"power": 0.0}, "schedule.power=0.0"),
        (Polynomial, {"warmup_epochs": 30.0}, "schedule.warmup_epochs=30.0: .* epochs=30"),
        (Cosine, {"warmup_epochs": -1.0}, "schedule.warmup_epochs=-1.0"),
        (Cosine, {"decay_epochs": 0.0}, "schedule.decay_epochs=0.0"),
    ],
)
def test_impossible_settings_are_refused(made, arguments, named):
    with pytest.raises(ValueError, match=named):
        made(**{"epochs": 30, "base_lr": 1.0} | arguments)
