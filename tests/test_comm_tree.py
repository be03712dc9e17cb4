"""The order of a sum is the tree's, whoever holds the blocks: shown with an addition that remembers its order."""

import math
from itertools import pairwise

import numpy as np
import pytest

from train.comm.tree import PartialSums, aligned_nodes, combine


def add(left: str, right: str) -> str:
    return f"({left}+{right})"


def reference(num_blocks: int) -> str:
    """The tree from its definition: pairs of neighbours, then pairs of pairs; what has no neighbour moves up alone."""
    level = [str(block) for block in range(num_blocks)]
    while len(level) > 1:
        level = [add(*level[i : i + 2]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0]


def partial_sums(first: int, last: int) -> dict:
    sums = PartialSums(add)
    for block in range(first, last):
        sums.push(block, str(block))
    return sums.take()


def random_cuts(random: np.random.Generator, num_blocks: int) -> list[int]:
    inside = random.choice(np.arange(1, num_blocks), size=random.integers(0, num_blocks), replace=False)
    return [0, *sorted(inside.tolist()), num_blocks]


def test_the_reference_for_six_blocks():
    assert reference(6) == "(((0+1)+(2+3))+(4+5))"


@pytest.mark.parametrize("num_blocks", range(1, 41))
def test_any_contiguous_split_sums_in_the_trees_order(num_blocks):
    random = np.random.default_rng(num_blocks)
    for _ in range(25):
        cuts = random_cuts(random, num_blocks)
        nodes = {}
        for first, last in pairwise(cuts):
            mine = partial_sums(first, last)
            assert list(mine) == aligned_nodes(first, last)
            nodes |= mine
        assert combine(nodes, num_blocks, add) == reference(num_blocks)


def test_nodes_cover_a_share_exactly_and_are_few():
    for first in range(41):
        for last in range(first + 1, 42):
            nodes = aligned_nodes(first, last)
            covered = [block for start, size in nodes for block in range(start, start + size)]
            assert covered == list(range(first, last))
            assert all(size & (size - 1) == 0 and start % size == 0 for start, size in nodes)
            assert len(nodes) <= 2 * math.ceil(math.log2(last - first)) + 1


def test_partial_sums_are_empty_after_taking():
    sums = PartialSums(add)
    sums.push(6, "a")
    assert sums.take() == {(6, 1): "a"}
    sums.push(0, "b")  # a new step starts at the worker's first block again
    assert sums.take() == {(0, 1): "b"}
    assert sums.take() == {}


def test_a_gap_is_a_mistake_of_ours():
    sums = PartialSums(add)
    sums.push(0, "0")
    with pytest.raises(AssertionError, match="block 2"):
        sums.push(2, "2")
    with pytest.raises(AssertionError, match="block 1"):
        combine({(0, 1): "0", (2, 1): "2"}, 3, add)
