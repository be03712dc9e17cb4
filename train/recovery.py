"""How workers go on together after some of them were lost or have come: which step, whose state, whose statistics.

Every worker says how far it has come and which statistics of chips it holds (train/comm/backup). Those that have come
farthest are right: weights and optimizer of the others, and of newcomers, are copied from one of them. If statistics of
that step are lost with all who kept them, all go back to the last checkpoint, or to the beginning where there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from train.comm.backup import cover


@dataclass(frozen=True)
class Membership:
    """Which workers train from now on, as one of them is told."""

    rank: int
    shares: list[range]
    """The blocks of each rank."""
    nodes: list[str]
    """Where each rank runs."""
    store: Any = None
    """A c10d store that all ranks reach, made for this group."""

    @property
    def world_size(self) -> int:
        return len(self.shares)


@dataclass(frozen=True)
class Joined:
    """Where a worker went on in a new group. `at` is in Unix seconds."""

    step: int
    source: Literal["beginning", "memory", "checkpoint"]
    repeated: int
    """Steps that some worker had finished and that are computed again."""
    at: float
    checkpoint: str | None = None
    """Its file, where it was one."""
    defects: tuple[str, ...] = ()
    """Of newer checkpoints, which could not be used."""


@dataclass(frozen=True)
class Offer:
    """What a worker brings: finished steps and the step last evaluated (None: a newcomer has neither), and its bank."""

    reached: tuple[int, int] | None
    pieces: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Agreement:
    """What to go on from (as in Offer), a rank that has that state, and (rank, first row, rows) of the statistics."""

    reached: tuple[int, int]
    leader: int
    pieces: list[tuple[int, int, int]]


def agree(offers: Sequence[Offer], num_rows: int) -> Agreement | None:
    """What all go on from; None where nobody has a state, or the statistics of the farthest step are incomplete."""
    reached = farthest(offers)
    chosen = None if reached is None else cover([offer.pieces for offer in offers], reached[0], num_rows)
    if chosen is None:
        return None
    lengths = [{(step, first): count for step, first, count in offer.pieces} for offer in offers]
    leader = next(rank for rank, offer in enumerate(offers) if offer.reached == reached)
    return Agreement(reached, leader, [(rank, first, lengths[rank][reached[0], first]) for rank, first in chosen])


def farthest(offers: Sequence[Offer]) -> tuple[int, int] | None:
    return max((offer.reached for offer in offers if offer.reached is not None), default=None)
