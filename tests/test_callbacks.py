"""Callbacks beside the sinks: progress, and files that do not change when a run is stopped and resumed."""

import pytest
from run_folder_samples import EVAL_STEPS, NUM_STEPS, STARTED_AT, config, drive, make_run, result, run_info

from train.callbacks import MetricsCallback, MLPerfCallback, ProgressCallback, ProgressState, TraceCallback
from train.metrics import open_sinks


def test_progress_follows_the_run(tmp_path):
    progress = ProgressCallback()
    assert progress.state == ProgressState()
    run = run_info(tmp_path, config())
    progress.on_start(run)
    assert (progress.state.step, progress.state.total_steps, progress.state.eta_s) == (0, NUM_STEPS, None)
    clock = drive([progress], run, steps=range(1, 6))
    state = progress.state
    assert (state.step, state.epoch, state.measured_s, state.emulated_s) == (
        5,
        5 / 3,
        clock.measured_s,
        clock.emulated_s,
    )
    assert state.images_per_s == pytest.approx(512 / 2.0)  # steps are 2.0 s apart on the measured clock
    assert state.eta_s == pytest.approx((NUM_STEPS - 5) * 2.0)
    assert state.top1 is None and state.updated_at > 0 and not state.ended
    progress.on_end(result())
    assert progress.state.ended


def test_progress_counts_evaluations_in_the_rate(tmp_path):
    progress = ProgressCallback()
    drive([progress], run_info(tmp_path, config()))
    seconds = (NUM_STEPS - 1) * 2.0 + 0.5  # from the first step to the last, one evaluation between
    assert progress.state.images_per_s == pytest.approx((NUM_STEPS - 1) * 512 / seconds)
    assert progress.state.eta_s == 0 and progress.state.top1 == 0.9861


def test_progress_of_a_resumed_run_starts_where_it_stopped(tmp_path):
    progress = ProgressCallback()
    progress.on_start(run_info(tmp_path, config(), resumed_step=6))
    assert (progress.state.step, progress.state.epoch) == (6, 2.0)


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
    whole, folder = make_run(tmp_path / "whole"), tmp_path / "resumed"
    folder.mkdir()
    for first, last, resumed, status in ((1, 9, 0, "interrupted"), (7, NUM_STEPS, 6, "done")):
        run = run_info(folder, config(), resumed_step=resumed)
        sinks = open_sinks(folder, config(), resumed_step=resumed, started_at_wall=STARTED_AT)
        callbacks = [MetricsCallback(sinks), MLPerfCallback(), TraceCallback()]
        drive(callbacks, run, steps=range(first, last + 1))
        for callback in callbacks:
            callback.on_end(result(status=status))
    for name in ("metrics.jsonl", "mlperf.log", "trace.json"):
        assert (folder / name).read_text() == (whole / name).read_text(), name


def test_sinks_are_closed_with_the_runs_status():
    class Closed:
        def log(self, row): ...

        def close(self, status="done"):
            self.status = status

    sinks = [Closed(), Closed()]
    MetricsCallback(sinks).on_end({"status": "failed"})
    assert [sink.status for sink in sinks] == ["failed", "failed"]


def test_mlperf_log_is_there_before_the_run_ends(tmp_path):
    drive([MLPerfCallback()], run_info(tmp_path, config()), steps=range(1, EVAL_STEPS[0] + 1))
    text = (tmp_path / "mlperf.log").read_text()
    assert text.count('"eval_accuracy"') == 1 and '"run_stop"' not in text
