"""Measures how much of the all-reduce a training step hides: real steps with and without it, in interleaved turns.

    python scripts/bench_overlap.py [--json] [--quick] [--workers 2] [--turns 15] [--batch 8] [--image-size 224]
                                    [--bucket-ends 85 160] [--sides none gloo shm ddp ...]

Every worker is a process with its share of the processors, pinned to it, and computes with one thread. All of them make
the same step (ResNet-50, SGD) by turns in each of these ways:
none         without communication
gloo, shm    gradients summed in buckets beside the backward pass, as training does it (train/comm/buckets)
gloo after, shm after    the same buckets once the backward pass is over
ddp          torch's DistributedDataParallel over gloo, with its own buckets (25 MB, the first one 1 MB)

step      from a common start to the end of the slowest worker's update
growth    of the step against the step without communication of the same turn (median of the turns' ratios)
waiting   from a worker's last gradient to the summed ones, mean of the workers; it holds the wait for a slower worker
exposed   the same from the last gradient of the last worker on: what of the sums themselves nothing hid
alone     the same sums while nothing computes
cpu       processor time that a worker's step takes beyond the step without communication
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WARM_UPS = 2
SIDES = ("none", "gloo", "shm", "gloo after", "shm after", "ddp")
GROWTH_AIM, SHARE_OF_GLOO_AIM, EXPOSED_AIM = 0.05, 0.5, 0.1


class Step:
    """One worker's training step; `mark` is when its last gradient was ready, `summed` when it had all sums."""

    def __init__(self, model: Any, batch: int, image_size: int) -> None:
        import torch

        self.model, self.parameters = model, list(model.parameters())
        self.images = torch.randn(batch, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,))
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0, momentum=0.9, weight_decay=1e-4, foreach=True)
        self.parameters[0].register_post_accumulate_grad_hook(self._note)
        self.mark = self.summed = 0.0

    def _note(self, _: Any) -> None:
        self.mark = time.perf_counter()

    def loss(self, module: Any) -> Any:
        from torch.nn import functional

        return functional.cross_entropy(module(self.images), self.labels)

    def update(self, gradients: list | None) -> None:
        if gradients is not None:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()


def ours(step: Step, sums: Any, workers: int) -> Callable[[], None]:
    """As train/trainer does it with one pass."""
    import torch

    def run() -> None:
        loss = step.loss(step.model)
        with sums.as_they_come(0, loss.detach().view(1)):
            loss.backward()
        gradients, _ = sums.total()
        step.summed = time.perf_counter()
        step.update(torch._foreach_div(gradients, workers))

    return run


def stock(step: Step) -> Callable[[], None]:
    from torch.nn.parallel import DistributedDataParallel

    module = DistributedDataParallel(step.model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def run() -> None:
        step.loss(module).backward()  # which waits for the sums
        step.summed = time.perf_counter()
        step.update(None)

    return run


def prepared(rank: int, workers: int, store: Any, given: argparse.Namespace) -> dict[str, tuple[Step, Callable, Any]]:
    """Side -> (step, one step, its sums)."""
    import torch
    from torch import distributed
    from torch.distributed import PrefixStore

    from train.comm.aggregation import SumAggregator
    from train.comm.buckets import Afterwards, GradientSums, InThread
    from train.comm.groups import SingleGroup
    from train.comm.shm_group import ShmGroup
    from train.comm.torch_group import TorchGroup
    from train.models.chip_norm import allocate_chips
    from train.models.resnet import resnet
    from train.models.resnet_cifar import resnet_cifar
    from train.sim import workload
    from train.sim.step import buckets

    def model() -> Any:
        torch.manual_seed(0)
        made = resnet_cifar(20, num_classes=10) if given.quick else resnet(50, num_classes=1000)
        allocate_chips(made, 1, 1)
        return made.to(memory_format=torch.channels_last)

    table = workload.resnet_cifar(20) if given.quick else workload.resnet(50)
    sizes = [bucket.tensors for bucket in buckets(table, given.bucket_ends)]
    step, found = Step(model(), given.batch, given.image_size), {}
    for side in given.sides:
        if side == "ddp":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            distributed.init_process_group("gloo", store=PrefixStore("ddp", store), rank=rank, world_size=workers)
            its_own = Step(model(), given.batch, given.image_size)
            found[side] = its_own, stock(its_own), None
            continue
        kind = {"gloo": TorchGroup, "shm": ShmGroup}.get(side.split()[0])
        group = kind(rank, workers, PrefixStore(side, store), "cpu") if kind else SingleGroup()
        beside = InThread() if side in ("gloo", "shm") else Afterwards()
        make = partial(SumAggregator, group)
        sums = GradientSums(step.parameters, sizes, make, make(), beside)
        found[side] = step, ours(step, sums, workers), sums
    return found


def alone(step: Step, sums: Any) -> None:
    """Hand over a step's gradients, all at once, of which only the sums are left to do."""
    sums.add(0, [parameter.detach().clone() for parameter in step.parameters], step.images.new_zeros(1))


def work(rank: int, workers: int, port: int, given: argparse.Namespace, results: Any) -> None:
    import torch
    from torch.distributed import TCPStore

    from train.comm.shm_group import ShmGroup
    from train.memory import keep_freed_memory

    processors = sorted(os.sched_getaffinity(0))
    each = max(1, len(processors) // workers)
    os.sched_setaffinity(0, [processors[(rank * each + i) % len(processors)] for i in range(each)])
    torch.set_num_threads(1)
    keep_freed_memory()
    store = TCPStore("127.0.0.1", port, workers, is_master=False, wait_for_workers=False)
    pace = ShmGroup(rank, workers, store, "cpu")
    sides = prepared(rank, workers, store, given)
    for turn in range(WARM_UPS + given.turns):
        for name in given.sides if turn % 2 else given.sides[::-1]:
            step, run, sums = sides[name]
            pace.barrier()
            began, spent = time.perf_counter(), time.process_time()
            run()
            ended, spent = time.perf_counter(), time.process_time() - spent
            mine = torch.tensor([began, step.mark, step.summed, ended, spent, 0.0], dtype=torch.float64)
            if sums is not None and name != "none":
                alone(step, sums)
                pace.barrier()
                started = time.perf_counter()
                sums.total()
                mine[5] = time.perf_counter() - started
            everyone = pace.all_gather(mine)
            if rank == 0 and turn >= WARM_UPS:
                results.put((name, everyone.tolist()))
    pace.barrier()


def measure(given: argparse.Namespace) -> dict[str, list[list[list[float]]]]:
    """Side -> turns -> workers -> (began, last gradient, summed, ended, processor seconds, seconds of sums alone)."""
    from scripts.loopback import loopback_store

    context = multiprocessing.get_context("spawn")
    workers = given.workers
    store, port = loopback_store(workers)
    results: Any = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, workers, port, given, results), daemon=True) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    samples: dict[str, list] = {side: [] for side in given.sides}
    while sum(map(len, samples.values())) < given.turns * len(given.sides):
        if not results.empty() or all(process.is_alive() for process in processes):
            try:
                name, turn = results.get(timeout=1.0)
            except multiprocessing.queues.Empty:
                continue
            samples[name].append(turn)
        else:
            raise RuntimeError("a worker ended early; its error is above")
    for process in processes:
        process.join()
    del store
    return samples


def rows(samples: dict[str, list[list[list[float]]]]) -> list[dict]:
    """Medians over the turns; a turn's step is that of its slowest worker, and its start that of the last one."""

    def steps(side: str) -> list[float]:
        return [
            max(end for *_, end, _, _ in turn) - max(turn[i][0] for i in range(len(turn))) for turn in samples[side]
        ]

    def spent(side: str) -> list[float]:
        return [statistics.mean(worker[4] for worker in turn) for turn in samples[side]]

    found, none, none_cpu = [], steps("none"), spent("none")
    for side, turns in samples.items():
        growth = [step / base - 1 for step, base in zip(steps(side), none, strict=True)]
        waiting = [statistics.mean(worker[2] - worker[1] for worker in turn) for turn in turns]
        exposed = [max(worker[2] for worker in turn) - max(worker[1] for worker in turn) for turn in turns]
        quartiles = statistics.quantiles(growth, n=4) if len(growth) > 1 else growth * 3
        found.append(
            {
                "side": side,
                "workers": len(turns[0]),
                "turns": len(turns),
                "step_s": statistics.median(steps(side)),
                "growth": statistics.median(growth),
                "growth_quartiles": [quartiles[0], quartiles[2]],
                "waiting_s": statistics.median(waiting),
                "exposed_s": statistics.median(exposed),
                "alone_s": statistics.median(max(worker[5] for worker in turn) for turn in turns) or None,
                "cpu_s": statistics.median(s - base for s, base in zip(spent(side), none_cpu, strict=True)),
            }
        )
    return found


def aims(found: list[dict]) -> list[dict]:
    """Those of the measured sides."""
    of = {row["side"]: row for row in found}
    judged = []
    if "shm" in of:
        shm = of["shm"]
        judged.append({"aim": "shm: growth of the step", "value": shm["growth"], "below": GROWTH_AIM})
        judged.append(
            {"aim": "shm: exposed, of the sums alone", "value": shm["exposed_s"] / shm["alone_s"], "below": EXPOSED_AIM}
        )
    if {"shm", "gloo"} <= set(of):
        below = SHARE_OF_GLOO_AIM * of["gloo"]["growth"]
        judged.append({"aim": "shm: growth, below half of gloo's", "value": of["shm"]["growth"], "below": below})
    return [judgement | {"met": judgement["value"] < judgement["below"]} for judgement in judged]


def table(found: list[dict], judged: list[dict]) -> str:
    lines = [
        "| side | step ms | growth (quartiles) | waiting ms | exposed ms | alone ms | cpu ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        low, high = row["growth_quartiles"]
        alone_ms = "" if row["alone_s"] is None else f"{row['alone_s'] * 1e3:.1f}"
        lines.append(
            f"| {row['side']} | {row['step_s'] * 1e3:.0f} | {row['growth']:+.1%} ({low:+.1%} to {high:+.1%}) "
            f"| {row['waiting_s'] * 1e3:.1f} | {row['exposed_s'] * 1e3:.2f} | {alone_ms} | {row['cpu_s'] * 1e3:+.0f} |"
        )
    for one in judged:
        verdict = "met" if one["met"] else "**missed**"
        lines.append(f"\n{one['aim']}: {one['value']:.1%}, to be below {one['below']:.1%}: {verdict}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15, help="of all sides, after two that do not count")
    parser.add_argument("--batch", type=int, default=8, help="images of a worker's step")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--bucket-ends", type=int, nargs="*", default=[85, 160], help="as chip.bucket_ends")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 on small images, three turns")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    if given.quick:
        given.turns, given.image_size, given.bucket_ends = 3, 32, [2, 30]
    if given.workers < 2 or given.turns < 1 or "none" not in given.sides:
        parser.error("--workers must be at least 2, --turns at least 1, and --sides hold none")
    found = rows(measure(given))
    judged = aims(found)
    print(json.dumps({"rows": found, "aims": judged}) if given.json else table(found, judged))
    return 0 if all(aim["met"] for aim in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
