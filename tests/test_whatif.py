"""What launch.emulate makes of a sweep: one table, one CSV, one plot, and nothing dropped or written unasked."""

import csv
import io
import json
import struct
from contextlib import redirect_stdout

import pytest

from launch import whatif
from launch.emulate import answer

PARTS = "compute_s exposed_comm_s straggler_s input_s other_s eval_s startup_s".split()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(folder, exit status, stdout) of a sweep in which one value can't be priced."""
    folder, out = tmp_path_factory.mktemp("whatif") / "made" / "out", io.StringIO()
    words = ["mesh=dgx_a100", "chip.jitter=0,-1,0.1", f"out={folder}", f"trace={folder / 'step.json'}"]
    with redirect_stdout(out):
        status = answer(["-m", "format=json", *words])
    return folder, status, out.getvalue()


def rows(folder) -> list[dict]:
    with (folder / "whatif.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_value_that_cannot_be_priced_is_a_row_and_the_status(sweep):
    folder, status, _ = sweep
    assert status == 2
    found = rows(folder)
    assert [(row["job"], row["chip.jitter"]) for row in found] == [("1", "0"), ("2", "-1"), ("3", "0.1")]
    assert "jitter=-1 must" in found[1]["not_priced"]
    assert [bool(row["emulated/time_to_train_s"]) for row in found] == [True, False, True]
    assert [row["not_priced"] for row in (found[0], found[2])] == ["", ""]
    shown = (folder / "whatif.txt").read_text().splitlines()
    assert shown[0].startswith("what if: 3 jobs") and shown[1].split()[:3] == ["job", "chip.jitter", "chips"]
    assert shown[3].split()[:4] == ["2", "-1", "not", "priced:"] and shown[-1].startswith("claimed: 59.8 s")


def test_the_csv_adds_up_and_keeps_its_label(sweep):
    for row in rows(sweep[0])[::2]:
        total = sum(float(row[f"emulated/{part}"]) for part in PARTS)
        assert total == pytest.approx(float(row["emulated/time_to_train_s"]))
        low, high = float(row["emulated/interval_low_s"]), float(row["emulated/interval_high_s"])
        assert low < total < high
        assert all(name.startswith("emulated/") for name in row if name not in ("job", "chip.jitter", "not_priced"))


def test_the_plot_is_one_picture(sweep):
    picture = (sweep[0] / "whatif.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", picture[16:24])[0] >= 1000
    assert sorted(path.name for path in sweep[0].iterdir()) == [
        "step-1.json",
        "step-3.json",
        "whatif.csv",
        "whatif.png",
        "whatif.txt",
    ]


def test_json_stays_one_object_a_priced_job(sweep):
    sound, slow = (json.loads(line)["straggler_s"] for line in sweep[2].splitlines())
    assert slow > sound


def test_the_table_is_that_of_the_jobs_and_nothing_is_written_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert answer(["-m", "chip.jitter=0,0.05", "wire_dtype=fp16"]) == 0
    out = capsys.readouterr().out
    assert out.count("\nemulated: ResNet-50") == 2
    title, head, *lines, _ = out[out.index("what if: ") :].splitlines()
    assert title.endswith("in all of them wire_dtype=fp16")
    assert head.split()[:4] == ["job", "chip.jitter", "chips", "batch"]
    waiting = [float(line[: head.index("waiting") + len("waiting")].split()[-1]) for line in lines]
    assert waiting == [0, pytest.approx(0.05 * 17.907 * 3.248, abs=2e-3)]
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        whatif.write(tmp_path / "taken", [])
