"""Where a training step's time goes: torch's profiler over our trainer on synthetic images.

    python scripts/profile_step.py [--json] [--device cpu] [--chips 1] [--chip-batch 32] [--steps 3] [--depth 50]
                                   [--image-size 224] [--precision auto] [--top 12]

Prints the share of each kind of kernel (on a CPU: of each operation's own time), the longest kernels, and on a GPU how
long it stood idle between them. Shares are of the whole time; profiling itself slows the CPU's side of a step.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_train_sides import harness  # noqa: E402
from scripts.precision_option import parse  # noqa: E402

KINDS = (
    # kind, parts of kernels' or operations' names; the first that fits
    ("batch norm, ReLU, residual", ("_moments", "_merged", "_apply", "_sums", "_totals", "_gradient", "batch_norm")),
    ("optimizer", ("FusedSgd", "multi_tensor", "_fused_sgd", "_foreach", "lars")),
    ("pooling", ("pool",)),
    ("convolutions and products", ("conv", "xmma", "cudnn", "gemm", "cutlass", "nvjet", "wgrad", "dgrad", "mm")),
    ("copies", ("Memcpy", "Memset", "copy", "CatArray")),
)
WARM_UPS = 4
"""Steps before the profile; the first of a GPU record its graph."""


class Profiled:
    """Called after each step; profiles `steps` of them, then ends the training with SystemExit."""

    def __init__(self, steps: int, device: str) -> None:
        activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
        self._profile, self._steps, self._device, self._calls = profile(activities=[activity]), steps, device, 0

    def __call__(self, **_: object) -> None:
        self._calls += 1
        if self._calls == WARM_UPS:
            self._wait()
            self._profile.start()
            self._started = time.perf_counter()
        elif self._calls == WARM_UPS + self._steps:
            self._wait()
            self.seconds = time.perf_counter() - self._started
            self._profile.stop()
            raise SystemExit

    def _wait(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()

    def rows(self) -> list[dict]:
        """Name, kind, calls and seconds a step of every kernel or operation, longest first."""
        on_cpu = self._device == "cpu"
        rows = []
        for event in self._profile.key_averages():
            seconds = (event.self_cpu_time_total if on_cpu else event.self_device_time_total) / 1e6 / self._steps
            if seconds > 0:
                row = {"name": event.key, "kind": kind(event.key), "calls": event.count / self._steps}
                rows.append(row | {"seconds": seconds})
        return sorted(rows, key=lambda row: -row["seconds"])


def kind(name: str) -> str:
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--chips", type=int, default=1)
    parser.add_argument("--chip-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--top", type=int, default=12, help="so many of the longest kernels")
    parser.add_argument("--optim", choices=("sgd", "lars"), default="sgd")
    options, _ = parse(parser)
    profiled = Profiled(options.steps, options.device)
    shape = {"batch": options.chip_batch, "optimizer": options.optim}
    shape |= {key: getattr(options, key) for key in ("chips", "depth", "image_size", "device", "precision")}
    try:
        harness(profiled, **shape)
    except SystemExit:
        pass
    step_s, rows, kinds = profiled.seconds / options.steps, profiled.rows(), defaultdict(float)
    for row in rows:
        kinds[row["kind"]] += row["seconds"]
    if options.device != "cpu":
        kinds["idle"] = max(step_s - sum(kinds.values()), 0.0)
    result = {**shape, "step_s": step_s, "kinds": dict(kinds), "rows": rows}
    if options.json:
        return print(json.dumps(result))
    images = options.chips * options.chip_batch
    print(f"{step_s * 1e3:.1f} ms a step of {images} images, profiled ({images / step_s:,.0f} images/s)")
    for name, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{seconds * 1e3:9.2f} ms {seconds / step_s:6.1%}  {name}")
    print(f"the {options.top} longest:")
    for row in rows[: options.top]:
        print(f"{row['seconds'] * 1e3:9.2f} ms {row['calls']:6.0f} calls  {row['name'][:90]}")


if __name__ == "__main__":
    main()
