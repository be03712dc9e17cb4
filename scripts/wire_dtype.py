"""What fp16 and bf16 sums do to gradients on 8, 64 and 1,024 chips: errors, range, stagnation, and a short training.

    python scripts/wire_dtype.py [--json] [--write]

Per-chip gradients of a small residual network on scikit-learn's digits are added in the order of each plan, every sum
rounded to the wire's dtype, and compared with their sum in float64. --write makes docs/wire_dtype.md and .png.
Bounds: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, ch. 4: with d sums in a row the error is
at most d u times the sum of the magnitudes (u: half the spacing at 1), and about sqrt(d) u if the roundings are random.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.wire_dtype_study import CHIP_BATCH, CHIPS, IMAGE_SIZE, PLANS, STEPS, TRAINED_CHIPS, study  # noqa: E402
from train.metrics import write_aside  # noqa: E402
from train.report import markdown_table  # noqa: E402

DOCS = ROOT / "docs"


def percent(share: float) -> str:
    return "0" if share == 0 else f"{100 * share:.2g} %" if share < 0.5 else f"{100 * share:.1f} %"


def pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Each row of the network at the start with the same row of the trained one."""
    start, trained = ([row for row in rows if row["state"] == state] for state in ("start", "trained"))
    return list(zip(start, trained, strict=True))


def tables(found: dict) -> dict[str, str]:
    grown = [["dtype", "plan", "chips", "d", "error, start", "trained", "worst layer"]]
    grown[0] += ["largest of an element", "sqrt(d) u", "d u"]
    stagnant = [["dtype", "plan", "chips", "equal gradients", "magnitudes, start", "trained"]]
    for start, trained in pairs(found["growth"]):
        if start["dtype"] == "fp32" and start["chips"] < max(CHIPS):
            continue
        name = [start["dtype"], start["plan"], f"{start['chips']:,}"]
        both = [max(start[key], trained[key]) for key in ("worst_layer", "worst_measured")]
        errors = [start["error"], trained["error"], *both, start["random_bound"], start["worst_bound"]]
        grown.append([*name, str(start["sums_in_a_row"]), *map(percent, errors)])
        if start["chips"] == max(CHIPS):
            same = start["error_of_equal_gradients"], start["error_of_magnitudes"], trained["error_of_magnitudes"]
            stagnant.append([*name, *map(percent, same)])
    ranges = [["chips", "loss scale", "divided by chips", "vanished, start", "trained", "overflowed, start", "trained"]]
    for start, trained in pairs(found["range"]):
        if start["dtype"] == "fp16":
            shares = [row[key] for key in ("lost", "overflowed") for row in (start, trained)]
            name = [f"{start['chips']:,}", f"{start['loss_scale']:,}", f"{start['divided']} the sum"]
            ranges.append([*name, *map(percent, shares)])
    trainings = [["sums", "loss scale", "loss, last 5 steps", "top-1", "steps skipped", "weights apart from the first"]]
    for row in found["training"]:
        numbers = [f"{row['loss']:.3f}", percent(row["top1"]), str(row["skipped"]), percent(row["weights_apart"])]
        trainings.append([f"{row['dtype']}, {row['plan']}", f"{row['loss_scale']:,}", *numbers])
    found_in = {"growth": grown, "stagnation": stagnant, "range": ranges, "training": trainings}
    return {name: markdown_table(rows) for name, rows in found_in.items()}


def document(found: dict) -> str:
    parts, most = tables(found), max(CHIPS)
    at = {(row["state"], row["chips"], row["plan"], row["dtype"]): row for row in found["growth"]}
    ring_bf16, tree_bf16, ring_fp16, tree_fp16 = (
        at["start", most, plan, dtype] for dtype in ("bf16", "fp16") for plan in ("ring", "hierarchical")
    )
    short = at["start", min(CHIPS), "halving_doubling", "bf16"]
    near = {(r["state"], r["loss_scale"], r["divided"]): r for r in found["range"] if r["chips"] == most}
    top1 = [row["top1"] for row in found["training"]]
    return f"""# What 16 bits on the wire do to a sum of gradients

Real gradients of {CHIPS[0]}, {CHIPS[1]} and {CHIPS[2]:,} emulated chips, {CHIP_BATCH} images each, of a residual
network with {found["parameters"]:,} parameters on scikit-learn's digits ({IMAGE_SIZE} px), at the start and after
{STEPS} steps. They are added in the order of each plan, every chip's gradients and every sum rounded to the wire's
dtype (`train/comm/wire.py`), and compared with their sum in float64. That is what a run does with
`gradient_sum=plan numerics=fast workers=1`; with `gradient_sum=fp32` the wire's dtype only moves the clock.
`python scripts/wire_dtype.py --write` repeats all of it in two to three minutes of one core.

![Error of the sum by number of chips, and loss of a short training](wire_dtype.png)

## How the error grows

d: sums in a row that an addend goes through. u: half the spacing at 1, 2^-11 in fp16, 2^-8 in bf16, 2^-24 in fp32.
"Error" and "worst layer" (of both states) are relative to the norm of the exact sum. "Largest of an element" is
relative to the sum of that element's magnitudes: it is at most d u, and about sqrt(d) u where roundings are
independent (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, ch. 4). The gradients are scaled so
that nothing leaves fp16's range.

{parts["growth"]}

- The order matters, not the number of chips: on {most:,} chips the hierarchical plan (d = {tree_fp16["sums_in_a_row"]})
  errs by {percent(tree_fp16["error"])} in fp16 and {percent(tree_bf16["error"])} in bf16, no more than on
  {min(CHIPS)} chips; a ring (d = {ring_fp16["sums_in_a_row"]:,}) by {percent(ring_fp16["error"])} and
  {percent(ring_bf16["error"])}.
- Only short sums come near the worst case: with d = {short["sums_in_a_row"]} the worst bf16 element of the start errs
  by {short["worst_measured"] / short["worst_bound"]:.2f} d u, with d = {ring_bf16["sums_in_a_row"]:,} by
  {ring_bf16["worst_measured"] / ring_bf16["worst_bound"]:.2f} d u, as roundings up and down cancel.
- But the bf16 ring's element is {ring_bf16["worst_measured"] / ring_bf16["random_bound"]:.1f} sqrt(d) u, the fp16 one's
  {ring_fp16["worst_measured"] / ring_fp16["random_bound"]:.1f}: in bf16 the roundings of a long chain are no longer
  independent. They stagnate:

## Stagnation

A chain swallows addends below half its own spacing: 256 + 1 = 256 in bf16, 2048 + 1 = 2048 in fp16. "Equal
gradients": every chip sends the same 1. "Magnitudes": every chip sends the absolute values of its gradients.

{parts["stagnation"]}

The bf16 ring stops at 256 equal addends, however many follow. The more the chips agree, the worse. Trees add numbers
of like size: they lose none of equal addends, and as little of magnitudes as of gradients.

## Range of fp16

Hierarchical plan. "Vanished": elements of chips' gradients that fp16 rounds to 0. "Overflowed": elements of the sum
that are infinite; a single one has a run with a loss scale skip the step. Dividing before the sum is a loss scale
divided by the chips: powers of two move the range and cost no digits (the last row is the loss scale of 1).

{parts["range"]}

On {most:,} chips a loss scale of 1,024 is too much for the sum at the start
({percent(near["start", 1024, "after"]["overflowed"])} of it overflows). Divided before the sum nothing overflows; but
then, without a loss scale, {percent(near["trained", 1, "before"]["lost"])} of the trained network's elements vanish.
They are its smallest, and hardly move the error of the sum. In bf16, whose range is fp32's, neither happens.

## A short training

{TRAINED_CHIPS} chips x {CHIP_BATCH} images, {STEPS} steps of SGD from the same weights; top-1 over the held-out images.

{parts["training"]}

Top-1 lies between {percent(min(top1))} and {percent(max(top1))} without following the errors above. The second row is
the control: fp32 in another order, whose weights drift apart by {percent(found["training"][1]["weights_apart"])}, by
rounding alone. In loss and top-1, 16 bits on the wire can't be told from it on {TRAINED_CHIPS} chips. This is one
seed, and says nothing of a ring of {most:,} chips in bf16, which was not trained, nor of larger networks, whose
gradients are smaller and vanish sooner.
"""


def draw(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = dict(zip(PLANS, ("tab:red", "tab:blue", "tab:green"), strict=True))
    for dtype, marker in {"bf16": "s", "fp16": "o"}.items():
        for plan, colour in colours.items():
            of_line = {"state": "start", "dtype": dtype, "plan": plan}
            rows = [row for row in found["growth"] if row | of_line == row]
            left.loglog(CHIPS, [row["error"] for row in rows], marker=marker, color=colour, label=f"{dtype} {plan}")
            if plan != "halving_doubling":
                left.loglog(CHIPS, [row["random_bound"] for row in rows], ":", color=colour, linewidth=1)
    left.set(xlabel="chips", ylabel="relative error of the sum", title="Gradients at the start; dotted: sqrt(d) u")
    left.set_xticks(CHIPS, [f"{chips:,}" for chips in CHIPS])
    left.minorticks_off()
    left.legend(fontsize=8)
    for row in found["training"]:
        label = f"{row['dtype']} {row['plan']}" + (
            f", loss scale {row['loss_scale']:,}" if row["dtype"] == "fp16" else ""
        )
        style = {"fp32": "-", "fp16": "--", "bf16": ":"}[row["dtype"]]
        right.plot(range(1, STEPS + 1), row["losses"], style, color=colours[row["plan"]], label=label, linewidth=1)
    right.set(xlabel="step", ylabel="training loss", title=f"{TRAINED_CHIPS} chips, digits")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="write docs/wire_dtype.md and docs/wire_dtype.png")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the network is small, and the figures are those of one order of the sums inside a chip
    found = study()
    if options.json:
        print(json.dumps(found))
    else:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables(found).items()))
        print(f"\n{found['seconds']:.0f} s")
    if options.write:
        DOCS.mkdir(exist_ok=True)
        draw(found, DOCS / "wire_dtype.png")
        write_aside(DOCS / "wire_dtype.md", document(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
