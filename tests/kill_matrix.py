"""One rank is killed (kill -9) in every phase of every backend's life; run as a command it prints what the others saw.

    python scripts/check_backends.py kills [--backends shm gloo ...] [--phases waiting:all_reduce ...] [--json]

A survivor must get an error that names the dead rank and its own operation within LIMIT_S of the kill, must be able to
make a new group of those that are left in the same process, and to use it; and no socket or shared memory may stay.
A rank that is killed before it has said where it is can't be told from a late one: there the limit is the timeout.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from group_samples import equal, make, name_of, numbers, summed
from rank_processes import run_ranks
from torch.distributed import PrefixStore

from train.comm import peers
from train.comm.aggregation import SumAggregator
from train.comm.buckets import GradientSums, InThread
from train.comm.groups import PeerLost

LIMIT_S = 1.0
SHORT_TIMEOUT_S = 2.0
KILL_AFTER_S = 0.25
BACKENDS = ("gloo", "plan:ring", "plan:halving_doubling", "shm", "hybrid")
OPERATIONS = (
    "all_reduce large asynchronous overlapped all_gather reduce_scatter broadcast barrier send exchange".split()
)
PHASES = (
    "unannounced",  # before it has said where it is
    "connect",  # the connections are there, the transport is being made
    "idle",  # between two operations
    *(f"waiting:{operation}" for operation in OPERATIONS),  # the others wait, the victim has not come
    *(f"inside:{operation}" for operation in OPERATIONS),  # all are at it
    "subgroup",
    "close",
)
NAMES = {"large": "all_reduce", "asynchronous": "all_reduce", "subgroup": "connect", "idle": "all_reduce"}
SEVERAL = {"send": ("send", "recv"), "overlapped": ("all_reduce", "sum_shared", "shared", "connect")}


def die(store: Any) -> None:
    store.set("killed", repr(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def operate(group: Any, operation: str) -> None:
    rank, n = group.rank, group.world_size
    value = numbers(rank, 1_000_000 if operation == "large" else 5000)
    if operation in ("all_reduce", "large"):
        group.all_reduce(value)
    elif operation == "asynchronous":
        group.all_reduce(value, async_op=True).wait()
    elif operation == "overlapped":
        overlap(group)
    elif operation == "all_gather":
        group.all_gather(value)
    elif operation == "reduce_scatter":
        group.reduce_scatter(numbers(rank, 5000 * n).view(n, 5000))
    elif operation == "broadcast":
        for source in range(n):
            group.broadcast(value, source)
    elif operation == "barrier":
        group.barrier()
    elif operation == "send":
        for peer in range(n):
            if peer != rank:
                first, second = (group.send, group.recv) if rank < peer else (group.recv, group.send)
                first(value, peer)
                second(value, peer)
    else:
        for peer in range(n):
            turn = (peer - rank) % n
            if turn != rank:
                group.exchange([value], [torch.empty_like(value)], turn)


def overlap(group: Any) -> None:
    """A few steps of a small network, whose gradients are summed in three buckets beside the backward pass."""
    network = torch.nn.Sequential(*[torch.nn.Linear(200, 200) for _ in range(6)])
    parameters = list(network.parameters())
    sums = GradientSums(parameters, [4, 4, 4], partial(SumAggregator, group), SumAggregator(group), InThread())
    for _ in range(5):
        with sums.as_they_come(0, torch.ones(3)):
            network(torch.ones(16, 200)).sum().backward()
        sums.total()


def live_and_die(rank: int, n: int, store: Any, backend: str, phase: str, victim: int) -> dict | None:
    """What a survivor saw: {seconds from the kill to the error, text}."""
    sockets = count_sockets()
    kind, _, operation = phase.partition(":")
    if rank == victim and kind in ("unannounced", "connect"):
        where = "_connect" if kind == "unannounced" else "made"
        setattr(peers.Peers, where, lambda *_: die(store))
    saw: dict = {}
    group = None
    try:
        if kind == "unannounced":
            patient = peers.Peers.__init__

            def impatient(self: Any, *args: Any) -> None:
                patient(self, *args[:4], SHORT_TIMEOUT_S, *args[5:])

            peers.Peers.__init__ = impatient
        group = make(backend, rank, n, store, "first")
        group.barrier()
        if rank == victim:
            meet_the_end(group, store, kind, operation)
        outlive(group, kind, operation)
    except PeerLost as error:
        saw = {"seconds": time.monotonic() - float(store.get("killed")), "text": str(error), "peer": error.peer}
    if kind == "unannounced":
        peers.Peers.__init__ = patient
    if group is not None:
        group.abort()
    del group
    check_the_rest(rank, n, store, backend, victim)
    deadline = time.monotonic() + 5
    while count_sockets() > sockets and not held_by_gloo():
        assert time.monotonic() < deadline, f"{count_sockets() - sockets} sockets are left"
        time.sleep(0.02)
    return saw


def meet_the_end(group: Any, store: Any, kind: str, operation: str) -> None:
    if kind == "inside":
        threading.Timer(KILL_AFTER_S, die, [store]).start()
        while True:
            operate(group, operation)
    time.sleep(KILL_AFTER_S)
    die(store)


def outlive(group: Any, kind: str, operation: str) -> None:
    if kind == "subgroup":
        group.subgroup(list(range(group.world_size)))
    elif kind == "close":
        group.close()
    elif kind == "idle":
        time.sleep(2 * KILL_AFTER_S)
        operate(group, "all_reduce")
    else:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            operate(group, operation)


def check_the_rest(rank: int, n: int, store: Any, backend: str, victim: int) -> None:
    """The others go on together, in the same processes."""
    left = [other for other in range(n) if other != victim]
    group = make(backend, left.index(rank), n - 1, PrefixStore("rest", store), "second")
    value = numbers(rank, 100_000)
    group.all_reduce(value)
    equal(value, summed(left, 100_000))
    group.barrier()
    group.close()


def count_sockets() -> int:
    return sum(name_of(link).startswith("socket:") for link in Path("/proc/self/fd").iterdir())


def held_by_gloo() -> bool:
    """Whether gloo waits for the rest of a message, or for a rank to connect, until its timeout: it can't be told."""
    return any(thread.name in ("turns", "connect") for thread in threading.enumerate())


def victims(backend: str) -> tuple[int, tuple[int, ...]]:
    """(ranks, who is killed): in a hybrid of two nodes one that speaks for its node, and one that does not."""
    return (4, (0, 3)) if backend == "hybrid" else (3, (0, 2))


def killed(backend: str, phase: str, victim: int) -> float:
    """Seconds until the last survivor had its error; AssertionError where one saw something else."""
    n, _ = victims(backend)
    results = run_ranks(n, live_and_die, backend, phase, victim, dying=victim)
    kind, _, operation = phase.partition(":")
    limit = SHORT_TIMEOUT_S + 2 * LIMIT_S if kind == "unannounced" else LIMIT_S
    if kind == "idle":
        limit = 2 * KILL_AFTER_S + LIMIT_S
    last = 0.0
    for rank, saw in enumerate(results):
        if rank == victim or (kind == "close" and not saw):  # it had left before
            continue
        where = f"{backend}, {phase}, rank {victim} killed: rank {rank} saw {saw}"
        assert saw and saw["peer"] == victim, where
        names = SEVERAL.get(operation, (NAMES.get(operation or kind, operation or kind),))
        assert f"rank {victim} " in saw["text"] and (
            any(name in saw["text"] for name in names) or kind in ("unannounced", "connect")
        ), where
        assert saw["seconds"] < limit, where
        last = max(last, saw["seconds"])
    return last


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("check_backends.py kills", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES, metavar="PHASE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    rows, failed = [], 0
    for phase in given.phases:
        row: dict = {"phase": phase}
        for backend in given.backends:
            try:
                row[backend] = max(killed(backend, phase, victim) for victim in victims(backend)[1])
            except AssertionError as error:
                row[backend] = f"FAILED: {error}"
                failed += 1
        rows.append(row)
        if not given.json:
            cells = [f"{row[b] * 1e3:8.0f} ms" if isinstance(row[b], float) else row[b] for b in given.backends]
            print(f"{phase:24}", *(f"{backend} {cell:12}" for backend, cell in zip(given.backends, cells, strict=True)))
            sys.stdout.flush()
    if given.json:
        print(json.dumps(rows))
    return 1 if failed else 0
