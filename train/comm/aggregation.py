"""Adding up what the blocks of all workers computed: in one fixed order (`exact`) or in the fastest one (`fast`).

A block's contribution is a list of tensors (its gradients, its loss ...); all workers get the sum over all blocks.
Where the group has memory that all workers share (`shared` of train.comm.shm_group), they add up there: a worker's
sums lie in it from its first contribution on, and the total is read from it: it takes the place of the first of the
terms, for which there is other memory at the next step.
"""

import operator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from train.comm.arrays import BLOCK_BYTES, array
from train.comm.groups import Group
from train.comm.tree import Node, PartialSums, aligned_nodes, combine

Turn = TypeVar("Turn")


class Aggregator(Protocol):
    def prepare(self, like: list[Tensor]) -> None:
        """Make room for contributions of these shapes and strides; all ranks call it. Else the first `add` does."""

    def add(self, block: int, tensors: list[Tensor]) -> None:
        """Take over a pass's contribution (its tensors are overwritten); `block`, its first one, ascends."""

    def total(self) -> list[Tensor]:
        """The sum over every worker's contributions since the last call, in float32 or wider, on every worker.

        To be read only, until the next contribution: all workers may have the same memory.
        """


def _add(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(left, right)
    return left


class TreeAggregator:
    """The sum in the order of the summation tree: the same bits for every contiguous split of the blocks over workers.

    Every worker sends to each other one the slice of its partial sums that the other finishes, and the finished slices
    are gathered: each moves as many bytes as a ring all-reduce does when a worker's blocks are one node of the tree.
    """

    def __init__(self, group: Group, shares: list[range]) -> None:
        """`shares`: the consecutive blocks of each rank."""
        self._group = group
        self._nodes = [aligned_nodes(share.start, share.stop) for share in shares]
        self._num_blocks = shares[-1].stop
        self._sums = PartialSums(_add)
        self._memory = SharedVectors(group)
        self._like: list[Tensor] = []
        self._turns: list[tuple[dict[Node, Tensor], dict[int, list[Tensor]]]] = [({}, {})]

    def prepare(self, like: list[Tensor]) -> None:
        """A row of memory for each node: what its first block contributes lands there, the rest is added.

        A row has a slice for each rank, [world_size, length], zeros behind the last element.
        """
        self._like, (rank, world_size) = shapes_of(like), (self._group.rank, self._group.world_size)
        if world_size == 1:
            return
        length, dtype, own = -(-sum(t.numel() for t in like) // world_size), one_dtype(like), self._nodes[rank]
        if self._memory.exists:
            nodes = [node for of_rank in self._nodes for node in of_rank]
            turns = self._memory.turns([world_size * length] * len(nodes), dtype)
        else:
            nodes = own
            turns = [list(torch.zeros(len(nodes), world_size * length, dtype=dtype, device=like[0].device))]
        self._turns = []
        for vectors in turns:
            rows = {node: vector.view(world_size, length) for node, vector in zip(nodes, vectors, strict=True)}
            self._turns.append((rows, {node[0]: unflatten(rows[node].view(-1), self._like) for node in own}))

    def add(self, block: int, tensors: list[Tensor]) -> None:
        if not alike(self._like, tensors):
            self.prepare(tensors)
        _, places = self._turns[0]
        if block in places:
            tensors = copied(tensors, places[block])
        self._sums.push(block, tensors)

    def total(self) -> list[Tensor]:
        partial = self._sums.take()
        if self._group.world_size == 1:
            return combine(partial, self._num_blocks, _add)
        return self._in_shared_memory() if self._memory.exists else self._across_workers()

    def _across_workers(self) -> list[Tensor]:
        rank, ((rows, _),) = self._group.rank, self._turns
        nodes = {node: row[rank] for node, row in rows.items()}
        own = list(rows.values())
        for peer in meeting_order(rank, self._group.world_size):
            incoming = [torch.empty_like(own[0][peer]) for _ in self._nodes[peer]]
            self._group.exchange([row[peer] for row in own], incoming, peer)
            nodes.update(zip(self._nodes[peer], incoming, strict=True))
        finished = combine(nodes, self._num_blocks, operator.iadd)
        return unflatten(self._group.all_gather(finished.contiguous()).view(-1), self._like)

    def _in_shared_memory(self) -> list[Tensor]:
        """As `_across_workers`, but what a worker sends to others they read, each its own slice of all rows.

        The sum replaces the first node, which costs less than to write it elsewhere; other sums stay in the cache.
        """
        rows, _ = _turned(self._turns)
        self._group.barrier()
        slices = {node: array(row[self._group.rank]) for node, row in rows.items()}
        first = self._nodes[0][0]
        length = BLOCK_BYTES // self._like[0].element_size()
        for start in range(0, len(slices[first]), length):
            self._add_up({node: part[start : start + length] for node, part in slices.items()}, first)
        self._group.barrier()
        return unflatten(rows[first].view(-1), self._like)

    def _add_up(self, terms: dict[Node, Any], first: Node) -> None:
        total = terms[first]

        def add(left: Any, right: Any) -> Any:
            return operator.iadd(left, right) if left is total else left + right

        combine(terms, self._num_blocks, add)


class SumAggregator:
    """The sum in the fastest order: a worker's own passes one after the other, then the backend's all-reduce.

    The first pass's gradients are copied to where the all-reduce takes them from, and the others added to them there.
    """

    def __init__(self, group: Group, wire: torch.dtype | None = None) -> None:
        """`wire`: what goes from worker to worker is rounded to this dtype, and so is each sum; None: nothing is."""
        self._group, self._wire = group, wire
        self._memory = SharedVectors(group)
        self._like: list[Tensor] = []
        self._sum: list[Tensor] | None = None
        self._turns: list[tuple[list[Tensor], list[Tensor]]] = []

    def prepare(self, like: list[Tensor]) -> None:
        self._like, self._dtype = shapes_of(like), one_dtype(like)
        if self._group.world_size == 1:
            return
        length, dtype = sum(t.numel() for t in like), self._wire or self._dtype
        if self._memory.exists:
            turns = self._memory.turns([length] * self._group.world_size, dtype)
            mine = [parts[self._group.rank] for parts in turns]
        else:
            mine = [torch.zeros(length, dtype=dtype, device=like[0].device)]
            turns = [mine]
        self._turns = [(parts, unflatten(part, self._like)) for parts, part in zip(turns, mine, strict=True)]

    def add(self, block: int, tensors: list[Tensor]) -> None:
        if self._sum is not None:
            _add(self._sum, tensors)
            return
        if not alike(self._like, tensors):
            self.prepare(tensors)
        lands = self._group.world_size > 1 and self._wire in (None, self._dtype)  # else once the sum is complete
        self._sum = copied(tensors, self._turns[0][1]) if lands else tensors

    def total(self) -> list[Tensor]:
        tensors, self._sum = self._sum, None
        if self._group.world_size == 1:
            return tensors
        parts, places = _turned(self._turns)
        if tensors is not places:
            copied(tensors, places)
        if self._memory.exists:
            self._group.sum_shared(parts)
        else:
            self._group.all_reduce(parts[0])
        return unflatten(parts[0].to(self._dtype), self._like)


class SharedVectors:
    """Vectors in memory that all ranks share, asked for again and again; made at the first time."""

    def __init__(self, group: Group) -> None:
        self._group, self._sizes, self._vectors = group, None, []
        self.exists = group.world_size > 1 and hasattr(group, "shared")

    def turns(self, sizes: list[int], dtype: torch.dtype) -> list[list[Tensor]]:
        """[two steps in turn]: the same vectors but for the first one, which the next step still reads as a sum."""
        if self._sizes != (sizes, dtype):
            self._sizes, self._vectors = (sizes, dtype), self._group.shared([*sizes, sizes[0]], dtype)
        else:
            self._group.barrier()  # somebody may still read a sum of before
        first, *others, second = self._vectors
        return [[first, *others], [second, *others]]


def _turned(turns: list[Turn]) -> Turn:
    """The first one, which becomes the last one."""
    turns.append(turn := turns.pop(0))
    return turn


def meeting_order(rank: int, world_size: int) -> list[int]:
    """The other ranks, in an order in which every two meet in the same round (a round-robin tournament)."""
    peers = ((turn - rank) % world_size for turn in range(world_size))
    return [peer for peer in peers if peer != rank]


def one_dtype(tensors: list[Tensor]) -> torch.dtype:
    """That of all of them; ValueError where they are of several."""
    if len(dtypes := {tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"{', '.join(sorted(map(str, dtypes)))} can't be summed together; make all tensors one dtype")
    return tensors[0].dtype


def shapes_of(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of the same shapes and strides that hold nothing."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]


def alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return [t.shape for t in some] == [t.shape for t in others]


def copied(tensors: list[Tensor], places: list[Tensor]) -> list[Tensor]:
    torch._foreach_copy_(places, tensors)
    return places


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of `flat` with the shapes and strides of `like`."""
    tensors, offset = [], 0
    for tensor in like:
        tensors.append(_like(flat[offset : offset + tensor.numel()], tensor))
        offset += tensor.numel()
    return tensors


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    return part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
