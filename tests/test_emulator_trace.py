"""The trace of an emulation: Chrome's format, lanes that add up to the step's parts, links with the all-reduce."""

import json
from collections import defaultdict

import pytest
from emulator_samples import record_config
from trace_laws import checked, seconds

from train import emulator
from train.emulator_trace import CHIP_LANES, LINKS, MEAN_CHIP, NUM_STEPS, dumps, lateness
from train.sim.step import buckets


@pytest.fixture(scope="module", params=["hierarchical", "ring", "a slow chip, flow", "8 chips, input, bn_span"])
def machine(request):
    config = record_config()
    if request.param == "ring":
        config["collective"]["_target_"] = "train.comm.algorithms.ring"
    elif request.param == "a slow chip, flow":
        config["faults"] = {"_target_": "train.sim.faults.SlowChip", "factor": 1.5}
        config["network"] = {"_target_": "train.sim.flow.Flow"}
        config["mesh"]["axes"]["host"] = 8
    elif request.param == "8 chips, input, bn_span":
        config["mesh"] |= {"axes": {"host": 1, "chip": 8}, "host_images_per_s": 10_000}
        config["bn_span"] = 8
    return emulator.build(config)


@pytest.fixture
def lanes(machine):
    """(process, lane) -> its events, in time; the file keeps the format's laws."""
    return checked(dumps(machine))


def test_it_says_what_it_is(machine):
    content = json.loads(dumps(machine))
    assert content["otherData"]["label"] == "emulated" and content["displayTimeUnit"] == "ms"


def test_a_step_is_compute_and_what_is_exposed_to_a_nanosecond(machine, lanes):
    step = machine.step(machine.global_batch_size)
    for number in range(1, NUM_STEPS + 1):
        parts = {
            part: seconds([event for event in lanes[MEAN_CHIP, lane] if event["args"]["step"] == number])
            for part, lane in CHIP_LANES.items()
        }
        assert sum(parts.values()) == pytest.approx(step.step_s, rel=0, abs=1.5e-9)
        assert parts["compute_s"] + parts["exposed_comm_s"] == pytest.approx(
            step.compute_s + step.exposed_comm_s, rel=0, abs=3e-9
        )  # several events, whose ends are whole nanoseconds


def test_the_mean_chip_s_lanes_add_up_to_the_step_s_parts(machine, lanes):
    step = machine.step(machine.global_batch_size)
    for part, lane in CHIP_LANES.items():
        drawn = seconds(lanes[MEAN_CHIP, lane])
        assert drawn == pytest.approx(NUM_STEPS * getattr(step, part), abs=1e-7)


def test_every_chip_ends_its_step_with_the_others(machine, lanes):
    ends = defaultdict(float)
    for (process, _), events in lanes.items():
        for event in events if process != LINKS else ():
            key = event["args"]["step"], process
            ends[key] = max(ends[key], event["ts"] + event["dur"])
    microseconds = 1e6 * machine.step(machine.global_batch_size).step_s
    assert len(ends) >= 3 * NUM_STEPS
    for (number, _), end in ends.items():
        assert end == pytest.approx(number * microseconds, abs=0.01)


def test_the_links_carry_the_all_reduce_of_every_bucket(machine, lanes):
    reduces = [event for event in lanes[LINKS, "all-reduce"] if event["args"]["step"] == 1]
    sizes = [2 * bucket.parameters for bucket in buckets(machine.workload, machine.chip.bucket_ends)]
    assert [event["args"]["bytes"] for event in reduces] == sizes
    for event, size in zip(reduces, sizes, strict=True):
        assert event["dur"] / 1e6 == pytest.approx(machine.network.seconds(machine.plan, size), abs=2e-9)
        inside = [
            other
            for link in machine.mesh.topology.link_classes
            for other in lanes[LINKS, link.name]
            if other["args"] == event["args"]
        ]
        assert inside and min(other["ts"] for other in inside) == pytest.approx(event["ts"], abs=0.01)
        assert max(other["ts"] + other["dur"] for other in inside) <= event["ts"] + event["dur"] + 0.01


def test_the_last_bucket_ends_with_the_exposed_communication(machine, lanes):
    shown = [e for e in lanes[MEAN_CHIP, "exposed communication"] if e["name"] != "batch-norm sums"]
    if shown:
        ends = [event["ts"] + event["dur"] for event in lanes[LINKS, "all-reduce"] if event["args"]["step"] == 1]
        assert shown[0]["ts"] + shown[0]["dur"] == pytest.approx(max(ends), abs=0.01)


def test_the_draw_is_seeded_and_its_slowest_is_the_expected_one(machine):
    late, step = lateness(machine, 1, 2), machine.step(machine.global_batch_size)
    assert late.shape == (2, machine.active_chips)
    assert late.max(axis=1) == pytest.approx(step.straggler_s)
    assert (late == lateness(machine, 1, 2)).all()


def test_a_large_mesh_shows_chosen_chips():
    config = record_config()
    config["mesh"]["axes"]["host"] = 512
    text = dumps(emulator.build(config))
    events = json.loads(text)["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names[0].startswith("links of") and names[1].startswith("the mean chip") and len(names) <= 6
    assert any("slowest of step 1" in name for name in names) and any("chip 4,095 (last)" in name for name in names)
    assert len(text) < 200_000
