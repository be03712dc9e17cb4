"""Measures training ResNet-50 against what else this machine could do, in interleaved turns of one run.

    python scripts/bench_train.py [--json] [--quick] [--only step mesh tax] [--chip-batch 32 16] [--chips 1]
                                  [--threads 2] [--device cpu] [--precision auto] [--no-compile]

step  images/s of our trainer (synthetic data through its loader, aggregator, SGD or LARS, metrics file; so many chips,
      in one batch of the other sides), of torchvision's reference settings (fp32, batch 32, default memory format), of
      a bare loop (`bare_loop` in bench_train_sides.py), and the images/s that the best large product would allow at
      24.3 GFLOP an image
mesh  images of 32 pixels, global batch 8,192 on 8, 64 and 1,024 chips: seconds a step and peak memory, each afresh
tax   chips in a pass against one plain batch of the same size (scripts/bench_chip_norm.py has the layers, too)

All but the reference compute in `--precision`: as training chooses it, bfloat16 where the machine multiplies it. Every
side is a process of its own with the same number of threads; one computes while the others wait, turn by turn. Rates
are medians over the rounds, ratios medians of each round's ratio. It needs torch, torchvision and numpy alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_train_sides import REFERENCE_BATCH  # noqa: E402
from scripts.precision_option import parse  # noqa: E402
from train.memory import preloaded  # noqa: E402

SIDES = Path(__file__).with_name("bench_train_sides.py")
MATMUL_SIZE, QUICK_MATMUL_SIZE, GPU_MATMUL_SIZE = 4096, 1024, 8192
MESH_SIZE, MESH_BATCH, MESH_CHIPS = 32, 8192, (8, 64, 1024)
COMPILE_LIMIT_S = 150
TARGETS = {"ratio_to_reference": 3.5, "ratio_to_bare_loop": 0.97, "matmul_limit_share": 0.7}
STEPS = {"reference": 1, "bare_loop": 3, "compiled": 3, "harness": 3, "matmul": 4}  # of one turn
GPU_STEPS = 10  # times as many on a GPU


class Side:
    """In this process: a side's process, started to make `warmup` steps."""

    def __init__(self, side: str, threads: int, warmup: int = 2, **arguments: object) -> None:
        task = json.dumps({"side": side, "threads": threads, "warmup": warmup, "arguments": arguments})
        allocator = preloaded() if side == "harness" else {}  # as launch.run gives it to its workers
        self.process = subprocess.Popen(
            [sys.executable, SIDES, task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | allocator | {"OMP_NUM_THREADS": str(threads)},
            text=True,
        )

    def ready(self) -> dict:
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args[-1]} ended with status {self.process.wait()}")
        return json.loads(answer)

    def turn(self, steps: int) -> float:
        """Seconds of so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.ready()["seconds"]

    def ready_within(self, seconds: float) -> bool:
        """Whether it is ready by then; it is stopped otherwise."""
        import select

        if select.select([self.process.stdout], [], [], seconds)[0] and self.process.stdout.readline():
            return True
        self.close()
        return False

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def harness(options: argparse.Namespace, chips: int, chip_batch: int, image_size: int, warmup: int = 2) -> Side:
    """Our trainer."""
    images = {"chips": chips, "batch": chip_batch, "image_size": image_size}
    alike = {key: getattr(options, key) for key in ("depth", "device", "precision")}
    return Side("harness", options.threads, warmup, optimizer=options.optim, **images, **alike)


def bench_steps(options: argparse.Namespace, say: Callable[[str], None]) -> dict:
    """Images/s of every side, for each chip batch."""
    from train.sim.workload import resnet as table

    flops = table(options.depth, "imagenet", options.image_size, 1000).training_flops
    numerics = {"device": options.device, "precision": options.precision}
    common = {"depth": options.depth, "image_size": options.image_size} | numerics
    on_gpu = options.device == "cuda"
    size = QUICK_MATMUL_SIZE if options.quick else GPU_MATMUL_SIZE if on_gpu else MATMUL_SIZE
    base = {
        "reference": Side("reference", options.threads, **common),
        "matmul": Side("matmul", options.threads, size=size, **numerics),
    }
    try_compiling, compiled, rows = options.compile, False, []
    for chip_batch in options.chip_batch:
        sides, batch = dict(base), options.chips * chip_batch
        sides["bare_loop"] = Side("bare_loop", options.threads, batch=batch, compiled=False, **common)
        sides["harness"] = harness(options, options.chips, chip_batch, options.image_size)
        for name in ("bare_loop", "harness") if rows else sides:
            sides[name].ready()
        if try_compiling or compiled:
            say(f"compiling the bare loop for {batch} images, for at most {COMPILE_LIMIT_S} s")
            sides["compiled"] = Side("bare_loop", options.threads, batch=batch, compiled=True, **common)
            if not sides["compiled"].ready_within(COMPILE_LIMIT_S):
                del sides["compiled"]
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds):
            for name in list(sides) if number % 2 else list(reversed(sides)):
                steps = STEPS[name] * (GPU_STEPS if on_gpu else 1)
                times[name].append(sides[name].turn(steps) / steps)
        for name in set(sides) - set(base):
            sides[name].close()
        row = {"chips": options.chips, "chip_batch": chip_batch} | step_row(times, batch, flops, 2.0 * size**3)
        rows.append(row)
        try_compiling, compiled = False, row["bare_loop"] == "compiled"
        say(step_line(row))
    for side in base.values():
        side.close()
    return {"flops_per_image": flops, "steps": rows}


def step_row(times: dict[str, list[float]], batch: int, image_flops: float, product_flops: float) -> dict:
    """Seconds a step of every side, round by round -> rates and ratios, to the faster form of the bare loop."""
    images = {name: batch for name in times} | {"reference": REFERENCE_BATCH}
    rates = {name: [images[name] / s for s in seconds] for name, seconds in times.items() if name != "matmul"}
    forms = {name: statistics.median(rates[name]) for name in ("bare_loop", "compiled") if name in rates}
    bare = max(forms, key=forms.__getitem__)
    flops_per_s = product_flops / min(times["matmul"])
    limit = flops_per_s / image_flops

    def ratio(other: str) -> float:
        return statistics.median(h / o for h, o in zip(rates["harness"], rates[other], strict=True))

    return {
        "reference_images_per_s": statistics.median(rates["reference"]),
        "bare_loop_images_per_s": forms[bare],
        "harness_images_per_s": statistics.median(rates["harness"]),
        "ratio_to_reference": ratio("reference"),
        "ratio_to_bare_loop": ratio(bare),
        "matmul_limit_share": statistics.median(rates["harness"]) / limit,
        "matmul_limit_images_per_s": limit,
        "matmul_gflops_per_s": flops_per_s / 1e9,
        "bare_loop": "eager" if bare == "bare_loop" else "compiled",
        "bare_loop_forms_images_per_s": {"eager" if n == "bare_loop" else n: rate for n, rate in forms.items()},
        "rounds": rates,
    }


def step_line(row: dict) -> str:
    forms = ", ".join(f"{name} {rate:.2f}" for name, rate in row["bare_loop_forms_images_per_s"].items())
    ratios = ", ".join(f"{row[key]:.2f} {key} (at least {least})" for key, least in TARGETS.items())
    return (
        f"{row['chips']} x {row['chip_batch']} images: {row['harness_images_per_s']:.2f} images/s, bare loop {forms}, "
        f"reference {row['reference_images_per_s']:.2f}, matmul limit {row['matmul_limit_images_per_s']:.1f} "
        f"({row['matmul_gflops_per_s']:.0f} GFLOP/s)\n    {ratios}"
    )


def bench_mesh(options: argparse.Namespace, say: Callable[[str], None]) -> dict:
    """Seconds of a step and peak memory of the same images on meshes of different sizes, each in a fresh process."""
    image_size, batch = (MESH_SIZE, 64) if options.quick else (MESH_SIZE, MESH_BATCH)
    rows = []
    for chips in MESH_CHIPS:
        chips = min(chips, batch // 4)
        side = harness(options, chips, batch // chips, image_size, warmup=1)
        first = side.ready()  # starts and warms up, a few percent of so long a step
        seconds = [side.turn(1) for _ in range(options.mesh_steps)] or [first["step_s"]]
        side.close()
        rows.append(
            {
                "image_size": image_size,
                "chips": chips,
                "chip_batch": batch // chips,
                "step_s": statistics.median(seconds),
                "peak_memory_bytes": first["peak_memory_bytes"],
            }
        )
        say(f"{image_size} px, batch {batch} on {chips:5d} chips: {rows[-1]['step_s']:7.2f} s a step, "
            f"peak {rows[-1]['peak_memory_bytes'] / 2**20:,.0f} MiB")  # fmt: skip
    spread = {key: max(r[key] for r in rows) / min(r[key] for r in rows) - 1 for key in ("step_s", "peak_memory_bytes")}
    say(f"    largest over smallest: {spread['step_s']:+.1%} time (at most 15 %), "
        f"{spread['peak_memory_bytes']:+.1%} memory (at most 10 %)")  # fmt: skip
    return {"mesh": rows, "mesh_time_spread": spread["step_s"], "mesh_memory_spread": spread["peak_memory_bytes"]}


def bench_tax(options: argparse.Namespace, say: Callable[[str], None]) -> dict:
    """The chip tax of a few cases."""
    from scripts.bench_chip_norm import CASES, QUICK_CASES

    cases = QUICK_CASES if options.quick else CASES
    numerics = {"device": options.device, "precision": options.precision}
    side = Side("tax", options.threads, 1, cases=cases, repeats=5, **numerics)
    rows = []
    for _ in cases:
        rows.append(row := side.ready()["row"])
        say(f"{row['image_size']} px, {row['chips']} chips x {row['chip_batch']}: chip tax {row['tax']:.3f} "
            f"(at least {row['target']}), plain loop {row['loop_tax']:.3f}")  # fmt: skip
        side.process.stdin.write("1\n")
        side.process.stdin.flush()
    side.close()
    return {"chip_tax": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="one round, small cases, nothing compiled")
    parser.add_argument("--only", nargs="+", choices=("step", "mesh", "tax"), default=["step", "mesh", "tax"])
    parser.add_argument("--chip-batch", type=int, nargs="+", default=[32, 16])
    parser.add_argument("--chips", type=int, default=1, help="of our trainer, in the part step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="the bare loop is eager")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mesh-steps", type=int, default=0, help="timed steps after the first, else the first counts")
    parser.add_argument("--optim", choices=("sgd", "lars"), default="sgd")
    parser.add_argument("--depth", type=int, default=50, help="of the ResNet")
    parser.add_argument("--image-size", type=int, default=224, help="of the part step")
    options, precision = parse(parser)
    if options.quick:
        options.rounds, options.compile = 1, False
    say = (lambda line: None) if options.json else (lambda line: print(line, flush=True))
    say(f"{precision.name} ({precision.reason})")
    parts = {"step": bench_steps, "mesh": bench_mesh, "tax": bench_tax}
    result = {key: getattr(options, key) for key in ("device", "precision", "threads", "optim")}
    for name in options.only:
        result |= parts[name](options, say)
    if "steps" in result:  # the first chip batch's, also at the top
        result |= {key: value for key, value in result["steps"][0].items() if key != "rounds"}
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
