"""The benchmark of collectives: its arithmetic, and one small run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench_collectives as bench

ROOT = Path(__file__).parents[1]


def test_ratios_are_those_of_each_turn_and_bandwidths_those_of_the_median():
    samples = {(4000, "gloo"): [4.0, 8.0, 6.0], (4000, "shm"): [1.0, 1.0, 3.0], (8, "gloo"): [1.0, 1.0, 1.0]}
    gloo, shm, _ = bench.rows(4, samples)
    assert (gloo["seconds"], gloo["ratio_to_gloo"]) == (6.0, 1.0)
    assert shm == {
        "backend": "shm",
        "workers": 4,
        "bytes": 4000,
        "seconds": 1.0,
        "algbw_gbytes_per_s": 4e-6,
        "busbw_gbytes_per_s": 4e-6 * 1.5,  # 2 (n - 1) / n
        "ratio_to_gloo": 4.0,  # of 4, 8 and 2
    }


def test_aims_are_held_against_rows_of_their_size():
    row = {"backend": "shm", "workers": 4, "bytes": 102_228_128, "ratio_to_gloo": 2.9}
    rows = [row, row | {"bytes": 4096, "ratio_to_gloo": 11.0}, row | {"bytes": 1 << 20}, row | {"backend": "copy"}]
    rows.append(row | {"backend": "plan", "ratio_to_gloo": 0.92})
    found = [(aim["backend"], aim["bytes"], aim["met"]) for aim in bench.aims(rows)]
    assert found == [("shm", 102_228_128, False), ("shm", 4096, True), ("plan", 102_228_128, True)]


@pytest.mark.slow
def test_a_small_run_prints_one_object():
    command = [sys.executable, "scripts/bench_collectives.py", "--json", "--workers", "2", "--bytes", "200000"]
    done = subprocess.run([*command, "--repetitions", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["backend"] for row in result["rows"]] == list(bench.CANDIDATES)
    assert all(row["bytes"] == 200_000 and row["seconds"] > 0 for row in result["rows"]) and result["aims"] == []


def test_wrong_sizes_are_refused():
    command = [sys.executable, "scripts/bench_collectives.py", "--bytes", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--bytes multiples of 4" in done.stderr
