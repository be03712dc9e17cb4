"""TensorBoard's two clocks, read back over the HTTP interface of a real server."""

import json
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from run_folder_samples import CLAIM, NEIGHBOURS, STARTED_AT, Clocked, config, drive, make_run, run_info
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.callbacks import MetricsCallback
from train.metrics import open_sinks, read_rows, step_row
from train.tensorboard import CLOCK_TAGS, EPOCH, LAYOUT, TensorBoardSink, write_reference_runs

ROOT = Path(__file__).resolve().parents[1]
EMULATED, MEASURED = "digits-1/tb/emulated", "digits-1/tb/measured"


class Board:
    def __init__(self, logdir):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/data/"
        arguments = ["--host", "127.0.0.1", "--port", str(port), "--logdir", str(logdir), "--reload_interval", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def get(self, path, body=None, **query):
        url = self.url + path + ("?" + urllib.parse.urlencode(query) if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def wait(self, condition, seconds=30):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError("TensorBoard did not show it in time")

    def scalars(self, run, tag):
        return self.get("plugin/scalars/scalars", run=run, tag=tag)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A server on the reference runs and on a run stopped after step 12, resumed from step 6 and finished."""
    runs = tmp_path_factory.mktemp("board") / "runs"
    make_run(runs / "digits-1")
    callback = MetricsCallback(
        open_sinks(runs / "digits-1", config(), resumed_step=6, started_at_wall=STARTED_AT, claim=CLAIM)
    )
    drive([callback], run_info(runs / "digits-1", config(), resumed_step=6), steps=range(7, 13))
    callback.on_end({"status": "done"})
    write_reference_runs(runs, [CLAIM, *NEIGHBOURS])
    server = Board(runs)
    server.runs = runs
    try:
        server.wait(lambda: len(server.get("runs")) == 11 and len(server.scalars(EMULATED, "clock/eval_top1")) == 2)
        yield server
    finally:
        server.process.terminate()
        server.process.wait(10)


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def test_scalars_equal_the_metrics_file(board):
    """Exactly, after rounding to float32, which is what an event file holds; no point twice after a resume."""
    rows = list(read_rows(board.runs / "digits-1"))
    tags = {tag for row in rows for tag in row["values"]}
    for run, clock, start in ((EMULATED, "emulated_s", EPOCH), (MEASURED, "measured_s", STARTED_AT)):
        for tag in tags:
            if tag.startswith("chips/") and run == EMULATED:
                continue  # what was computed of the chips belongs to the clock that ran meanwhile
            having = [row for row in rows if tag in row["values"]]
            expected = [[start + row[clock], row["step"], float32(row["values"][tag])] for row in having]
            assert board.scalars(run, tag) == expected, (run, tag)


@pytest.mark.parametrize("clock", ["emulated", "measured"])
def test_clock_tags_have_the_clocks_milliseconds_as_step(board, clock):
    rows, run = list(read_rows(board.runs / "digits-1")), f"digits-1/tb/{clock}"
    for source, tag in CLOCK_TAGS.items():
        source = source.format(clock=clock)
        expected = [
            [round(1000 * row[f"{clock}_s"]), float32(row["values"][source])] for row in rows if source in row["values"]
        ]
        assert [point[1:] for point in board.scalars(run, tag)] == expected


def test_tags_are_few_and_live_in_groups(board):
    tags = board.get("plugin/scalars/tags")
    names = {tag for run in tags.values() for tag in run}
    assert len(names) <= 60
    assert {name.partition("/")[0] for name in names} == set(
        "train eval measured emulated clock result chips step".split()
    )


def test_claim_and_neighbours_are_one_point_each(board):
    for record in (CLAIM, *NEIGHBOURS):
        top1 = float32((record.reached_top1 or record.target_top1) / 100)
        points = board.scalars(f"reference/{record.id}", "clock/eval_top1")
        assert points == [[EPOCH + record.seconds, round(1000 * record.seconds), top1]]
        assert board.scalars(f"reference/{record.id}", "eval/top1") == [[EPOCH + record.seconds, 0, top1]]
    assert board.scalars("reference/huawei-2019-atlas900", "clock/eval_top1") == [
        [1_700_000_059.8, 59_800, float32(0.759)]
    ]


def test_target_lines_are_on_the_emulated_clock(board):
    for tag, target in (("clock/target_top1", 0.97), ("clock/claim_target_top1", 0.759)):
        assert [value for _, _, value in board.scalars(EMULATED, tag)] == [
            float32(target)
        ] * 3  # start, two evaluations
    assert "clock/target_top1" not in board.get("plugin/scalars/tags")[MEASURED]


def test_custom_scalars_layout(board):
    layout = board.get("plugin/custom_scalars/layout")
    found = {
        category["title"]: {chart["title"]: drawn(chart) for chart in category["chart"]}
        for category in layout["category"]
    }
    assert found == LAYOUT
    known = {tag for run in board.get("plugin/scalars/tags").values() for tag in run}
    named = {tag for charts in LAYOUT.values() for tags in charts.values() for entry in tags for tag in several(entry)}
    assert named <= known, "an empty chart"


def drawn(chart) -> list:
    """The chart's tags, as LAYOUT has them."""
    if "margin" in chart:
        return [(one["lower"], one["value"], one["upper"]) for one in chart["margin"]["series"]]
    return [tag.removesuffix("$") for tag in chart["multiline"]["tag"]]


def several(entry) -> tuple:
    return entry if isinstance(entry, tuple) else (entry,)


def test_a_part_of_a_step_is_a_run_with_the_whole_steps_tag(board):
    """In milliseconds; a part that is never above 0 (here the input) has no run, a level line its ends alone."""
    parts = {"compute": 12.5, "exposed_communication": 3.1, "waiting_for_slowest_chip": 1.1, "other": 0.4}
    found = {run.removeprefix(f"{EMULATED}/") for run in board.get("runs") if run.startswith(f"{EMULATED}/")}
    assert found == set(parts)
    for part, milliseconds in parts.items():
        points = board.scalars(f"{EMULATED}/{part}", "step/emulated_ms")
        assert [point[1:] for point in points] == [[step, float32(milliseconds)] for step in (1, 6, 12)]
    whole = board.scalars(EMULATED, "step/emulated_ms")
    assert [point[1:] for point in whole] == [[step, float32(17.1)] for step in range(1, 13)]
    whole, waits = (board.scalars(run, "step/measured_ms") for run in (MEASURED, f"{MEASURED}/waiting_for_data"))
    assert {value for *_, value in whole} == {1900} and {value for *_, value in waits} == {50}


def test_hparams(board):
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    experiment = board.get("plugin/hparams/experiment", {"experimentName": ""})
    assert {info["displayName"] for info in experiment["metricInfos"]} == {"top1", "emulated_s", "measured_s"}
    body = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 10}
    (group,) = board.get("plugin/hparams/session_groups", body)["sessionGroups"]
    assert group["name"] == "digits-1"
    expected = {"optim": "SGD", "mesh": "Atlas 900", "global_batch_size": 512.0, "precision": "bf16", "seed": 0.0}
    assert expected.items() <= group["hparams"].items()
    last = list(read_rows(board.runs / "digits-1"))[-1]
    metrics = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert metrics == {
        "eval/top1": float32(0.9861),
        "result/emulated_s": float32(last["emulated_s"]),
        "result/measured_s": float32(last["measured_s"]),
    }
    (session,) = group["sessions"]
    assert session["status"] == "STATUS_SUCCESS"
    assert session["startTimeSecs"] == STARTED_AT and session["endTimeSecs"] == STARTED_AT + last["measured_s"]


def test_texts_are_the_configuration_and_the_source_of_a_record(board):
    (text,) = board.get("plugin/text/text", run=EMULATED, tag="config/text_summary")
    assert text["wall_time"] == EPOCH and "digits_atlas" in text["text"] and "base_lr" in text["text"]
    (text,) = board.get("plugin/text/text", run="reference/huawei-2019-atlas900", tag="record/text_summary")
    assert "DoNews" in text["text"] and "no reached value was published" in text["text"]


def test_a_part_that_changes_is_drawn_as_it_is(tmp_path):
    """The last point of a level stretch is written before the first of the next."""
    sink, clock = TensorBoardSink(tmp_path, STARTED_AT, config()), Clocked()
    rows = [step_row(clock.step(step)) for step in range(1, 10)]
    for row in rows[4:6]:
        row["values"]["emulated/straggler_s"] = 0.5
    for row in rows:
        sink.log(row)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tb/emulated/waiting_for_slowest_chip")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("step/emulated_ms")]
    low = float32(1.1)
    assert found == [(1, low), (4, low), (5, 500), (6, 500), (7, low), (9, low)]


def test_a_step_is_seen_while_the_run_goes_on(board):
    """A value reaches a server without the sink being closed or flushed by anyone."""
    folder = board.runs / "live"
    folder.mkdir()
    sinks = open_sinks(folder, config())
    try:
        drive([MetricsCallback(sinks)], run_info(folder, config()), steps=range(1, 3))
        board.wait(lambda: len(board.scalars("live/tb/emulated", "train/loss")) == 2)
    finally:
        for sink in sinks:
            sink.close()


def test_reference_runs_are_written_once(tmp_path):
    write_reference_runs(tmp_path, [CLAIM])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_reference_runs(tmp_path, [CLAIM])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_screenshot_refuses_a_folder_without_runs_and_a_machine_without_browser(tmp_path):
    browser = tmp_path / "bin/chromium"
    browser.parent.mkdir()
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    command = [sys.executable, ROOT / "scripts/screenshot_tensorboard.py", tmp_path, tmp_path / "out.png"]
    done = subprocess.run(command, env={"PATH": str(browser.parent)}, capture_output=True, text=True)
    assert done.returncode == 2 and "no TensorBoard event file" in done.stderr and len(done.stderr.splitlines()) == 1
    browser.unlink()
    done = subprocess.run(command, env={"PATH": str(browser.parent)}, capture_output=True, text=True)
    assert done.returncode == 2 and "apt-get install chromium" in done.stderr and len(done.stderr.splitlines()) == 1
