"""All-reduce on two binary trees at once, pipelined: Sanders, Speck and Traeff 2009, with the trees of NCCL.

Each tree works on one half of the buffer. A chip that has children in one tree is a leaf of the other (a root has one
child), so that it sends and receives twice the buffer at most. The trees' edges have two colours such that a chip's
two ways up differ, and its two ways down: even rounds use the edges of one colour, odd rounds those of the other, and
in every round a chip sends one message and receives one, at most.

8 chips:   0 - 4, 4 - (2, 6), 2 - (1, 3), 6 - (5, 7)  and its mirror image  7 - 3, 3 - (5, 1), 5 - (6, 4), 1 - (2, 0).

Trees: NCCL, src/graph/trees.cc (ncclGetBtree; ncclGetDtree: the second is the first mirrored at even sizes, shifted
by one at odd sizes).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from train.comm.plan import Pick, Round, amounts


class Edges(NamedTuple):
    """Edges of one colour, by the round in which their first chunk goes up."""

    child: np.ndarray
    parent: np.ndarray
    tree: np.ndarray
    start: np.ndarray


class DoubleTree:
    """Sums towards the roots, then copies back, for `size` positions; each half of the buffer in `chunks` parts.

    Chunk k crosses an edge in round start + 2k, after it has come over all edges below; the copies go the same ways
    backwards. 2(2 chunks + s - 1) rounds, where s, the last start, is at most 2 ceil(log2 size) - 1.
    """

    def __init__(self, size: int, chunks: int):
        self.size, self.chunks = size, chunks

    def rounds(self) -> Iterator[Round]:
        """Parts 0..chunks-1 are the first tree's."""
        for reduce in (True, False):
            for at, colour, first, last in self._turns() if reduce else reversed(list(self._turns())):
                some = slice(self._before[colour][first], self._before[colour][last])
                child, parent, tree, start = (values[some] for values in self._edges[colour])
                part = tree * self.chunks + (at - start.astype(np.int64)) // 2
                source, destination = (child, parent) if reduce else (parent, child)
                yield Round(source, destination, part, part + 1, reduce)

    def distinct(self, pick: Pick) -> Iterator[tuple[Round, int]]:
        """Most rounds use all edges of a colour; those in which the pipeline fills and drains, some.

        Edges are chosen from those of each start by themselves: they are about those of a level of the trees.
        """
        chosen, kept = [], []
        for before in self._before:
            picked = [first + pick(last - first, 8) for first, last in pairwise(before)]
            chosen.append(np.concatenate([np.empty(0, dtype=np.int64), *picked]))
            kept.append(_before([len(each) for each in picked]))
        for (colour, first, last), times in Counter(turn[1:] for turn in self._turns()).items():
            some = chosen[colour][kept[colour][first] : kept[colour][last]]
            child, parent = self._edges[colour].child[some], self._edges[colour].parent[some]
            yield amounts(child, parent, 1, True), times
            yield amounts(parent, child, 1, False), times

    def _turns(self) -> Iterator[tuple[int, int, int, int]]:
        """(round, colour, first start, last start + 1) of the rounds of the sum in which anything moves."""
        filled = 2 * (self.chunks - 1)  # rounds between an edge's first chunk and its last
        for at in range(max(map(len, self._before)) - 1 + filled):
            before = self._before[at % 2]
            first, last = max(at - filled, 0), min(at + 1, len(before) - 1)
            if first < last and before[first] < before[last]:
                yield at, at % 2, first, last

    @cached_property
    def _before(self) -> list[list[int]]:
        """Of each colour: how many edges start before each round."""
        return [_before(np.bincount(edges.start)) for edges in self._edges]

    @cached_property
    def _edges(self) -> tuple[Edges, Edges]:
        first, colours = binary_tree(self.size), edge_colours(self.size)
        chips = np.arange(self.size, dtype=np.int32), second_chip(self.size)  # of the positions of each tree
        child = np.concatenate([chip[1:] for chip in chips])
        parent = np.concatenate([chip[first[1:]] for chip in chips])
        tree = np.repeat(np.arange(2), self.size - 1)
        start = np.concatenate([_starts(first, colours[tree][chips[tree]])[1:] for tree in (0, 1)])
        order = np.argsort(start % 2 * 128 + start, kind="stable")  # the parity of the start is the colour
        edges = [values[order] for values in (child, parent, tree, start)]
        split = len(start) - np.count_nonzero(start % 2)
        return Edges(*(values[:split] for values in edges)), Edges(*(values[split:] for values in edges))


def _before(counts: Sequence[int] | np.ndarray) -> list[int]:
    """How many come before each, and altogether."""
    return [0, *np.cumsum(counts).tolist()]


def binary_tree(size: int) -> np.ndarray:
    """[size]: the parent of each position, -1 of position 0, the root. Odd positions are leaves.

    The parent is the next multiple of twice the highest power of two in the position, or the one before where there
    is none.
    """
    position = np.arange(size, dtype=np.int32)
    step = position & -position
    above = (position ^ step) | (step << 1)
    parent = np.where(above < size, above, position ^ step)
    parent[0] = -1
    return parent


def second_chip(size: int) -> np.ndarray:
    """[size]: the chip at each position of the second tree."""
    position = np.arange(size, dtype=np.int32)
    return size - 1 - position if size % 2 == 0 else (position + 1) % size


def double_tree(size: int) -> np.ndarray:
    """[2, size]: the parent of each chip in both trees, -1 of a root."""
    first, chip = binary_tree(size), second_chip(size)
    second = np.full(size, -1, dtype=np.int32)
    second[chip[1:]] = chip[first[1:]]
    return np.stack([first, second])


def edge_colours(size: int) -> np.ndarray:
    """[2, size]: 0 or 1, the colour of every chip's way up in both trees (of no meaning at a root).

    At multiples of 4 the number of ones in the position, in the tree in which it is even, is a colouring. (Siblings
    differ in one bit; two leaves of a parent are neighbours 4j and 4j + 2 in the other tree.) At other sizes the
    clipped upper end breaks the rule, and the edges are walked.
    """
    if size % 4:
        return _walked_colours(double_tree(size))
    chip = np.arange(size, dtype=np.int32)
    ones = np.where(chip % 2 == 0, chip, size - 1 - chip)
    for shift in (16, 8, 4, 2, 1):
        ones = ones ^ (ones >> shift)
    first = (ones + chip) % 2
    return np.stack([first, 1 - first])


def _walked_colours(trees: np.ndarray) -> np.ndarray:
    """Two edges that must differ are neighbours: an edge has at most one at its lower end and one at its upper end.

    So they form paths and rings of even length, that are coloured in turns.
    """
    size = trees.shape[1]
    parent = trees.ravel()  # edge tree * size + child
    edge = np.flatnonzero(parent >= 0)
    below = np.where(np.roll(trees, 1, axis=0).ravel() >= 0, (np.arange(2 * size) + size) % (2 * size), -1)
    above = np.full(2 * size, -1)
    by_parent = edge[np.argsort(parent[edge], kind="stable")]
    same = np.flatnonzero(parent[by_parent][1:] == parent[by_parent][:-1])
    above[by_parent[same]], above[by_parent[same + 1]] = by_parent[same + 1], by_parent[same]
    ends = edge[(below[edge] < 0) | (above[edge] < 0)]
    colour, ways = [-1] * (2 * size), (below.tolist(), above.tolist())
    for start in [*ends.tolist(), *edge.tolist()]:
        at, shade, way = start, 0, 0 if below[start] >= 0 else 1
        while at >= 0 and colour[at] < 0:
            colour[at] = shade
            at, shade, way = ways[way][at], 1 - shade, 1 - way
    return np.maximum(colour, 0).reshape(2, size)


def _starts(parent: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """[size]: the first round of every edge of `binary_tree`: after those below, and even or odd as its colour."""
    start, step = np.zeros(len(parent), dtype=np.uint8), 1
    while step < len(parent):
        position = slice(step, None, 2 * step)  # everything below these has its start
        start[position] += (start[position] + colour[position].astype(np.uint8)) % 2
        np.maximum.at(start, parent[position], start[position] + np.uint8(1))
        step *= 2
    return start
