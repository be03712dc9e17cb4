"""What faults cost on the emulated clock, with prices that can be added up by hand."""

import pytest

from train.sim.clock import EmulatedClock
from train.sim.course import Course
from train.sim.faults import Condition, DeadChip, FlippedBit, LostHost, SlowChip, SlowLink
from train.sim.step import StepTime
from train.sim.timeline import Pace, Timeline
from train.sim.toll import Toll

SOUND = StepTime(compute_s=2.0, exposed_comm_s=0.5, straggler_s=0.25, input_s=0.0, other_s=0.25)
PACE = Pace(
    seed=0,
    chips=16,
    chips_per_host=8,
    steps_per_epoch=10,
    step_s=3.0,
    startup_s=5.0,
    eval_s=4.0,
    eval_every=1,
    eval_offset=0,
    checkpoint_steps=None,
)


def price(state: Condition) -> Course:
    """A slow chip is waited for, a slow link multiplies communication, a lost chip saves 1/32 s of it."""
    factor = max((factor for _, factor in state.links), default=1)
    exposed_s = 0.5 * factor - state.lost / 32
    return Course.of(StepTime(2.0, exposed_s, max(0.25, (state.slowdown - 1) * 2.0), 0.0, 0.25))


def toll(*faults, steps: int = 40) -> Toll:
    return Toll(Timeline(faults, PACE, steps), price)


def test_without_faults_the_clock_is_steps_times_their_time():
    without = toll()
    assert without.train_s(7) == 21 and without.cost_s(40) == 0 and without.values(7) == {}
    assert without.step(7) == SOUND and without.parts(2) == StepTime(4.0, 1.0, 0.5, 0.0, 0.5)


def test_slow_steps_cost_what_they_are_longer():
    slow = toll(SlowChip(2, at_steps=3, for_steps=4), SlowLink(4, at_steps=5, for_steps=1))
    assert [slow.step(step).step_s for step in (2, 3, 5, 6, 7)] == [3, 4.75, 6.25, 4.75, 3]
    assert slow.cost_s(2) == 0 and slow.cost_s(3) == 1.75 and slow.cost_s(40) == 4 * 1.75 + 1.5
    assert slow.recovery_s(40) == 0
    assert slow.parts(40).straggler_s == 36 * 0.25 + 4 * 2 and slow.parts(40).exposed_comm_s == 40 * 0.5 + 1.5


@pytest.mark.parametrize("between, repeated", [(None, 13), (0, 13), (5, 3), (6, 1), (13, 13), (12, 1), (20, 13)])
def test_with_a_spare_all_steps_since_the_checkpoint_are_repeated(between, repeated):
    """It dies in step 13: that one is lost, and those after the last checkpoint before it; 0: there is none."""
    dead = toll(DeadChip(at_steps=13, detect_s=7, restart_s=11, checkpoint_steps=between))
    assert dead.recovery_s(12) == 0 and dead.recovery_s(13) == 18 + 3 * repeated
    assert dead.step(13).step_s == 3 + 18 + 3 * repeated and dead.step(14) == SOUND
    assert dead.cost_s(40) == 18 + 3 * repeated
    assert dead.report(40)["events"][0]["repeated_steps"] == repeated


def test_steps_are_repeated_at_their_own_pace():
    """Two slow ones among the four that are repeated."""
    faults = SlowChip(2, at_steps=11, for_steps=2), DeadChip(at_steps=14, detect_s=0, restart_s=1, checkpoint_steps=10)
    assert toll(*faults).recovery_s(40) == 1 + 4 * 3 + 2 * 1.75


def test_the_runs_own_checkpoints_count_where_the_fault_names_none():
    pace = Pace(**vars(PACE) | {"checkpoint_steps": 4})
    dead = Toll(Timeline([DeadChip(at_steps=[7, 8])], pace, 40), price)
    assert [event["repeated_steps"] for event in dead.report(40)["events"]] == [3, 4]


def test_a_smaller_mesh_repeats_one_step_and_goes_on_at_its_own_pace():
    lost = toll(LostHost(host=1, at_steps=11, recovery="shrink", detect_s=7, restart_s=11))
    assert lost.step(10) == SOUND and lost.step(12) == price(Condition(lost=8)).at(1) and lost.step(12).step_s == 2.75
    assert lost.recovery_s(40) == 18 + 2.75
    assert lost.cost_s(40) == pytest.approx(18 + 2.75 - 30 * 0.25)
    assert lost.values(12) == {
        "emulated/fault_events": 1,
        "emulated/living_chips": 8,
        "emulated/faults_s": pytest.approx(18 + 2.75 - 2 * 0.25),
    }


def test_the_whole_is_the_sum_of_its_steps():
    faults = DeadChip(per_step=0.1), SlowChip(3, per_step=0.1, for_steps=3), FlippedBit(per_step=0.2)
    faults += (LostHost(at_steps=20, recovery="shrink"),)
    random = toll(*faults)
    each = [random.step(step) for step in range(1, 41)]
    for steps in (1, 13, 40):
        assert random.train_s(steps) == pytest.approx(sum(step.step_s for step in each[:steps]), rel=1e-12)
        assert random.parts(steps).step_s == pytest.approx(random.train_s(steps), rel=1e-12)
    assert (
        random.recovery_s(40) == pytest.approx(sum(step.recovery_s for step in each), rel=1e-12) and each[19].recovery_s
    )
    assert random.report(40)["num_events"] == len(random.timeline.events) > 8
    assert random.report(40)["cost_s"] == pytest.approx(random.train_s(40) - 120)


def test_a_clock_that_is_resumed_stands_where_it_stood():
    faults = SlowChip(2, at_steps=3, for_steps=4), DeadChip(at_steps=5)
    clock = EmulatedClock(SOUND, eval_s=10.0, startup_s=3.0, toll=toll(*faults))
    for _ in range(6):
        clock.advance_step()
    clock.advance_eval()
    assert clock.seconds == 3 + 10 + toll(*faults).train_s(6) and clock.step == toll(*faults).step(6)
    resumed = EmulatedClock(SOUND, 10.0, 3.0, toll(*faults))
    resumed.load_state_dict(clock.state_dict())
    assert resumed.seconds == clock.seconds and resumed.fault_values() == clock.fault_values()


def test_a_fault_costs_more_where_the_images_are_larger():
    """From step 11 on every step computes 2 s longer; a chip half as fast is waited for in proportion."""

    def by_size(state: Condition) -> Course:
        wait_s = (state.slowdown - 1) * 2.0
        return Course(((1, StepTime(2.0, 0.0, wait_s, 0.0, 0.0)), (11, StepTime(4.0, 0.0, 2 * wait_s, 0.0, 0.0))))

    slow = Toll(Timeline([SlowChip(2, at_steps=9, for_steps=4)], PACE, 40), by_size)
    assert [slow.step(step).step_s for step in (8, 9, 10, 11, 12, 13)] == [2, 4, 4, 8, 8, 4]
    assert slow.train_s(40) == 10 * 2 + 30 * 4 + 2 * 2 + 2 * 4 and slow.cost_s(40) == 2 * 2 + 2 * 4
    assert slow.parts(12) == StepTime(10 * 2 + 2 * 4, 0.0, 2 * 2 + 2 * 4, 0.0, 0.0)
    dead = Toll(Timeline([DeadChip(at_steps=13, detect_s=7, restart_s=11)], PACE, 40), by_size)
    assert dead.step(13).recovery_s == 18 + 10 * 2 + 3 * 4  # all steps again, each at its own size
