"""PyTorch's own transports as a group: gloo between processors, nccl between NVIDIA GPUs, hccl between Ascend NPUs.

hccl comes with torch_npu and follows its interface (that of nccl); it could not be run for want of a device.
"""

import importlib.util
import os
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch._C import _distributed_c10d as c10d

from train.comm.peers import Peers, seconds
from train.comm.turns import Pending, check_rank, check_summed, flat

Backend = Literal["gloo", "nccl", "hccl"]
MEMORY = {"nccl": ("cuda", "GPU"), "hccl": ("npu", "NPU")}
"""The only kind of device that a transport serves; gloo takes any, and copies to and from a GPU."""
NEVER_SENT = 1 << 20
"""A tag that no message has."""


class TorchGroup:
    """A process group of its own, beside torch.distributed's default one, so that it can be given up and made anew.

    `store` is a c10d store that every rank reaches, new (or under a new prefix) for each group; one rank alone needs
    none. `timeout_s` is how long a rank that is alive may be waited for.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        device: str,
        backend: Backend = "gloo",
        timeout_s: float = 600.0,
    ) -> None:
        check_backend(backend, device)
        self.rank, self.world_size, self.backend = rank, world_size, backend
        self._store = distributed.HashStore() if store is None else store
        self._device, self._timeout_s, self._subgroups = device, timeout_s, 0
        self._peers = Peers(self._name(), rank, world_size, self._store, timeout_s)
        self._group = self._peers.made(self._process_group, "connect")
        self._peers.on_loss(self._interrupt)

    def _name(self) -> str:
        return self.backend

    def _process_group(self) -> Any:
        # a connection of its own, as a rank that never comes would keep this one busy
        store = distributed.PrefixStore("transport", self._store.clone())
        timeout = seconds(self._timeout_s)
        if self.backend == "gloo":
            options = distributed.ProcessGroupGloo._Options()
            options._timeout, options._threads = timeout, 2
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
            where = {"interface": interface} if interface else {"hostname": self._peers.address}
            options._devices = [distributed.ProcessGroupGloo.create_device(**where)]
            return distributed.ProcessGroupGloo(store, self.rank, self.world_size, options)
        if self.backend == "nccl":
            made, options = distributed.ProcessGroupNCCL, distributed.ProcessGroupNCCL.Options()
            torch.cuda.set_device(torch.device(self._device))
        else:
            from torch_npu._C._distributed_c10d import ProcessGroupHCCL as made

            options = made.Options()
        options._timeout = timeout
        return made(store, self.rank, self.world_size, options)

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Any:
        check_summed(tensor, self._name())
        if async_op and tensor.is_contiguous():
            with self._peers.during("all_reduce"):
                work = self._group.allreduce([tensor])
            return Pending(work.wait, self._peers, "all_reduce")
        with flat(tensor) as elements, self._peers.during("all_reduce"):
            self._group.allreduce([elements]).wait()
        return Pending(_nothing) if async_op else None

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = tensor.new_empty((self.world_size, *tensor.shape))
        rows = _bytes(out.view(self.world_size, tensor.numel()))
        with self._peers.during("all_gather"):
            self._group.allgather([list(rows.unbind())], [_bytes(tensor.contiguous().view(-1))]).wait()
        return out

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        check_summed(tensor, self._name())
        out = tensor.new_empty(tensor.shape[1:])
        with self._peers.during("reduce_scatter"):
            self._group.reduce_scatter([out], [[row.contiguous() for row in tensor.unbind()]]).wait()
        return out

    def broadcast(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        options = c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        with flat(tensor) as elements, self._peers.during("broadcast"):
            self._group.broadcast([_bytes(elements)], options).wait()

    def barrier(self) -> None:
        with self._peers.during("barrier"):
            self._group.barrier().wait()

    def send(self, tensor: Tensor, destination: int) -> None:
        check_rank(destination, self.world_size, "destination")
        with self._peers.during("send"):
            self._group.send([tensor.contiguous()], destination, 0).wait()

    def recv(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        with flat(tensor) as elements, self._peers.during("recv"):
            self._group.recv([elements], source, 0).wait()

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        check_rank(peer, self.world_size, "peer")
        transfers = [(self._group.send, tensor.contiguous(), peer) for tensor in outgoing]
        taken = [tensor if tensor.is_contiguous() else torch.empty_like(tensor).contiguous() for tensor in incoming]
        transfers += [(self._group.recv, tensor, peer) for tensor in taken]
        with self._peers.during("exchange"):
            for work in self._at_once(transfers):
                work.wait()
        for tensor, came in zip(incoming, taken, strict=True):
            if came is not tensor:
                tensor.copy_(came)

    def _at_once(self, transfers: list[tuple[Any, Tensor, int]]) -> list[Any]:
        """Starts sends and receives that don't wait for each other."""
        if self.backend == "gloo":
            return [start([tensor], peer, 0) for start, tensor, peer in transfers]
        self._group._start_coalescing()
        for start, tensor, peer in transfers:
            start([tensor], peer, 0)
        return [self._group._end_coalescing()]

    def subgroup(self, ranks: list[int]) -> "TorchGroup | None":
        store = self._substore()
        if self.rank not in ranks:
            return None
        return TorchGroup(ranks.index(self.rank), len(ranks), store, self._device, self.backend, self._timeout_s)

    def _substore(self) -> Any:
        self._subgroups += 1
        return distributed.PrefixStore(f"subgroup{self._subgroups}", self._store)

    def abort(self) -> None:
        self._peers.abort()
        self._interrupt()
        self._group = _Ended()

    def close(self) -> None:
        self._peers.close()
        self._group = _Ended()

    def _interrupt(self) -> None:
        """End whatever this rank waits for, and with its connections what others wait for.

        gloo has no abort; but a message that isn't received in time ends all connections of a group.
        """
        group = self._group
        if isinstance(group, _Ended):
            return
        if self.backend != "gloo":
            group.abort()
            return
        for peer in range(self.world_size):
            if peer != self.rank:
                with suppress(RuntimeError):  # one that is dead refuses at once, and the next one is asked
                    group.recv([torch.empty(1)], peer, NEVER_SENT).wait(seconds(0.001))


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory without its dtype: transports don't know them all."""
    return tensor.view(torch.uint8)


class _Ended:
    """In place of a process group that has been left: another thread may still be about to use it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("the group has ended")


def check_backend(backend: str, device: str) -> None:
    """ValueError where the transport is not installed or the device's memory is not what it moves."""
    if backend == "nccl" and not distributed.is_nccl_available():
        raise ValueError("backend=nccl: this torch has no NCCL; install a CUDA build of torch, or use backend=gloo")
    kind, memory = MEMORY.get(backend, ("", ""))
    if not device.startswith(kind):
        raise ValueError(
            f"backend={backend} moves {memory} memory only, and device={device}; use backend=gloo or device={kind}"
        )
    if backend == "hccl" and importlib.util.find_spec("torch_npu") is None:
        raise ValueError("backend=hccl: torch_npu is not installed; install it beside CANN (pip install torch-npu)")


def _nothing() -> None: ...
