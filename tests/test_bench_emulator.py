"""The emulator's benchmark: one measurement, what it makes of measurements, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench_emulator as bench

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "scripts" / "bench_emulator.py"


def measured(network: str, chips: int, seconds: float, peak_bytes: int = 2**26) -> dict:
    times = {"seconds": seconds, "composing_s": seconds / 2, "peak_bytes": peak_bytes, "time_to_train_s": 1.0}
    return {"network": network, "chips": chips, **times}


def test_one_measurement_prices_the_largest_mesh_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, PATH, "--one", "alpha_beta", "1048576"], capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert result["chips"] == 1_048_576 and result["time_to_train_s"] > 0
    assert 0 < result["composing_s"] < result["seconds"] and result["peak_bytes"] < 2**30


def test_aims_and_skips_are_said():
    rows = [
        {
            "chips": 1024,
            "alpha_beta": measured("alpha_beta", 1024, 0.2),
            "flow": measured("flow", 1024, 2.5),
            "all_reduce": {"skipped": bench.MISSING},
        },
        {
            "chips": 1_048_576,
            "alpha_beta": measured("alpha_beta", 1_048_576, 0.9, 2**31),
            "flow": {"skipped": "above"},
            "all_reduce": {"skipped": "above"},
        },
    ]
    aims = bench.aims(rows)
    assert [aim["met"] for aim in aims] == [True, False, True, False]
    shown = bench.tables({"rows": rows, "aims": aims})
    assert "apt-get install python3-simgrid" in shown and shown.count("**missed**") == 2
    assert "| 1,024 | 0.200 (0.100) | 64 MiB | 2.500 (1.250) |" in shown


def test_a_failed_measurement_keeps_its_reason():
    assert "flaw" in bench.fresh("--one", "flaw", "8")["skipped"]


def test_chips_are_whole_hosts(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_emulator.py", "--chips", "12"])
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == 2 and "--chips 12" in capsys.readouterr().err
