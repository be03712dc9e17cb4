"""The benchmark of overlap: its arithmetic, and one small run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench_overlap as bench

ROOT = Path(__file__).parents[1]


def worker(began: float, gradient: float, summed: float, ended: float, spent: float, alone: float) -> list[float]:
    return [began, gradient, summed, ended, spent, alone]


def test_growth_is_that_of_each_turn_and_waiting_that_of_each_worker():
    """Two workers, two turns; the second worker starts last in each, and the first one's gradients are last."""
    samples = {
        "none": [[worker(0.0, 0.9, 0.9, 1.0, 1.0, 0.0), worker(0.1, 0.8, 0.8, 1.1, 0.8, 0.0)]] * 2,
        "shm": [
            [worker(0.0, 0.9, 0.95, 1.1, 1.25, 0.5), worker(0.1, 0.7, 0.95, 1.15, 0.75, 0.75)],
            [worker(0.0, 0.9, 1.25, 1.5, 1.25, 0.25), worker(0.1, 0.8, 1.25, 1.4, 0.75, 0.25)],
        ],
    }
    none, shm = bench.rows(samples)
    assert (none["growth"], none["growth_quartiles"], none["cpu_s"]) == (0, [0, 0], 0)
    assert none["step_s"] == pytest.approx(1.0) and none["alone_s"] is None
    assert shm["growth"] == pytest.approx((0.05 + 0.4) / 2) and shm["step_s"] == pytest.approx((1.05 + 1.4) / 2)
    assert shm["waiting_s"] == pytest.approx((0.15 + 0.4) / 2)  # 0.05 and 0.25; 0.35 and 0.45
    assert shm["exposed_s"] == pytest.approx((0.05 + 0.35) / 2)  # from 0.9 on
    assert shm["alone_s"] == pytest.approx((0.75 + 0.25) / 2) and shm["cpu_s"] == pytest.approx(0.1)


def test_aims_are_held_against_the_sides_that_were_measured():
    shm = {"side": "shm", "growth": 0.03, "exposed_s": 0.004, "alone_s": 0.02}
    gloo = {"side": "gloo", "growth": 0.1}
    assert [(aim["below"], aim["met"]) for aim in bench.aims([shm, gloo])] == [(0.05, True), (0.1, False), (0.05, True)]
    assert [aim["met"] for aim in bench.aims([shm | {"growth": 0.06}, gloo])] == [False, False, False]
    assert bench.aims([gloo]) == []


@pytest.mark.slow
def test_a_small_run_prints_one_object():
    command = [sys.executable, "scripts/bench_overlap.py", "--json", "--quick", "--sides", "none", "gloo", "shm", "ddp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert [row["side"] for row in result["rows"]] == ["none", "gloo", "shm", "ddp"] and len(result["aims"]) == 3
    assert all(row["step_s"] > 0 and row["turns"] == 3 for row in result["rows"])


def test_a_comparison_with_nothing_is_refused():
    command = [sys.executable, "scripts/bench_overlap.py", "--sides", "gloo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--sides hold none" in done.stderr
