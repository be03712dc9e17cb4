"""What every backend must do, as cases that run in a process for each rank; run as a command it counts them.

    python scripts/check_backends.py contract [--backends shm plan ...] [--ranks 2 3 4 5] [--elements 10000000] [--json]

Sums are of small whole numbers, exact in every dtype and order, so that every result is known; that the order of sums
is the right one is held against the numpy interpreter of the same plan, bit by bit.
"""

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from group_samples import BACKENDS, WORKERS_PER_NODE, equal, make, name_of, numbers, summed
from rank_processes import run_ranks
from torch import Tensor

from train.comm.aggregation import meeting_order
from train.comm.algorithms import ring
from train.comm.groups import PeerLost
from train.comm.plan import run_on_arrays
from train.comm.plan_group import worker_mesh
from train.comm.turns import SUMMED

SIZES = (0, 1, 2, 3, 17, 1000, 8191, 100_003)
Case = tuple[str, Callable[[], str | None]]
"""A name, and what asserts or returns why it was skipped."""


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint8)


class Contract:
    """The cases of one group on one rank; every rank runs them in the same order."""

    def __init__(self, backend: str, rank: int, world_size: int, store: Any, elements: int) -> None:
        self.backend, self.store = backend, store
        self.n, self.rank, self.elements = world_size, rank, elements
        self.group = make(backend, rank, world_size, store, "contract")

    def cases(self) -> Iterator[Case]:
        large = [size for size in (1_000_001, 10_000_000) if size <= self.elements]
        for dtype in SUMMED:
            for size in SIZES:
                yield f"all_reduce {dtype} [{size}]", lambda d=dtype, s=size: self.all_reduce(s, d)
        for size in large:
            yield f"all_reduce torch.float32 [{size}]", lambda s=size: self.all_reduce(s, torch.float32)
        for size in (*SIZES, *large):
            yield f"order of sums [{size}]", lambda s=size: self.order_of_sums(s)
            yield f"reduce_scatter [n, {size}]", lambda s=size: self.reduce_scatter(s)
            for dtype in (torch.float32, torch.bool, torch.int16):
                yield f"all_gather {dtype} [{size}]", lambda d=dtype, s=size: self.all_gather(s, d)
            yield f"broadcast [{size}]", lambda s=size: self.broadcast(s)
            yield f"send and recv [{size}]", lambda s=size: self.send_recv(s)
            yield f"exchange [{size}]", lambda s=size: self.exchange(s)
        names = "shapes strides asynchronous repeated barrier subgroups refused mismatched shared_memory made_anew"
        for name in names.split():
            yield name.replace("_", " "), getattr(self, name)

    def run(self) -> Counter:
        """{"passed": cases, reason: cases skipped for it}"""
        counts: Counter = Counter()
        for name, case in self.cases():
            try:
                counts[case() or "passed"] += 1
            except Exception as error:
                error.add_note(f"case: {name}, backend {self.backend}, rank {self.rank} of {self.n}")
                raise
        self.group.close()
        self.closed()
        return counts

    def all_reduce(self, size: int, dtype: torch.dtype) -> None:
        value = numbers(self.rank, size, dtype)
        assert self.group.all_reduce(value) is None
        equal(value, summed(range(self.n), size, dtype))

    def order_of_sums(self, size: int) -> str | None:
        """Random numbers of many magnitudes; the same bits on all ranks, and those of the interpreter."""
        generator = torch.Generator().manual_seed(size)
        each = torch.randn(self.n, size, generator=generator) * 10.0 ** torch.arange(self.n)[:, None]
        value = each[self.rank].clone()
        self.group.all_reduce(value)
        for row in self.group.all_gather(value):
            assert np.array_equal(bits(row), bits(value)), "ranks have different bits"
        if self.backend == "gloo" and self.n > 2:
            return "gloo's order of sums is not documented"
        assert np.array_equal(bits(value), bits(torch.from_numpy(self.expected(each.numpy())))), "not the plan's bits"
        return None

    def expected(self, each: np.ndarray) -> np.ndarray:
        if each.shape[1] == 0:
            return each[0]
        if self.backend.startswith("plan"):
            return run_on_arrays(self.group.plan, each)[self.rank].copy()
        if self.backend == "hybrid":
            starts = range(0, self.n, WORKERS_PER_NODE)
            nodes = np.stack([in_order(each[start : start + WORKERS_PER_NODE]) for start in starts])
            plan = ring(worker_mesh(len(nodes), {"host": len(nodes), "chip": 1}))
            return run_on_arrays(plan, nodes)[0].copy()
        return in_order(each)

    def reduce_scatter(self, size: int) -> None:
        rows = numbers(self.rank, self.n * size).view(self.n, size)
        equal(self.group.reduce_scatter(rows), summed(range(self.n), self.n * size).view(self.n, size)[self.rank])

    def all_gather(self, size: int, dtype: torch.dtype) -> None:
        value = numbers(self.rank, size, dtype)
        gathered = self.group.all_gather(value)
        value.zero_()  # the result is a copy
        equal(gathered, torch.stack([numbers(rank, size, dtype) for rank in range(self.n)]))

    def broadcast(self, size: int) -> None:
        for source in range(self.n):
            value = numbers(self.rank, size)
            self.group.broadcast(value, source)
            equal(value, numbers(source, size))

    def send_recv(self, size: int) -> str | None:
        """Round the ring, one after another."""
        if self.n == 1:
            return "one rank has nobody to send to"
        token = numbers(0, size, torch.int64)
        if self.rank > 0:
            self.group.recv(token.zero_(), self.rank - 1)
        self.group.send(token + 1, (self.rank + 1) % self.n)
        if self.rank == 0:
            self.group.recv(token, self.n - 1)
        equal(token, numbers(0, size, torch.int64) + (self.rank or self.n))
        return None

    def exchange(self, size: int) -> str | None:
        """As many tensors as the rank's number and one more, of three types and of other sizes in each direction."""
        if self.n == 1:
            return "one rank has nobody to send to"

        def outgoing(rank: int, peer: int) -> list[Tensor]:
            kinds = (torch.float32, torch.uint8, torch.bool)
            return [numbers(rank + peer, size + rank + i, kinds[i % 3]) for i in range(rank + 1)]

        for peer in meeting_order(self.rank, self.n):
            incoming = [torch.empty_like(tensor) for tensor in outgoing(peer, self.rank)]
            self.group.exchange(outgoing(self.rank, peer), incoming, peer)
            for ours, expected in zip(incoming, outgoing(peer, self.rank), strict=True):
                equal(ours, expected)
        return None

    def shapes(self) -> None:
        for shape in ((), (1, 1), (3, 0, 2), (5, 3, 2)):
            value = numbers(self.rank, int(np.prod(shape))).view(shape)
            gathered = self.group.all_gather(value)
            self.group.all_reduce(value)
            equal(value, summed(range(self.n), value.numel()).view(shape))
            equal(gathered, torch.stack([numbers(r, value.numel()).view(shape) for r in range(self.n)]))

    def strides(self) -> None:
        """Not contiguous: transposed, every third, channels last; what lies between stays as it was."""
        for count in (60, 48_000):
            base = numbers(self.rank, count)
            views = (base.view(-1, 6).t(), base[::3], base.view(1, 3, 4, -1).to(memory_format=torch.channels_last))
            for view in views:
                value, sent = view.clone(memory_format=torch.preserve_format), view
                self.group.all_reduce(value)
                expected = summed(range(self.n), count)
                expected = expected.view(-1, 6).t() if view is views[0] else expected
                expected = expected[::3] if view is views[1] else expected
                expected = expected.view(1, 3, 4, -1) if view is views[2] else expected
                equal(value, expected)
                equal(self.group.all_gather(sent).sum(0), expected)
            self.group.all_reduce(base[::3])
            equal(base[::3], summed(range(self.n), count)[::3])
            equal(base[1::3], numbers(self.rank, count)[1::3])

    def asynchronous(self) -> None:
        """Several under way, waited for the other way round, and one at once behind them."""
        sizes = (100_003, 1, 5000, 0, 300_000)
        values = [numbers(self.rank, size) for size in sizes]
        pending = [self.group.all_reduce(value, async_op=True) for value in values]
        last = numbers(self.rank, 77)
        self.group.all_reduce(last)
        for work in reversed(pending):
            work.wait()
        for value, size in zip(values, sizes, strict=True):
            equal(value, summed(range(self.n), size))
        equal(last, summed(range(self.n), 77))

    def repeated(self) -> None:
        """Operations of all kinds in turn: what one leaves behind must not reach the next."""
        for turn in range(40):
            size = (1, 9000, 40, 300_000)[turn % 4] + turn
            value = numbers(self.rank + turn, size)
            self.group.all_reduce(value)
            equal(value, summed(range(turn, turn + self.n), size))
            if turn % 5 == 0:
                self.group.broadcast(value.add_(self.rank), turn % self.n)
                equal(value, summed(range(turn, turn + self.n), size) + turn % self.n)
            if turn % 7 == 0:
                equal(self.group.all_gather(torch.tensor([self.rank])), torch.arange(self.n).view(-1, 1))

    def barrier(self) -> str | None:
        if self.store is None:
            return "one rank waits for nobody"
        for turn in range(3):
            if self.rank == turn % self.n:
                time.sleep(0.02)
            self.store.add(f"arrived {turn}", 1)
            self.group.barrier()
            assert self.store.add(f"arrived {turn}", 0) == self.n
        return None

    def subgroups(self) -> None:
        """Ranks of their own, in the given order; the whole group goes on beside them."""
        for ranks in ([0, self.n - 1], list(range(self.n))[::-1], [self.n // 2]):
            ranks = list(dict.fromkeys(ranks))
            part = self.group.subgroup(ranks)
            assert (part is not None) == (self.rank in ranks)
            if part is not None:
                assert (part.rank, part.world_size) == (ranks.index(self.rank), len(ranks))
                value = numbers(self.rank, 5000)
                part.all_reduce(value)
                equal(value, summed(ranks, 5000))
                part.broadcast(value := numbers(self.rank, 5), len(ranks) - 1)
                equal(value, numbers(ranks[-1], 5))
            self.all_reduce(10, torch.float32)
            if part is not None and part is not self.group:
                part.close()

    def refused(self) -> str | None:
        if self.n == 1:
            return "one rank has no other to name wrongly"
        calls = (
            (lambda: self.group.all_reduce(torch.zeros(3, dtype=torch.bool)), "torch.bool; convert"),
            (lambda: self.group.broadcast(torch.zeros(3), self.n), f"source {self.n} is no rank of a group of "),
            (lambda: self.group.send(torch.zeros(3), -1), "destination -1 is no rank"),
        )
        for call, named in calls:
            try:
                call()
            except ValueError as error:
                assert named in str(error), error
            else:
                raise AssertionError(f"no error: {named}")
        self.all_reduce(10, torch.float32)
        return None

    def mismatched(self) -> str | None:
        """Ranks that call different things."""
        if not self.backend.startswith("shm"):
            return "only shm sees that ranks call different operations"
        for dtype, size in ((torch.float32 if self.rank else torch.float16, 7), (torch.float32, 90_000 + self.rank)):
            try:
                self.group.all_reduce(torch.zeros(size, dtype=dtype))
            except ValueError as error:
                assert "different operations (rank 0: all_reduce of" in str(error), error
            else:
                raise AssertionError("no error")
            self.all_reduce(100_003, torch.float32)
        return None

    def shared_memory(self) -> str | None:
        if not hasattr(self.group, "shared"):
            return "this backend has no memory to share"
        for size in (1, 17, 300_001):
            one, *others, two, empty = self.group.shared([size] * self.n + [size, 0], torch.float32)
            assert empty.numel() == 0
            for turn in range(5):
                parts = [two if turn % 2 else one, *others]
                parts[self.rank].copy_(numbers(self.rank + turn, size))
                self.group.sum_shared(parts)
                equal(parts[0], summed(range(turn, turn + self.n), size))
        return None

    def made_anew(self) -> str | None:
        """Given up and made again in the same process, three times; what waits for one that gave up gets an error."""
        if self.n == 1:
            return "one rank waits for nobody"
        for turn in range(3):
            group = make(self.backend, self.rank, self.n, self.store, f"anew {turn}")
            value = numbers(self.rank, 1000)
            group.all_reduce(value)
            equal(value, summed(range(self.n), 1000))
            self.store.add(f"summed {turn}", 1)
            if self.rank == turn % self.n:
                while self.store.add(f"summed {turn}", 0) < self.n:  # so that nobody is still at it
                    time.sleep(0.001)
                group.abort()
            try:
                group.all_reduce(value)
            except PeerLost as error:
                assert "all_reduce" in str(error) and f"rank {self.rank} of {self.n}" in str(error), error
            else:
                raise AssertionError("no error after a rank gave up")
            group.abort()
        return None

    def closed(self) -> None:
        """Nothing of the groups is left in this process: no shared memory with a name, no socket, no thread."""
        left = {name for name in map(name_of, Path("/proc/self/fd").iterdir()) if name.startswith("/dev/shm")}
        assert not left, left
        deadline = time.monotonic() + 5
        while names := [thread.name for thread in threading.enumerate() if thread.name == "peers"]:
            assert time.monotonic() < deadline, names
            time.sleep(0.01)


def in_order(each: np.ndarray) -> np.ndarray:
    total = each[0].copy()
    for row in each[1:]:
        total += row
    return total


def run_contract(rank: int, world_size: int, store: Any, backend: str, elements: int) -> Counter:
    return Contract(backend, rank, world_size, store, elements).run()


def unavailable(backend: str) -> str:
    """Why a backend can't be tried on this machine, or ''."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        return "needs two NVIDIA GPUs"
    if backend == "hccl":
        return "needs Ascend NPUs and torch_npu"
    return ""


def count(backend: str, world_size: int, elements: int) -> Counter:
    """Cases that passed, and those skipped by their reason; the first failure is raised."""
    if reason := unavailable(backend):
        return Counter({reason: 1})
    if backend == "single":
        return run_contract(0, 1, None, backend, elements)
    if backend == "plan:torus_2d" and world_size % WORKERS_PER_NODE:
        return Counter({"an odd number of workers is no torus of two axes": 1})
    return run_ranks(world_size, run_contract, backend, elements)[0]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("check_backends.py contract", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--elements", type=int, default=10_000_000, help="of the largest buffer")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    total: dict[str, Counter] = {}
    for backend in given.backends:
        counts = [count(backend, ranks, given.elements) for ranks in ([1] if backend == "single" else given.ranks)]
        total[backend] = sum(counts, Counter())
        if not given.json:
            passed, skipped = total[backend]["passed"], {k: v for k, v in total[backend].items() if k != "passed"}
            reasons = "; ".join(f"{number} {reason}" for reason, number in skipped.items())
            print(f"{backend:22} {passed:5} passed {sum(skipped.values()):4} skipped  {reasons}", flush=True)
    if given.json:
        print(json.dumps(total))
    return 0
