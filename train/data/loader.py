"""Batches prepared ahead by one background thread."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

import numpy as np
import torch

from train.data.source import Dataset

END = object()

Batch = tuple[torch.Tensor, torch.Tensor]


class Prefetcher:
    """Yields `dataset.batch(indices)` for each (epoch, indices) of `batches`, in order, prepared ahead of the consumer.

    At most `depth` batches wait ready and one more is in preparation; of a dataset that can `start` a batch (Staged),
    `depth` are in preparation at once. On a GPU the batches lie there already: what is copied are such a dataset's
    bytes, through pinned memory, and the GPU crops, mirrors and normalises them beside the training. An error of the
    thread (of `batches` too) is raised to the consumer in its place in the order. `wait_s` is the time the consumer has
    waited so far, in seconds.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Iterable[tuple[int, np.ndarray]],
        *,
        seed: int,
        depth: int = 2,
        device: str = "cpu",
    ) -> None:
        assert depth >= 1, depth
        self.wait_s = 0.0
        self._dataset, self._batches, self._seed, self._device = dataset, batches, seed, device
        self._ahead = depth if hasattr(dataset, "start") else 1
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
        if self._device != "cpu":  # its memory belongs to the copying stream, which must not use it again too early
            for tensor in item:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
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
        under_way: deque[Callable[[], Batch]] = deque()
        try:
            with self._stream():
                for batch in self._begun():
                    under_way.append(batch)
                    if len(under_way) >= self._ahead:
                        self._put(under_way.popleft()())
                    if self._closing.is_set():
                        return
                while under_way and not self._closing.is_set():
                    self._put(under_way.popleft()())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self._tell(error)
        else:
            self._tell(END)
        finally:
            for finish in under_way:  # nobody wants them, but their memory has to come back
                with suppress(Exception):
                    finish()

    def _tell(self, last: object) -> None:
        if not self._closing.is_set():  # else nobody makes room any more
            self._ready.put(last)

    def _begun(self) -> Iterator[Callable[[], Batch]]:
        """Batches under way, in order; an error takes the place of its batch and is the last."""
        try:
            for epoch, indices in self._batches:
                yield self._begin(epoch, indices)
        except Exception as error:
            yield partial(raised, error)

    def _begin(self, epoch: int, indices: np.ndarray) -> Callable[[], Batch]:
        if not hasattr(self._dataset, "start"):
            return lambda: self._moved(*self._dataset.batch(indices, seed=self._seed, epoch=epoch))
        wait = self._dataset.start(indices, seed=self._seed, epoch=epoch)

        def finish() -> Batch:
            *parts, labels = self._moved(*wait())
            return self._dataset.finish(*parts), labels

        return finish

    def _moved(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._device == "cpu":
            return tensors
        return tuple(tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors)

    def _put(self, batch: Batch) -> None:
        if self._device != "cpu":  # the consumer's stream must not see a batch that is still on its way
            torch.cuda.current_stream().synchronize()
        self._ready.put(batch)

    def _stream(self) -> AbstractContextManager:
        """Copies run beside the training's computing."""
        return nullcontext() if self._device == "cpu" else torch.cuda.stream(torch.cuda.Stream(self._device))


def raised(error: BaseException) -> Batch:
    raise error
