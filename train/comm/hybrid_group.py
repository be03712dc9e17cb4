"""Workers on several machines: shared memory inside each, a plan between their first workers."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed

from train.comm.algorithms import ring
from train.comm.peers import GroupError
from train.comm.plan import Plan
from train.comm.plan_group import PlanGroup
from train.comm.shm_group import ShmGroup
from train.comm.torch_group import TorchGroup
from train.comm.turns import Turns, check_rank, check_summed, flat
from train.mesh.mesh import Mesh


class HybridGroup(TorchGroup):
    """Sums are made in each node, then by the plan of `algorithm` between the nodes, then given back in each.

    Messages go through memory where both ends share it; everything else over gloo, as between all.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        device: str,
        algorithm: Callable[[Mesh], Plan] = ring,
        timeout_s: float = 600.0,
    ) -> None:
        if not device.startswith("cpu"):
            raise ValueError(f"backend=hybrid moves CPU memory only, and device={device}; use backend=nccl")
        self._algorithm, self._parts = algorithm, []
        super().__init__(rank, world_size, store, device, "gloo", timeout_s)
        self._turns = Turns(self._peers)
        nodes = self._peers.nodes
        self.node_ranks = [peer for peer, node in enumerate(nodes) if node == nodes[rank]]
        """The ranks of this node, in order; the first one speaks for it."""
        self.heads = sorted({nodes.index(node) for node in nodes})
        try:
            self._node = self._part(ShmGroup, self.node_ranks, f"node{self.node_ranks[0]}")
            if rank in self.heads:
                self._between = self._part(PlanGroup, self.heads, "between", algorithm=algorithm)
        except BaseException:
            self.abort()
            raise

    def _part(self, kind: type, ranks: list[int], name: str, **settings: Any) -> Any:
        store = distributed.PrefixStore(name, self._store.clone())
        made = self._peers.made(
            lambda: kind(ranks.index(self.rank), len(ranks), store, "cpu", timeout_s=self._timeout_s, **settings),
            "connect",
        )
        self._parts.append(made)
        return made

    def _name(self) -> str:
        return "hybrid"

    @contextmanager
    def _inside(self):
        """A part's error names ranks of the part: the whole group knows better who is to blame."""
        try:
            yield
        except GroupError as error:
            raise RuntimeError(str(error)) from error

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Any:
        check_summed(tensor, "hybrid")
        return self._turns.run("all_reduce", lambda: self._all_reduce(tensor), async_op)

    def _all_reduce(self, tensor: Tensor) -> None:
        with self._inside(), flat(tensor) as elements:
            self._node.all_reduce(elements)
            if len(self.heads) > 1:
                if self.rank in self.heads:
                    self._between.all_reduce(elements)
                self._node.broadcast(elements, 0)

    def send(self, tensor: Tensor, destination: int) -> None:
        check_rank(destination, self.world_size, "destination")
        if destination in self.node_ranks:
            self._turns.run("send", lambda: self._in_node("send", tensor, self.node_ranks.index(destination)))
        else:
            super().send(tensor, destination)

    def recv(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        if source in self.node_ranks:
            self._turns.run("recv", lambda: self._in_node("recv", tensor, self.node_ranks.index(source)))
        else:
            super().recv(tensor, source)

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        check_rank(peer, self.world_size, "peer")
        if peer in self.node_ranks:
            local = self.node_ranks.index(peer)
            self._turns.run("exchange", lambda: self._in_node("exchange", outgoing, incoming, local))
        else:
            super().exchange(outgoing, incoming, peer)

    def _in_node(self, operation: str, *args: Any) -> None:
        with self._inside():
            getattr(self._node, operation)(*args)

    def subgroup(self, ranks: list[int]) -> "HybridGroup | None":
        store = self._substore()
        if self.rank not in ranks:
            return None
        settings = {"algorithm": self._algorithm, "timeout_s": self._timeout_s}
        return HybridGroup(ranks.index(self.rank), len(ranks), store, self._device, **settings)

    def _interrupt(self) -> None:
        super()._interrupt()
        for part in self._parts:
            part.abort()

    def abort(self) -> None:
        super().abort()
        self._turns.end()

    def close(self) -> None:
        super().close()
        for part in self._parts:
            part.close()
        self._turns.end()
