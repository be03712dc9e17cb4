"""Rows, metrics.jsonl, and what is left of an earlier attempt when a run is resumed."""

import json
import math

import pytest
from run_folder_samples import EVAL_STEPS, NUM_STEPS, STARTED_AT, STEP, config, drive, make_run, run_info

from train.callbacks import MetricsCallback
from train.metrics import JsonlSink, open_sinks, read_rows, truncate, write_aside


def test_rows_have_the_fields_of_the_file_format(tmp_path):
    rows = [json.loads(line) for line in (make_run(tmp_path / "a") / "metrics.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in rows} == {("kind", "step", "epoch", "measured_s", "emulated_s", "values")}
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == list(EVAL_STEPS)


def test_rates_are_images_over_the_seconds_of_the_step(tmp_path):
    values = next(read_rows(make_run(tmp_path / "a")))["values"]
    assert values["measured/images_per_s"] == 512 / 1.9
    assert values["emulated/images_per_s"] == 512 / STEP.step_s
    parts = ("compute", "exposed_comm", "straggler", "input", "other")
    assert sum(values[f"emulated/{part}_s"] for part in parts) == pytest.approx(values["emulated/step_s"], rel=1e-12)


def test_a_row_is_on_disk_before_the_next(tmp_path):
    sink, row = JsonlSink(tmp_path), {"kind": "step", "step": 1, "values": {"train/loss": 0.1}}
    sink.log(row)
    assert list(read_rows(tmp_path)) == [row]
    sink.close()


def test_values_that_are_not_finite_are_null_and_come_back_as_nan(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.log({"kind": "step", "step": 1, "values": {"train/grad_norm": math.inf, "train/loss": 1.0}})
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["values"] == {
        "train/grad_norm": None,
        "train/loss": 1.0,
    }
    assert math.isnan(next(read_rows(tmp_path))["values"]["train/grad_norm"])


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    run = make_run(tmp_path / "a")
    whole = list(read_rows(run))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert list(read_rows(run)) == whole
    assert truncate(run, NUM_STEPS) == whole
    assert list(read_rows(run)) == whole


@pytest.mark.parametrize("broken", ["not json", "3", "{}"])
def test_a_broken_line_is_named(tmp_path, broken):
    run = make_run(tmp_path / "a")
    path = run / "metrics.jsonl"
    path.write_text(broken + "\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: not a row of metrics"):
        list(read_rows(run))


def test_truncate_keeps_the_lines_up_to_the_step_byte_for_byte(tmp_path):
    run = make_run(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    truncate(run, 6)
    kept = (run / "metrics.jsonl").read_text()
    assert kept == "".join(lines[:7])  # six steps and the evaluation at the sixth
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_a_resumed_run_writes_the_same_rows_as_an_uninterrupted_one(tmp_path):
    whole, run = make_run(tmp_path / "whole"), tmp_path / "resumed"
    run.mkdir()
    for first, last, resumed in ((1, 9, 0), (7, NUM_STEPS, 6)):  # stopped after step 9, last checkpoint at 6
        sinks = open_sinks(run, config(), resumed_step=resumed, started_at_wall=STARTED_AT)
        callback = MetricsCallback(sinks)
        drive([callback], run_info(run, config(), resumed_step=resumed), steps=range(first, last + 1))
        callback.on_end({"status": "done"})
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_write_aside_leaves_only_the_file(tmp_path):
    write_aside(tmp_path / "report.md", "one")
    write_aside(tmp_path / "report.md", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"] and (tmp_path / "report.md").read_text() == "two"
