"""Where the ranks of a group meet in shared memory: a barrier at which they also see whether all came for the same.

A rank signs what it comes for and counts itself in; the last one to come compares the signatures, does what is to be
done while the others wait, and lets them go on. So nobody is woken up but to go on: where ranks share processors, being
woken is what a small operation costs.
"""

import struct
from collections.abc import Callable
from time import monotonic

import torch
from torch import Tensor

from train.comm.peers import Peers
from train.comm.segment import LINE, SEMAPHORE_BYTES, Segment, lines

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "sum_shared")
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
SIGNATURE = struct.Struct("5q")
"""Operation, dtype, elements, source, and where the elements lie: this one ranks need not have in common."""
COMMON = 4 * 8
WORD = 8
COME, LATEST, DIFFER = 0, 1, 2
"""Words of the state: how many have come, who came last, and whether the signatures differ."""


class Meeting:
    """Part of a segment, from byte `offset` on:

        [the state's lock] [each rank's semaphore] [state] [which meeting each rank came to last] [signatures, twice]

    The semaphores order memory: who comes passes through the lock after all who came before, and goes on after the last
    one's post. A signature is overwritten by that of two operations later, when all have read it.
    """

    @staticmethod
    def nbytes(ranks: int) -> int:
        return (1 + ranks) * SEMAPHORE_BYTES + LINE + lines(ranks * WORD) + 2 * ranks * LINE

    def __init__(self, segment: Segment, offset: int, peers: Peers, spin_s: float) -> None:
        n, makes = peers.world_size, peers.rank == 0
        self._peers, self._spin_s = peers, spin_s
        ((self._lock,),) = segment.semaphores(offset, 1, 1, 1 if makes else None)
        (self._go,) = segment.semaphores(offset + SEMAPHORE_BYTES, 1, n, 0 if makes else None)
        rest = (1 + n) * SEMAPHORE_BYTES
        self._bytes = memoryview(segment.tensor(offset + rest, self.nbytes(n) - rest, torch.uint8).numpy())
        self._state = self._bytes[:LINE].cast("q")
        self._meeting_of = self._bytes[LINE : LINE + n * WORD].cast("q")
        first = LINE + lines(n * WORD)
        self._signatures = self._bytes[first : first + n * LINE], self._bytes[first + n * LINE :]
        self._table, self._meeting = self._signatures[0], 0

    def sign(self, operation: str, tensor: Tensor | None = None, source: int = 0, address: int = 0) -> None:
        """Write down what this rank is about to do."""
        self._table = self._signatures[self._table is self._signatures[0]]
        kind = DTYPES.index(tensor.dtype) if tensor is not None and tensor.dtype in DTYPES else len(DTYPES)
        size = 0 if tensor is None else tensor.numel()
        SIGNATURE.pack_into(
            self._table, self._peers.rank * LINE, OPERATIONS.index(operation), kind, size, source, address
        )

    def addresses(self) -> list[int]:
        """What each rank has signed, once all have met."""
        return [signature[-1] for signature in self._signed()]

    def meet(self, operation: str, signed: bool = False, last: Callable[[], None] | None = None) -> None:
        """Return once all have come, and `last` has been called by the last one; with `signed` ValueError where they
        have not come for the same.
        """
        rank, n, self._meeting = self._peers.rank, self._peers.world_size, self._meeting + 1
        since = monotonic()

        def check() -> None:
            absent = (peer for peer in range(n) if peer != rank and self._meeting_of[peer] < self._meeting)
            self._peers.check_waiting(operation, next(absent, self._state[LATEST]), since)

        self._lock.wait(check, self._spin_s)
        come = self._state[COME] = self._state[COME] + 1
        self._state[LATEST], self._meeting_of[rank] = rank, self._meeting
        self._lock.post()
        if come == n:
            self._lead(signed, last)
        else:
            self._go[rank].wait(check, self._spin_s)
        if signed and self._state[DIFFER]:
            calls = ", ".join(f"rank {peer}: {_spell(*signature)}" for peer, signature in enumerate(self._signed()))
            raise ValueError(f"backend=shm: the ranks call different operations ({calls})")

    def _lead(self, signed: bool, last: Callable[[], None] | None) -> None:
        """All others wait, and leave alone what is shared."""
        self._state[COME] = 0
        if signed:
            table = self._table.tobytes()
            self._state[DIFFER] = len({table[at : at + COMMON] for at in range(0, len(table), LINE)}) > 1
        if last is not None and not (signed and self._state[DIFFER]):
            last()
        for peer, semaphore in enumerate(self._go):
            if peer != self._peers.rank:
                semaphore.post()

    def _signed(self) -> list[tuple[int, ...]]:
        return [SIGNATURE.unpack_from(self._table, at) for at in range(0, len(self._table), LINE)]


def _spell(operation: int, kind: int, size: int, source: int, _: int) -> str:
    name = OPERATIONS[operation]
    if name == "barrier":
        return name
    dtype = str(DTYPES[kind]).removeprefix("torch.") if kind < len(DTYPES) else "other"
    return f"{name} of {size} {dtype}" + (f" from {source}" if name == "broadcast" else "")
