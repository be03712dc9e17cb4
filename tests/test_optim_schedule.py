"""Learning rates at the points where the formula is easy, and step by step beside torch's schedulers."""

import pytest
import torch
from torch.optim import lr_scheduler

from train.optim.schedule import Cosine, MultiStep, Polynomial


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


def test_multistep_golden_values():
    rate = MultiStep(epochs=90, base_lr=0.4, warmup_epochs=5, milestones=[30, 60, 80], factor=0.1)
    expected = {0: 0.0, 2.5: 0.2, 5: 0.4, 29.99: 0.4, 30: 0.04, 59.9: 0.04, 60: 0.004, 80: 0.0004, 90: 0.0004}
    assert {epoch: rate(epoch) for epoch in expected} == pytest.approx(expected, rel=1e-14)
    assert MultiStep(epochs=1, base_lr=1.0, warmup_epochs=0, milestones=[])(1) == 1.0


STEPS, WARM, ALL = 7, 3, 20  # steps an epoch, epochs of warm-up, epochs
TORCH = {
    "polynomial": (
        Polynomial(epochs=ALL, base_lr=2.0, end_lr=0.0, power=2, warmup_epochs=WARM),
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, (ALL - WARM) * STEPS, power=2),
    ),
    "cosine": (
        Cosine(epochs=ALL, base_lr=2.0, end_lr=0.25, warmup_epochs=WARM),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, (ALL - WARM) * STEPS, eta_min=0.25),
    ),
    "multistep": (
        MultiStep(epochs=ALL, base_lr=2.0, warmup_epochs=WARM, milestones=[9, 15], factor=0.2),
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [(9 - WARM) * STEPS, (15 - WARM) * STEPS], gamma=0.2),
    ),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("name", TORCH)
def test_every_step_is_that_of_torch(name):
    rate, made = TORCH[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    # LinearLR can't start at 0: it begins with our step 1.
    warm = lr_scheduler.LinearLR(optimizer, start_factor=1 / (WARM * STEPS), total_iters=WARM * STEPS - 1)
    both = lr_scheduler.SequentialLR(optimizer, [warm, made(optimizer)], milestones=[WARM * STEPS - 1])
    assert rate(0) == 0
    for step in range(1, ALL * STEPS):
        assert rate(step / STEPS) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12), step
        both.step()


def test_the_rates_of_a_whole_run_written_out():
    """56 epochs of 39 steps, 8 of warm-up: Peng Cheng Lab's lr_generator for MLPerf v1.0, in own words."""
    rate = Polynomial(epochs=56, base_lr=24.952061, end_lr=0.0001, power=2, warmup_epochs=8, decay_epochs=48)
    for step in range(56 * 39):
        if step < 312:
            expected = 24.952061 / 312 * step
        else:
            expected = (24.952061 - 0.0001) * (1 - (step - 312) / 1872) ** 2 + 0.0001
        assert rate(step / 39) == pytest.approx(expected, rel=1e-12, abs=1e-15)


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
        (MultiStep, {"factor": 1.0}, "schedule.factor=1.0"),
        (MultiStep, {"milestones": [20, 10]}, "schedule.milestones=.20, 10.: must rise"),
        (MultiStep, {"milestones": [5, 10]}, "schedule.milestones=.5, 10.: .*warmup_epochs=5"),
    ],
)
def test_impossible_settings_are_refused(made, arguments, named):
    with pytest.raises(ValueError, match=named):
        made(**{"epochs": 30, "base_lr": 1.0} | arguments)
