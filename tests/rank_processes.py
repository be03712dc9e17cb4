"""Real processes for tests of what several workers do together."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore

from scripts.loopback import loopback_store

HANGING_S = 120.0


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, dying: int | None = None) -> list[Any]:
    """`function(rank, world_size, store, *args)` in a process for each rank, on loopback; the results by rank.

    dying: the rank that is expected to end without a result (None in its place).

    `function`, `args` and results are pickled: a module's own function, plain values. The processes are forked from one
    that has loaded the library and done nothing with it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.build", "hydra.utils"])
    store, port = loopback_store(world_size)
    ends, processes = [], []
    for rank in range(world_size):
        end, other = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(other, function, rank, world_size, port, args), daemon=True)
        process.start()
        other.close()
        ends.append(end)
        processes.append(process)
    try:
        return _results(ends, dying)
    finally:
        for process in processes:
            process.kill()
            process.join()
        del store


def _results(ends: list[Connection], dying: int | None) -> list[Any]:
    """What the processes sent, by rank; the first error of one ends the waiting."""
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        ready = wait([end for rank, end in enumerate(ends) if rank not in results], HANGING_S)
        assert ready, f"ranks {sorted(set(range(len(ends))) - set(results))} hang"
        for end in ready:
            rank = ends.index(end)
            try:
                error, results[rank] = end.recv()
            except EOFError:
                assert rank == dying, f"rank {rank} died"
                error, results[rank] = None, None
            assert error is None, f"rank {rank}:\n{error}"
    return [results[rank] for rank in range(len(ends))]


def _work(end: Connection, function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple) -> None:
    import torch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = TCPStore("127.0.0.1", port, world_size, is_master=False, wait_for_workers=False)
        end.send((None, function(rank, world_size, store, *args)))
    except BaseException:
        end.send((traceback.format_exc(), None))
