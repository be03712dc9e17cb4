"""PyTorch's own transports as a group: gloo between processors, nccl between NVIDIA GPUs, hccl between Ascend NPUs.

hccl comes with torch_npu and follows its interface (that of nccl); it could not be run for want of a device.
"""

import importlib.util
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch._C import _distributed_c10d as c10d

from train.comm.peers import SLICE_S, Peers, seconds
from train.comm.turns import Pending, Turns, check_rank, check_summed, flat

Backend = Literal["gloo", "nccl", "hccl"]
MEMORY = {"nccl": ("cuda", "GPU"), "hccl": ("npu", "NPU")}
"""The only kind of device that a transport serves; gloo takes any, and copies to and from a GPU."""
NEVER_SENT = 1 << 20
"""A tag that no message has."""


class TorchGroup:
    """A process group of its own, beside torch.distributed's default one, so that it can be given up and made anew.

    `store` is a c10d store that every rank reaches, new (or under a new prefix) for each group; one rank alone needs
    none. `timeout_s` is how long a rank that is alive may be waited for; `within`, the peers of the group that this one
    is a part of.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        device: str,
        backend: Backend = "gloo",
        timeout_s: float = 600.0,
        within: Peers | None = None,
    ) -> None:
        check_backend(backend, device)
        self.rank, self.world_size, self.backend = rank, world_size, backend
        self._store = distributed.HashStore() if store is None else store
        self._device, self._timeout_s, self._subgroups = device, timeout_s, 0
        self._peers = Peers(self._name(), rank, world_size, self._store, timeout_s, within)
        # When a peer dies in the middle of a message, gloo tells nobody who waits for the rest of it (pair.cc,
        # signalException); so nobody waits in gloo without looking at the peers now and then.
        self._turns = Turns(self._peers, apart=backend == "gloo")
        self._group = self._peers.made(self._process_group, "connect")
        if backend != "gloo":
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
            work = self._started("all_reduce", lambda: self._group.allreduce([tensor]))
            return Pending(lambda: self._wait("all_reduce", work))
        with flat(tensor) as elements:
            self._collective("all_reduce", lambda: self._group.allreduce([elements]))
        return Pending(_nothing) if async_op else None

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = tensor.new_empty((self.world_size, *tensor.shape))
        rows = list(_bytes(out.view(self.world_size, tensor.numel())).unbind())
        own = _bytes(tensor.contiguous().view(-1))
        self._collective("all_gather", lambda: self._group.allgather([rows], [own]))
        return out

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        check_summed(tensor, self._name())
        out = tensor.new_empty(tensor.shape[1:])
        rows = [row.contiguous() for row in tensor.unbind()]
        self._collective("reduce_scatter", lambda: self._group.reduce_scatter([out], [rows]))
        return out

    def broadcast(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        options = c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        with flat(tensor) as elements:
            self._collective("broadcast", lambda: self._group.broadcast([_bytes(elements)], options))

    def barrier(self) -> None:
        self._collective("barrier", lambda: self._group.barrier())

    def send(self, tensor: Tensor, destination: int) -> None:
        check_rank(destination, self.world_size, "destination")
        self._turns.run("send", lambda: self._group.send([tensor.contiguous()], destination, 0).wait())

    def recv(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        with flat(tensor) as elements:
            self._turns.run("recv", lambda: self._group.recv([elements], source, 0).wait())

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        check_rank(peer, self.world_size, "peer")
        self._turns.run("exchange", lambda: self._exchange(outgoing, incoming, peer))

    def _exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        transfers = [(self._group.send, tensor.contiguous(), peer) for tensor in outgoing]
        with ExitStack() as stack:
            taken = [stack.enter_context(flat(tensor)) for tensor in incoming]
            for work in self._at_once([*transfers, *((self._group.recv, tensor, peer) for tensor in taken)]):
                work.wait()

    def _at_once(self, transfers: list[tuple[Any, Tensor, int]]) -> list[Any]:
        """Starts sends and receives that don't wait for each other."""
        if self.backend == "gloo":
            return [start([tensor], peer, 0) for start, tensor, peer in transfers]
        self._group._start_coalescing()
        for start, tensor, peer in transfers:
            start([tensor], peer, 0)
        return [self._group._end_coalescing()]

    def _collective(self, operation: str, start: Callable[[], Any]) -> None:
        self._wait(operation, self._started(operation, start))

    def _started(self, operation: str, start: Callable[[], Any]) -> Any:
        with self._peers.during(operation):
            return start()

    def _wait(self, operation: str, work: Any) -> None:
        """A collective's work, unlike a message's, can be waited for a while without harm."""
        with self._peers.during(operation):
            while self.backend == "gloo" and not work.is_completed():
                with suppress(RuntimeError):  # not yet; or its own error, which is raised below
                    return work.wait(seconds(SLICE_S))
                if not work.is_completed():
                    self._peers.check(operation)
            work.wait()

    def subgroup(self, ranks: list[int]) -> "TorchGroup | None":
        store = self._substore()
        if self.rank not in ranks:
            return None
        where = ranks.index(self.rank), len(ranks), store, self._device
        return TorchGroup(*where, self.backend, self._timeout_s, self._peers)

    def _substore(self) -> Any:
        self._subgroups += 1
        return distributed.PrefixStore(f"subgroup{self._subgroups}", self._store)

    def abort(self) -> None:
        self._peers.abort()
        self._turns.close()
        self._interrupt()
        held, self._group = [self._group], _Ended()
        # its end may have to wait for what it is still at
        threading.Thread(target=held.clear, name="abort", daemon=True).start()

    def close(self) -> None:
        self._peers.close()
        self._turns.close()
        self._group = _Ended()

    def _interrupt(self) -> None:
        """End what is under way, and with the connections what others wait for.

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
