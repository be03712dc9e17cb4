"""Steps that change their time on the way, with times that can be added up by hand."""

import pytest

from train.sim.clock import EmulatedClock
from train.sim.course import Course, checked_sizes
from train.sim.run import run_time
from train.sim.step import StepTime

SMALL = StepTime(compute_s=1.0, exposed_comm_s=0.5, straggler_s=0.25, input_s=0.0, other_s=0.25)
LARGE = StepTime(compute_s=4.0, exposed_comm_s=0.0, straggler_s=1.0, input_s=0.5, other_s=0.5)
COURSE = Course(((1, SMALL), (11, LARGE), (21, SMALL)))


def test_each_step_has_its_own_time_and_any_stretch_their_sum():
    each = [COURSE.at(step) for step in range(1, 31)]
    assert each == [SMALL] * 10 + [LARGE] * 10 + [SMALL] * 10
    for first in range(1, 31):
        for last in range(first - 1, 31):
            assert COURSE.seconds(last, first) == sum(step.step_s for step in each[first - 1 : last])
    assert COURSE.parts(12, 10) == StepTime(1 + 8, 0.5, 0.25 + 2, 1.0, 0.25 + 1)
    assert COURSE.mean(20) == StepTime(2.5, 0.25, 0.625, 0.25, 0.375)
    assert Course.of(SMALL).mean(3) is SMALL and Course.of(COURSE) is COURSE


def test_the_clock_goes_through_it():
    clock, seconds = EmulatedClock(COURSE, eval_s=10.0, startup_s=3.0), []
    assert clock.step == SMALL and clock.seconds == 3
    for _ in range(25):
        clock.advance_step()
        seconds.append(clock.step.step_s)
    clock.advance_eval()
    assert seconds == [2] * 10 + [6] * 10 + [2] * 5 and clock.seconds == 3 + 90 + 10
    resumed = EmulatedClock(COURSE, eval_s=10.0, startup_s=3.0)
    resumed.load_state_dict(clock.state_dict())
    assert (resumed.seconds, resumed.step) == (clock.seconds, clock.step)


def test_a_runs_parts_are_those_of_its_steps_and_add_up():
    run = run_time(COURSE, 2.0, 5.0, steps_per_epoch=10, epochs=2.5, eval_every=1)
    assert (run.compute_s, run.exposed_comm_s, run.straggler_s) == (10 + 40 + 5, 5 + 2.5, 2.5 + 10 + 1.25)
    assert (run.input_s, run.other_s, run.steps, run.evaluations) == (5, 2.5 + 5 + 1.25, 25, 3)
    assert run.time_to_train_s == 5 + COURSE.seconds(25) + 3 * 2 and run.interval_s == (run.time_to_train_s,) * 2
    low, high = run_time(COURSE, 2.0, 5.0, 10, [1, 2], 1).interval_s  # the second epoch's steps are the longer ones
    assert (low, high) == pytest.approx((5 + 20 + 4 + 6, 5 + 20 + 60 + 4), abs=4)


@pytest.mark.parametrize(
    "wrong", [[[1, 24]], [[0, 24], [0, 32]], [[0, 24], [2, 0]], [[0]], [[0, 24], [3, 32], [2, 40]]]
)
def test_sizes_start_at_epoch_0_and_rise(wrong):
    with pytest.raises(
        ValueError, match=r"data.train_sizes=.*must be \[\[first epoch, pixels\], ...\] from epoch 0 on"
    ):
        checked_sizes(wrong)
    assert checked_sizes([[0, 24], [3, 32]]) == ((0, 24), (3, 32))
