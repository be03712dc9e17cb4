import math

import pytest

from train.sim.convergence import Epochs
from train.sim.run import num_evaluations, run_time
from train.sim.step import StepTime

STEP = StepTime(0.7, 0.1, 0.1, 0.05, 0.05)


@pytest.mark.parametrize(
    "epochs, every, offset, count",
    [(68, 4, 0, 17), (64, 4, 0, 16), (66, 4, 0, 17), (3, 4, 0, 1), (30, 1, 4, 27), (5, 4, 1, 2)],
)
def test_number_of_evaluations(epochs, every, offset, count):
    assert num_evaluations(epochs, every, offset) == count


def test_parts_add_up_to_the_median_run():
    run = run_time(STEP, 2.0, 5.0, steps_per_epoch=10, epochs=[4, 8], eval_every=2)
    parts = (run.compute_s, run.exposed_comm_s, run.straggler_s, run.input_s, run.other_s, run.eval_s, run.startup_s)
    assert run.epochs == 6 and run.steps == 60 and run.evaluations == 3
    assert sum(parts) == pytest.approx(run.time_to_train_s) == pytest.approx(60 + 6 + 5)


def test_fixed_epochs_without_model_error_have_no_interval():
    run = run_time(STEP, 2.0, 5.0, 10, 6, 2)
    assert run.interval_s == (run.time_to_train_s, run.time_to_train_s)


def test_log_normal_interval_is_exact():
    run = run_time(STEP, 2.0, 5.0, 10, 6, 2, model_error=0.2)
    z = 1.6448536
    expected = [run.time_to_train_s * math.exp(sign * z * 0.2) for sign in (-1, 1)]
    assert run.interval_s == pytest.approx(expected, rel=1e-6)


def test_uniform_epochs_give_the_quantiles_of_a_line():
    run = run_time(STEP, 0.0, 0.0, 1000, [10, 20], 5)
    assert run.interval_s == pytest.approx((10_500, 19_500), rel=1e-3)


def test_reference_epochs_give_normal_quantiles():
    run = run_time(STEP, 0.0, 0.0, 10_000, Epochs(32_768, 56.0, 0.447), 4)
    assert run.epochs == 56.0 and run.steps == 560_000
    z = 1.6448536 * 0.447
    assert run.epochs_interval == pytest.approx((56 - z, 56 + z), abs=0.01)
    assert run.interval_s == pytest.approx(((56 - z) * 1e4, (56 + z) * 1e4), rel=3e-4)


def test_epochs_without_a_spread_are_one_number():
    given, known = (run_time(STEP, 2.0, 5.0, 10, epochs, 2, model_error=0.1) for epochs in (6, Epochs(1, 6.0, 0.0)))
    assert given == known and given.epochs_interval == (6.0, 6.0)


def test_both_spreads_widen_the_interval():
    only_epochs, both = (run_time(STEP, 2.0, 5.0, 10, [4, 8], 2, model_error=e).interval_s for e in (0.0, 0.2))
    assert both[0] < only_epochs[0] and both[1] > only_epochs[1]


@pytest.mark.parametrize("epochs, every, named", [([8, 4], 2, "epochs="), (0, 2, "epochs=0"), (4, 0, "eval_every=0")])
def test_wrong_lengths_are_refused(epochs, every, named):
    with pytest.raises(ValueError, match=named):
        run_time(STEP, 2.0, 5.0, 10, epochs, every)
