"""Adding up what the blocks of all workers computed: in one fixed order (`exact`) or in the fastest one (`fast`).

A block's contribution is a list of tensors (its gradients, its loss ...); all workers get the sum over all blocks.
Where the group has memory that all workers share (`shared` of train.comm.shm_group), they add up there: a contribution
is copied into it once, and the sum is read from it.
"""

import time
from typing import Protocol

import torch
from torch import Tensor

from train.comm.groups import Group
from train.comm.tree import PartialSums, aligned_nodes, combine


class Aggregator(Protocol):
    comm_s: float
    """Seconds spent in communication by the last `total`."""

    def add(self, block: int, tensors: list[Tensor]) -> None:
        """Take over a pass's contribution (its tensors are overwritten); `block`, its first one, ascends."""

    def total(self) -> list[Tensor]:
        """The sum over every worker's contributions since the last call, in float32 or wider, on every worker.

        To be read only, until the next call: all workers may have the same memory.
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
        self.comm_s = 0.0

    def add(self, block: int, tensors: list[Tensor]) -> None:
        self._sums.push(block, tensors)

    def total(self) -> list[Tensor]:
        partial = self._sums.take()
        started = time.perf_counter()
        if self._group.world_size == 1:
            result = combine(partial, self._num_blocks, _add)
        elif self._memory.exists:
            result = self._in_shared_memory(list(partial.values()))
        else:
            result = self._across_workers(list(partial.values()))
        self.comm_s = time.perf_counter() - started
        return result

    def _across_workers(self, partial: list[list[Tensor]]) -> list[Tensor]:
        rank, world_size = self._group.rank, self._group.world_size
        like = partial[0]
        length = -(-sum(t.numel() for t in like) // world_size)
        mine = [flatten(tensors, length * world_size).view(world_size, length) for tensors in partial]
        nodes = {node: flat[rank] for node, flat in zip(self._nodes[rank], mine, strict=True)}
        for peer in meeting_order(rank, world_size):
            incoming = [torch.empty_like(mine[0][peer]) for _ in self._nodes[peer]]
            self._group.exchange([flat[peer] for flat in mine], incoming, peer)
            nodes.update(zip(self._nodes[peer], incoming, strict=True))
        finished = combine(nodes, self._num_blocks, lambda left, right: left.add_(right))
        return unflatten(self._group.all_gather(finished.contiguous()).view(-1), like)

    def _in_shared_memory(self, partial: list[list[Tensor]]) -> list[Tensor]:
        """As `_across_workers`, but what a worker sends to others they read, and its own slices they leave alone."""
        rank, world_size = self._group.rank, self._group.world_size
        like = partial[0]
        length = -(-sum(t.numel() for t in like) // world_size)
        sizes = [len(nodes) * world_size * length for nodes in self._nodes]
        *parts, result = self._memory.vectors([*sizes, world_size * length], like[0].dtype)
        for tensors, flat in zip(partial, parts[rank].view(-1, world_size * length), strict=True):
            flatten(tensors, len(flat), out=flat)
        self._group.barrier()
        nodes = {
            node: row[rank]
            for nodes, part in zip(self._nodes, parts, strict=True)
            for node, row in zip(nodes, part.view(-1, world_size, length), strict=True)
        }
        finished = combine(nodes, self._num_blocks, lambda left, right: left.add_(right))
        result.view(world_size, length)[rank].copy_(finished)
        self._group.barrier()
        return unflatten(result, like)


class SumAggregator:
    """The sum in the fastest order: a worker's own passes one after the other, then the backend's all-reduce."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._memory = SharedVectors(group)
        self._sum: list[Tensor] | None = None
        self.comm_s = 0.0

    def add(self, block: int, tensors: list[Tensor]) -> None:
        self._sum = tensors if self._sum is None else _add(self._sum, tensors)

    def total(self) -> list[Tensor]:
        tensors, self._sum = self._sum, None
        started = time.perf_counter()
        if self._group.world_size > 1:
            length, rank = sum(t.numel() for t in tensors), self._group.rank
            if self._memory.exists:
                *parts, flat = self._memory.vectors([length] * (self._group.world_size + 1), tensors[0].dtype)
                flatten(tensors, length, out=parts[rank])
                self._group.sum_shared(parts, [flat])
            else:
                self._group.all_reduce(flat := flatten(tensors, length))
            tensors = unflatten(flat, tensors)
        self.comm_s = time.perf_counter() - started
        return tensors


class SharedVectors:
    """Vectors in memory that all ranks share, asked for again and again; made at the first time."""

    def __init__(self, group: Group) -> None:
        self._group, self._sizes, self._vectors = group, None, []
        self.exists = group.world_size > 1 and hasattr(group, "shared")

    def vectors(self, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        if self._sizes != (sizes, dtype):
            self._sizes, self._vectors = (sizes, dtype), self._group.shared(sizes, dtype)
        return self._vectors


def meeting_order(rank: int, world_size: int) -> list[int]:
    """The other ranks, in an order in which every two meet in the same round (a round-robin tournament)."""
    peers = ((turn - rank) % world_size for turn in range(world_size))
    return [peer for peer in peers if peer != rank]


def flatten(tensors: list[Tensor], length: int, out: Tensor | None = None) -> Tensor:
    """All elements in one vector of `length`, in memory order of each tensor, zeros behind them (`out` has them there).

    ValueError where the tensors are of several dtypes.
    """
    if len(dtypes := {tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"{', '.join(sorted(map(str, dtypes)))} can't be summed together; make all tensors one dtype")
    flat = torch.zeros(length, dtype=tensors[0].dtype, device=tensors[0].device) if out is None else out
    offset = 0
    for tensor in tensors:
        _like(flat[offset : offset + tensor.numel()], tensor).copy_(tensor)
        offset += tensor.numel()
    return flat


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of `flat` with the shapes and strides of `like`."""
    tensors, offset = [], 0
    for tensor in like:
        tensors.append(_like(flat[offset : offset + tensor.numel()], tensor))
        offset += tensor.numel()
    return tensors


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    return part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
