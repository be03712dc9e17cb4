import itertools

import pytest

from train.sim.clock import EmulatedClock
from train.sim.step import StepTime, buckets, expected_max_normal, exposed_s, step_time
from train.sim.workload import resnet


@pytest.mark.parametrize(
    "count, mean", [(1, 0), (2, 0.5641896), (3, 0.8462844), (8, 1.4236003), (16, 1.7659914), (1000, 3.2414358)]
)
def test_expected_maximum_of_normals(count, mean):
    """Tabulated values of the largest normal order statistic (Harter 1961)."""
    assert expected_max_normal(count) == pytest.approx(mean, abs=2e-6)


def test_buckets_hold_all_gradients_and_become_ready_in_order():
    cut = buckets(resnet(), [85, 160])
    assert [bucket.parameters for bucket in cut] == [23_390_696, 2_156_928, 9_408]
    assert [bucket.ready for bucket in cut] == sorted(bucket.ready for bucket in cut)
    assert cut[-1].ready == 1.0
    assert sum(bucket.parameters for bucket in buckets(resnet(), [10, 20, 30])) == resnet().parameters
    assert len(buckets(resnet(18), [85, 160])) == len(buckets(resnet(), [])) == 1


def test_overlap_is_never_shorter_than_the_longer_lane_nor_longer_than_both():
    ready = [0.4, 0.7, 1.0]
    for durations in itertools.product([0.0, 0.1, 0.5, 2.0], repeat=3):
        total = 1.0 + exposed_s(ready, durations, 1.0)
        assert max(1.0, sum(durations)) <= total <= 1.0 + sum(durations) + 1e-12


def test_exposed_communication_by_hand():
    assert exposed_s([0.4, 1.0], [0.3, 0.1], 1.0) == pytest.approx(0.1)  # the first bucket is hidden
    assert exposed_s([0.4, 1.0], [0.8, 0.1], 1.0) == pytest.approx(0.3)  # the second waits for the first
    assert exposed_s([1.0], [0.8], 1.0) == pytest.approx(0.8)  # one bucket: nothing is hidden


def test_a_step_of_one_chip_is_compute_alone():
    step = step_time(0.02, resnet(), [85, 160], 2, lambda nbytes: 1.0, 0.03, num_chips=1)
    assert step == StepTime(0.02, 0.0, 0.0, 0.0, 0.0) and step.step_s == 0.02


def test_stragglers_grow_with_the_chips():
    waits = [step_time(1.0, resnet(), [], 2, lambda nbytes: 0.0, 0.1, n).straggler_s for n in (1, 8, 64, 1024)]
    assert waits == sorted(waits) and waits[1] == pytest.approx(0.14236, abs=1e-5)


def test_clock_advances_and_resumes():
    clock = EmulatedClock(StepTime(1.0, 0.5, 0.25, 0.0, 0.0), eval_s=10.0, startup_s=3.0)
    assert clock.seconds == 3.0
    for _ in range(4):
        clock.advance_step()
    clock.advance_eval()
    assert clock.seconds == 3.0 + 4 * 1.75 + 10.0
    resumed = EmulatedClock(clock.step, 10.0, 3.0)
    resumed.load_state_dict(clock.state_dict())
    resumed.advance_step()
    assert resumed.seconds == clock.seconds + 1.75
