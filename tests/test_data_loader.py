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
