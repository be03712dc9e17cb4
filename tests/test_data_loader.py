import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train.data import loader
from train.data.loader import Prefetcher


class Numbers:
    """Images hold their index and epoch; index 13 is unreadable. Counts the batches made."""

    def __init__(self) -> None:
        self.made = 0
        self.hold = threading.Event()
        self.hold.set()

    def __len__(self) -> int:
        return 1000

    def batch(self, indices, *, seed, epoch):
        self.hold.wait(10)
        if 13 in indices:
            raise FileNotFoundError("thirteen.jpg is gone")
        self.made += 1
        return torch.from_numpy(indices * 1000 + epoch), torch.from_numpy(indices + seed)


def batches(first: int, count: int):
    return [(step // 2, np.array([first + step])) for step in range(count)]


def test_in_order_across_epochs():
    with Prefetcher(Numbers(), batches(100, 5), seed=7) as prefetcher:
        assert [(images.item(), labels.item()) for images, labels in prefetcher] == [
            (100_000, 107), (101_000, 108), (102_001, 109), (103_001, 110), (104_002, 111),
        ]  # fmt: skip
        with pytest.raises(StopIteration):
            next(prefetcher)


def test_depth_bounds_the_batches_ahead():
    dataset = Numbers()
    with Prefetcher(dataset, batches(100, 50), seed=0, depth=3) as prefetcher:
        next(prefetcher)
        patience = time.monotonic() + 10
        while dataset.made < 5 and time.monotonic() < patience:
            time.sleep(0.01)
        time.sleep(0.05)
        assert dataset.made == 1 + 3 + 1  # taken, waiting, and one in the thread's hand


def test_an_error_arrives_in_its_place_with_its_own_type():
    prefetcher = Prefetcher(Numbers(), batches(11, 9), seed=0)
    assert [next(prefetcher)[1].item(), next(prefetcher)[1].item()] == [11, 12]
    with pytest.raises(FileNotFoundError, match="thirteen.jpg is gone"):
        next(prefetcher)
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_an_error_of_the_order_arrives_too():
    def broken():
        yield 0, np.array([1])
        raise ValueError("no more order")

    prefetcher = Prefetcher(Numbers(), broken(), seed=0)
    next(prefetcher)
    with pytest.raises(ValueError, match="no more order"):
        next(prefetcher)


def test_close_joins_the_thread_in_every_state():
    for taken in (0, 1, 4):
        prefetcher = Prefetcher(Numbers(), batches(100, 4), seed=0, depth=1)
        for _ in range(taken):
            next(prefetcher)
        prefetcher.close()
        prefetcher.close()
        assert not prefetcher._thread.is_alive()
        with pytest.raises(StopIteration):
            next(prefetcher)


def test_waiting_is_counted_and_the_consumers_own_time_is_not(monkeypatch):
    clock = itertools.count().__next__  # a second for each look at it
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=clock))
    with Prefetcher(Numbers(), batches(100, 3), seed=0) as prefetcher:
        next(prefetcher)
        for _ in range(100):
            clock()
        list(prefetcher)
        assert prefetcher.wait_s == 4  # three batches and the end


class Startable(Numbers):
    """Batches are begun ahead; a task counts as under way until somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = self.waited = self.most = 0

    def start(self, indices, *, seed, epoch):
        if 17 in indices:
            raise RuntimeError("no loader process for seventeen")
        self.begun += 1
        self.most = max(self.most, self.begun - self.waited)

        def wait():
            self.waited += 1
            return self.batch(indices, seed=seed, epoch=epoch)

        return wait

    def finish(self, images):
        return images + 0.5


def test_batches_that_can_be_started_are_under_way_together_and_come_in_order():
    dataset = Startable()
    with Prefetcher(dataset, batches(100, 9), seed=7, depth=3) as prefetcher:
        assert [labels.item() for _, labels in prefetcher] == list(range(107, 116))
    assert dataset.most == 3 and dataset.begun == dataset.waited == 9
    with Prefetcher(Startable(), [(2, np.array([3]))], seed=0) as prefetcher:
        assert next(prefetcher)[0].item() == 3002.5


@pytest.mark.parametrize(("first", "error"), [(11, FileNotFoundError), (15, RuntimeError)])
def test_what_was_begun_before_an_error_comes_first(first, error):
    dataset = Startable()
    with Prefetcher(dataset, batches(first, 9), seed=0, depth=3) as prefetcher:
        assert [next(prefetcher)[1].item(), next(prefetcher)[1].item()] == [first, first + 1]
        with pytest.raises(error):
            next(prefetcher)
    assert dataset.begun == dataset.waited  # closing waits for what was under way: its memory comes back


@pytest.mark.parametrize("taken", [0, 1, 3, 6])
def test_closing_waits_for_what_is_under_way(taken):
    dataset = Startable()
    prefetcher = Prefetcher(dataset, batches(100, 6), seed=0, depth=2)
    for _ in range(taken):
        next(prefetcher)
    prefetcher.close()
    assert not prefetcher._thread.is_alive() and dataset.begun == dataset.waited
