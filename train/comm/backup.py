"""What only one worker holds, kept twice: the running statistics of its chips, so that the chips outlive the worker.

Weights and optimizer are the same on every worker; the chips' statistics are not. After the forward passes of a step,
before any gradient is exchanged, every worker hands its own to a keeper. Whoever has finished a step has therefore seen
all statistics of that step put away; whoever has not still has those of the step before. Both are kept.

    rank      0     1     2     3           keepers on other nodes where there are several
    keeper    1     2     3     0
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.comm.aggregation import meeting_order
from train.comm.groups import Group

KEPT_STEPS = 2


class Bank:
    """Statistics by number of finished steps: step -> first row -> [rows, features], a worker's own and its wards'.

    It outlives the groups of workers, so what is in it may be of an earlier distribution of the chips.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, dict[int, Tensor]] = {}

    def put(self, step: int, first_row: int, rows: Tensor) -> None:
        """Keep `rows` (nobody changes them any more); what is older than the step before is forgotten."""
        self._pieces.setdefault(step, {})[first_row] = rows
        for old in [known for known in self._pieces if known <= step - KEPT_STEPS]:
            del self._pieces[old]

    def offers(self) -> list[tuple[int, int, int]]:
        """(step, first row, number of rows) of every piece."""
        return [(step, first, len(rows)) for step, kept in self._pieces.items() for first, rows in kept.items()]

    def piece(self, step: int, first_row: int) -> Tensor:
        return self._pieces[step][first_row]

    def forget_after(self, step: int) -> None:
        """Drop what belongs to steps that were not finished."""
        for later in [known for known in self._pieces if known > step]:
            del self._pieces[later]

    def clear(self) -> None:
        self._pieces.clear()


def keepers(nodes: Sequence[str]) -> list[int]:
    """The rank that keeps each rank's statistics: the next one on another node, else the next one; itself if alone."""
    count = len(nodes)
    chosen = []
    for rank, node in enumerate(nodes):
        after = [(rank + step) % count for step in range(1, count)]
        chosen.append(next((peer for peer in after if nodes[peer] != node), after[0] if after else rank))
    return chosen


class Backup:
    """Puts a worker's statistics into its bank and its keeper's, and its wards' into its own."""

    def __init__(self, group: Group, bank: Bank, rows: Sequence[range], kept_by: Sequence[int]) -> None:
        """`rows` of all chips' statistics that each rank holds; `kept_by`: see `keepers`."""
        self._group, self.bank, self._rows, self._kept_by = group, bank, rows, kept_by

    def exchange(self, step: int, mine: Tensor) -> None:
        """All ranks call it with their statistics [rows, features] after `step` steps."""
        rank, rows = self._group.rank, self._rows
        self.bank.put(step, rows[rank].start, mine)
        for peer in meeting_order(rank, self._group.world_size):
            outgoing = [mine] if self._kept_by[rank] == peer else []
            incoming = [mine.new_empty(len(rows[peer]), mine.shape[1])] if self._kept_by[peer] == rank else []
            if outgoing or incoming:
                self._group.exchange(outgoing, incoming, peer)
            for theirs in incoming:
                self.bank.put(step, rows[peer].start, theirs)


def cover(offers: Sequence[Sequence[tuple[int, int, int]]], step: int, num_rows: int) -> list[tuple[int, int]] | None:
    """(rank, first row) of pieces that together hold all `num_rows` rows of a step; None where some are lost.

    `offers`: of each rank, see `Bank.offers`. The longest pieces first; of equal ones the lowest rank's.
    """
    pieces = [(first, count, rank) for rank, of_rank in enumerate(offers) for at, first, count in of_rank if at == step]
    chosen, reached = [], 0
    while reached < num_rows:
        going_on = [(first + count, -rank, first) for first, count, rank in pieces if first <= reached < first + count]
        if not going_on:
            return None
        reached, negative_rank, first = max(going_on)
        chosen.append((-negative_rank, first))
    return chosen


def assemble(
    group: Group, bank: Bank, step: int, pieces: Sequence[tuple[int, int, int]], mine: range, features: int, device: str
) -> Tensor:
    """This rank's rows of the statistics [len(mine), features] after `step` steps, from whoever has them.

    `pieces` (rank, first row, rows) cover all rows; all ranks call it with the same ones.
    """
    result = torch.empty(len(mine), features, device=device)
    for owner, first, count in pieces:
        rows = bank.piece(step, first) if owner == group.rank else torch.empty(count, features, device=device)
        group.broadcast(rows, owner)
        start, stop = max(first, mine.start), min(first + count, mine.stop)
        if start < stop:
            result[start - mine.start : stop - mine.start] = rows[start - first : stop - first]
    return result
