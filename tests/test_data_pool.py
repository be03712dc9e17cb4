import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_image_tree

from train.data.imagenet import ImageNetFolder
from train.data.pool import parts

ROOT = Path(__file__).resolve().parent.parent
INDICES = np.arange(18)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_image_tree(tmp_path_factory.mktemp("photos"), classes=3, per_class=2, size=40)


def source_of(root: Path, workers: int, **options) -> ImageNetFolder:
    return ImageNetFolder(str(root), image_size=24, workers=workers, repeat=3, **options)


@contextmanager
def processes_of(root: Path, workers: int, **options) -> Iterator[ImageNetFolder]:
    source = source_of(root, workers, **options)
    yield source
    source.train.pool.close()


def loaders(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    patience = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < patience:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_parts_cover_everything_once():
    for count, most in ((10, 3), (2, 5), (0, 4), (7, 7), (1, 1)):
        covered = [i for part in parts(count, most) for i in range(count)[part]]
        assert covered == list(range(count)) and len(parts(count, most)) <= most


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_gives_the_same_bits_at_every_size(tree, workers):
    sizes = [[0, 8], [2, 16], [5, 24]]
    threads = source_of(tree, workers=0, train_sizes=sizes)
    with processes_of(tree, workers, train_sizes=sizes) as source:
        for epoch, size in ((0, 8), (1, 8), (2, 16), (4, 16), (5, 24), (90, 24), (0, 8)):
            images, labels = source.train.batch(INDICES, seed=4, epoch=epoch)
            expected = threads.train.batch(INDICES, seed=4, epoch=epoch)
            assert images.shape == (18, 3, size, size) and images.equal(expected[0]) and labels.equal(expected[1])
        first, second = (source.train.start(INDICES, seed=4, epoch=epoch) for epoch in (6, 7))  # both under way
        assert not second()[0].equal(first()[0])
        for dataset, other in ((source.train, threads.train), (source.eval, threads.eval)):  # by the same processes
            images, labels = dataset.batch(np.arange(6), seed=4, epoch=7)
            assert images.equal(other.batch(np.arange(6), seed=4, epoch=7)[0]) and labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_broken_photo_is_counted_here(tmp_path):
    root = make_image_tree(tmp_path, classes=3, per_class=2, size=40)
    (root / "train" / "n00000001" / "1_1.JPEG").write_bytes(b"")
    threads = source_of(root, workers=0, on_error="skip")
    with processes_of(root, workers=2, on_error="skip") as source:
        for dataset in (source.train, threads.train):
            with pytest.warns(UserWarning, match="1_1.JPEG"):
                images, labels = dataset.batch(INDICES, seed=0, epoch=0)
        assert source.num_skipped == 1
        images, labels = source.train.batch(INDICES, seed=0, epoch=1)
        expected = threads.train.batch(INDICES, seed=0, epoch=1)
        assert images.equal(expected[0]) and labels.equal(expected[1])


def test_errors_of_a_loader_arrive_and_closing_ends_all(tmp_path):
    root = make_image_tree(tmp_path, classes=3, per_class=2, size=40)
    (root / "train" / "n00000001" / "1_1.JPEG").write_bytes(b"")
    source = source_of(root, workers=2)
    with pytest.raises(ValueError, match="unreadable image .*1_1.JPEG"):
        source.train.batch(INDICES, seed=0, epoch=0)
    source.train.batch(INDICES[:3], seed=0, epoch=0)  # what comes after is not disturbed
    launcher = source.train.pool._launcher.pid
    pids = loaders(launcher)
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a loader process has ended.*data.workers=0"):
        for _ in range(3):
            source.train.batch(INDICES[:3], seed=0, epoch=0)
    source.train.pool.close()
    assert gone([launcher, *pids])


OWNER = """
import sys, time
import numpy as np
from train.data.imagenet import ImageNetFolder
source = ImageNetFolder(sys.argv[1], image_size=24, workers=2)
source.train.batch(np.arange(6), seed=0, epoch=0)
print(source.train.pool._launcher.pid, flush=True)
time.sleep(60)
"""


def test_loaders_end_with_a_killed_owner(tree):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tree)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    launcher = int(owner.stdout.readline())
    pids = [launcher, *loaders(launcher)]
    assert len(pids) == 3
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(pids)
