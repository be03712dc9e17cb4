"""trace.json: Chrome's trace format, the emulated parts of a step in order, and a small file however long the run."""

import json

import pytest
from emulator_samples import record_config
from run_folder_samples import EVAL_S, EVAL_STEPS, NUM_STEPS, STARTUP_S, STEP, config, drive, make_run, run_info
from trace_laws import checked, seconds
from training_samples import tiny

from train import emulator, emulator_trace, trace
from train.build import WorkerContext, run_worker
from train.callbacks import Callback, TraceCallback
from train.metrics import eval_row, read_rows, step_row
from train.progress import StepRecord
from train.sim.step import StepTime


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("trace") / "run")
    return json.loads((run / "trace.json").read_text())["traceEvents"]


def drawn(events, process):
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return [
        (names[event["pid"], event["tid"]], event) for event in events if event["ph"] == "X" and event["pid"] == process
    ]


def test_the_file_keeps_the_format_s_laws_and_names_its_clocks(tmp_path):
    text = (make_run(tmp_path / "run") / "trace.json").read_text()
    checked(text)
    events = json.loads(text)["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        "digits_atlas: emulated machine, emulated clock",
        "digits_atlas: this machine, measured clock",
    }


def event(name="x", ts=0.0, dur=1.0, **changes):
    return {"ph": "X", "pid": 1, "tid": 1, "name": name, "ts": ts, "dur": dur, "args": {}} | changes


@pytest.mark.parametrize(
    "broken, says",
    [
        ([event(dur=-1.0)], "oneOf|not valid"),
        ([event(dur=None)], "not valid"),
        ([event(pid="chip 0")], "not valid"),
        ([event(ph="Q")], "not valid"),
        ([event(tid=7)], "nobody names its lane"),
        ([event(ts=0.0, dur=2.0), event(ts=1.0, dur=2.0)], "overlaps another in part"),
        ([{"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "again"}}], "named twice"),
    ],
)
def test_what_the_format_forbids_is_seen(broken, says):
    found = trace.process_names(1, "machine", {"a": "lane a", "b": "lane b"})
    text = json.dumps({"displayTimeUnit": "ms", "otherData": {}, "traceEvents": [*found, event(ts=9.0), *broken]})
    with pytest.raises(AssertionError, match=says):
        checked(text)
    inside = [event(ts=0.0, dur=2.0), event(ts=1.0, dur=1.0), event(ts=2.0, dur=1.0), event(ts=0.5, tid=2)]
    checked(json.dumps({"displayTimeUnit": "ms", "otherData": {}, "traceEvents": [*found, *inside]}))


def test_the_parts_of_an_emulated_step_follow_each_other(events):
    first = [
        (lane, event["ts"], event["dur"]) for lane, event in drawn(events, trace.EMULATED) if event["args"]["step"] == 1
    ]
    begin = 1e6 * STARTUP_S
    expected = []
    for lane, part_s in (
        ("compute", STEP.compute_s),
        ("waiting for the slowest chip", STEP.straggler_s),
        ("exposed communication", STEP.exposed_comm_s),
        ("other", STEP.other_s),
    ):
        expected.append((lane, pytest.approx(begin, abs=0.01), pytest.approx(1e6 * part_s)))
        begin += 1e6 * part_s
    assert first == expected


def test_every_evaluation_is_on_both_clocks(events):
    for process in (trace.EMULATED, trace.MEASURED):
        evaluations = [event for lane, event in drawn(events, process) if lane == "evaluation"]
        assert [event["args"]["step"] for event in evaluations] == list(EVAL_STEPS)
    assert evaluations[-1]["args"]["top1"] == 0.9861
    emulated = [event for lane, event in drawn(events, trace.EMULATED) if lane == "evaluation"]
    assert all(event["dur"] == pytest.approx(1e6 * EVAL_S) for event in emulated)


def test_a_long_run_gives_a_small_file(tmp_path):
    rows = {"step": [], "eval": []}

    class Rows(Callback):
        def on_step(self, record):
            rows["step"].append(step_row(record))

        def on_eval(self, record):
            rows["eval"].append(eval_row(record))

    drive([Rows()], run_info(tmp_path, config()))
    callback = TraceCallback()
    callback.on_start(run_info(tmp_path, config()))
    for number in range(3000):
        for row in (rows["step"][number % NUM_STEPS], rows["eval"][number % 2]):
            callback._keep({**row, "step": number})
    callback.on_end({})
    text = (tmp_path / "trace.json").read_text()
    steps = {
        event["args"]["step"]
        for lane, event in drawn(json.loads(text)["traceEvents"], trace.MEASURED)
        if lane == "step"
    }
    assert steps == {*range(trace.NUM_STEPS), *range(3000 - trace.NUM_STEPS, 3000)}
    assert len(text) < 2_000_000


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    row = {"step": 1, "epoch": 1.0, "measured_s": 2.0, "emulated_s": 1.0}
    values = {"emulated/step_s": 0.5, "emulated/compute_s": 0.5, "measured/step_s": 1.0, "train/loss": float("nan")}
    text = trace.dumps([{**row, "values": values}], [], "run")
    assert "NaN" not in text and json.loads(text)["traceEvents"][-1]["args"]["loss"] is None


@pytest.fixture(scope="module")
def machine():
    settings = record_config()
    settings["mesh"]["axes"]["host"] = 8
    return emulator.build(settings)


OTHER_PRICE = 3
"""The step of `lanes` that costs something else."""


@pytest.fixture(scope="module")
def lanes(machine, tmp_path_factory):
    """Of a run on the machine: four steps, of which one costs more than the machine's do, a checkpoint before one."""
    callback, folder, step = (
        TraceCallback(machine),
        tmp_path_factory.mktemp("trace"),
        machine.step(machine.global_batch_size),
    )
    callback.on_start(run_info(folder, config()))
    measured_s, emulated_s = 10.0, 1.0
    for number in range(1, 5):
        priced = StepTime(1.0, 0.25, 0.0, 0.0, 0.0) if number == OTHER_PRICE else step
        measured_s, emulated_s = measured_s + 2.5, emulated_s + priced.step_s
        callback.on_step(
            StepRecord(
                step=number,
                epoch=0.1 * number,
                loss=1.0,
                top1=0.5,
                learning_rate=0.1,
                grad_norm=1.0,
                images=1,
                step_s=2.0,
                data_wait_s=0.125,
                comm_s=0.5,
                measured_s=measured_s,
                emulated_s=emulated_s,
                emulated=priced,
                update_s=0.25,
                checkpoint_s=0.375 if number == 2 else 0.0,
            )
        )
    callback.on_end({})
    return checked((folder / "trace.json").read_text())


def of_step(events, number):
    return [event for event in events if event["args"]["step"] == number]


def test_an_emulated_step_is_compute_and_what_is_exposed_to_a_nanosecond(machine, lanes):
    step = machine.step(machine.global_batch_size)
    for number in (1, 2, 4):
        parts = {
            key: seconds(of_step(lanes[trace.EMULATED, lane], number)) for key, lane in trace.EMULATED_LANES.items()
        }
        assert sum(parts.values()) == pytest.approx(step.step_s, rel=0, abs=1.5e-9)
        assert parts["emulated/exposed_comm_s"] == pytest.approx(step.exposed_comm_s, rel=0, abs=1.5e-9)
        assert parts["emulated/compute_s"] == pytest.approx(step.compute_s, rel=0, abs=1.5e-9)


def test_each_link_class_has_a_lane_and_carries_each_step_s_buckets(machine, lanes):
    drawn, step = emulator_trace.drawing(machine), machine.step(machine.global_batch_size)
    assert {part.lane for part in drawn.links} == {
        "all_reduce",
        *(each.name for each in machine.mesh.topology.link_classes),
    }
    for key, lane in drawn.link_lanes.items():
        parts = [part for part in drawn.links if part.lane == key]
        for number in (1, 2, 4):
            found = of_step(lanes[trace.LINKS, lane], number)
            assert len(found) == len(parts) > 0
            assert seconds(found) == pytest.approx(sum(part.seconds for part in parts), abs=1e-9 * len(parts))
    last = of_step(lanes[trace.LINKS, "all-reduce"], 1)[-1]
    waits = of_step(lanes[trace.EMULATED, "exposed communication"], 1)[0]
    assert last["ts"] + last["dur"] == pytest.approx(waits["ts"] + waits["dur"], abs=0.01)
    assert step.exposed_comm_s > 0


def test_links_that_outlast_the_step_are_cut_so_that_the_next_one_s_fit():
    parts = [trace.Part("roce", 0.0, 0.75), trace.Part("roce", 0.75, 0.5), trace.Part("roce", 1.25, 0.5)]
    priced = StepTime(1.0, 0.0, 0.0, 0.0, 0.0)
    drawn = trace.Drawing(priced, emulator_trace.CHIP_LANES, [], "links", {"roce": "roce"}, parts)
    values = {"emulated/step_s": 1.0, "emulated/compute_s": 1.0, "measured/step_s": 1.0}
    rows = [{"step": n, "epoch": 0.1, "measured_s": 2.0 * n, "emulated_s": 1.0 * n, "values": values} for n in (1, 2)]
    found = checked(trace.dumps(rows, [], "run", drawn))[trace.LINKS, "roce"]
    assert [(event["ts"], event["dur"]) for event in found[:3]] == [(0.0, 0.75e6), (0.75e6, 0.25e6), (1e6, 0.75e6)]


def test_a_step_of_another_price_is_drawn_by_its_row_without_links(lanes):
    assert not any(of_step(events, OTHER_PRICE) for (process, _), events in lanes.items() if process == trace.LINKS)
    assert seconds(of_step(lanes[trace.EMULATED, "compute"], OTHER_PRICE)) == 1.0
    assert seconds(of_step(lanes[trace.EMULATED, "exposed communication"], OTHER_PRICE)) == 0.25


def test_a_measured_step_is_waiting_compute_sum_and_update_in_this_order(lanes):
    begin = 1e6 * (10.0 + 2.5 - 2.0)
    expected = {"waiting for data": 0.125, "compute": 1.125, "waiting for the all-reduce": 0.5, "update": 0.25}
    for lane, duration in expected.items():
        (found,) = of_step(lanes[trace.MEASURED, lane], 1)
        assert (found["ts"], found["dur"]) == (begin, 1e6 * duration)
        begin += 1e6 * duration
    (whole,) = of_step(lanes[trace.MEASURED, "step"], 1)
    assert (whole["dur"], whole["ts"] + whole["dur"]) == (2e6, begin)


def test_a_checkpoint_lies_before_the_step_that_it_held_up(lanes):
    (saved,) = lanes[trace.MEASURED, "checkpoint"]
    (step,) = of_step(lanes[trace.MEASURED, "step"], 2)
    assert saved["dur"] == 0.375e6 and saved["ts"] + saved["dur"] == step["ts"]


def test_a_real_run_is_drawn_whole(tmp_path):
    run_worker(tiny("max_steps=3", "checkpoint_steps=2"), WorkerContext(), tmp_path)
    drawn = checked((tmp_path / "trace.json").read_text())
    rows = [row for row in read_rows(tmp_path) if row["kind"] == "step"]
    assert len(rows) == 3
    for row in rows:
        for process, clock, parts in (
            (trace.EMULATED, "emulated", ["input", "compute", "exposed communication", "other"]),
            (trace.MEASURED, "measured", ["waiting for data", "compute", "waiting for the all-reduce", "update"]),
        ):
            parts += ["waiting for the slowest chip"] if clock == "emulated" else []
            total = sum(seconds(of_step(drawn[process, lane], row["step"])) for lane in parts)
            assert total == pytest.approx(row["values"][f"{clock}/step_s"], rel=0, abs=1.5e-9)
        assert of_step(drawn[trace.LINKS, "all-reduce"], row["step"])
    (saved,) = drawn[trace.MEASURED, "checkpoint"]  # the one after the last step has none that it held up
    assert saved["args"]["step"] == 3 and rows[2]["values"]["measured/checkpoint_s"] > 0
