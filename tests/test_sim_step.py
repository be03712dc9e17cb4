import itertools

import pytest

from train.sim.clock import EmulatedClock
from train.sim.step import StepTime, buckets, exposed_s, norm_messages, step_time, update_bytes
from train.sim.workload import resnet


def step(compute_s: float = 0.02, num_chips: int = 8, all_reduce_s: float = 0.0, **more) -> StepTime:
    return step_time(compute_s, resnet(), [85, 160], 2, lambda nbytes: all_reduce_s, num_chips, **more)


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


def test_overlap_is_the_share_of_the_backward_pass_that_hides_communication():
    """A bucket that is ready at 2/3 of the step starts at 5/6 with half of the pass, and at its end with none."""
    first = buckets(resnet(), [85, 160])[0].ready
    times = {size: 0.0 for size in (2_156_928, 9_408)} | {23_390_696: 0.4}
    waits = [
        step_time(1.0, resnet(), [85, 160], 1, times.get, 8, overlap=overlap).exposed_comm_s
        for overlap in (1.0, 0.5, 0.0)
    ]
    assert waits == pytest.approx([max(0.0, 0.4 - (1 - first) * overlap) for overlap in (1.0, 0.5, 0.0)])
    assert waits[0] < waits[1] < waits[2] == pytest.approx(0.4)


def test_a_step_of_one_chip_is_compute_alone():
    alone = step(num_chips=1, all_reduce_s=1.0)
    assert alone == StepTime(0.02, 0.0, 0.0, 0.0, 0.0) and alone.step_s == 0.02


def test_a_launch_floor_lengthens_a_short_step_alone():
    assert step(floor_s=0.05) == StepTime(0.02, 0.0, 0.0, 0.0, pytest.approx(0.03))
    assert step(floor_s=0.01) == step()
    assert step(floor_s=0.1, all_reduce_s=0.01).exposed_comm_s < step(all_reduce_s=0.01).exposed_comm_s


def test_communication_inside_the_rate_is_not_charged_again():
    outside = step(all_reduce_s=0.02).exposed_comm_s
    inside = step(all_reduce_s=0.015).exposed_comm_s
    assert step(all_reduce_s=0.02, inside_s=lambda nbytes: 0.015).exposed_comm_s == pytest.approx(outside - inside)
    assert step(all_reduce_s=0.02, inside_s=lambda nbytes: 0.03).exposed_comm_s == 0.0


def test_input_that_keeps_up_costs_nothing_and_slow_input_sets_the_step():
    assert step(input_s=0.019).input_s == 0.0
    slow = step(all_reduce_s=0.01, straggler_s=0.002, input_s=0.05)
    assert slow.step_s == pytest.approx(0.05) and slow.input_s == pytest.approx(0.05 - slow.step_s + slow.input_s)


def test_statistics_and_update_are_added_whole():
    assert step(norm_s=0.004).exposed_comm_s == pytest.approx(step().exposed_comm_s + 0.004)
    assert step(update_s=0.003).other_s == pytest.approx(0.003)


def test_batch_norm_sends_two_numbers_a_channel_each_way():
    """53 norm layers of ResNet-50 with 26,560 channels (53,120 scales and shifts)."""
    messages = norm_messages(resnet())
    assert len(messages) == 2 * 53 and sum(messages) == 2 * 53_120


def test_an_update_by_hand():
    """fp32: SGD with momentum moves 5 numbers a parameter, LARS 7: 0.58 ms of 25.6 M at 1,228 GB/s."""
    assert update_bytes("none", 10) == 0 and update_bytes("sgd", 10) == 200 and update_bytes("lars", 10) == 280
    assert update_bytes("lars", resnet().parameters) / 1228e9 == pytest.approx(0.583e-3, rel=1e-3)


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
