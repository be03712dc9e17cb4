"""Who moves real bytes between workers: groups of processes with the collectives that training needs.

`connect` makes the group of a configuration; a backend from outside the repository is a class with the methods of
`Group`, named by `_target_` in a YAML of the group `backend`, whose first arguments are those of `connect`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed


class PeerLost(RuntimeError):
    """An operation of a group failed because a rank of it is gone, or has given up; the group is of no use any more."""


class Group(Protocol):
    """The workers of a run. Tensors are contiguous; results, in place or returned, have the same bits on every rank.

    When a rank has died or given up, the others' operations raise PeerLost; they then `abort`.
    """

    rank: int
    world_size: int

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Any:
        """Sum `tensor` over the ranks, in place; with `async_op` an object whose `wait()` ends the operation."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[n] on every rank -> [world_size, n]."""

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """[world_size, n] -> [n], this rank's row of the sum."""

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copy the source's tensor into everyone's."""

    def barrier(self) -> None:
        """Return once every rank has called."""

    def send(self, tensor: Tensor, destination: int) -> None: ...

    def recv(self, tensor: Tensor, source: int) -> None: ...

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        """Send and receive at once; the peer calls it with the lists the other way round."""

    def subgroup(self, ranks: list[int]) -> "Group | None":
        """The group of some ranks; every rank of this group calls it, and the others get None."""

    def abort(self) -> None:
        """Give up at once; whoever waits for this rank gets an error."""

    def close(self) -> None:
        """Leave the group in good order."""


class SingleGroup:
    """The group of one worker: nothing moves."""

    rank = 0
    world_size = 1

    def __init__(self, rank: int = 0, world_size: int = 1, store: Any = None, device: str = "cpu") -> None:
        if world_size != 1:
            raise ValueError(f"backend=single carries one worker, not {world_size}; use backend=auto, or workers=1")

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Any:
        return _Done() if async_op else None

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0).clone()

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        return tensor[0].clone()

    def broadcast(self, tensor: Tensor, source: int) -> None: ...

    def barrier(self) -> None: ...

    def send(self, tensor: Tensor, destination: int) -> None:
        raise ValueError(f"a group of one has nobody to send to (destination {destination})")

    def recv(self, tensor: Tensor, source: int) -> None:
        raise ValueError(f"a group of one has nobody to receive from (source {source})")

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        raise ValueError(f"a group of one has nobody to exchange with (peer {peer})")

    def subgroup(self, ranks: list[int]) -> "SingleGroup | None":
        return self if ranks == [0] else None

    def abort(self) -> None: ...

    def close(self) -> None: ...


class _Done:
    def wait(self) -> None: ...


class TorchGroup:
    """torch.distributed's own backends; `store` is a c10d store that every rank reaches, a new one for each group.

    One rank alone needs no store.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        device: str,
        backend: Literal["gloo", "nccl"] = "gloo",
        timeout_s: float = 600.0,
    ) -> None:
        if backend == "nccl" and not distributed.is_nccl_available():
            raise ValueError("backend=nccl: this torch has no NCCL; install a CUDA build of torch, or use backend=gloo")
        if backend == "nccl" and device == "cpu":
            raise ValueError("backend=nccl moves GPU memory only, and device=cpu; use backend=gloo or device=cuda")
        distributed.init_process_group(
            backend,
            store=distributed.HashStore() if store is None else store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=torch.device(device) if backend == "nccl" else None,
        )
        self._adopt(distributed.group.WORLD)

    def _adopt(self, process_group: Any) -> None:
        self._group = process_group
        self.rank = distributed.get_rank(process_group)
        self.world_size = distributed.get_world_size(process_group)
        self._global_ranks = distributed.get_process_group_ranks(process_group)

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Any:
        with self._blaming("all_reduce"):
            return distributed.all_reduce(tensor, group=self._group, async_op=async_op)

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = tensor.new_empty((self.world_size, *tensor.shape))
        with self._blaming("all_gather"):
            distributed.all_gather(list(out.unbind()), tensor, group=self._group)
        return out

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        out = torch.empty_like(tensor[0])
        with self._blaming("reduce_scatter"):
            distributed.reduce_scatter(out, list(tensor.unbind()), group=self._group)
        return out

    def broadcast(self, tensor: Tensor, source: int) -> None:
        with self._blaming("broadcast"):
            distributed.broadcast(tensor, self._global_ranks[source], group=self._group)

    def barrier(self) -> None:
        with self._blaming("barrier"):
            distributed.barrier(group=self._group)

    def send(self, tensor: Tensor, destination: int) -> None:
        with self._blaming("send"):
            distributed.send(tensor, self._global_ranks[destination], group=self._group)

    def recv(self, tensor: Tensor, source: int) -> None:
        with self._blaming("recv"):
            distributed.recv(tensor, self._global_ranks[source], group=self._group)

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        other = self._global_ranks[peer]
        calls = [distributed.P2POp(distributed.isend, tensor, other, self._group) for tensor in outgoing]
        calls += [distributed.P2POp(distributed.irecv, tensor, other, self._group) for tensor in incoming]
        with self._blaming(f"exchange with rank {peer}"):
            for work in distributed.batch_isend_irecv(calls):
                work.wait()

    @contextmanager
    def _blaming(self, operation: str) -> Iterator[None]:
        """torch reports a lost connection, like all else that goes wrong below it, as a RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).partition("This is typically")[0].strip()
            raise PeerLost(f"rank {self.rank} of {self.world_size}, {operation}: {reason}") from error

    def subgroup(self, ranks: list[int]) -> "TorchGroup | None":
        process_group = distributed.new_group([self._global_ranks[r] for r in ranks])
        if self.rank not in ranks:
            return None
        group = TorchGroup.__new__(TorchGroup)
        group._adopt(process_group)
        return group

    def abort(self) -> None:
        process_group, self._group = self._group, None
        process_group.abort()  # does nothing on gloo, whose peers notice that the connections close with the group
        distributed.destroy_process_group(process_group)

    def close(self) -> None:
        distributed.destroy_process_group(self._group)


def connect(rank: int, world_size: int, store: Any, device: str) -> Group:
    """backend=auto: one worker needs no transport, GPUs use NCCL, processors gloo."""
    if world_size == 1:
        return SingleGroup()
    return TorchGroup(rank, world_size, store, device, backend="nccl" if device.startswith("cuda") else "gloo")
