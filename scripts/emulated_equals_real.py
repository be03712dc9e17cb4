"""Emulated = real: K chips in one process against K processes of torch's DistributedDataParallel.

    python scripts/emulated_equals_real.py [--json] [--write]

Per step from the same weights: gradients, losses and running statistics; then free runs, in which each side updates its
own weights. The table, or with --json one JSON object, goes to stdout; --write makes docs/emulated_equals_real.md.
Exit status: 1 where a bound is missed. The real side is torchvision's ResNet, torch's loss and SGD, gloo on loopback.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
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
from train.metrics import finite, write_aside
from train.models.chip_norm import allocate_chips, chip_moments
from train.models.layout import chip_after_chip
from train.models.resnet import ResNet, resnet
from train.optim.lars import LARS
from train.optim.sgd import SGD
from train.optim.update import WeightUpdate
from train.precision import LossScale, choose_precision, describe_device
from train.report import markdown_table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "emulated_equals_real.md"
CHIPS = 4
PASSES = (range(0, 2), range(2, 4))  # the chips that go through the emulated side's network at once: its blocks
STEPS = 20
CLASSES = 10
SMOOTHING, MOMENTUM, WEIGHT_DECAY, COEFFICIENT = 0.1, 0.9, 5e-5, 0.001
LEARNING_RATES = {"sgd": 0.1, "lars": 5.0}
BOUNDS = {"float64": 1e-12, "float32": 1e-5}
FREE_BOUND = 1e-10
KINK = 1e-5
"""Largest input of a ReLU, relative to the root mean square of its layer, whose sign may be float32's rounding."""
MAX_DRAWS = 20
STATISTICS = ("running_mean", "running_var")
HANGING_S = 300.0

TEXT = """# Emulated = real

Written by `python scripts/emulated_equals_real.py --write` in {seconds:.0f} s (torch {torch}, {device});
`--json` prints the same figures, and the exit status is 1 where a bound is missed.
`tests/test_emulated_equals_real.py` holds smaller cases to these bounds.

{chips} chips in one process (`ChipBatchNorm2d` in passes of two chips, `chip_losses`, `TreeAggregator`, `WeightUpdate`,
the project's optimizers) against {chips} processes of torch's `DistributedDataParallel` over gloo, a chip each:
torchvision's ResNet with a 3x3 stem, `nn.BatchNorm2d`, `cross_entropy`, `torch.optim.SGD`, and LARS written out from
MLPerf's formula. Images of {pixels} x {pixels} pixels, so that the last stage sees 2 x 2; learning rates {rates}.
Each process keeps its own running statistics, as each chip does.

## Per step, from the same weights

Largest error over all steps and processes, relative to each tensor's norm. Chips of unequal size count alike, as in
`DistributedDataParallel`: the mean over processes of each one's mean loss.

{steps}

*Set aside*: in float32 the input of a ReLU can lie so close to zero (here: less than {kink:g} of its layer's root mean
square) that rounding opens the ReLU on one side only. The loss has no gradient there, and one such input among
thousands can move a tensor's gradient by as much as stands in brackets. Another batch is drawn then; losses and
statistics are compared all the same.

## Free runs

Each side updates its own weights, chip batch {free_batch}. Relative difference of all weights as one vector and, in
brackets, of the worst tensor; the last gamma of every residual block starts at zero (the project's default) or at one.

{free}

From one, the same rounding grows several times faster. In float32, the arithmetic of real training, ReLUs that flip
carry it in {last} steps to {whole:.0%} of all weights and {worst:.0%} of the worst tensor. Trainings that differ only
in the order of a sum are then different trainings, which is why `numerics=exact` fixes every bit and relies on no
tolerance.
"""


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


STEP_CASES = (
    *(Case(sizes, dtype) for dtype in BOUNDS for sizes in ((2,) * CHIPS, (8,) * CHIPS, (2, 3, 5, 8))),
    Case((2,) * CHIPS, depth=50, steps=10),
)
FREE_CASES = (
    Case((8,) * CHIPS),
    Case((8,) * CHIPS, optimizer="lars"),
    Case((8,) * CHIPS, zero_init=False),
    Case((8,) * CHIPS, "float32"),
    Case((8,) * CHIPS, "float32", zero_init=False),
)


@dataclass(frozen=True)
class Worst:
    """The largest relative error, and the tensor that has it."""

    error: float = 0.0
    tensor: str = ""

    def __or__(self, other: "Worst") -> "Worst":
        return max(self, other, key=lambda worst: worst.error)


@dataclass
class StepErrors:
    """The worst of all steps and processes. `redrawn`: batches whose gradients say nothing; see `compare_steps`."""

    case: Case
    gradients: Worst = Worst()
    losses: Worst = Worst()
    statistics: Worst = Worst()
    redrawn: int = 0
    redrawn_gradients: Worst = Worst()

    @property
    def passed(self) -> bool:
        return all(x.error <= BOUNDS[self.case.dtype] for x in (self.gradients, self.losses, self.statistics))


@dataclass(frozen=True)
class FreeErrors:
    """After every step: the relative difference of all weights as one vector, and of the worst tensor."""

    case: Case
    whole: list[float]
    worst: list[float]

    @property
    def bound(self) -> float:
        return FREE_BOUND if self.case.dtype == "float64" and self.case.zero_init else math.inf

    @property
    def passed(self) -> bool:
        return max(self.worst) <= self.bound


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


Spoil = Callable[[Emulated], None]


def prepare(processes: Processes, case: Case, spoil: Spoil | None) -> Emulated:
    """Both sides with the same weights. `spoil` changes the emulated side, for tests that must see it."""
    folder = Path(tempfile.mkdtemp(dir=processes.folder))
    emulated = Emulated(case, folder)
    processes.call("prepare", case, folder)
    for file in folder.iterdir():
        file.unlink()  # both sides have it mapped; the memory goes with them
    if spoil:
        spoil(emulated)
    return emulated


def compare_steps(processes: Processes, case: Case, spoil: Spoil | None = None) -> StepErrors:
    """Steps from the emulated side's weights, whose optimizer makes those of the next step.

    A ReLU whose input is within rounding of zero may be open on one side and closed on the other. The loss has no
    gradient there, and one such input among thousands can move a tensor's gradient by 1e-2: such gradients are then set
    aside and another batch is drawn. Losses and statistics are compared in any case.
    """
    emulated, errors, draw = prepare(processes, case, spoil), StepErrors(case), 0
    for step in range(case.steps):
        for _ in range(MAX_DRAWS):
            processes.start("compute", draw)
            gradients = emulated.compute(draw)
            losses, draw = processes.results(), draw + 1
            for chips, ours in zip(PASSES, emulated.losses, strict=True):
                theirs = sum(losses[chips.start : chips.stop])
                errors.losses |= Worst(abs(ours - theirs) / theirs, f"step {step + 1}, chips {chips.start} on")
            compared = processes.call("compare")
            for _, statistics, _ in compared:
                errors.statistics |= statistics
            worst = max((one for one, _, _ in compared), key=lambda one: one.error)
            kinked = 0 < max(size for _, _, size in compared) <= KINK
            if worst.error <= BOUNDS[case.dtype] or not kinked:
                break
            errors.redrawn += 1
            errors.redrawn_gradients |= worst
        errors.gradients |= worst
        emulated.update(gradients)
        processes.call("load")
    return errors


def compare_runs(processes: Processes, case: Case, spoil: Spoil | None = None) -> FreeErrors:
    """Steps in which each side updates its own weights, from the same start."""
    emulated, errors = prepare(processes, case, spoil), FreeErrors(case, [], [])
    for step in range(case.steps):
        processes.start("step", step)
        emulated.update(emulated.compute(step))
        processes.results()
        differences, weights, worst = zip(*processes.call("compare_weights"), strict=True)
        errors.whole.append(math.sqrt(sum(differences) / sum(weights)))
        errors.worst.append(max(worst))
    return errors


def step_rows(results: list[StepErrors]) -> list[tuple[str, ...]]:
    head = ("network", "dtype", "gradients (worst tensor)", "losses", "statistics", "bound", "steps", "set aside")
    rows = [head]
    for r in results:
        gradients, bound = f"{r.gradients.error:.1e} ({r.gradients.tensor})", f"{BOUNDS[r.case.dtype]:.0e}"
        aside = f"{r.redrawn} (up to {r.redrawn_gradients.error:.1e})" if r.redrawn else "0"
        errors = gradients, f"{r.losses.error:.1e}", f"{r.statistics.error:.1e}"
        rows.append((r.case.name, r.case.dtype, *errors, bound, str(r.case.steps), aside))
    return rows


def free_rows(results: list[FreeErrors]) -> list[tuple[str, ...]]:
    def head(case: Case) -> str:
        return f"{case.dtype}, {case.optimizer.upper()}, {'zero' if case.zero_init else 'one'}"

    rows = [("step", *(head(r.case) for r in results))]
    for step in range(1, STEPS + 1):
        rows.append((str(step), *(f"{r.whole[step - 1]:.0e} ({r.worst[step - 1]:.0e})" for r in results)))
    return [*rows, ("bound", *(f"({r.bound:.0e})" if r.bound < math.inf else "none" for r in results))]


def document(steps: list[StepErrors], free: list[FreeErrors], seconds: float) -> str:
    return TEXT.format(
        chips=CHIPS,
        pixels=steps[0].case.image_size,
        steps=markdown_table(step_rows(steps)),
        free=markdown_table(free_rows(free)),
        kink=KINK,
        rates=" and ".join(f"{rate:g} for {name.upper()}" for name, rate in LEARNING_RATES.items()),
        free_batch=free[0].case.sizes[0],
        last=free[-1].case.steps,
        whole=free[-1].whole[-1],
        worst=free[-1].worst[-1],
        torch=torch.__version__,
        device=describe_device("cpu"),
        seconds=seconds,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument("--write", action="store_true", help=f"make docs/{DOCUMENT.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, steps, free = time.perf_counter(), [], []
    with Processes() as processes:
        for compare, cases, results in ((compare_steps, STEP_CASES, steps), (compare_runs, FREE_CASES, free)):
            for case in cases:
                print(f"{time.perf_counter() - started:4.0f} s  {compare.__name__}: {case}", file=sys.stderr)
                results.append(compare(processes, case))
    passed = all(result.passed for result in (*steps, *free))
    if arguments.write:
        write_aside(DOCUMENT, document(steps, free, time.perf_counter() - started))
    if arguments.json:
        rows = {"steps": steps, "free": free}
        rows = {name: [dataclasses.asdict(r) | {"passed": r.passed} for r in of] for name, of in rows.items()}
        bounds = {"steps": BOUNDS, "free": FREE_BOUND}
        seconds = time.perf_counter() - started
        print(json.dumps(finite({"passed": passed, "bounds": bounds, "seconds": seconds} | rows)))
    else:
        print(markdown_table(step_rows(steps)), markdown_table(free_rows(free)), sep="\n\n")
        print(f"\n{'all bounds hold' if passed else 'A BOUND IS MISSED'}; {time.perf_counter() - started:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
