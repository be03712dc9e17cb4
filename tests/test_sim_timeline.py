"""When faults strike: schedules and rates by hand, and events that depend on seed, fault and step alone."""

import math
from dataclasses import replace

import pytest

from train.sim.faults import (
    Condition,
    DeadChip,
    FlippedBit,
    LostHost,
    Several,
    SlowChip,
    SlowLink,
    StaleBatchNorm,
    each,
)
from train.sim.timeline import Pace, Timeline, chance

PACE = Pace(
    seed=0,
    chips=64,
    chips_per_host=8,
    steps_per_epoch=10,
    step_s=2.0,
    startup_s=5.0,
    eval_s=4.0,
    eval_every=1,
    eval_offset=0,
    checkpoint_steps=None,
)


def struck(*faults, steps: int = 100, **pace) -> list[int]:
    return [event.step for event in Timeline(faults, replace(PACE, **pace), steps).events]


@pytest.mark.parametrize(
    "when, steps",
    [
        ({}, [1]),
        ({"at_steps": 7}, [7]),
        ({"at_steps": [9, 7, 7, 101]}, [7, 9]),
        ({"at_epochs": [0, 1.5]}, [1, 16]),
        ({"at_s": 0}, [1]),
        ({"at_s": [5.0, 6.9, 7.0, 24.9]}, [1, 2, 10]),  # step 1 ends at 7, step 10 at 25, the evaluation at 29
        ({"at_s": [27, 30.9, 31]}, [11, 12]),
    ],
)
def test_a_schedule_counts_steps_epochs_or_seconds_of_the_undisturbed_run(when, steps):
    assert struck(FlippedBit(**when)) == steps


def test_an_evaluation_that_begins_late_moves_the_seconds():
    assert struck(FlippedBit(at_s=26), eval_offset=3.0, eval_every=4.0) == [11]
    assert struck(FlippedBit(at_s=[64.9, 65, 68.9, 71]), eval_offset=3.0, eval_every=4.0) == [30, 31, 32]


def test_a_rate_of_chips_and_hours_is_a_chance_a_step():
    assert chance(FlippedBit(per_chip_hour=0.5), PACE) == pytest.approx(1 - math.exp(-0.5 * 64 * 2 / 3600), rel=1e-12)
    assert chance(FlippedBit(per_step=0.25), PACE) == 0.25
    assert chance(FlippedBit(at_steps=3), PACE) == 0
    assert struck(FlippedBit(per_step=1)) == list(range(1, 101)) and struck(FlippedBit(per_step=0)) == []
    number = len(struck(FlippedBit(per_step=0.1), steps=10_000))
    assert abs(number - 1000) < 4 * math.sqrt(10_000 * 0.1 * 0.9)


def test_events_follow_from_seed_fault_and_step_alone():
    fault = DeadChip(per_step=0.05)
    whole = Timeline([fault], PACE, 400)
    assert [(event.step, event.chips.start) for event in whole.events[:3]] == GOLDEN
    assert Timeline([fault], PACE, 100).events == [event for event in whole.events if event.step <= 100]
    later = Timeline([fault, FlippedBit(per_step=0.3)], PACE, 400)
    assert [event for event in later.events if event.fault is fault] == whole.events
    assert len({tuple(struck(fault, seed=seed)) for seed in range(5)}) == 5
    twice = [event.step for event in Timeline([fault, fault], PACE, 400).events]
    assert len(twice) > len(whole.events) and len(set(twice)) > len(whole.events)


GOLDEN = [(9, 18), (43, 17), (58, 30)]


def test_every_chip_is_struck_about_as_often():
    events = Timeline([FlippedBit(per_step=1)], PACE, 6400).events
    counts = [0] * 64
    for event in events:
        counts[event.chips.start] += 1
    assert min(counts) > 60 and max(counts) < 140
    assert len({event.draws for event in events}) == 6400


def test_a_fault_lasts_as_long_as_it_is_told():
    timeline = Timeline([SlowChip(3, chip=5, at_steps=4, for_steps=2), SlowChip(2, chip=6, at_steps=5)], PACE, 10)
    slow = [timeline.at(step).condition.slowdown for step in range(1, 9)]
    assert slow == [1, 1, 1, 3, 3, 2, 2, 2]
    links = Timeline([SlowLink(4, "roce", at_steps=2, for_steps=1), SlowLink(2, at_steps=2)], PACE, 10)
    found = [links.at(step).condition.links for step in (1, 2, 3)]
    assert found == [(), (("roce", 4), (None, 2)), ((None, 2),)]
    stale = Timeline([StaleBatchNorm(chip=3, at_steps=2, for_steps=2)], PACE, 10)
    assert [sorted(stale.at(step).stale) for step in range(5)] == [[], [], [3], [3], []]


def test_what_stands_from_the_first_step_on_is_a_property_of_the_machine():
    assert SlowChip(2).stands and SlowLink(2).stands and StaleBatchNorm().stands
    for fault in (SlowChip(2, for_steps=3), SlowChip(2, at_steps=1), SlowLink(2, per_step=1), DeadChip(), FlippedBit()):
        assert not fault.stands, fault


def test_chips_that_are_gone_are_gone_for_good_and_are_not_struck_again():
    shrink = {"recovery": "shrink"}
    lost = LostHost(host=1, at_steps=3, **shrink)
    later = [DeadChip(chip=9, at_steps=4, **shrink), SlowChip(3, chip=10, at_steps=1), FlippedBit(chip=11, at_steps=5)]
    timeline = Timeline([lost, *later, DeadChip(chip=20, at_steps=6, **shrink)], PACE, 10)
    assert [(event.fault.name, event.step) for event in timeline.events] == [
        ("slow chip", 1),
        ("lost host", 3),
        ("dead chip", 6),
    ]
    assert [len(timeline.at(step).lost) for step in (0, 2, 3, 5, 6, 10)] == [0, 0, 8, 8, 9, 9]
    assert timeline.at(2).condition == Condition(slowdown=3) and timeline.at(3).condition == Condition(lost=8)
    assert timeline.strikes(4) == timeline.strikes(5) == []


def test_a_spare_leaves_the_mesh_as_it_was():
    timeline = Timeline([DeadChip(chip=9, at_steps=4)], PACE, 10)
    assert {timeline.at(step).condition for step in range(11)} == {Condition()}
    assert [event.chips for event in timeline.strikes(4)] == [range(9, 10)]


def test_the_last_host_can_not_be_lost():
    faults = [LostHost(host=host, at_steps=2 + host, recovery="shrink") for host in range(8)]
    with pytest.raises(ValueError, match="faults: no chip is left in step 9; have fewer of them shrink the mesh"):
        Timeline(faults, PACE, 10)
    assert len(Timeline(faults, PACE, 8).at(8).lost) == 56


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: DeadChip(at_steps=3, per_step=0.1), "faults: dead chip has at_steps and per_step; give one of them"),
        (lambda: FlippedBit(at_steps=0), "faults.at_steps=0: flipped bit strikes at 1 or later"),
        (lambda: FlippedBit(at_epochs=[1, -1]), "faults.at_epochs=-1"),
        (lambda: FlippedBit(at_s=math.inf), "faults.at_s=inf"),
        (lambda: FlippedBit(per_step=1.5), "faults.per_step=1.5: flipped bit needs a rate from 0 to 1"),
        (lambda: FlippedBit(per_chip_hour=-1), "faults.per_chip_hour=-1"),
        (lambda: FlippedBit(bit=32), "faults.bit=32: a float32 has bits 0 to 31"),
        (lambda: DeadChip(recovery="pray"), "faults.recovery=pray: dead chip knows spare and shrink"),
        (lambda: LostHost(detect_s=-1), "faults.detect_s=-1"),
        (lambda: SlowChip(2, for_steps=0), "faults.for_steps=0"),
        (lambda: Timeline([SlowChip(2, chip=64, at_steps=99)], PACE, 9), "faults.chip=64: the mesh's chips .* 0 to 63"),
        (lambda: Timeline([LostHost(host=8)], PACE, 9), "faults.host=8: the mesh's hosts with work are 0 to 7"),
        (lambda: each(PACE), "is no fault; each is a node with a _target_ of train.sim.faults"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_several_faults_are_taken_in_their_order():
    one, two = SlowChip(2), DeadChip()
    assert each(Several({"b": one, "a": Several({"c": two})})) == (one, two)
    assert each(None) == () and each(two) == (two,) and each(Several({})) == ()
