"""One worker of scripts/shaped_links.py, on a chip of its network: ping-pongs, then all-reduces of given plans.

    python -m scripts.shaped_worker < order.json

Rank 0 writes one JSON object to stdout: {"ping_pong": [[seconds of one way] for each ping-pong], "all_reduce":
[[seconds] for each all-reduce]}.
"""

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from scripts.shaped_mesh import ALGORITHMS, shape
from scripts.shaped_network import Layout
from train.comm.groups import Group, TorchGroup
from train.comm.plan import Plan

AHEAD_S = 0.02
"""All ranks start at a time agreed on this long before, when the agreeing itself has surely come through."""


def ping_pong(group: Group, peers: list[int], nbytes: int, repetitions: int) -> list[float]:
    """Seconds of one way, of each there-and-back after the first two; peers are two ranks, the others return [0]."""
    if group.rank not in peers:
        return [0.0] * repetitions
    first = group.rank == min(peers)
    other, there, back = sum(peers) - group.rank, torch.zeros(nbytes // 4), torch.zeros(nbytes // 4)
    seconds = []
    for _ in range(repetitions + 2):
        began = time.perf_counter()
        if first:
            group.send(there, other)
            group.recv(back, other)
        else:
            group.recv(back, other)
            group.send(there, other)
        seconds.append((time.perf_counter() - began) / 2)
    return seconds[2:]


def all_reduces(group: Group, run: Callable[[Tensor], Any], nbytes: int, repetitions: int) -> list[float]:
    """Seconds from the common start to the last rank's end, of each all-reduce after the first.

    AssertionError where a sum is not exact.
    """
    seconds = []
    pattern = torch.arange(nbytes // 4, dtype=torch.float32) % 7
    ranks = group.world_size * (group.world_size + 1) / 2
    for _ in range(repetitions + 1):
        tensor = pattern + (group.rank + 1)
        start = _common_start(group)
        run(tensor)
        took = torch.tensor([time.monotonic() - start], dtype=torch.float64)
        assert torch.equal(tensor, pattern * group.world_size + ranks), "the all-reduce gave a wrong sum"
        seconds.append(float(group.all_gather(took).max()))
    return seconds[1:]


def _common_start(group: Group) -> float:
    """Waits for it; all namespaces have one clock."""
    start = torch.tensor([time.monotonic() + AHEAD_S], dtype=torch.float64)
    group.barrier()
    start[0] = time.monotonic() + AHEAD_S
    group.broadcast(start, 0)
    time.sleep(max(0.0, float(start[0]) - time.monotonic()))
    return float(start[0])


def over_send_and_recv(plan: Plan, group: Group) -> Callable[[Tensor], None]:
    rounds = []
    for turn in plan.rounds():
        sends = [tuple(map(int, each)) for each in np.stack([turn.destination, turn.first, turn.last], 1)[turn.source == group.rank]]
        recvs = [tuple(map(int, each)) for each in np.stack([turn.source, turn.first, turn.last], 1)[turn.destination == group.rank]]
        rounds.append((sends, recvs, turn.reduce))

    def run(tensor: Tensor) -> None:
        width = -(-len(tensor) // plan.num_chunks)
        for sends, recvs, reduce in rounds:
            into = [(tensor[a * width : b * width], peer) for peer, a, b in recvs]
            bufs = [torch.empty_like(t) if reduce else t for t, _ in into]
            works = [distributed.irecv(buf, peer) for buf, (_, peer) in zip(bufs, into)]
            works += [distributed.isend(tensor[a * width : b * width], peer) for peer, a, b in sends]
            for work in works:
                work.wait()
            if reduce:
                for buf, (t, _) in zip(bufs, into):
                    t += buf

    return run


def main() -> None:
    order = json.load(sys.stdin)
    torch.set_num_threads(1)
    layout, rank = Layout(**order["layout"]), order["rank"]
    timeout = timedelta(seconds=order["timeout_s"])
    store = distributed.TCPStore(layout.address(0), order["port"], layout.chips, rank == 0, timeout)
    group = TorchGroup(rank, layout.chips, store, "cpu", timeout_s=order["timeout_s"])
    found: dict[str, list[list[float]]] = {"ping_pong": [], "all_reduce": []}
    for peers, nbytes in order["ping_pong"]:
        group.barrier()
        mine = torch.tensor(ping_pong(group, peers, nbytes, order["repetitions"]), dtype=torch.float64)
        found["ping_pong"].append(group.all_gather(mine)[min(peers)].tolist())
    plans = {name: over_send_and_recv(ALGORITHMS[name](shape(layout)), group) for name in ALGORITHMS}
    for name, nbytes in order["all_reduce"]:
        found["all_reduce"].append(all_reduces(group, plans[name], nbytes, order["repetitions"]))
    group.close()
    if rank == 0:
        json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
