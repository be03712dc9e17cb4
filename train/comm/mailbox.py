"""Messages between two ranks through shared memory: a ring of letters from each to each, so that both write at once."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import zip_longest
from time import monotonic

import torch
from torch import Tensor

from train.comm.peers import Peers
from train.comm.segment import SEMAPHORE_BYTES, Segment
from train.comm.turns import flat

LETTERS = 4
MOST_BYTES, LEAST_BYTES = 512 << 10, 4 << 10
"""Of one rank's letters to all others, and of one letter."""


class Mailbox:
    """Part of a segment, from byte `offset` on: [letters sent] [letters free] [from][to][letter]"""

    @staticmethod
    def nbytes(ranks: int) -> int:
        return ranks * ranks * (2 * SEMAPHORE_BYTES + LETTERS * _letter_bytes(ranks))

    def __init__(self, segment: Segment, offset: int, peers: Peers) -> None:
        n, first = peers.world_size, peers.rank == 0
        self._peers, self._size = peers, _letter_bytes(n)
        area = offset + 2 * n * n * SEMAPHORE_BYTES
        self._sent = segment.semaphores(offset, n, n, 0 if first else None)
        self._free = segment.semaphores(offset + n * n * SEMAPHORE_BYTES, n, n, LETTERS if first else None)
        self._letters = segment.tensor(area, n * n * LETTERS * self._size, torch.uint8).view(n, n, LETTERS, self._size)
        self._written, self._read = [0] * n, [0] * n

    def exchange(self, operation: str, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        """Letter by letter: one written, one read, as long as there are any."""
        since = monotonic()

        def check() -> None:
            self._peers.check_waiting(operation, peer, since)

        with ExitStack() as stack:
            taken = [stack.enter_context(flat(tensor)) for tensor in incoming]
            for going, coming in zip_longest(self._cut(outgoing), self._cut(taken)):
                if going is not None:
                    self._free[self._peers.rank][peer].wait(check)
                    self._letters[self._peers.rank, peer, self._written[peer], : len(going)].copy_(going)
                    self._sent[self._peers.rank][peer].post()
                    self._written[peer] = (self._written[peer] + 1) % LETTERS
                if coming is not None:
                    self._sent[peer][self._peers.rank].wait(check)
                    coming.copy_(self._letters[peer, self._peers.rank, self._read[peer], : len(coming)])
                    self._free[peer][self._peers.rank].post()
                    self._read[peer] = (self._read[peer] + 1) % LETTERS

    def _cut(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        for tensor in tensors:
            if tensor.numel():
                yield from tensor.contiguous().view(-1).view(torch.uint8).split(self._size)


def _letter_bytes(ranks: int) -> int:
    return max(LEAST_BYTES, MOST_BYTES // ranks // 64 * 64)
