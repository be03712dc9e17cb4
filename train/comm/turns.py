"""The operations of a group that has no queue of its own: one after another, in the caller's thread or beside it."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from train.comm.peers import Peers

# those that gloo adds
SUMMED = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
)


class Pending:
    """An operation under way; `wait` ends it, and raises what went wrong in it."""

    def __init__(self, wait: Callable[[], Any], peers: Peers | None = None, operation: str = "") -> None:
        self._wait, self._peers, self._operation = wait, peers, operation

    def wait(self) -> None:
        if self._peers is None:
            self._wait()
        else:
            with self._peers.during(self._operation):
                self._wait()


class Turns:
    """Every rank calls a group's operations in the same order, and each ends before the next one begins."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future | None = None

    def run(self, operation: str, function: Callable[[], Any], async_op: bool = False) -> Any:
        """What `function` returns, or with `async_op` a Pending. Errors become GroupError."""
        self._peers.check(operation)
        if async_op:
            if self._thread is None:
                threads = torch.get_num_threads()  # the count is a thread's own
                self._thread = ThreadPoolExecutor(1, operation, torch.set_num_threads, (threads,))
            self._last = self._thread.submit(self._turn, operation, function)
            return Pending(self._last.result)
        if self._last is not None:
            if not self._last.done():
                self._last.exception()  # waits; an error of its own is raised where it is waited for
            self._last = None
        return self._turn(operation, function)

    def _turn(self, operation: str, function: Callable[[], Any]) -> Any:
        with self._peers.during(operation):
            return function()

    def end(self) -> None:
        """Call it after the peers have been told: what is under way then ends with an error, or by itself."""
        if self._thread is not None:
            self._thread.shutdown()


@contextmanager
def flat(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of `tensor` in one dimension, to be changed in place whatever its strides."""
    if tensor.is_contiguous():
        yield tensor.view(-1)
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
