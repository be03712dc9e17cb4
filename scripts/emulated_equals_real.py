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
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.emulated_equals_real_sides import (  # noqa: E402
    CHIPS,
    LEARNING_RATES,
    PASSES,
    STEPS,
    Case,
    Emulated,
    Processes,
    Worst,
)
from train.metrics import finite, write_aside  # noqa: E402
from train.precision import describe_device  # noqa: E402
from train.report import markdown_table  # noqa: E402

DOCUMENT = ROOT / "docs" / "emulated_equals_real.md"
BOUNDS = {"float64": 1e-12, "float32": 1e-5}
FREE_BOUND = 1e-10
KINK = 1e-5
"""Largest input of a ReLU, relative to the root mean square of its layer, whose sign may be float32's rounding."""
MAX_DRAWS = 20

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
