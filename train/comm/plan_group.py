"""A plan of the emulator, run for real: each worker is a chip of a small mesh, each transfer a message.

What `run_on_arrays` does on arrays in one process, with the same chunks and the same order of sums, so that the results
have the same bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from train.comm.algorithms import ring
from train.comm.peers import Peers
from train.comm.plan import Plan
from train.comm.torch_group import TorchGroup
from train.comm.turns import check_summed, flat
from train.mesh.mesh import Mesh
from train.mesh.topologies import Star
from train.mesh.topology import LinkClass

MESSAGE_BYTES = 4 << 20
"""Longer transfers go in several messages of equal size, about this one, so that one is added while the next one comes.
"""


@dataclass(frozen=True)
class Turn:
    """One rank's part of a round: (peer, first chunk, last chunk), in the order of the plan."""

    sends: tuple[tuple[int, int, int], ...]
    receives: tuple[tuple[int, int, int], ...]
    reduce: bool


class PlanGroup(TorchGroup):
    """`algorithm` makes the plan of all_reduce; the other operations are the transport's (`over`).

    axes: of the mesh of workers, the last one fastest; by default {host: nodes, chip: workers of a node} where the
    nodes have equally many in the order of ranks, else a host for each worker. An axis `chip` is what lies in a host.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        device: str,
        algorithm: Callable[[Mesh], Plan] = ring,
        over: Literal["gloo", "nccl"] = "gloo",
        axes: dict[str, int] | None = None,
        timeout_s: float = 600.0,
        within: Peers | None = None,
    ) -> None:
        if axes is not None:  # before anything connects
            algorithm(worker_mesh(world_size, axes))
        super().__init__(rank, world_size, store, device, over, timeout_s, within)
        try:
            self.plan = algorithm(worker_mesh(world_size, axes or _axes(self._peers.nodes)))
        except ValueError:
            self.close()
            raise
        self._algorithm = algorithm
        self._schedule = tuple(schedule(self.plan, rank))
        self._room: dict[torch.dtype, Tensor] = {}

    def _name(self) -> str:
        return f"plan over {self.backend}"

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Any:
        check_summed(tensor, "plan")
        return self._turns.run("all_reduce", lambda: self._run(tensor), async_op)

    def _run(self, tensor: Tensor) -> None:
        with flat(tensor) as elements:
            width = -(-len(elements) // self.plan.num_chunks)
            for turn in self._schedule:
                self._take_turn(turn, elements, width)

    def _take_turn(self, turn: Turn, elements: Tensor, width: int) -> None:
        """Nothing that arrives is put in place before all that leaves has left, where the two overlap."""
        going = list(_messages(turn.sends, elements, width))
        coming = list(_messages(turn.receives, elements, width))
        parts = [part for _, part in coming]
        apart = not _overlap([part for _, part in going], parts)
        direct = apart and not turn.reduce
        landed = parts if direct else self._landings(parts)
        # Receives first: gloo asks for a message before it is sent, and the asking would wait behind what this rank
        # sends. On a wire that made an exchange take twice as long.
        came = [self._group.recv([landing], peer, 0) for (peer, _), landing in zip(coming, landed, strict=True)]
        sent = [self._group.send([part], peer, 0) for peer, part in going]
        if not apart:
            for work in sent:
                work.wait()
        for part, landing, work in zip(parts, landed, came, strict=True):
            work.wait()
            if turn.reduce:
                part.add_(landing)
            elif not direct:
                part.copy_(landing)
        if apart:
            for work in sent:
                work.wait()

    def _landings(self, parts: list[Tensor]) -> list[Tensor]:
        """As many elements as the parts have, in memory that is kept: the kernel would have to clear new pages."""
        if not parts:
            return []
        sizes, like = [len(part) for part in parts], parts[0]
        if like.dtype not in self._room or len(self._room[like.dtype]) < sum(sizes):
            self._room[like.dtype] = like.new_empty(sum(sizes))
        return list(self._room[like.dtype][: sum(sizes)].split(sizes))

    def subgroup(self, ranks: list[int]) -> "PlanGroup | None":
        """On a mesh of default axes."""
        store = self._substore()
        if self.rank not in ranks:
            return None
        where = ranks.index(self.rank), len(ranks), store, self._device
        return PlanGroup(*where, self._algorithm, self.backend, None, self._timeout_s, self._peers)


def worker_mesh(world_size: int, axes: dict[str, int]) -> Mesh:
    """The workers as chips on one switch. ValueError where the axes don't multiply to their number."""
    link = LinkClass("between workers", gbytes_per_s=1.0, latency_us=1.0)  # only its kind matters to an algorithm
    return Mesh("workers", axes, Star(link, chips_per_host=axes.get("chip", 1)), chips=world_size)


def schedule(plan: Plan, rank: int) -> Iterator[Turn]:
    """What one rank does in each round in which it does anything."""
    for turn in plan.rounds():
        transfers = list(zip(*(part.tolist() for part in turn[:4]), strict=True))
        sends = tuple((to, first, last) for source, to, first, last in transfers if source == rank)
        receives = tuple((source, first, last) for source, to, first, last in transfers if to == rank)
        if sends or receives:
            yield Turn(sends, receives, turn.reduce)


def _messages(
    transfers: tuple[tuple[int, int, int], ...], elements: Tensor, width: int
) -> Iterator[tuple[int, Tensor]]:
    for peer, first, last in transfers:
        part = elements[first * width : last * width]
        if len(part):
            yield from ((peer, message) for message in part.tensor_split(max(1, round(part.nbytes / MESSAGE_BYTES))))


def _overlap(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether vectors of one buffer have elements in common."""
    ends = [(part.data_ptr(), part.data_ptr() + part.nbytes) for part in others]
    return any(part.data_ptr() < end and start < part.data_ptr() + part.nbytes for part in some for start, end in ends)


def _axes(nodes: list[str]) -> dict[str, int]:
    sizes = [len(list(together)) for _, together in groupby(nodes)]
    if len(set(sizes)) == 1 and len(sizes) == len(set(nodes)):
        return {"host": len(sizes), "chip": sizes[0]}
    return {"host": len(nodes), "chip": 1}
