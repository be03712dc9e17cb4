"""Who moves real bytes between workers: groups of processes with the collectives that training needs.

`connect` makes the group of a configuration; a backend from outside the repository is a class with the methods of
`Group`, named by `_target_` in a YAML of the group `backend`, whose first arguments are those of `connect`.
"""

from typing import Any, Protocol

from torch import Tensor


class PeerLost(RuntimeError):
    """An operation of a group could not be ended: a rank is gone or has given up; the group is of no use any more.

    peer: the rank that is to blame, where one is known.
    """

    def __init__(self, text: str, peer: int | None = None) -> None:
        super().__init__(text)
        self.peer = peer


class Group(Protocol):
    """The workers of a run. Every rank calls the same operations in the same order, with equal shapes and dtypes.

    Results, in place or returned, have the same bits on every rank. When a rank dies or gives up, every other one's
    operation ends within a second with a PeerLost that names that rank and the operation, and so
    does every later one; `abort`, then, and a new group of those that are left, with a new prefix of the store.
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
        """Give up at once: every rank's operations end with an error."""

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


def connect(rank: int, world_size: int, store: Any, device: str) -> Group:
    """backend=auto: one worker needs no transport, GPUs use NCCL, processors gloo."""
    if world_size == 1:
        return SingleGroup()
    from train.comm.torch_group import TorchGroup  # which needs what is here

    return TorchGroup(rank, world_size, store, device, backend="nccl" if device.startswith("cuda") else "gloo")
