"""Measures our backends against gloo, all in the same processes and in interleaved turns.

    python scripts/bench_collectives.py [--json] [--workers 2 4 8] [--repetitions 11] [--bytes 102228128 4096]
                                        [--piece-kib 1024]

An all-reduce of contiguous fp32, by default the gradients of ResNet-50 and 4 KB. A worker has one thread and is bound
to one processor, which it shares where there are fewer. Each backend has a buffer of its own, allocated by torch alike.
gloo    torch's own ring
plan    our ring, by messages over gloo
shm     shared memory and, where the kernel lets workers do so, reading each other's (the buffer is private)
copies  shared memory alone, with copies in and out
huge    gloo with the buffer of `shm`, which has put it into huge pages: what of its speed gloo could have too
shared  shared memory in which the terms already lie, and the sum takes the place of the first (how training uses it)
copy    what memory allows: every worker copies a buffer of its own from one place to another, all at once

A turn's time is that of its slowest worker; seconds are medians over the turns, ratios medians of each turn's ratio.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RESNET50_BYTES = 4 * 25_557_032
WARM_UPS = 2
SAMPLE_S = 0.02  # small buffers are reduced several times in a turn, until it takes about so long
# backend, least bytes, workers -> times as fast as gloo
AIMS = {
    ("shm", "large"): {2: 3, 4: 3, 8: 3},
    ("shared", "large"): {2: 5, 4: 5, 8: 5},
    ("shm", "small"): {2: 5, 4: 10, 8: 10},
    ("plan", "large"): {2: 1 / 1.4, 4: 1 / 1.1, 8: 1 / 1.1},
}
CANDIDATES = ("gloo", "plan", "shm", "huge", "copies", "shared", "copy")
SMALL_UP_TO, LARGE_FROM = 4096, 100e6


def candidates(rank: int, workers: int, store: Any, nbytes: int, piece_kib: int | None) -> dict[str, Callable[[], Any]]:
    """One all-reduce by each."""
    import torch
    from torch.distributed import PrefixStore

    from train.comm.plan_group import PlanGroup
    from train.comm.shm_group import ShmGroup
    from train.comm.torch_group import TorchGroup

    where = {kind: PrefixStore(f"{kind.__name__} {nbytes}", store) for kind in (TorchGroup, PlanGroup, ShmGroup)}
    gloo, plan = (kind(rank, workers, where[kind], "cpu") for kind in (TorchGroup, PlanGroup))
    shm = ShmGroup(rank, workers, where[ShmGroup], "cpu")
    copies = ShmGroup(
        rank, workers, PrefixStore("copies", where[ShmGroup]), "cpu", piece_kib=piece_kib, read_memory=False
    )
    groups = {"gloo": gloo, "plan": plan, "shm": shm, "copies": copies}
    buffers = {name: torch.ones(nbytes // 4) for name in (*groups, "from", "to")}
    for name, group in groups.items():
        group.all_reduce(buffers[name])
        assert (buffers[name] == workers).all()
        buffers[name].zero_()  # stays finite however often it is summed
    parts = shm.shared([nbytes // 4] * workers, torch.float32)
    parts[rank].fill_(1.0)
    shm.sum_shared(parts)
    assert (parts[0] == workers).all()
    shm.barrier()
    parts[rank].zero_()
    return {
        "gloo": lambda: gloo.all_reduce(buffers["gloo"]),
        "plan": lambda: plan.all_reduce(buffers["plan"]),
        "shm": lambda: shm.all_reduce(buffers["shm"]),
        "huge": lambda: gloo.all_reduce(buffers["shm"]),
        "copies": lambda: copies.all_reduce(buffers["copies"]),
        "shared": lambda: shm.sum_shared(parts),
        "copy": lambda: buffers["to"].copy_(buffers["from"]),
    }


def work(
    rank: int, workers: int, port: int, sizes: list[int], repetitions: int, piece_kib: int | None, results: Any
) -> None:
    import torch
    from torch.distributed import TCPStore

    from train.comm.shm_group import ShmGroup

    torch.set_num_threads(1)
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[rank % len(processors)]})
    store = TCPStore("127.0.0.1", port, workers, is_master=False, wait_for_workers=False)
    pace = ShmGroup(rank, workers, store, "cpu")
    for nbytes in sizes:
        calls = candidates(rank, workers, store, nbytes, piece_kib)
        times = dict.fromkeys(calls, 1)
        for turn in range(WARM_UPS + repetitions):
            for name, call in calls.items():
                pace.barrier()
                began = time.perf_counter()
                for _ in range(times[name]):
                    call()
                mine = torch.tensor([(time.perf_counter() - began) / times[name]], dtype=torch.float64)
                slowest = pace.all_gather(mine).max().item()
                if turn < WARM_UPS:
                    times[name] = max(1, min(500, round(SAMPLE_S / slowest)))
                elif rank == 0:
                    results.put((nbytes, name, slowest))
    pace.barrier()


def measure(workers: int, sizes: list[int], repetitions: int, piece_kib: int | None) -> list[dict]:
    from scripts.loopback import loopback_store

    context = multiprocessing.get_context("spawn")
    store, port = loopback_store(workers)
    results: Any = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, workers, port, sizes, repetitions, piece_kib, results))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    samples: dict[tuple[int, str], list[float]] = {}
    expected = len(sizes) * len(CANDIDATES) * repetitions
    while sum(map(len, samples.values())) < expected:
        if not results.empty() or all(process.is_alive() for process in processes):
            try:
                nbytes, name, seconds = results.get(timeout=1.0)
            except multiprocessing.queues.Empty:
                continue
            samples.setdefault((nbytes, name), []).append(seconds)
        else:
            raise RuntimeError("a worker ended early; its error is above")
    for process in processes:
        process.join()
    del store
    return rows(workers, samples)


def rows(workers: int, samples: dict[tuple[int, str], list[float]]) -> list[dict]:
    """The bus bandwidth is what each worker's link would carry in a ring (as NCCL's tests have it)."""
    found = []
    for (nbytes, name), seconds in samples.items():
        gloo = samples[nbytes, "gloo"]
        median = statistics.median(seconds)
        bandwidth = nbytes / median / 1e9
        found.append(
            {
                "backend": name,
                "workers": workers,
                "bytes": nbytes,
                "seconds": median,
                "algbw_gbytes_per_s": bandwidth,
                "busbw_gbytes_per_s": bandwidth * 2 * (workers - 1) / workers,
                "ratio_to_gloo": statistics.median(g / s for g, s in zip(gloo, seconds, strict=True)),
            }
        )
    return found


def aims(found: list[dict]) -> list[dict]:
    judged = []
    for row in found:
        size = "large" if row["bytes"] >= LARGE_FROM else "small" if row["bytes"] <= SMALL_UP_TO else ""
        aim = AIMS.get((row["backend"], size), {}).get(row["workers"])
        if aim is not None:
            met = row["ratio_to_gloo"] >= aim
            judged.append({key: row[key] for key in ("backend", "workers", "bytes", "ratio_to_gloo")})
            judged[-1] |= {"aim": aim, "met": met}
    return judged


def table(found: list[dict], judged: list[dict]) -> str:
    lines = [
        "| backend | workers | bytes | ms | GB/s | bus GB/s | times gloo | aim |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    aim_of = {(aim["backend"], aim["workers"], aim["bytes"]): aim for aim in judged}
    for row in found:
        aim = aim_of.get((row["backend"], row["workers"], row["bytes"]))
        verdict = f"{aim['aim']:.2g}: {'met' if aim['met'] else '**missed**'}" if aim else ""
        lines.append(
            f"| {row['backend']} | {row['workers']} | {row['bytes']:,} | {row['seconds'] * 1e3:.3f} "
            f"| {row['algbw_gbytes_per_s']:.3g} | {row['busbw_gbytes_per_s']:.3g} "
            f"| {row['ratio_to_gloo']:.2f} | {verdict} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--bytes", type=int, nargs="+", default=[RESNET50_BYTES, 4096])
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--piece-kib", type=int, help="backend.piece_kib of copies")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    if min(given.workers) < 2 or min(given.bytes) < 4 or any(size % 4 for size in given.bytes):
        parser.error("--workers must be at least 2, --bytes multiples of 4")
    found = [
        row for workers in given.workers for row in measure(workers, given.bytes, given.repetitions, given.piece_kib)
    ]
    judged = aims(found)
    print(json.dumps({"rows": found, "aims": judged}) if given.json else table(found, judged))
    return 0 if all(aim["met"] for aim in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
