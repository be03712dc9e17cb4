"""A disk that is full for a while costs what it costs: no row, no point, and no run."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from run_folder_samples import Clocked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import checkpoint, checkpoint_files
from train.callbacks import MetricsCallback, OutlastsFullDisk
from train.metrics import open_sinks, read_rows

SIZE = 2 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # tensorboard's thread may have a file open yet


def fill(disk: Path) -> Path:
    path = disk / "filling"
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    return path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's own thread
def test_rows_wait_for_room_and_tensorboard_is_made_anew(disk):
    said: list[str] = []
    clock = Clocked()
    callback = OutlastsFullDisk(MetricsCallback(open_sinks(disk, {})), said.append)
    callback.on_step(clock.step(1))
    filling = fill(disk)
    for step in range(2, 120):  # the last page of the file takes some rows yet, and tensorboard's queue all
        callback.on_step(clock.step(step))
    callback.on_eval(clock.evaluation(119, 0.5))
    told = ": No space left on device; training goes on, and writes when there is room again"
    assert 1 <= len(said) < 10 and all(line.endswith(told) for line in said)  # once for each time that room ran out
    assert len(list(read_rows(disk))) < 120
    filling.unlink()
    callback.on_step(clock.step(120))
    callback.on_end({"status": "done"})
    points = [(row["kind"], row["step"]) for row in read_rows(disk)]
    assert points == [*(("step", step) for step in range(1, 120)), ("eval", 119), ("step", 120)]
    for clock in ("measured", "emulated"):
        shown = EventAccumulator(str(disk / "tb" / clock)).Reload().Scalars("train/loss")
        assert [point.step for point in shown] == list(range(1, 121))


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(disk):
    folder = checkpoint_files.take_over(disk)
    before = checkpoint.save(folder, 1, {"text": "x" * 1000})
    filling = fill(disk)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(folder, 2, {"text": "x" * 100_000})
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001.pt", "step_00000001.sha256"]
    filling.unlink()
    assert checkpoint_files.newest_sound(disk, pytest.fail) == before
    assert checkpoint.load(checkpoint.save(folder, 2, {"a": 1})) == {"a": 1}
