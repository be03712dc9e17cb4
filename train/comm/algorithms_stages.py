"""What plans are made of: rings, direct exchange, halving-doubling and NHR in one group of chips.

Ring: Patarasuk and Yuan 2009. Halving-doubling: Thakur, Rabenseifner and Gropp 2005; sizes that are no power of two
fold the surplus first, as HCCL does. NHR (non-uniform hierarchical ring): HCCL's source code, reduce_scatter_nhr.cc,
and its document coll_algo_intro/NHR.md. Direct exchange: "Mesh" of the same documents.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from train.comm.algorithms_tree import DoubleTree
from train.comm.plan import Pick, Round, Stage, amounts, every
from train.mesh.mesh import Mesh

Axes = tuple[str, ...]
Stages = tuple[Stage, ...]


def ring(rings: np.ndarray, axes: Axes, shard_axes: Axes = (), lane: int = 0) -> Stages:
    """Reduce-scatter and all-gather on `rings` [rings, size] (orders of positions), each with every r-th part.

    size - 1 rounds each, (size - 1)/size of the shard sent by each chip.
    """

    def stage(reduce: bool) -> Stage:
        rounds, distinct = partial(_ring_rounds, rings, reduce), partial(_ring_distinct, rings, reduce)
        name = "ring reduce-scatter" if reduce else "ring all-gather"
        return Stage(name, axes, rings.size, rounds, shard_axes, distinct, lane)

    return stage(True), stage(False)


def _ring_rounds(rings: np.ndarray, reduce: bool) -> Iterator[Round]:
    """Position p ends with (reduce) or starts from parts p*r .. p*r + r-1."""
    num_rings, size = rings.shape
    source, destination = rings.ravel(), np.roll(rings, -1, axis=1).ravel()
    lane = np.repeat(np.arange(num_rings), size)
    for step in range(size - 1):
        owner = np.roll(rings, step + 1 if reduce else step, axis=1).ravel()
        first = owner * num_rings + lane
        yield Round(source, destination, first, first + 1, reduce)


def _ring_distinct(rings: np.ndarray, reduce: bool, pick: Pick) -> Iterator[tuple[Round, int]]:
    """Every round goes the same ways with one part; two rings that share a way (a double link) make one message."""
    num_rings, size = rings.shape
    place = pick(size, num_rings)
    source, destination = rings[:, place].ravel(), rings[:, (place + 1) % size].ravel()
    turn = amounts(source, destination, 1, reduce)
    yield turn.messages() if num_rings > 1 else turn, size - 1


def direct(size: int, axes: Axes) -> Stages:
    """Reduce-scatter and all-gather where every chip has a link to every other: one round each."""

    def rounds(reduce: bool) -> Iterator[Round]:
        source, destination = np.nonzero(~np.eye(size, dtype=bool))
        first = destination if reduce else source
        yield Round(source, destination, first, first + 1, reduce)

    return (
        Stage("direct reduce-scatter", axes, size, partial(rounds, True)),
        Stage("direct all-gather", axes, size, partial(rounds, False)),
    )


def halving_doubling(mesh: Mesh, axes: Axes, shard_axes: Axes = ()) -> Stages:
    """All-reduce in 2 log2(n) rounds; 2 floor(log2 n) + 2 where n is no power of two."""
    size = mesh.size(axes)
    parts = 1 << (size.bit_length() - 1)
    rounds = partial(_halving_doubling_rounds, size, parts)

    def distinct(pick: Pick) -> Iterator[tuple[Round, int]]:
        return ((turn, 1) for turn in rounds(pick))

    return (Stage("halving-doubling", axes, parts, partial(rounds, every), shard_axes, distinct),)


def _halving_doubling_rounds(size: int, parts: int, pick: Pick) -> Iterator[Round]:
    """Positions 2i and 2i + 1 below 2(size - parts) are folded into one before, and unfolded after."""
    surplus = size - parts
    even = 2 * pick(surplus)
    whole = np.zeros_like(even), np.full_like(even, parts)
    rank = pick(parts)

    def position(rank: np.ndarray) -> np.ndarray:
        return np.where(rank < surplus, 2 * rank, rank + surplus)

    if surplus:
        yield Round(even + 1, even, *whole, True)
    distance = parts // 2
    while distance:
        partner = rank ^ distance
        first = partner & -distance
        yield Round(position(rank), position(partner), first, first + distance, True)
        distance //= 2
    distance = 1
    while distance < parts:
        first = rank & -distance
        yield Round(position(rank), position(rank ^ distance), first, first + distance, False)
        distance *= 2
    if surplus:
        yield Round(even, even + 1, *whole, False)


def nhr(mesh: Mesh, axes: Axes, shard_axes: Axes = ()) -> Stages:
    """All-reduce in 2 ceil(log2 n) rounds, 2(n - 1)/n of the shard sent by each chip, whatever n is.

    Adding, round s: position p sends to p - 2^s the slices of p - 2^s, p - 3 * 2^s, p - 5 * 2^s ... that it holds;
    position p ends with slice p. Copying goes the same ways back. The slices are numbered in the buffer so that those
    sent together lie together (all of them at powers of two, in a few pieces else).
    """
    size = mesh.size(axes)
    rounds, distinct = partial(_nhr_rounds, size), partial(_nhr_distinct, size)
    return (Stage("non-uniform hierarchical ring", axes, size, rounds, shard_axes, distinct),)


def _nhr_steps(size: int) -> list[tuple[int, int]]:
    """(distance, slices sent) of every adding round: the slices are those at odd multiples of the distance."""
    steps = range((size - 1).bit_length())
    return [(1 << step, (size - 1 + (1 << step)) >> (step + 1)) for step in steps]


def _nhr_rounds(size: int) -> Iterator[Round]:
    steps, place = _nhr_steps(size), _slice_places(size)
    for distance, slices in steps:
        yield _nhr_round(size, distance, slices, place)
    for distance, slices in reversed(steps):
        source, destination, first, last, _ = _nhr_round(size, distance, slices, place)
        yield Round(destination, source, first, last, False)


def _nhr_round(size: int, distance: int, slices: int, place: np.ndarray) -> Round:
    """The slices of each position, sorted by their place in the buffer; where they follow on, they are one transfer."""
    back = distance * (1 + 2 * np.arange(slices, dtype=np.int32))
    twice = np.concatenate([place, place]).astype(np.uint16 if size < 1 << 16 else np.int32)
    places = np.sort(twice[np.arange(size, 2 * size, dtype=np.int32)[:, None] - back], axis=1)
    breaks = places[:, 1:] - places[:, :-1] != 1
    edge = np.ones((size, 1), dtype=bool)
    source, column = np.nonzero(np.hstack([edge, breaks]))
    first = places[source, column].astype(np.int64)
    last = places[np.hstack([breaks, edge])].astype(np.int64) + 1
    return Round(source, (source - distance) % size, first, last, True)


def _slice_places(size: int) -> np.ndarray:
    """[slices]: where in the buffer each lies: evens before odds, and again in each half, while several are sent."""
    order = np.arange(size, dtype=np.int32)[None]
    for _, slices in _nhr_steps(size):
        if slices == 1:
            break
        order = np.concatenate([order[:, ::2], order[:, 1::2]], axis=1)
        if order.shape[1] % 2:
            break
        order = order.reshape(-1, order.shape[1] // 2)
    place = np.empty(size, dtype=np.int32)
    place[order.ravel()] = np.arange(size)
    return place


def _nhr_distinct(size: int, pick: Pick) -> Iterator[tuple[Round, int]]:
    position, steps = pick(size), _nhr_steps(size)
    for distance, slices in steps:
        yield amounts(position, (position - distance) % size, slices, True), 1
    for distance, slices in reversed(steps):
        yield amounts(position, (position + distance) % size, slices, False), 1


def double_tree(mesh: Mesh, axes: Axes, shard_axes: Axes = (), *, chunks: int) -> Stages:
    """All-reduce on two trees, each with half of the shard in `chunks` parts; see `algorithms_tree`."""
    trees = DoubleTree(mesh.size(axes), chunks)
    return (Stage("double binary tree", axes, 2 * chunks, trees.rounds, shard_axes, trees.distinct),)
