"""A finished run on one page of TensorBoard: both texts, the picture, and what a run without a curve gets."""

import errno
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from run_folder_samples import make_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import run_page
from scripts.screenshot_tensorboard import BROWSERS, PAGES
from train.metrics import read_rows
from train.report import report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    found = report([make_run(tmp_path_factory.mktemp("page") / "runs" / "digits-1")]).runs[0]
    run_page.write(found)
    return found


def shown(run) -> EventAccumulator:
    return EventAccumulator(str(run.run_dir / "tb" / "page")).Reload()


def text(board: EventAccumulator, tag: str) -> str:
    (event,) = board.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_the_page_has_the_picture_and_three_texts(run):
    board = shown(run)
    (image,) = board.Images("one_minute/picture")
    assert image.encoded_image_string == (run.run_dir / "page.png").read_bytes() and image.width == 1200
    assert sorted(board.Tags()["tensors"]) == [f"{tag}/text_summary" for tag in run_page.texts(run.data)]


def test_the_first_text_keeps_the_labels_in_columns_of_their_own(run):
    lines = text(shown(run), "one_minute/1_result").splitlines()
    assert lines[0] == "### Run digits-1: done, reached its target"
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["", "claimed", "emulated", "measured"]
    (row,) = [line for line in lines if line.startswith("| time to target")]
    assert "59.80 s" in row and "0.50 s" in row and "26.00 s" in row


def test_every_circumstance_stands_once_on_the_page(run):
    board = shown(run)
    second, third = (text(board, f"one_minute/{name}") for name in list_of(run)[1:])
    differ = [one["name"] for one in run.data["conditions"] if one["differs"]]
    assert f"differs from the claim in {len(differ)} of {len(run.data['conditions'])}" in second
    assert [line.split("|")[1].strip() for line in second.splitlines()[4:]] == differ
    for one in run.data["conditions"]:
        assert (one["name"] in third) == (not one["differs"]), one["name"]
    assert "Source: DoNews" in third


def list_of(run) -> list[str]:
    return [tag.partition("/")[2] for tag in run_page.texts(run.data)]


def test_the_picture_of_a_run_that_missed_its_target_and_has_no_claim(run, tmp_path):
    data = json.loads(json.dumps(run.data)) | {"claim": None, "neighbours": [], "reached": False}
    for label in ("emulated", "measured"):
        data[label]["time_to_target_s"] = None
    data["claimed"] = {}
    run_page.draw(data, list(read_rows(run.run_dir)), tmp_path / "page.png")
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]
    assert list(run_page.texts(data)) == ["one_minute/1_result"]


def test_a_run_without_a_curve_has_the_texts_alone(run, tmp_path):
    folder = make_run(tmp_path / "short")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    short = [row for row in rows if row["kind"] == "step" or row["step"] == 12]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    found = report([folder]).runs[0]
    run_page.write(found)
    assert shown(found).Tags()["images"] == [] and not (folder / "page.png").exists()


def test_a_full_disk_costs_the_page_and_not_the_run(run, monkeypatch, capsys):
    from launch.run import _page

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_page, "draw", full)
    _page(run)
    assert capsys.readouterr().err == "launch.run: no page for TensorBoard: [Errno 28] No space left on device\n"


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser: apt-get install chromium")
def test_screenshots_in_a_real_browser(run, tmp_path):
    command = [sys.executable, "scripts/screenshot_tensorboard.py", run.run_dir.parent, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        picture = (tmp_path / page.file).read_bytes()
        width, height = struct.unpack(">2I", picture[16:24])
        assert (width, height) == tuple(round(page.scale * side) for side in page.size)
        assert 20_000 < len(picture) < 300_000  # an empty page is smaller


def test_a_run_without_a_page_is_refused(run, tmp_path):
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    command = [sys.executable, "scripts/screenshot_tensorboard.py", run.run_dir.parent, tmp_path / "out", "--run", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "x/tb/page: is not there; give a run that ended (one of ['digits-1'])" in done.stderr
