"""The sides of scripts/bench_train.py, each in a process of its own: `bench_train_sides.py TASK`, TASK as JSON.

They take turns: a side computes when it is told how many steps, and answers with the seconds. bare_loop and reference
import nothing of ours.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train.memory import keep_freed_memory, peak_bytes  # noqa: E402

REFERENCE_BATCH = 32  # torchvision's default


def reference(pace: Callable[[], None], depth: int, image_size: int, device: str, **_) -> None:
    """torchvision's references/classification/train.py with its defaults, on images in memory."""
    import torch
    import torchvision

    model = getattr(torchvision.models, f"resnet{depth}")().to(device)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(REFERENCE_BATCH, 3, image_size, image_size, device=device)
    labels = torch.randint(1000, (REFERENCE_BATCH,), device=device)
    while True:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        pace()


def bare_loop(
    pace: Callable[[], None], batch: int, depth: int, image_size: int, device: str, precision: str, compiled: bool
) -> None:
    """What one would write by hand for speed: bfloat16 autocast where the machine is the faster for it, channels last,
    foreach SGD, perhaps compiled.
    """
    import torch
    import torchvision
    from torch.nn import functional

    model = getattr(torchvision.models, f"resnet{depth}")().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5, foreach=True)
    forward = torch.compile(model, mode="reduce-overhead" if device == "cuda" else None) if compiled else model
    images = torch.randn(batch, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    while True:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = functional.cross_entropy(forward(images).float(), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        pace()


def harness(
    pace: Callable[[], None],
    batch: int,
    depth: int,
    image_size: int,
    device: str,
    precision: str,
    chips: int,
    optimizer: str,
) -> None:
    """Our trainer, as train/build puts it together, on `chips` chips of `batch` images, numerics=fast."""
    from functools import partial

    import torch

    from train.callbacks import Callback, MetricsCallback
    from train.comm.aggregation import SumAggregator
    from train.comm.buckets import Afterwards, GradientSums
    from train.comm.groups import SingleGroup
    from train.data.order import Order
    from train.data.synthetic import Synthetic
    from train.metrics import JsonlSink
    from train.models.chip_norm import allocate_chips
    from train.models.passes import images_per_pass, plan_passes
    from train.models.resnet import resnet
    from train.optim.lars import LARS
    from train.optim.schedule import Polynomial
    from train.optim.sgd import SGD
    from train.optim.update import WeightUpdate
    from train.precision import choose_device, choose_loss_scale, choose_precision, use_arithmetic
    from train.progress import Limits
    from train.sim.clock import EmulatedClock
    from train.sim.step import StepTime
    from train.sim.workload import resnet as table
    from train.trainer import Part, Trainer

    class Paced(Callback):
        def on_step(self, record) -> None:
            pace(step_s=record.step_s)

    keep_freed_memory()
    device, group = choose_device(device), SingleGroup()
    precision = choose_precision(precision, device)
    use_arithmetic(device, precision, exact=False)
    source = Synthetic(image_size, num_train=100 * chips * batch, num_eval=1)
    order = Order(len(source.train), batch, chips, seed=0)
    model = resnet(depth).to(device, memory_format=torch.channels_last)
    allocate_chips(model, chips, 1)
    room = images_per_pass(table(depth, "imagenet", image_size, 1000), precision, device) // batch
    keys = {"numerics": "fast", "chips_per_pass": "auto", "bn_span": 1}
    trainer = Trainer(
        model=model,
        source=source,
        order=order,
        update=WeightUpdate(
            model, {"sgd": SGD, "lars": LARS}[optimizer](model.parameters()), precision, choose_loss_scale("auto")
        ),
        schedule=Polynomial(epochs=90, base_lr=0.1),
        bn_rule="mean",
        chips_per_block=chips,
        clock=EmulatedClock(StepTime(0.0, 0.0, 0.0, 0.0, 0.0), 0.0, 0.0),
        limits=Limits(epochs=90, target_top1=1.0, eval_every=90, eval_offset=0.0, max_steps=None),
        precision=precision,
        label_smoothing=0.1,
        device=device,
    )
    passes = plan_passes(keys, chips, range(chips), room)
    sums = GradientSums(
        trainer.parameters, [len(trainer.parameters)], partial(SumAggregator, group), SumAggregator(group), Afterwards()
    )
    trainer.take(Part(group, sums, SumAggregator(group), None, passes))
    with tempfile.TemporaryDirectory() as folder:
        trainer.train([MetricsCallback([JsonlSink(folder)]), Paced()], save=partial(max, 0))


def matmul(pace: Callable[[], None], size: int, device: str, precision: str) -> None:
    """One large product a step."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    while True:
        (left @ right)[0, 0].item()
        pace()


def tax(pace: Callable[[], None], cases: list, repeats: int, device: str, precision: str) -> None:
    """The chip tax of each case, as the answer to the first turn."""
    from bench_chip_norm import chip_tax

    keep_freed_memory()
    for size, chips, chip_batch, target in cases:
        pace(row=chip_tax(size, chips, chip_batch, repeats, device, precision) | {"target": target})


SIDES = {side.__name__: side for side in (reference, bare_loop, harness, matmul, tax)}


class Pace:
    """In a side's process: called after every step; at the end of a turn it answers and waits for the next."""

    def __init__(self, warmup: int, device: str) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
        self._device, self._left, self._started = device, warmup, time.perf_counter()

    def __call__(self, **answer: object) -> None:
        self._left -= 1
        if self._left > 0:
            return
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        answer |= {"seconds": seconds, "peak_memory_bytes": peak_bytes(self._device)}
        self._answers.write(json.dumps(answer) + "\n")
        if not (turn := sys.stdin.readline()):
            raise SystemExit
        self._left, self._started = int(turn), time.perf_counter()


def main() -> None:
    import torch

    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    arguments = task["arguments"]
    SIDES[task["side"]](Pace(task["warmup"], arguments["device"]), **arguments)


if __name__ == "__main__":
    main()
