"""Measures this machine, writes it down as a chip and a mesh, and holds what they predict against real training steps.

    python scripts/calibrate.py [--json] [--quick] [--docs] [--run-root runs] [--chip-batch 16] [--rounds 4]
                                [--threads N]

For one worker with all threads, and for two that share them and compute at the same time: matmul, copy, every distinct
convolution and every other layer of ResNet-50, and between two workers the all-reduce at several sizes; all by
themselves, none inside a training step. From these alone come chip/*.yaml and mesh/*.yaml in
RUN_ROOT/calibration/<date>, with calibration.json beside them, and from those files the emulator's step
(docs/calibration.md). In the same run the trainer makes real ResNet-50 steps, turn by turn with the layers, on the
same processes; they are only compared. A second image size shows how far the files carry.
"""

import argparse
import json
import math
import multiprocessing
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.compose import compose  # noqa: E402
from scripts.calibrate_report import IMAGE_SIZE, WORKERS, page, report  # noqa: E402
from train import emulator  # noqa: E402
from train.metrics import write_aside  # noqa: E402
from train.sim.workload import resnet as table_of_resnet  # noqa: E402

OTHER_IMAGE_SIZE, QUICK_IMAGE_SIZE = 64, 32
MATMUL_SIZE, QUICK_MATMUL_SIZE = 2048, 256
ALL_REDUCE_BYTES = (1 << 16, 1 << 20, 1 << 23, 1 << 25, 102_228_128)  # the last: ResNet-50's gradients in fp32
GRADIENT_PASSES = 3
"""A parameter's gradient is read and written where the sum becomes the mean, and read for its norm."""
IMAGE_PASSES = 2
"""Synthetic images are read from a strip and written."""
PATIENCE_S = 600.0
PAGE = ROOT / "docs" / "calibration.md"


def config_of(workers: int, image_size: int, chip_batch: int, rounds: int, mesh: str = "localhost") -> dict:
    """The training of real steps: ours with the default optimizer on synthetic images, a chip for each worker."""
    own = []
    if mesh == "localhost":  # before there is a file, and as it will say
        own = [f"mesh.axes.host={workers}", "wire_dtype=fp32", "chip.bucket_ends=[]"]
    return compose(
        [
            "experiment=synthetic",
            f"mesh={mesh}",
            *own,
            f"workers={workers}",
            "optim=sgd",
            f"chip_batch_size={chip_batch}",
            f"data.image_size={image_size}",
            f"data.num_train={100 * workers * chip_batch}",
            "data.num_eval=1",
            f"max_steps={rounds + 1}",
        ]
    )


def measured(workers: int, task: dict, tick: Callable[[], None]) -> list[dict]:
    """The facts of every process (scripts/calibrate_worker). RuntimeError where one fails or is silent for long."""
    from scripts.calibrate_worker import measure
    from scripts.loopback import loopback_store

    context = multiprocessing.get_context("spawn")
    store, port = loopback_store(workers)
    results: Any = context.Queue()
    processes = [
        context.Process(target=measure, args=(rank, workers, port, task, results), daemon=True)
        for rank in range(workers)
    ]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    facts: dict[int, dict] = {}
    try:
        for process in processes:
            process.start()
        heard = time.monotonic()
        while len(facts) < workers:
            try:
                rank, what, value = results.get(timeout=1.0)
            except queue.Empty:
                dead = [rank for rank, each in enumerate(processes) if rank not in facts and not each.is_alive()]
                if dead and results.empty():
                    raise RuntimeError(f"process {dead[0]} of {workers} died; its error is above") from None
                if time.monotonic() - heard > PATIENCE_S:
                    raise RuntimeError(f"nothing was heard of {workers} processes for {PATIENCE_S:g} s") from None
                continue
            heard = time.monotonic()
            if what == "failed":
                raise RuntimeError(f"process {rank} of {workers}: {value}")
            if what == "done":
                facts[rank] = value
            elif rank == 0:
                tick()
    finally:
        for process in processes:
            if len(facts) < workers:
                process.kill()
            process.join()
        del store
    return [facts[rank] for rank in range(workers)]


def rates(facts: list[dict]) -> dict:
    """Medians over rounds and processes: matmul in FLOP/s, copy in bytes read and written a second, of one process."""
    every = {what: [work / seconds for each in facts for work, seconds in each[what]] for what in ("matmul", "copy")}
    return {f"{what}_per_s": statistics.median(values) for what, values in every.items()}


def classes(tables: list[list[dict]]) -> dict[str, dict]:
    """kind of layer -> seconds, FLOPs and bytes of a step, from the tables of all processes."""
    found: dict[str, dict] = {}
    for rows in zip(*tables, strict=True):
        own = found.setdefault(rows[0]["kind"], {"layers": 0, "seconds": 0.0, "flops": 0.0, "bytes": 0.0})
        own["layers"] += rows[0]["count"]
        own["seconds"] += rows[0]["count"] * statistics.fmean(statistics.median(row["seconds"]) for row in rows)
        for what in ("flops", "bytes"):
            own[what] += rows[0]["count"] * rows[0][what]
    return found


def by_copy(parameters: int, image_size: int, batch: int, copy_per_s: float) -> dict[str, dict]:
    """What of a step is priced as bytes at the copy's rate; the optimizer's own the emulator adds."""
    elements = {"gradients": GRADIENT_PASSES * parameters, "input": IMAGE_PASSES * batch * 3 * image_size**2}
    return {
        kind: {"layers": 1, "seconds": 4 * number / copy_per_s, "flops": 0.0, "bytes": 4.0 * number}
        for kind, number in elements.items()
    }


def jitter(tables: list[list[dict]]) -> float:
    """Deviation of a chip's step as a share of it, from round to round and process to process."""
    rounds = [
        sum(row["count"] * row["seconds"][turn] for row in table)
        for table in tables
        for turn in range(len(table[0]["seconds"]))
    ]
    return statistics.stdev(rounds) / statistics.fmean(rounds) if len(rounds) > 1 else 0.0


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(latency, bytes per second) of all-reduces of (bytes, seconds) between two, each error weighing by its share.

    A ring of two has two rounds, each with a latency and half of the bytes. ValueError where no link is like that.
    """
    import numpy as np

    nbytes, seconds = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    fixed, slope = np.linalg.lstsq(np.stack([1 / seconds, nbytes / seconds], 1), np.ones(len(nbytes)), rcond=None)[0]
    if slope <= 0:
        raise ValueError(f"all-reduces of {nbytes.tolist()} bytes took {seconds.tolist()} s: the machine is too busy")
    return max(float(fixed) / 2, 1e-7), 1 / float(slope)


def anchors(seconds: dict[int, float], work: float, precision: str, source: str) -> list[dict]:
    """Of the chip's file: batch -> seconds of a step's layers, with no optimizer in them.

    Two batches give a line; where noise gives it a negative fixed time, the largest batch alone stays.
    work: FLOPs of an image over those of ResNet-50 at 224 pixels, whose rates anchors are.
    """
    if len(seconds) > 1:
        (small, few), (large, many) = min(seconds.items()), max(seconds.items())
        if many * small > few * large or many <= few:
            seconds = {large: many}
    return [
        {
            "precision": precision,
            "batch": batch,
            "images_per_s": batch * work / took,
            "optimizer": "none",
            "source": source,
        }
        for batch, took in sorted(seconds.items())
    ]


def chip_node(name: str, found: dict, made: list[dict], source: str) -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "_target_": "train.mesh.chip.Chip",
        "name": name,
        "tflops": {found["precision"]: found["matmul_per_s"] / 1e12},
        "hbm_gbytes": memory / 1e9,
        "hbm_gbytes_per_s": found["copy_per_s"] / 1e9,
        "precision": found["precision"],
        "jitter": found["jitter"],
        "anchors": made,
        "bucket_ends": [],  # one bucket: the trainer sums when the backward pass has ended
        "sources": {
            "tflops": f"measured: one product of {found['matmul_size']} x {found['matmul_size']}, {source}",
            "hbm_gbytes": "measured: memory of the whole machine",
            "hbm_gbytes_per_s": f"measured: copies of 64 MiB, bytes read and written, {source}",
            "jitter": f"measured: deviation of the layers' sum over rounds and processes, {source}",
            "bucket_ends": "derived: the trainer sums the gradients when the backward pass has ended",
        },
    }


def mesh_node(workers: int, chip: str, latency_s: float, bytes_per_s: float, source: str) -> dict:
    link = {
        "_target_": "train.mesh.topology.LinkClass",
        "name": "loopback",
        "gbytes_per_s": bytes_per_s / 1e9,
        "latency_us": latency_s * 1e6,
        "source": source,
    }
    return {
        "_target_": "train.mesh.mesh.Mesh",
        "name": f"this machine, {workers} worker{'s' if workers > 1 else ''}",
        "brings": {"chip": chip, "wire_dtype": "fp32", "network": "alpha_beta"},
        "axes": {"host": workers, "chip": 1},
        "chips": None,
        "topology": {"_target_": "train.mesh.topologies.Star", "link": link},
    }


def write_node(path: Path, node: dict, comment: str) -> None:
    from yaml import safe_dump

    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, f"# {comment}\n" + safe_dump(node, sort_keys=False, allow_unicode=True, width=1000))


def compared(workers: int, image_size: int, batch: int, mesh: Path, facts: list[dict], case: int, sums: dict) -> dict:
    """A row: what the emulator says with the mesh's file, what the trainer's steps took, and the parts of both."""
    step = emulator.build(config_of(workers, image_size, batch, 0, str(mesh))).step(workers * batch)
    steps = [each["cases"][case]["steps"] for each in facts]
    real = {
        key: statistics.median(statistics.fmean(rank[turn][key] for rank in steps) for turn in range(len(steps[0])))
        for key in ("step_s", "comm_s", "data_wait_s")
    }
    layers_s = sum(own["seconds"] for own in sums.values())
    by_layers_s = layers_s + step.step_s - step.compute_s
    return {
        "workers": workers,
        "image_size": image_size,
        "chip_batch": batch,
        "predicted_s": step.step_s,
        "measured_s": real["step_s"],
        "error": step.step_s / real["step_s"] - 1,
        "layers_predicted_s": by_layers_s,
        "layers_error": by_layers_s / real["step_s"] - 1,
        "predicted_parts": {
            "compute_s": step.compute_s,
            "all_reduce_s": step.exposed_comm_s,
            "straggler_s": step.straggler_s,
            "update_s": step.other_s,
        },
        "measured_parts": {"all_reduce_s": real["comm_s"], "data_wait_s": real["data_wait_s"]},
        "classes": sums,
        "measured_steps_s": [statistics.fmean(rank[turn]["step_s"] for rank in steps) for turn in range(len(steps[0]))],
    }


def calibrate(options: argparse.Namespace, folder: Path, tick: Callable[[str], None]) -> dict:
    """Measures, writes the files, compares. The object that --json prints."""
    date = time.strftime("%Y-%m-%d %H:%M")
    sizes = [(QUICK_IMAGE_SIZE, [options.chip_batch])]
    if not options.quick:
        half = max(2, options.chip_batch // 2)
        sizes = [(IMAGE_SIZE, [options.chip_batch, half]), (OTHER_IMAGE_SIZE, [2 * options.chip_batch])]
    tasks = {
        workers: {
            "threads": max(1, options.threads // workers),
            "rounds": options.rounds,
            "matmul_size": QUICK_MATMUL_SIZE if options.quick else MATMUL_SIZE,
            "all_reduce_bytes": ALL_REDUCE_BYTES[:2] if options.quick else ALL_REDUCE_BYTES,
            "cases": [
                {"config": config_of(workers, size, batches[0], options.rounds), "batches": batches}
                for size, batches in sizes
            ],
        }
        for workers in WORKERS
    }
    facts = {
        workers: measured(workers, task, lambda workers=workers: tick(f"{workers} worker(s)"))
        for workers, task in tasks.items()
    }
    reduces = [
        (row["bytes"], statistics.median(map(statistics.fmean, zip(row["seconds"], other["seconds"], strict=True))))
        for row, other in zip(facts[2][0]["all_reduce"], facts[2][1]["all_reduce"], strict=True)
    ]
    latency_s, bytes_per_s = line(reduces)
    result: dict = {"date": date, "device": facts[1][0]["device"], "cores": os.cpu_count(), "quick": options.quick}
    result |= {"rounds": options.rounds, "all_reduce": [{"bytes": n, "seconds": s} for n, s in reduces]}
    result |= {"link": {"latency_s": latency_s, "bytes_per_s": bytes_per_s}, "machine": {}, "files": {}, "cases": []}
    for workers, name in WORKERS.items():
        threads = tasks[workers]["threads"]
        how = f"{workers} process{'es at the same time, each' if workers > 1 else ''} with {threads} thread(s)"
        source = f"{how}, {result['device']}, {date}"
        found = rates(facts[workers]) | {"precision": facts[workers][0]["precision"], "threads": threads}
        found |= {"matmul_size": tasks[workers]["matmul_size"]}
        tables = [
            {batch: [each["cases"][case]["layers"][i] for each in facts[workers]] for i, batch in enumerate(batches)}
            for case, (_, batches) in enumerate(sizes)
        ]
        found["jitter"] = jitter(tables[0][options.chip_batch])
        parameters = table_of_resnet().parameters
        sums = [
            {b: classes(t) | by_copy(parameters, size, b, found["copy_per_s"]) for b, t in of_size.items()}
            for (size, _), of_size in zip(sizes, tables, strict=True)
        ]
        work = table_of_resnet(image_size=sizes[0][0]).training_flops / table_of_resnet().training_flops
        totals = {batch: sum(own["seconds"] for own in kinds.values()) for batch, kinds in sums[0].items()}
        made = anchors(totals, work, found["precision"], f"measured: sum over the layers, each timed alone, {source}")
        words = f"This machine as {how}: measured by scripts/calibrate.py, {date}; see docs/calibration.md."
        chip, mesh = folder / "chip" / f"{name}.yaml", folder / "mesh" / f"{name}.yaml"
        write_node(chip, chip_node(f"this machine, {threads} thread(s)", found, made, source), words)
        link = f"measured: all-reduces of {reduces[0][0]:,} to {reduces[-1][0]:,} bytes between 2 processes, {date}"
        write_node(mesh, mesh_node(workers, name, latency_s, bytes_per_s, link), words)
        result["machine"][name] = found
        result["files"][name] = {"chip": str(chip), "mesh": str(mesh)}
        for case, (size, batches) in enumerate(sizes):
            batch = batches[0]
            result["cases"].append(compared(workers, size, batch, mesh, facts[workers], case, sums[case][batch]))
    write_aside(folder / "calibration.json", json.dumps(result, indent=1) + "\n")
    return result


def ticking(pieces: int) -> tuple[Callable[[str], None], Callable[[], None]]:
    """(tick, end): a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = "{task.description}", BarColumn(), TextColumn("{task.completed}/{task.total} rounds"), TimeElapsedColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    task = bar.add_task("starting", total=pieces)
    return lambda words: bar.update(task, description=words, advance=1), bar.stop


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="tiny images, one round: shows that it runs, no more")
    parser.add_argument("--run-root", type=Path, default=Path("runs"))
    parser.add_argument("--chip-batch", type=int, help="images a worker and step at 224 pixels (default 16; quick: 4)")
    parser.add_argument("--rounds", type=int, help="timed steps, and timings of each layer (default 4; quick: 1)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all workers together")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/calibration.md as well")
    options = parser.parse_args(argv)
    options.chip_batch = options.chip_batch or (4 if options.quick else 16)
    options.rounds = options.rounds or (1 if options.quick else 4)
    if min(options.chip_batch - 1, options.rounds, options.threads) < 1:
        parser.error("--chip-batch must be at least 2, --rounds and --threads at least 1")
    if options.docs and options.quick:
        parser.error("--docs is for a whole calibration: leave out --quick")
    folder = (options.run_root / "calibration" / time.strftime("%Y%m%d-%H%M%S")).absolute()
    sizes = 1 if options.quick else 2
    tick, end = ticking(2 * sizes * (options.rounds + 1) + 1)
    try:
        result = calibrate(options, folder, tick)
    except RuntimeError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    finally:
        end()
    assert all(math.isfinite(case["error"]) for case in result["cases"])
    if options.docs:
        write_aside(PAGE, page(PAGE.read_text(encoding="utf-8"), result))
    print(json.dumps(result) if options.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
