"""One collective operation as data: stages on mesh axes, whose rounds of transfers come lazily as arrays.

A buffer is cut into `num_chunks` equal chunks (the last one short where the length doesn't divide); a transfer names
the chunks it carries. All transfers of a round start together: what a chip sends is what it held before the round.
What one chip sends to another in one round is one message, even where its chunks don't follow one another.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from train.mesh.mesh import Mesh

MOST_PRICED = 1 << 14
"""Transfers of a round up to which every one is priced; of a larger round `representatives` are."""

Pick = Callable[..., np.ndarray]
"""(count, share=1) -> which of 0..count-1 are wanted, rising; a share-th of MOST_PRICED suffices."""


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

    def below(self, chunk: int) -> "Round":
        """The same without the chunks from `chunk` on."""
        kept = self.first < chunk
        first, last = self.first[kept], np.minimum(self.last[kept], chunk)
        return Round(self.source[kept], self.destination[kept], first, last, self.reduce)

    def messages(self) -> "Round":
        """One transfer for each pair of chips; its first and last tell how many chunks it carries, not which."""
        most = int(self.destination.max()) + 1
        pairs, message = np.unique(self.source.astype(np.int64) * most + self.destination, return_inverse=True)
        counts = np.bincount(message, self.last - self.first).astype(np.int64)
        return Round(pairs // most, pairs % most, np.zeros_like(counts), counts, self.reduce)


def amounts(source: np.ndarray, destination: np.ndarray, parts: int, reduce: bool) -> Round:
    """A round for pricing: every message carries `parts` parts, it doesn't matter which."""
    return Round(source, destination, np.zeros_like(source), np.full_like(source, parts), reduce)


@dataclass(frozen=True)
class Stage:
    """An algorithm that runs in every group of chips that differ in `axes` alone.

    `rounds()` yields rounds in positions within one group and in `parts` of the group's shard. The shard is the part
    of the buffer that the chips' positions along `shard_axes` select (all of it where there are none).
    lane: which of the plan's equal shares of the buffer it works on.
    `distinct(pick)` yields (round, how many rounds cost the same) with one transfer a message, of which `pick` has
    chosen; where a plan has several lanes, in the order of time, equal rounds one after another. None: every round.
    """

    algorithm: str
    axes: tuple[str, ...]
    parts: int
    rounds: Callable[[], Iterator[Round]]
    shard_axes: tuple[str, ...] = ()
    distinct: Callable[[Pick], Iterator[tuple[Round, int]]] | None = None
    lane: int = 0


@dataclass(frozen=True)
class Plan:
    """Stages on a mesh, in order. Lanes (shares of the buffer) run at once: round k of one with round k of the others.

    The lanes of a plan have equally many rounds, and add or copy in the same of them.
    """

    name: str
    mesh: Mesh
    stages: tuple[Stage, ...]

    @cached_property
    def num_lanes(self) -> int:
        return 1 + max((stage.lane for stage in self.stages), default=0)

    @cached_property
    def num_chunks(self) -> int:
        return self.num_lanes * math.lcm(1, *(self.mesh.size(stage.shard_axes) * stage.parts for stage in self.stages))

    def rounds(self) -> Iterator[Round]:
        """All transfers of every round and group, in chips and chunks."""
        lanes = [self._lane(lane) for lane in range(self.num_lanes)]
        for turns in zip(*lanes, strict=True):
            yield turns[0] if len(turns) == 1 else _together(turns)

    def priced_rounds(self, all_groups: bool = False) -> Iterator[tuple[Round, int]]:
        """(round, how many cost the same): what a network needs, in chips and amounts of chunks (see `messages`).

        The first group of each stage alone, as all groups are alike, and of its larger rounds the `representatives`; or
        all of every group.
        """
        lanes = [self._priced_lane(lane, all_groups) for lane in range(self.num_lanes)]
        if len(lanes) == 1:
            yield from lanes[0]
            return
        now = [next(lane) for lane in lanes]
        while all(now):
            times = min(left for _, left in now)
            yield _together([turn for turn, _ in now]).messages(), times
            now = [
                (turn, left - times) if left > times else next(lane, None)
                for (turn, left), lane in zip(now, lanes, strict=True)
            ]

    def bytes_sent(self, nbytes: float) -> np.ndarray:
        """[chips]: bytes that each chip sends for a buffer of `nbytes`."""
        chunks = np.zeros(self.mesh.num_chips)
        for turn in self.rounds():
            np.add.at(chunks, turn.source, turn.last - turn.first)
        return chunks / self.num_chunks * nbytes

    def _lane(self, lane: int) -> Iterator[Round]:
        for stage in self.stages:
            if stage.lane == lane:
                yield from map(self._places(stage, all_groups=True), stage.rounds())

    def _priced_lane(self, lane: int, all_groups: bool) -> Iterator[tuple[Round, int]]:
        for stage in self.stages:
            if stage.lane == lane:
                place = self._places(stage, all_groups)
                if stage.distinct is None:
                    yield from ((place(turn), 1) for turn in stage.rounds())
                else:
                    pick = every if all_groups else representatives
                    yield from ((place(turn), times) for turn, times in stage.distinct(pick))

    def _places(self, stage: Stage, all_groups: bool) -> Callable[[Round], Round]:
        """From positions and parts of one group to chips and chunks, of all groups or of the first."""
        per_lane = self.num_chunks // self.num_lanes
        per_shard = per_lane // self.mesh.size(stage.shard_axes)
        per_part, start = per_shard // stage.parts, stage.lane * per_lane
        if not all_groups:
            return lambda turn: Round(
                _in_first_group(self.mesh, stage.axes, turn.source),
                _in_first_group(self.mesh, stage.axes, turn.destination),
                start + turn.first * per_part,
                start + turn.last * per_part,
                turn.reduce,
            )
        groups = self.mesh.groups(stage.axes)
        offset = (start + self.mesh.positions(stage.shard_axes)[groups[:, 0]] * per_shard)[:, None]
        return lambda turn: Round(
            groups[:, turn.source].ravel(),
            groups[:, turn.destination].ravel(),
            (offset + turn.first * per_part).ravel(),
            (offset + turn.last * per_part).ravel(),
            turn.reduce,
        )


def every(count: int, share: int = 1) -> np.ndarray:
    return np.arange(count)


def representatives(count: int, share: int = 1) -> np.ndarray:
    """All of 0..count-1 up to MOST_PRICED / share; above, fewer: the ends, those of blocks of 2^k, and every odd-th.

    Of a round in which all chips do alike and are numbered in order, these meet every kind of way: hosts, racks and
    pods are blocks of consecutive chips, and a way leaves one where the first or the last of a block is its end.
    (Trees over blocks of odd sizes can miss a few; a test shows less than 2 % of the time.)
    """
    most = MOST_PRICED // share
    if count <= most:
        return np.arange(count)
    sixteenth = max(1, most // 16)
    ends = np.arange(sixteenth), np.arange(count - sixteenth, count)
    block = 1 << (count // (4 * sixteenth) - 1).bit_length()
    start = np.arange(0, count, block)
    spread = np.arange(0, count, count // (4 * sixteenth) | 1)
    return np.unique(np.concatenate([*ends, start, np.minimum(start + block, count) - 1, spread]))


def _in_first_group(mesh: Mesh, axes: tuple[str, ...], position: np.ndarray) -> np.ndarray:
    """The chips at `position` (in the order of `axes`) of the group whose other coordinates are 0."""
    chip, names = np.zeros_like(position), list(mesh.axes)
    for axis in reversed(axes):
        position, coordinate = np.divmod(position, mesh.axes[axis])
        chip = chip + coordinate * mesh.size(tuple(names[names.index(axis) + 1 :]))
    return chip


def _together(turns: tuple[Round, ...] | list[Round]) -> Round:
    """Rounds of several lanes as one."""
    source, destination, first, last, reduce = zip(*turns, strict=True)
    assert len(set(reduce)) == 1, "lanes add and copy at different times"
    return Round(*(np.concatenate(arrays) for arrays in (source, destination, first, last)), reduce[0])


def run_on_arrays(plan: Plan, buffers: np.ndarray) -> np.ndarray:
    """What every chip holds after the plan: buffers [chips, length] -> [chips, length].

    Memory: that of `buffers` and of one round; chunks that a short buffer doesn't fill are left out.
    """
    chips, length = buffers.shape
    width = -(-length // plan.num_chunks)
    filled = -(-length // width)
    chunks = np.zeros((chips, filled * width), buffers.dtype)
    chunks[:, :length] = buffers
    chunks = chunks.reshape(chips, filled, width)
    for turn in plan.rounds():
        source, destination, chunk = turn.below(filled).by_chunk()
        sent = chunks[source, chunk]
        if turn.reduce:
            np.add.at(chunks, (destination, chunk), sent)
        else:
            chunks[destination, chunk] = sent
    return chunks.reshape(chips, -1)[:, :length]
