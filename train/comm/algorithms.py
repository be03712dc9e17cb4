"""All-reduce algorithms: pure functions from a mesh to a plan.

Ring: Patarasuk and Yuan 2009. Halving-doubling: Thakur, Rabenseifner and Gropp 2005; sizes that are no power of
two fold the surplus first, as HCCL does. Hierarchical: HCCL's scheme on Ascend 910 (rings inside a host,
halving-doubling between hosts).
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from train.comm.plan import Plan, Round, Stage
from train.mesh.mesh import Mesh


def ring(mesh: Mesh) -> Plan:
    """A ring through all chips (within one host: all its rings at once).

    2(n - 1) rounds, 2(n - 1)/n of the buffer sent by each chip.
    """
    axes = tuple(mesh.axes)
    return Plan("ring", mesh, (_reduce_scatter(mesh, axes), _all_gather(mesh, axes)) if mesh.num_chips > 1 else ())


def halving_doubling(mesh: Mesh) -> Plan:
    """Recursive halving and doubling over all chips: 2 log2(n) rounds, 2(n - 1)/n of the buffer sent by each chip.

    With n no power of two, p the largest below: 2 floor(log2 n) + 2 rounds.
    """
    axes = tuple(mesh.axes)
    return Plan("halving_doubling", mesh, (_halving_doubling(mesh, axes),) if mesh.num_chips > 1 else ())


def hierarchical(mesh: Mesh) -> Plan:
    """Reduce-scatter in each host on its rings, halving-doubling between equal chips, all-gather in each host."""
    return _hierarchical("hierarchical", mesh, [_halving_doubling(mesh, mesh.between_axes, mesh.inside_axes)])


def hierarchical_ring(mesh: Mesh) -> Plan:
    """As `hierarchical`, with a ring between the hosts."""
    between = mesh.between_axes, mesh.inside_axes
    return _hierarchical("hierarchical_ring", mesh, [_reduce_scatter(mesh, *between), _all_gather(mesh, *between)])


def _hierarchical(name: str, mesh: Mesh, between: list[Stage]) -> Plan:
    inside = mesh.inside_axes
    first, last = ([_reduce_scatter(mesh, inside)], [_all_gather(mesh, inside)]) if mesh.size(inside) > 1 else ([], [])
    return Plan(name, mesh, tuple(first + (between if mesh.num_hosts > 1 else []) + last))


def _reduce_scatter(mesh: Mesh, axes: tuple[str, ...], shard_axes: tuple[str, ...] = ()) -> Stage:
    rings = np.array(mesh.rings(axes))
    return Stage("ring reduce-scatter", axes, rings.size, partial(_ring_rounds, rings, reduce=True), shard_axes)


def _all_gather(mesh: Mesh, axes: tuple[str, ...], shard_axes: tuple[str, ...] = ()) -> Stage:
    rings = np.array(mesh.rings(axes))
    return Stage("ring all-gather", axes, rings.size, partial(_ring_rounds, rings, reduce=False), shard_axes)


def _ring_rounds(rings: np.ndarray, reduce: bool) -> Iterator[Round]:
    """rings [r, n], each with every r-th part; position p ends with (reduce) or starts from parts p*r .. p*r + r-1."""
    num_rings, size = rings.shape
    source, destination = rings.ravel(), np.roll(rings, -1, axis=1).ravel()
    lane = np.repeat(np.arange(num_rings), size)
    for step in range(size - 1):
        owner = np.roll(rings, step + 1 if reduce else step, axis=1).ravel()
        first = owner * num_rings + lane
        yield Round(source, destination, first, first + 1, reduce)


def _halving_doubling(mesh: Mesh, axes: tuple[str, ...], shard_axes: tuple[str, ...] = ()) -> Stage:
    size = mesh.size(axes)
    parts = 1 << (size.bit_length() - 1)
    return Stage("halving-doubling", axes, parts, partial(_halving_doubling_rounds, size, parts), shard_axes)


def _halving_doubling_rounds(size: int, parts: int) -> Iterator[Round]:
    """Positions 2i and 2i + 1 below 2(size - parts) are folded into one before, and unfolded after."""
    surplus = size - parts
    even = 2 * np.arange(surplus)
    whole = np.zeros_like(even), np.full_like(even, parts)
    rank = np.arange(parts)
    position = np.where(rank < surplus, 2 * rank, rank + surplus)
    if surplus:
        yield Round(even + 1, even, *whole, True)
    distance = parts // 2
    while distance:
        partner = rank ^ distance
        first = partner & -distance
        yield Round(position, position[partner], first, first + distance, True)
        distance //= 2
    distance = 1
    while distance < parts:
        first = rank & -distance
        yield Round(position, position[rank ^ distance], first, first + distance, False)
        distance *= 2
    if surplus:
        yield Round(even, even + 1, *whole, False)
