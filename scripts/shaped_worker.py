"""One worker of scripts/shaped_links.py, a process on a chip of its network: ping-pongs, then all-reduces of plans.

    python -m scripts.shaped_worker < order.json

order: layout (see shaped_network.Layout), rank, port, timeout_s, ping_pong [[two ranks, bytes, repetitions]],
all_reduce [[algorithm, bytes, repetitions]]. Rank 0 writes one JSON object: ping_pong and all_reduce have a list of
seconds for each of these, busy the share of the machine's cores that worked during each all_reduce.
"""

import json
import os
import sys
import time
from datetime import timedelta

import torch
from torch import distributed

from scripts.shaped_mesh import ALGORITHMS
from scripts.shaped_network import Layout
from train.comm.groups import Group
from train.comm.plan_group import PlanGroup

WARM_UP = 1  # the connections' windows are open then, and the memory has been touched
AHEAD_S = 0.02
"""All ranks start at a time agreed on this long before, when the agreeing itself has surely come through."""


def ping_pong(group: Group, peers: list[int], nbytes: int, repetitions: int) -> list[float]:
    """Seconds of one way, on every rank: of each there-and-back of two of them after the first ones."""
    group.barrier()
    seconds = [0.0] * repetitions
    if group.rank in peers:
        first, other = group.rank == min(peers), sum(peers) - group.rank
        message = torch.zeros(nbytes // 4)
        for turn in range(-WARM_UP, repetitions):
            began = time.perf_counter()
            for sends in (first, not first):
                (group.send if sends else group.recv)(message, other)
            if turn >= 0:
                seconds[turn] = (time.perf_counter() - began) / 2
    return group.all_gather(torch.tensor(seconds, dtype=torch.float64))[min(peers)].tolist()


def all_reduces(group: Group, nbytes: int, repetitions: int) -> list[float]:
    """Seconds from the common start to the last rank's end, of each all-reduce after the first ones.

    AssertionError where a sum is not exact.
    """
    seconds = []
    pattern = torch.arange(nbytes // 4, dtype=torch.float32) % 7
    ranks = group.world_size * (group.world_size + 1) / 2
    for _ in range(WARM_UP + repetitions):
        tensor = pattern + (group.rank + 1)
        start = _common_start(group)
        group.all_reduce(tensor)
        took = torch.tensor([time.monotonic() - start], dtype=torch.float64)
        assert torch.equal(tensor, pattern * group.world_size + ranks), "the all-reduce gave a wrong sum"
        seconds.append(float(group.all_gather(took).max()))
    return seconds[WARM_UP:]


def busy_s() -> float:
    """Seconds for which the machine's cores have worked so far, added up, those of all namespaces together."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _common_start(group: Group) -> float:
    """Waits for it; all namespaces have one clock."""
    group.barrier()
    start = torch.tensor([time.monotonic() + AHEAD_S], dtype=torch.float64)
    group.broadcast(start, 0)
    time.sleep(max(0.0, float(start[0]) - time.monotonic()))
    return float(start[0])


def main() -> None:
    order = json.load(sys.stdin)
    torch.set_num_threads(1)
    layout, rank, timeout_s = Layout(**order["layout"]), order["rank"], order["timeout_s"]
    store = distributed.TCPStore(
        layout.address(0), order["port"], layout.chips, rank == 0, timedelta(seconds=timeout_s)
    )

    def connect(name: str) -> PlanGroup:
        apart = distributed.PrefixStore(name, store)
        return PlanGroup(rank, layout.chips, apart, "cpu", ALGORITHMS[name], axes=layout.axes, timeout_s=timeout_s)

    groups = {name: connect(name) for name in dict.fromkeys(name for name, *_ in order["all_reduce"])}
    some = next(iter(groups.values()))
    found: dict[str, list] = {"ping_pong": [], "all_reduce": [], "busy": []}
    for peers, nbytes, repetitions in order["ping_pong"]:
        found["ping_pong"].append(ping_pong(some, peers, nbytes, repetitions))
    for name, nbytes, repetitions in order["all_reduce"]:
        began, busy = time.monotonic(), busy_s()
        found["all_reduce"].append(all_reduces(groups[name], nbytes, repetitions))
        found["busy"].append((busy_s() - busy) / (time.monotonic() - began) / os.cpu_count())
    for group in groups.values():
        group.barrier()
        group.close()
    if rank == 0:
        json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
