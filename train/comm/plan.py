"""One collective operation as data: stages on mesh axes, whose rounds of transfers come lazily as arrays.

A buffer is cut into `num_chunks` equal chunks (the last one short where the length doesn't divide); a transfer names
the chunks it carries. All transfers of a round start together: what a chip sends is what it held before the round.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from train.mesh.mesh import Mesh


class Round(NamedTuple):
    """Transfers source -> destination of chunks first..last-1; the receiver adds them (reduce) or takes them."""

    source: np.ndarray
    destination: np.ndarray
    first: np.ndarray
    last: np.ndarray
    reduce: bool

    def by_chunk(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, destination, chunk) of every chunk that moves, transfer after transfer."""
        counts = self.last - self.first
        transfer = np.repeat(np.arange(len(counts)), counts)
        chunk = self.first[transfer] + np.arange(len(transfer)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.source[transfer], self.destination[transfer], chunk


@dataclass(frozen=True)
class Stage:
    """An algorithm that runs in every group of chips that differ in `axes` alone.

    `rounds()` yields rounds in positions within one group and in `parts` of the group's shard. The shard is the part
    of the buffer that the chips' positions along `shard_axes` select (all of it where there are none).
    """

    algorithm: str
    axes: tuple[str, ...]
    parts: int
    rounds: Callable[[], Iterator[Round]]
    shard_axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Stages in order, on a mesh."""

    name: str
    mesh: Mesh
    stages: tuple[Stage, ...]

    @cached_property
    def num_chunks(self) -> int:
        return math.lcm(1, *(self.mesh.size(stage.shard_axes) * stage.parts for stage in self.stages))

    def rounds(self, all_groups: bool = True) -> Iterator[Round]:
        """Rounds in chips and chunks; of every group, or of the first group of each stage (all groups are alike)."""
        for stage in self.stages:
            groups = self.mesh.groups(stage.axes)
            groups = groups if all_groups else groups[:1]
            shards = self.mesh.size(stage.shard_axes)
            shard = self.mesh.positions(stage.shard_axes)[groups[:, 0]]
            per_part = self.num_chunks // (shards * stage.parts)
            offset = (shard * (self.num_chunks // shards))[:, None]
            for turn in stage.rounds():
                yield Round(
                    groups[:, turn.source].ravel(),
                    groups[:, turn.destination].ravel(),
                    (offset + turn.first * per_part).ravel(),
                    (offset + turn.last * per_part).ravel(),
                    turn.reduce,
                )

    def bytes_sent(self, nbytes: float) -> np.ndarray:
        """[chips]: bytes that each chip sends for a buffer of `nbytes`."""
        chunks = np.zeros(self.mesh.num_chips)
        for turn in self.rounds():
            np.add.at(chunks, turn.source, turn.last - turn.first)
        return chunks / self.num_chunks * nbytes


def run_on_arrays(plan: Plan, buffers: np.ndarray) -> np.ndarray:
    """What every chip holds after the plan: buffers [chips, length] -> [chips, length]."""
    chips, length = buffers.shape
    width = -(-length // plan.num_chunks)
    chunks = np.zeros((chips, plan.num_chunks * width), buffers.dtype)
    chunks[:, :length] = buffers
    chunks = chunks.reshape(chips, plan.num_chunks, width)
    for turn in plan.rounds():
        source, destination, chunk = turn.by_chunk()
        sent = chunks[source, chunk]
        if turn.reduce:
            np.add.at(chunks, (destination, chunk), sent)
        else:
            chunks[destination, chunk] = sent
    return chunks.reshape(chips, -1)[:, :length]
