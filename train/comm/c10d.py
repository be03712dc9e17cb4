"""Our backends in torch.distributed: after `import train.comm.c10d`, `init_process_group("cpu:plan")` or `"cpu:shm"`.

A stock DistributedDataParallel script trains on them unchanged. Sums and averages (all_reduce, reduce_scatter),
broadcast and barrier are the group's; gloo, in the same process group, does what else torch.distributed knows.
Operations run one after another beside the thread that asks for them, as DDP's overlap with backward needs.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C import _distributed_c10d as c10d

from train.comm.plan_group import PlanGroup
from train.comm.shm_group import ShmGroup
from train.comm.turns import SUMMED


def _is_sum(operation: Any) -> bool:
    """Operations know what they are equal to, but their names do not: `in` would not find them."""
    return operation == distributed.ReduceOp.SUM or operation == distributed.ReduceOp.AVG


def _by_gloo(method: str) -> Callable[..., Any]:
    """On the class, not the object: torch looks for a Python method there."""

    def call(self: "GroupBackend", *args: Any) -> Any:
        return getattr(self._gloo, method)(*args)

    return call


class GroupBackend(c10d.Backend):
    """One of our groups behind torch.distributed's interface."""

    def __init__(self, name: str, make: Callable[..., Any], options: Any) -> None:
        rank, size = options.group_rank, options.group_size
        super().__init__(rank, size)
        self._name = name
        timeout = options.timeout
        self._gloo = distributed.ProcessGroupGloo(distributed.PrefixStore("gloo", options.store), rank, size, timeout)
        store = distributed.PrefixStore(name, options.store)
        self._group = make(rank, size, store, "cpu", timeout_s=timeout.total_seconds())
        self._thread = ThreadPoolExecutor(1, name, torch.set_num_threads, (torch.get_num_threads(),))

    allgather, allgather_coalesced = _by_gloo("allgather"), _by_gloo("allgather_coalesced")
    all_gather_single, _allgather_base = _by_gloo("all_gather_single"), _by_gloo("_allgather_base")
    all_gather_single_coalesced = _by_gloo("all_gather_single_coalesced")
    allreduce_coalesced, reduce = _by_gloo("allreduce_coalesced"), _by_gloo("reduce")
    gather, scatter = _by_gloo("gather"), _by_gloo("scatter")
    alltoall, alltoall_base = _by_gloo("alltoall"), _by_gloo("alltoall_base")
    all_to_all_single = _by_gloo("all_to_all_single")
    send, recv, recv_anysource = _by_gloo("send"), _by_gloo("recv"), _by_gloo("recv_anysource")

    def name(self) -> str:
        return self._name

    def getBackendName(self) -> str:  # noqa: N802
        return self._name

    @property
    def supports_coalescing(self) -> bool:
        return False  # else batch_isend_irecv asks this backend again and again

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        operation = distributed.ReduceOp.SUM if options is None else options.reduceOp
        if not _is_sum(operation) or any(tensor.dtype not in SUMMED for tensor in tensors):
            return self._gloo.allreduce(tensors, options)

        def run() -> list[Tensor]:
            for tensor in tensors:
                self._group.all_reduce(tensor)
                if operation == distributed.ReduceOp.AVG:
                    tensor.div_(self._group.world_size)
            return tensors

        return self._later(run)

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        def run() -> list[Tensor]:
            for tensor in tensors:
                self._group.broadcast(tensor, options.rootRank)
            return tensors

        return self._later(run)

    def barrier(self, options: Any = None) -> Any:
        def run() -> list[Tensor]:
            self._group.barrier()
            return [torch.zeros(1)]

        return self._later(run)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        return self._reduce_scatter(outputs, [torch.stack(rows) for rows in inputs], options)

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, options: Any) -> Any:
        return self._reduce_scatter([output], [whole.view(self._group.world_size, *output.shape)], options)

    _reduce_scatter_base = reduce_scatter_single

    def _reduce_scatter(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        if not _is_sum(options.reduceOp):
            raise ValueError(f"backend={self._name}: reduce_scatter sums or averages; the rest is for gloo")

        def run() -> list[Tensor]:
            for output, rows in zip(outputs, inputs, strict=True):
                output.copy_(self._group.reduce_scatter(rows))
                if options.reduceOp == distributed.ReduceOp.AVG:
                    output.div_(self._group.world_size)
            return outputs

        return self._later(run)

    def _later(self, function: Callable[[], list[Tensor]]) -> Any:
        future: torch.futures.Future = torch.futures.Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._thread.submit(run)
        return c10d._create_work_from_future(future)

    def shutdown(self) -> None:
        self._thread.shutdown()
        self._group.close()

    def abort(self) -> None:
        self._group.abort()


def register(name: str, make: Callable[..., Any]) -> None:
    """Make `cpu:<name>` a backend of torch.distributed. `make`: a constructor as Group's, with `timeout_s`.

    For another algorithm: register("nhr", functools.partial(PlanGroup, algorithm=train.comm.algorithms.nhr)).
    """
    distributed.Backend.register_backend(
        name, lambda options, _=None: GroupBackend(name, make, options), extended_api=True, devices=["cpu"]
    )


register("plan", PlanGroup)
register("shm", ShmGroup)
