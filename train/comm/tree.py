"""The summation tree: one binary tree over the global index of the blocks, whoever holds them.

Floating-point addition is not associative, so the order of a sum is fixed once, by block number and not by worker: a
node of 2^k blocks is the sum of its left and its right half; what lies beyond the last block is left out. A worker that
holds n consecutive blocks can finish the nodes that lie wholly inside; those that cover its blocks are at most
2 ceil(log2 n) + 1 (Demmel and Nguyen 2013 use the same idea for reproducible sums).
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
Node = tuple[int, int]
"""(first block, number of blocks): the number is a power of two and divides the first."""


def aligned_nodes(first: int, last: int) -> list[Node]:
    """The fewest nodes of the tree that cover the blocks [first, last), from left to right."""
    nodes = []
    while first < last:
        size = 1
        while first % (2 * size) == 0 and first + 2 * size <= last:
            size *= 2
        nodes.append((first, size))
        first += size
    return nodes


class PartialSums:
    """Sums a worker's consecutive blocks as the tree does, keeping only the open nodes.

    `add(left, right)` returns the sum and may write it into `left`.
    """

    def __init__(self, add: Callable[[Value, Value], Value]) -> None:
        self._add = add
        self._open: list[tuple[Node, Value]] = []

    def push(self, block: int, value: Value) -> None:
        """Add the next block; blocks come in ascending order without gaps."""
        assert not self._open or block == sum(self._open[-1][0]), f"block {block} after node {self._open[-1][0]}"
        node = (block, 1)
        while self._open:
            (first, size), left = self._open[-1]
            if size != node[1] or first % (2 * size):
                break
            self._open.pop()
            value = self._add(left, value)
            node = (first, 2 * size)
        self._open.append((node, value))

    def take(self) -> dict[Node, Value]:
        """The finished nodes, from left to right; the object is empty afterwards."""
        nodes, self._open = dict(self._open), []
        return nodes


def combine(nodes: Mapping[Node, Value], num_blocks: int, add: Callable[[Value, Value], Value]) -> Value:
    """The sum of all blocks from the workers' nodes, in the tree's order; `nodes` cover [0, num_blocks) exactly."""
    size = 1
    while size < num_blocks:
        size *= 2
    return _combine(nodes, 0, size, num_blocks, add)


def _combine(nodes: Mapping[Node, Value], first: int, size: int, num_blocks: int, add: Callable) -> Value:
    if (first, size) in nodes:
        return nodes[first, size]
    assert size > 1, f"no worker holds block {first}"
    half = size // 2
    left = _combine(nodes, first, half, num_blocks, add)
    if first + half >= num_blocks:
        return left
    return add(left, _combine(nodes, first + half, half, num_blocks, add))
