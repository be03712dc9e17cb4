"""Workers on several machines: shared memory inside each, a plan between their first workers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, distributed

from train.comm.algorithms import ring
from train.comm.groups import PeerLost
from train.comm.peers import GRACE_S, Peers
from train.comm.plan import Plan
from train.comm.plan_group import PlanGroup
from train.comm.shm_group import ShmGroup
from train.comm.torch_group import TorchGroup
from train.comm.turns import check_rank, check_summed, flat
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
        within: Peers | None = None,
    ) -> None:
        if not device.startswith("cpu"):
            raise ValueError(f"backend=hybrid moves CPU memory only, and device={device}; use backend=nccl")
        self._algorithm, self._parts = algorithm, []
        super().__init__(rank, world_size, store, device, "gloo", timeout_s, within)
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
        where = ranks.index(self.rank), len(ranks), distributed.PrefixStore(name, self._store), "cpu"
        self._parts.append(kind(*where, timeout_s=self._timeout_s, within=self._peers, **settings))
        return self._parts[-1]

    def _name(self) -> str:
        return "hybrid"

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Any:
        check_summed(tensor, "hybrid")
        return self._turns.run("all_reduce", lambda: self._all_reduce(tensor), async_op)

    def _all_reduce(self, tensor: Tensor) -> None:
        try:
            with flat(tensor) as elements:
                self._node.all_reduce(elements)
                if len(self.heads) > 1:
                    if self.rank in self.heads:
                        self._between.all_reduce(elements)
                    self._node.broadcast(elements, 0)
        except PeerLost as error:  # of a part, which names its own ranks and operation
            self._peers.check_lost("all_reduce", error, GRACE_S)
            raise

    def send(self, tensor: Tensor, destination: int) -> None:
        group, peer = self._way(destination, "destination")
        group.send(tensor, peer)

    def recv(self, tensor: Tensor, source: int) -> None:
        group, peer = self._way(source, "source")
        group.recv(tensor, peer)

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        group, peer = self._way(peer, "peer")
        group.exchange(outgoing, incoming, peer)

    def _way(self, peer: int, what: str) -> tuple[Any, int]:
        """The group over which a peer is reached, and its rank there."""
        check_rank(peer, self.world_size, what)
        if peer in self.node_ranks:
            return self._node, self.node_ranks.index(peer)
        return super(), peer

    def subgroup(self, ranks: list[int]) -> "HybridGroup | None":
        store = self._substore()
        if self.rank not in ranks:
            return None
        where = ranks.index(self.rank), len(ranks), store, self._device
        return HybridGroup(*where, self._algorithm, self._timeout_s, self._peers)

    def abort(self) -> None:
        super().abort()
        for part in self._parts:
            part.abort()

    def close(self) -> None:
        super().close()
        for part in self._parts:
            part.close()
