"""The operations of a group that has no queue of its own: one after another, in the caller's thread or beside it."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from train.comm.groups import PeerLost
from train.comm.peers import SLICE_S, Peers

# those that gloo adds
SUMMED = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
)


class Pending:
    """An operation under way; `wait` ends it, and raises what went wrong in it."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait = wait

    def wait(self) -> None:
        wait, self._wait = self._wait, _nothing
        try:
            wait()
        finally:
            del wait  # an error knows this frame: see Turns._end


class Turns:
    """Every rank calls a group's operations in the same order, and each ends before the next one begins.

    apart: run all of them in a thread of their own, as ones that nothing ends when a peer dies; the caller is told,
    and the thread is left behind.
    """

    def __init__(self, peers: Peers, apart: bool = False) -> None:
        self._peers, self._apart = peers, apart
        self._queue: SimpleQueue | None = None
        self._last: Future | None = None

    def run(self, operation: str, function: Callable[[], Any], async_op: bool = False) -> Any:
        """What `function` returns, or with `async_op` a Pending. Errors become PeerLost."""
        self._peers.check(operation)
        if self._apart and not async_op:
            return self._end(operation, self._begin(operation, function))
        if async_op:
            future = self._last = self._begin(operation, function)
            return Pending(partial(self._end, operation, future))
        if self._last is not None:
            with suppress(PeerLost, ValueError):  # an error of its own is raised where it is waited for
                self._end(operation, self._last)
            self._last = None
        return self._turn(operation, function)

    def close(self) -> None:
        """Call it after the peers have been told: what is under way then ends by itself."""
        self._last = None
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None

    def _begin(self, operation: str, function: Callable[[], Any]) -> Future:
        if self._queue is None:
            self._queue = SimpleQueue()
            threads = torch.get_num_threads()  # the count is a thread's own
            threading.Thread(target=_work, args=(self._queue, threads), name="turns", daemon=True).start()
        future: Future = Future()
        self._queue.put((future, lambda: self._turn(operation, function)))
        return future

    def _end(self, operation: str, future: Future) -> Any:
        try:
            while not future.done():
                with suppress(TimeoutError):
                    return future.result(SLICE_S)
                self._peers.check(operation)
            return future.result()
        finally:
            del future  # an error knows this frame: no cycle may keep alive what the operation held

    def _turn(self, operation: str, function: Callable[[], Any]) -> Any:
        with self._peers.during(operation):
            return function()


def _nothing() -> None: ...


def _work(queue: SimpleQueue, threads: int) -> None:
    torch.set_num_threads(threads)
    while task := queue.get():
        future, function = task
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del task, future, function  # while it waits for the next one, nothing is kept


@contextmanager
def flat(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of `tensor` in one dimension, to be changed in place whatever its strides."""
    if tensor.is_contiguous():
        yield tensor if tensor.dim() == 1 else tensor.view(-1)
    else:
        dense = tensor.contiguous().view(-1)
        yield dense
        tensor.copy_(dense.view(tensor.shape))


def check_summed(tensor: Tensor, backend: str) -> None:
    """ValueError where elements of this type have no sum."""
    if tensor.dtype not in SUMMED:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUMMED)
        raise ValueError(f"backend={backend}: all_reduce adds {known}, not {tensor.dtype}; convert the tensor")


def check_rank(rank: int, world_size: int, what: str) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"{what} {rank} is no rank of a group of {world_size}")
