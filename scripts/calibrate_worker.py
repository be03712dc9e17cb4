"""What one process of scripts/calibrate.py measures: the machine's rates, every distinct layer of a ResNet, real steps.

A layer is timed by itself, forward and backward, each with its code warm, as in a step. In between, as much memory is
copied as pushes what the forward pass has left out of the caches, because in a step the backward pass comes long after;
the gradient is fresh, as there. What it takes to call for a backward pass at all, once a step, is taken off.
All processes of a run do the same at the same time, so that each finds the memory as busy as in training.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore
from torch.nn import functional

from train.build import Worker, WorkerContext
from train.callbacks import Callback
from train.comm.aggregation import TreeAggregator
from train.emulator import make
from train.memory import keep_freed_memory
from train.models.chip_norm import ChipBatchNorm2d, ChipPass, allocate_chips
from train.models.conv import Conv2d
from train.models.resnet import MaxPool2d
from train.precision import Precision, choose_precision, describe_device

NUM_TENSORS = 162
"""That are summed in a step: ResNet-50's gradients, and the loss with its companions."""
FLUSH_BYTES = 64 << 20
"""More than the last cache holds."""
ELEMENT_PASSES = {"batch norm": 8, "relu": 5, "sum": 6, "max pool": 3}
"""How often an input element goes from or to memory at least. Batch norm: read for the statistics, read and written;
gradient and input read for their sums, both read and the result written. ReLU: 2 and 3. Sum: of two forward, of the
gradients of a block's two ways backward. Max pool: read; its gradient filled with zeros and written."""


class Layer(NamedTuple):
    """`shape` [images, channels, height, width] of the input; outputs, kernel and stride of a convolution."""

    kind: str
    shape: tuple[int, ...]
    outputs: int = 0
    kernel: int = 1
    stride: int = 1

    @property
    def first(self) -> bool:
        """Whether nobody asks for the gradient of its input: an image's."""
        return self.kind == "convolution" and self.shape[1] == 3

    @property
    def flops(self) -> float:
        """Forward and backward, of what is a matrix product."""
        images, channels, height, width = self.shape
        if self.kind == "classifier":
            return 6.0 * images * channels * self.outputs
        if self.kind != "convolution":
            return 0.0
        pixels = ((height - 1) // self.stride + 1) * ((width - 1) // self.stride + 1)
        return (4.0 if self.first else 6.0) * images * pixels * self.outputs * channels * self.kernel**2

    def num_bytes(self, element_bytes: int) -> float:
        """Between memory and processor at least, forward and backward, of what is no matrix product."""
        elements = 1
        for size in self.shape:
            elements *= size
        return float(ELEMENT_PASSES.get(self.kind, 0) * elements * element_bytes)


def distinct_layers(model: dict, num_classes: int, image_size: int, batch: int) -> Counter[Layer]:
    """How often each layer occurs in a step of a configuration's model node; nothing is computed."""
    found: Counter[Layer] = Counter()
    with torch.device("meta"):
        network = make(model, num_classes=num_classes).eval()

    def watch(name: str, module: nn.Module) -> Callable:
        def seen(_: nn.Module, inputs: tuple[Tensor, ...], beside: dict, output: Tensor) -> None:
            shape = tuple(inputs[0].shape)
            if isinstance(module, Conv2d):
                kernel, stride = module.kernel_size[0], module.stride[0]
                found[Layer("convolution", shape, module.out_channels, kernel, stride)] += 1
            elif isinstance(module, ChipBatchNorm2d):
                found[Layer("batch norm", shape)] += 1
                if beside.get("residual") is not None:
                    found[Layer("sum", shape)] += 1
                if beside.get("relu"):
                    found[Layer("relu", shape)] += 1
            elif isinstance(module, MaxPool2d):
                found[Layer("max pool", shape)] += 1
            elif name == "layer4":
                found[Layer("classifier", tuple(output.shape), num_classes)] += 1

        return seen

    for name, module in network.named_modules():
        module.register_forward_hook(watch(name, module), with_kwargs=True)
    with torch.no_grad():
        network(torch.zeros(batch, 3, image_size, image_size, device="meta"))
    return found


class Bench:
    """Times layers in the dtype of the training; `largest` elements are the most that one of them has."""

    def __init__(self, precision: Precision, largest: int) -> None:
        self.precision = precision
        self._pool = torch.rand(largest).sub_(0.5).to(precision.dtype)
        self._nothing, self._one = torch.ones(1, requires_grad=True), torch.ones(1)
        self._old, self._new = (torch.ones(FLUSH_BYTES // 4) for _ in range(2))

    def copy_s(self) -> tuple[float, float]:
        """(bytes read and written, seconds)."""
        started = time.perf_counter()
        self._new.copy_(self._old)
        return 2.0 * FLUSH_BYTES, time.perf_counter() - started

    def matmul_s(self, size: int) -> tuple[float, float]:
        """(FLOPs, seconds) of one large product."""
        left, right = (self._fresh((1, 1, size, size)).view(size, size) for _ in range(2))
        started = time.perf_counter()
        _ = left @ right
        return 2.0 * size**3, time.perf_counter() - started

    def seconds(self, layer: Layer) -> float:
        """Forward and backward."""
        images = self._fresh(layer.shape)
        if layer.kind == "sum":
            other = self._fresh(layer.shape)
            started = time.perf_counter()
            result = images + other
            forward = time.perf_counter() - started
            self.copy_s()
            gradient = self._fresh(layer.shape)
            started = time.perf_counter()
            gradient.add_(result)
            return forward + time.perf_counter() - started
        run = self._made(layer)
        images.requires_grad_(not layer.first)
        with self.precision.autocast("cpu"):
            with torch.no_grad():
                run(images)
            started = time.perf_counter()
            result = run(images)
            forward = time.perf_counter() - started
        self.copy_s()
        gradient = self._fresh(tuple(result.shape)) if result.dim() == 4 else torch.ones_like(result)
        nothing = min(self._call_s() for _ in range(3))
        started = time.perf_counter()
        result.backward(gradient)
        return forward + max(0.0, time.perf_counter() - started - nothing)

    def _call_s(self) -> float:
        """Seconds of a backward pass through nothing."""
        result = self._nothing.view(-1)
        started = time.perf_counter()
        result.backward(self._one)
        return time.perf_counter() - started

    def _made(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        channels = layer.shape[1]
        if layer.kind == "convolution":
            conv = Conv2d(channels, layer.outputs, layer.kernel, layer.stride)
            return conv.to(memory_format=torch.channels_last)
        if layer.kind == "batch norm":
            norm = nn.Sequential(ChipBatchNorm2d(channels, ChipPass()))
            allocate_chips(norm, 1, 1)
            return norm
        if layer.kind == "max pool":
            return MaxPool2d(3, 2, 1)
        if layer.kind == "classifier":
            linear = nn.Linear(channels, layer.outputs)
            labels = torch.arange(layer.shape[0]) % layer.outputs
            return lambda x: functional.cross_entropy(linear(x.mean((2, 3))).float(), labels, label_smoothing=0.1)
        assert layer.kind == "relu", layer
        return torch.relu

    def _fresh(self, shape: tuple[int, ...]) -> Tensor:
        """New numbers of that shape, with channels last."""
        images, channels, height, width = shape
        elements = self._pool[: images * channels * height * width].clone()
        return elements.view(images, height, width, channels).permute(0, 3, 1, 2)


def measure(rank: int, world_size: int, port: int, task: dict, results: Any) -> None:
    """In a process of its own: does what `task` asks and puts (rank, what, value) into `results`.

    `progress` after every piece, at the end `done` with the facts, or `failed` with what went wrong.
    """
    try:
        results.put((rank, "done", _measure(rank, world_size, port, task, lambda: results.put((rank, "progress", 1)))))
    except BaseException as error:
        results.put((rank, "failed", f"{type(error).__name__}: {error}"))
        raise


def _measure(rank: int, world_size: int, port: int, task: dict, progress: Callable[[], None]) -> dict:
    keep_freed_memory()
    torch.set_num_threads(task["threads"])
    torch.manual_seed(rank)
    store = TCPStore("127.0.0.1", port, world_size, is_master=False, wait_for_workers=False)
    precision = choose_precision(task["cases"][0]["config"]["precision"], "cpu")
    facts = {"device": describe_device("cpu"), "precision": precision.name, "element_bytes": precision.dtype.itemsize}
    facts |= {"copy": [], "matmul": [], "cases": []}
    if world_size > 1:
        facts["all_reduce"] = _all_reduces(rank, world_size, PrefixStore("all_reduce", store), task)
        progress()
    for number, case in enumerate(task["cases"]):
        config = case["config"]
        context = WorkerContext(rank, world_size, "cpu", task["threads"], PrefixStore(f"case{number}", store))
        worker = Worker(config, context)
        tables = [
            distinct_layers(config["model"], worker.source.num_classes, config["data"]["image_size"], batch)
            for batch in case["batches"]
        ]
        largest = max(_elements(layer) for table in tables for layer in table)
        bench = Bench(precision, max(largest, task["matmul_size"] ** 2))
        rounds = Rounds(worker, bench, tables, task["matmul_size"], facts, progress)
        worker.trainer.train([rounds], save=lambda _: None)
        worker.group.close()
        facts["cases"].append(rounds.found())
    return facts


class Rounds(Callback):
    """After every real step each layer once, in turns, so that both have the same share of the machine's moods.

    The first step and the first round warm up and are left out.
    """

    def __init__(
        self,
        worker: Worker,
        bench: Bench,
        tables: list[Counter[Layer]],
        matmul_size: int,
        facts: dict,
        progress: Callable[[], None],
    ) -> None:
        self._worker, self._bench, self._tables, self._facts = worker, bench, tables, facts
        self._matmul_size, self._progress = matmul_size, progress
        self._steps: list[dict] = []
        self._seconds: list[dict[Layer, list[float]]] = [{layer: [] for layer in table} for table in tables]

    def on_step(self, record) -> None:
        group, warm = self._worker.group, record.step > 1
        if warm:
            self._steps.append({"step_s": record.step_s, "comm_s": record.comm_s, "data_wait_s": record.data_wait_s})
        group.barrier()
        for seconds in self._seconds:
            for layer, taken in seconds.items():
                time_s = self._bench.seconds(layer)
                if warm:
                    taken.append(time_s)
        if warm:
            self._facts["copy"] += [self._bench.copy_s() for _ in range(3)]
            self._facts["matmul"].append(self._bench.matmul_s(self._matmul_size))
        group.barrier()
        self._progress()

    def found(self) -> dict:
        tables = [
            [
                {
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "count": table[layer],
                    "flops": layer.flops,
                    "bytes": layer.num_bytes(self._bench.precision.dtype.itemsize),
                    "seconds": taken,
                }
                for layer, taken in seconds.items()
            ]
            for table, seconds in zip(self._tables, self._seconds, strict=True)
        ]
        return {"steps": self._steps, "layers": tables}


def _all_reduces(rank: int, world_size: int, store: Any, task: dict) -> list[dict]:
    """Seconds of sums of several sizes, as the trainer has them made, with the backend of the run."""
    config = task["cases"][0]["config"]
    group = make(config["backend"], rank=rank, world_size=world_size, store=store, device="cpu")
    aggregator = TreeAggregator(group, [range(peer, peer + 1) for peer in range(world_size)])
    found = []
    for nbytes in task["all_reduce_bytes"]:
        taken = []
        for _ in range(task["rounds"] + 1):
            tensors = [torch.zeros(max(1, nbytes // 4 // NUM_TENSORS)) for _ in range(NUM_TENSORS)]
            group.barrier()
            started = time.perf_counter()
            aggregator.add(rank, tensors)
            aggregator.total()
            taken.append(time.perf_counter() - started)
        found.append({"bytes": 4 * sum(tensor.numel() for tensor in tensors), "seconds": taken[1:]})
    group.close()
    return found


def _elements(layer: Layer) -> int:
    """The most that its input or its result has."""
    images, channels, height, width = layer.shape
    return images * height * width * max(channels, layer.outputs)
