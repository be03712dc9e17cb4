"""trace.json: Chrome's trace format, the emulated parts of a step in order, and a small file however long the run."""

import json

import pytest
from run_folder_samples import EVAL_S, EVAL_STEPS, NUM_STEPS, STARTUP_S, STEP, config, drive, make_run, run_info

from train import trace
from train.callbacks import Callback, TraceCallback
from train.metrics import eval_row, step_row


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("trace") / "run")
    return json.loads((run / "trace.json").read_text())["traceEvents"]


def drawn(events, process):
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return [
        (names[event["pid"], event["tid"]], event) for event in events if event["ph"] == "X" and event["pid"] == process
    ]


def test_schema(events):
    """What a reader of the format needs: phases X and M only, whole ids, times in microseconds not below zero."""
    for event in events:
        assert event["ph"] in ("X", "M") and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["name"], str) and isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] > 0
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        "digits_atlas: emulated machine, emulated clock",
        "digits_atlas: this machine, measured clock",
    }


def test_the_parts_of_an_emulated_step_follow_each_other(events):
    first = [
        (lane, event["ts"], event["dur"]) for lane, event in drawn(events, trace.EMULATED) if event["args"]["step"] == 1
    ]
    begin = 1e6 * STARTUP_S
    expected = []
    for lane, seconds in (
        ("compute", STEP.compute_s),
        ("waiting for the slowest chip", STEP.straggler_s),
        ("exposed communication", STEP.exposed_comm_s),
        ("other", STEP.other_s),
    ):
        expected.append((lane, pytest.approx(begin, abs=0.01), pytest.approx(1e6 * seconds)))
        begin += 1e6 * seconds
    assert first == expected


def test_lanes_do_not_overlap_themselves(events):
    for process in (trace.EMULATED, trace.MEASURED):
        ends = {}
        for lane, event in sorted(drawn(events, process), key=lambda item: item[1]["ts"]):
            assert event["ts"] >= ends.get(lane, 0) - 0.01
            ends[lane] = event["ts"] + event["dur"]


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
