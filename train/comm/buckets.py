"""Gradients summed over the workers bucket by bucket, beside the backward pass that still makes the others.

The buckets are those that the emulated clock prices (train/sim/step.buckets): tensors in the order in which the
backward pass makes them, the same on every rank. A bucket's sum starts when its last gradient is ready and the bucket
before it is done (Li et al. 2020, arXiv 2006.15704, section 3.2.3). In passes before a step's last one gradients only
accumulate.

    this thread  |  forward  |     backward      | waiting | update
    beside it                | loss |  | sum 1 |  | 2 || 3 |
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.comm.aggregation import Aggregator
from train.progress import doing


class Beside(Protocol):
    """Runs functions one after another, in the order given, without making the caller wait."""

    when: str
    """In words."""
    busy_s: float
    """Seconds that the functions of the last turn took, up to a `join`."""

    def submit(self, function: Callable[[], Any]) -> None: ...

    def check(self) -> None:
        """Raise what a function raised; those after it are left out."""

    def join(self) -> None:
        """Return once all are done; raises as `check` does."""


class Afterwards:
    """Runs them when they are waited for: where nothing is to be gained by less."""

    when = "after the backward pass"

    def __init__(self) -> None:
        self._functions: list[Callable[[], Any]] = []
        self.busy_s = 0.0

    def submit(self, function: Callable[[], Any]) -> None:
        self._functions.append(function)

    def check(self) -> None: ...

    def join(self) -> None:
        functions, self._functions = self._functions, []
        started = time.perf_counter()
        for function in functions:
            function()
        self.busy_s = time.perf_counter() - started


class InThread:
    """Runs them in a thread, which lives from the first one to `join`; it computes with one thread itself."""

    when = "in a thread beside the backward pass of a step's last pass"

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.busy_s = 0.0

    def submit(self, function: Callable[[], Any]) -> None:
        if self._thread is None:
            self._queue, self._error, self.busy_s = SimpleQueue(), None, 0.0
            self._thread = threading.Thread(target=self._work, name="beside", daemon=True)
            self._thread.start()
        self._queue.put(function)

    def check(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # it knows this frame: no cycle may keep alive what the function held

    def join(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self.check()

    def _work(self) -> None:
        torch.set_num_threads(1)  # the count is a thread's own: the others are for the backward pass
        doing("all-reduce")
        while function := self._queue.get():
            started = time.perf_counter()
            try:
                function()
            except BaseException as error:
                self._error = error
                return
            finally:
                del function  # while it waits for the next one, nothing is kept
                self.busy_s += time.perf_counter() - started


class GradientSums:
    """The gradients of a step and its outcome (loss, correct answers ...), summed over all passes of all workers."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        sizes: Sequence[int],
        make: Callable[[], Aggregator],
        outcome: Aggregator,
        beside: Beside,
    ) -> None:
        """`sizes`: tensors of each bucket, of those that `make` makes an aggregator; from the last parameter to the
        first. All ranks make one at the same time, and call the same methods in the same order.
        """
        if sum(sizes) != len(parameters):
            raise ValueError(f"the buckets hold {sum(sizes)} tensors, and the model has {len(parameters)}")
        ends = list(accumulate(sizes, initial=0))
        backward = list(parameters)[::-1]
        self.buckets = [backward[first:last] for first, last in pairwise(ends)]
        self._aggregators = [make() for _ in sizes]
        for aggregator, bucket in zip(self._aggregators, self.buckets, strict=True):
            aggregator.prepare(bucket)
        self._outcome, self._beside = outcome, beside
        self._totals: list[list[Tensor]] = []
        self._started = 0
        self.comm_s = 0.0
        """Seconds that the last `total` waited: what of the communication nothing hid."""

    @property
    def busy_s(self) -> float:
        """Seconds that the sums of the last step took, and what was to come before them."""
        return self._beside.busy_s

    @property
    def when(self) -> str:
        return self._beside.when

    def first(self, function: Callable[[], Any]) -> None:
        """An operation of the group that is to come before the step's sums."""
        self._beside.submit(function)

    def add(self, block: int, gradients: list[Tensor], outcome: Tensor) -> None:
        """A pass's contribution, gradients in the order of the parameters; see Aggregator.add."""
        self._outcome.add(block, [outcome])
        backward = iter(gradients[::-1])
        for aggregator, bucket in zip(self._aggregators, self.buckets, strict=True):
            aggregator.add(block, [next(backward) for _ in bucket])

    @contextmanager
    def as_they_come(self, block: int, outcome: Tensor) -> Iterator[None]:
        """Around the backward pass of a step's last contribution: takes the gradients from the parameters."""
        self._outcome.add(block, [outcome])
        self._beside.submit(lambda: self._sum(self._outcome))
        missing = [len(bucket) for bucket in self.buckets]

        def ready(number: int, _: Tensor) -> None:
            self._beside.check()
            missing[number] -= 1
            while self._started < len(missing) and not missing[self._started]:
                bucket, aggregator = self.buckets[self._started], self._aggregators[self._started]
                aggregator.add(block, taken(bucket))
                self._beside.submit(partial(self._sum, aggregator))
                self._started += 1

        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(ready, number))
            for number, bucket in enumerate(self.buckets)
            for parameter in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        assert not any(missing), f"{sum(missing)} parameters got no gradient"

    def total(self) -> tuple[list[Tensor], Tensor]:
        """(Gradients in the order of the parameters, outcome); to be read only, until the next contribution."""
        if not self._started:
            for aggregator in (self._outcome, *self._aggregators):
                self._beside.submit(partial(self._sum, aggregator))
        began = time.perf_counter()
        self._beside.join()
        self.comm_s = time.perf_counter() - began
        ((outcome,), *totals), self._totals, self._started = self._totals, [], 0
        return [gradient for total in totals for gradient in total][::-1], outcome

    def _sum(self, aggregator: Aggregator) -> None:
        self._totals.append(aggregator.total())


def taken(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Their gradients, which they have no longer."""
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return gradients
