"""The two sides of scripts/emulated_equals_real.py: the chips in one process by the library, a real process for each.

The real side is torchvision's ResNet, torch's loss and SGD, and DistributedDataParallel over gloo on loopback.
"""

import math
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from train.comm.aggregation import TreeAggregator
from train.comm.groups import SingleGroup
from train.compute import chip_losses
from train.models.chip_norm import allocate_chips, chip_moments
from train.models.layout import chip_after_chip
from train.models.resnet import ResNet, resnet
from train.optim.lars import LARS
from train.optim.sgd import SGD
from train.optim.update import WeightUpdate
from train.precision import LossScale, choose_precision

CHIPS = 4
PASSES = (range(0, 2), range(2, 4))  # the chips that go through the emulated side's network at once: its blocks
STEPS = 20
CLASSES = 10
SMOOTHING, MOMENTUM, WEIGHT_DECAY, COEFFICIENT = 0.1, 0.9, 5e-5, 0.001
LEARNING_RATES = {"sgd": 0.1, "lars": 5.0}
STATISTICS = ("running_mean", "running_var")
HANGING_S = 300.0


@dataclass(frozen=True)
class Case:
    """What both sides compute. `sizes`: images of each chip; `stages`: those of the network, 3 leaves out the last."""

    sizes: tuple[int, ...]
    dtype: str = "float64"
    depth: int = 18
    zero_init: bool = True
    optimizer: str = "sgd"
    steps: int = STEPS
    stages: int = 4
    image_size: int = 12  # the last stage has 2 x 2 pixels: 8 values a channel for two images

    @property
    def name(self) -> str:
        equal = len(set(self.sizes)) == 1
        return f"ResNet-{self.depth}, chip batch {self.sizes[0] if equal else ', '.join(map(str, self.sizes))}"


@dataclass(frozen=True)
class Worst:
    """The largest relative error, and the tensor that has it."""

    error: float = 0.0
    tensor: str = ""

    def __or__(self, other: "Worst") -> "Worst":
        return max(self, other, key=lambda worst: worst.error)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|; infinite where that is no number."""
    ours, theirs = ours.double(), theirs.double()
    difference = (ours - theirs).norm().item()
    if difference == 0:
        return 0.0
    error = difference / theirs.norm().item() if theirs.any() else math.inf
    return error if error < math.inf else math.inf


def worst_of(names: Iterable[str], ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Worst:
    errors = (Worst(relative(a, b), name) for name, a, b in zip(names, ours, theirs, strict=True))
    return max(errors, key=lambda worst: worst.error)


def batch(case: Case, draw: int, chip: int) -> tuple[Tensor, Tensor]:
    """A chip's images, a pattern for each class under noise, and its labels."""
    shape = (3, case.image_size, case.image_size)
    patterns = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + draw * CHIPS + chip)
    labels = torch.randint(0, CLASSES, (case.sizes[chip],), generator=generator)
    images = patterns[labels] + 0.5 * torch.randn(len(labels), *shape, generator=generator)
    return images.to(getattr(torch, case.dtype)), labels


def cut(model: nn.Module, case: Case) -> nn.Module:
    if case.stages == 3:
        model.layer4, model.fc = nn.Identity(), nn.Linear(model.layer4[0].conv1.in_channels, CLASSES)
    return model.to(getattr(torch, case.dtype))


class Relus:
    """What the ReLUs of either side's network put out: the inputs of the blocks' convolutions and the last output.

    Only float32 needs them: in float64 an input within rounding of zero is as good as impossible.
    """

    def __init__(self, model: nn.Module, case: Case) -> None:
        self._outputs: list[Tensor] = []
        self.shapes: list[torch.Size] = []  # of one image's
        if case.dtype == "float64":
            return
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name != "conv1" and "downsample" not in name:
                module.register_forward_pre_hook(lambda _, inputs: self._outputs.append(inputs[0].detach()))
        model.layer4.register_forward_hook(lambda _, __, output: self._outputs.append(output.detach()))
        model.eval()
        with torch.no_grad():
            model(batch(case, 0, 0)[0][:1])
        model.train()
        self.shapes = [output.shape[1:] for output in self.take()]

    def take(self) -> list[Tensor]:
        """Those of the last forward pass."""
        outputs, self._outputs = self._outputs, []
        return outputs


class Shared:
    """Files in memory through which the real processes see the emulated side, as lists of tensors."""

    def __init__(self, folder: Path, case: Case, model: nn.Module, statistics: list[Tensor], relus: Relus) -> None:
        """`statistics`: of one chip."""
        self._folder, self._dtype = folder, getattr(torch, case.dtype)
        shapes = [p.shape for p in model.parameters()]
        self.weights, self.gradients = self._map("weights", shapes), self._map("gradients", shapes)
        self.statistics = [self._map(f"statistics{c}", [x.shape for x in statistics]) for c in range(CHIPS)]
        self.relus = [
            self._map(f"relus{c}", [torch.Size((size, *shape)) for shape in relus.shapes])
            for c, size in enumerate(case.sizes)
        ]

    def _map(self, name: str, shapes: list[torch.Size]) -> list[Tensor]:
        sizes = [shape.numel() for shape in shapes]
        if not sizes:
            return []
        flat = torch.from_file(str(self._folder / name), shared=True, size=sum(sizes), dtype=self._dtype)
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


class Emulated:
    """All chips in this process, by the library's own parts, as its trainer puts them together."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.step = case, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = resnet(case.depth, "small", CLASSES, case.zero_init)
            self.model: ResNet = cut(model, case).to(memory_format=torch.channels_last)
        allocate_chips(self.model, CHIPS, span=1)
        self.parameters = list(self.model.parameters())
        if case.optimizer == "sgd":
            self.optimizer = SGD(self.parameters, MOMENTUM, weight_decay=WEIGHT_DECAY)
        else:
            self.optimizer = LARS(self.parameters, MOMENTUM, WEIGHT_DECAY, COEFFICIENT)
        precision = choose_precision("fp32", "cpu")  # that is: as the weights are
        self._update = WeightUpdate(self.model, self.optimizer, precision, LossScale(1.0, dynamic=False))
        self._aggregator = TreeAggregator(SingleGroup(), [range(len(PASSES))])
        self._relus = Relus(self.model, case)
        one_chip = [moment[0] for moment in chip_moments(self.model)]
        self.shared = Shared(folder, case, self.model, one_chip, self._relus)
        self.share_weights()

    def share_weights(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.shared.weights, self.parameters)

    def compute(self, draw: int) -> list[Tensor]:
        """The mean gradients, which the shared files get too, with statistics; `losses` are the passes' sums."""
        case, chip_pass, self.losses = self.case, self.model.chip_pass, []
        for block, chips in enumerate(PASSES):
            sizes = case.sizes[chips.start : chips.stop]
            chip_pass.first, chip_pass.count = chips.start, len(chips)
            chip_pass.sizes = sizes if len(set(case.sizes)) > 1 else None
            images, labels = (torch.cat(parts) for parts in zip(*(batch(case, draw, c) for c in chips), strict=True))
            logits = self.model(images.contiguous(memory_format=torch.channels_last))
            loss = chip_losses(logits, labels, chip_pass, SMOOTHING)
            loss.backward()
            self.losses.append(loss.item())
            self._aggregator.add(block, [p.grad for p in self.parameters])
            for p in self.parameters:
                p.grad = None
            mixed = chip_pass.interleaves(images)
            for i, output in enumerate(self._relus.take()):
                output = chip_after_chip(output, len(chips)) if mixed else output
                for chip, part in zip(chips, output.split(sizes), strict=True):
                    self.shared.relus[chip][i].copy_(part)
        gradients = self._aggregator.total()
        torch._foreach_div_(gradients, CHIPS)
        torch._foreach_copy_(self.shared.gradients, gradients)
        span = chip_pass.span
        for chip in range(CHIPS):
            torch._foreach_copy_(self.shared.statistics[chip], [x[chip // span] for x in chip_moments(self.model)])
        return gradients

    def update(self, gradients: list[Tensor]) -> None:
        self.step += 1
        loss = sum(self.losses) / CHIPS
        self._update.apply(gradients, loss, LEARNING_RATES[self.case.optimizer], self.step)
        self.share_weights()


class Real:
    """One chip in a process of its own: torch and torchvision alone. Called through its pipe; see `_work`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def prepare(self, case: Case, folder: Path) -> None:
        import torchvision

        with torch.device("meta"):
            model = getattr(torchvision.models, f"resnet{case.depth}")(num_classes=CLASSES)
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            model = cut(model, case)
        model.to_empty(device="cpu")
        norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        for norm in norms.values():
            norm.reset_running_stats()
        self.case = case
        self.names = [name for name, _ in model.named_parameters()]
        self.statistics = {f"{name}.{of}": norm.get_buffer(of) for name, norm in norms.items() for of in STATISTICS}
        self.relus = Relus(model, case)
        self.shared = Shared(folder, case, model, list(self.statistics.values()), self.relus)
        self.parameters = list(model.parameters())
        self.load()
        # each process keeps its own statistics; by default every step starts from those of process 0
        self.model = nn.parallel.DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        matrices, vectors = ([p for p in self.parameters if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors}]
        self.sgd = torch.optim.SGD(groups, LEARNING_RATES["sgd"], MOMENTUM)
        self.velocities = [torch.zeros_like(p) for p in self.parameters] if case.optimizer == "lars" else []

    def load(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.shared.weights)

    def compute(self, draw: int) -> float:
        """This process's loss; leaves the mean gradients in the parameters."""
        self.relus.take()
        images, labels = batch(self.case, draw, self.rank)
        self.sgd.zero_grad()
        loss = functional.cross_entropy(self.model(images), labels, label_smoothing=SMOOTHING)
        loss.backward()
        return loss.item()

    def step(self, draw: int) -> None:
        self.compute(draw)
        if self.case.optimizer == "sgd":
            self.sgd.step()
        else:
            self._lars()

    @torch.no_grad()
    def _lars(self) -> None:
        """MLPerf's formula, written out: batch norm and biases neither decay nor are scaled."""
        for w, v in zip(self.parameters, self.velocities, strict=True):
            rate, decay = LEARNING_RATES["lars"], 0.0
            if w.ndim > 1:
                decay = WEIGHT_DECAY
                if w.any() and w.grad.any():
                    rate *= COEFFICIENT * w.norm() / (w.grad.norm() + decay * w.norm())
            v.mul_(MOMENTUM).add_(rate * (w.grad + decay * w))
            w.sub_(v)

    def compare(self) -> tuple[Worst, Worst, float]:
        """The worst of this process's share of the gradients, of its own statistics, and the largest kink (0: none)."""
        gradients = worst_of(*map(self._share, (self.names, self.shared.gradients, [p.grad for p in self.parameters])))
        statistics = worst_of(self.statistics, self.shared.statistics[self.rank], self.statistics.values())
        kinks = [kink(a, b) for a, b in zip(self.shared.relus[self.rank], self.relus.take(), strict=True)]
        return gradients, statistics, max(kinks, default=0.0)

    @torch.no_grad()
    def compare_weights(self) -> tuple[float, float, float]:
        """(|ours - theirs|^2, |theirs|^2, the worst tensor's relative error) of this process's share of the weights."""
        ours, theirs = self._share(self.shared.weights), self._share(self.parameters)
        squares = [
            sum(x.double().square().sum().item() for x in of) for of in (torch._foreach_sub(ours, theirs), theirs)
        ]
        return *squares, worst_of(self._share(self.names), ours, theirs).error

    def _share(self, of: list) -> list:
        """Every fourth: after the all-reduce all processes hold the same."""
        return of[self.rank :: CHIPS]


def kink(ours: Tensor, theirs: Tensor) -> float:
    """The largest output, relative to the root mean square, of a ReLU that is open on one side only; 0: none is."""
    apart = (ours > 0) != (theirs > 0)
    return ((ours - theirs)[apart].abs().max() / theirs.square().mean().sqrt()).item() if apart.any() else 0.0


class Processes:
    """The real side: a process for each chip, killed at the end of the block in any case."""

    def __enter__(self) -> "Processes":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision", "torch._dynamo"])
        self._ends: list[Connection] = []
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="emulated-equals-real-")))
            for rank in range(CHIPS):
                end, other = context.Pipe()
                process = context.Process(target=_work, args=(other, rank, str(self.folder / "store")), daemon=True)
                process.start()
                stack.callback(process.join)
                stack.callback(process.kill)
                other.close()
                self._ends.append(stack.enter_context(end))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def start(self, method: str, *args) -> None:
        """Have every process call that method of its `Real`."""
        for end in self._ends:
            end.send((method, args))

    def results(self) -> list:
        """What the calls returned, by rank; the first error of one ends the waiting."""
        results = {}
        while len(results) < CHIPS:
            ready = wait([end for rank, end in enumerate(self._ends) if rank not in results], HANGING_S)
            if not ready:
                raise RuntimeError(f"processes {sorted(set(range(CHIPS)) - set(results))} hang")
            for end in ready:
                rank = self._ends.index(end)
                try:
                    error, results[rank] = end.recv()
                except EOFError:
                    raise RuntimeError(f"process {rank} died") from None
                if error:
                    raise RuntimeError(f"process {rank}:\n{error}")
        return [results[rank] for rank in range(CHIPS)]

    def call(self, method: str, *args) -> list:
        self.start(method, *args)
        return self.results()


def _work(end: Connection, rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", store=distributed.FileStore(store, CHIPS), rank=rank, world_size=CHIPS)
        real = Real(rank)
        while True:
            method, args = end.recv()
            end.send((None, getattr(real, method)(*args)))
    except EOFError:  # the other end is gone
        pass
    except BaseException:
        end.send((traceback.format_exc(), None))
