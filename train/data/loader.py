"""Batches prepared ahead by one background thread."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from train.data.source import Dataset

END = object()


class Prefetcher:
    """Yields `dataset.batch(indices)` for each (epoch, indices) of `batches`, in order, prepared ahead of the consumer.

    At most `depth` batches wait ready and one more is in preparation. An error of the thread (of `batches` too) is
    raised to the consumer in its place in the order. `wait_s` is the time the consumer has waited so far, in seconds.
    """

    def __init__(
        self, dataset: Dataset, batches: Iterable[tuple[int, np.ndarray]], *, seed: int, depth: int = 2
    ) -> None:
        assert depth >= 1, depth
        self.wait_s = 0.0
        self._dataset, self._batches, self._seed = dataset, batches, seed
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._closing.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_s += time.perf_counter() - start
        if item is END or isinstance(item, BaseException):
            self.close()
            raise StopIteration if item is END else item
        return item

    def close(self) -> None:
        """Stop preparing and join the thread; harmless when called again."""
        self._closing.set()
        while not self._ready.empty():  # a thread that waits for room gets it, then sees the event
            self._ready.get_nowait()
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        try:
            for epoch, indices in self._batches:
                if self._closing.is_set():
                    return
                self._ready.put(self._dataset.batch(indices, seed=self._seed, epoch=epoch))
                if self._closing.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self._ready.put(error)
        else:
            self._ready.put(END)
