"""A finished run on another machine: the same steps and evaluations on that machine's emulated clock.

The clock is train/sim/clock's: start-up, then each step and each evaluation in the order of the rows. What was computed
stays as it was.
"""

from collections.abc import Iterable

from train import emulator_faults
from train.emulator import Emulator
from train.sim.step import StepTime

CLOCKS = ("emulated", "published")
"""Which clock a run's rows were on: a training run's emulated one, or that of a published log."""
COMPUTED = ("train", "eval", "chips")
"""Groups of tags that have nothing to do with a clock."""


def own_clock(row: dict) -> str:
    """ValueError where a row is on no known clock."""
    for clock in CLOCKS:
        if f"{clock}_s" in row:
            return clock
    raise ValueError(f"a row of step {row.get('step')} has no time: it is of no run of this program")


def retime(rows: Iterable[dict], made: Emulator) -> list[dict]:
    """Rows of kind step and eval (see train/metrics) with emulated times of `made`, and nothing measured or published.

    Every step is one of the run's global batch, which `made` was built for. Faults of `made` move its clock alone.
    """
    rows = list(rows)
    toll = emulator_faults.toll(made, max((row["step"] for row in rows), default=0))
    eval_s, evals, found = made.eval_s(made.num_eval), 0, []
    for row in rows:
        evals += row["kind"] == "eval"
        computed = {tag: value for tag, value in row["values"].items() if tag.partition("/")[0] in COMPUTED}
        timed = _of_step(toll.step(row["step"]), made) if row["kind"] == "step" else {"emulated/eval_s": eval_s}
        seconds = made.startup_s + toll.train_s(row["step"]) + evals * eval_s
        found.append(
            {"kind": row["kind"], "step": row["step"], "epoch": row["epoch"], "emulated_s": seconds}
            | {"values": computed | timed}
        )
    return found


def _of_step(step: StepTime, made: Emulator) -> dict[str, float]:
    parts = {f"emulated/{name}": seconds for name, seconds in vars(step).items() if name != "recovery_s" or seconds}
    return {"emulated/images_per_s": made.global_batch_size / step.step_s, "emulated/step_s": step.step_s, **parts}


def result(before: list[dict], rows: list[dict], made: Emulator, target_top1: float) -> dict:
    """What `Emulator.run` returns, of the steps and evaluations that the run made, and when it reached its target.

    before: the run's own rows; rows: the re-timed ones. time_to_train_s is the clock at the run's end.
    """
    if not rows:
        raise ValueError("the run has no steps and no evaluations in metrics.jsonl: there is nothing to re-time")
    end, clock = rows[-1], own_clock(before[-1])
    toll = emulator_faults.toll(made, end["step"])
    parts = vars(toll.parts(end["step"]))
    parts["other_s"] += parts.pop("recovery_s")
    pairs = [(old, new) for old, new in zip(before, rows, strict=True) if new["kind"] == "eval"]
    reached = next((pair for pair in pairs if pair[1]["values"]["eval/top1"] >= target_top1), None)
    was_s, at_s = (reached[0][f"{clock}_s"], reached[1]["emulated_s"]) if reached else (None, None)
    top1s = [new["values"]["eval/top1"] for _, new in pairs]
    return made.run() | {
        "time_to_train_s": end["emulated_s"],
        "interval_s": list(made.interval_s(end["emulated_s"])),
        "steps": end["step"],
        "epochs": end["epoch"],
        "epochs_interval": [end["epoch"], end["epoch"]],
        "epochs_from": "the run",
        "evaluations": len(pairs),
        **parts,
        **({"faults": toll.report(end["step"])} if made.faults else {}),
        "eval_s": len(pairs) * made.eval_s(made.num_eval),
        "startup_s": made.startup_s,
        "target_top1": target_top1,
        "top1": top1s[-1] if top1s else None,
        "reached": reached is not None,
        "time_to_target_s": at_s,
        "target_interval_s": list(made.interval_s(at_s)) if at_s else None,
        "before": {"label": clock, "time_to_target_s": was_s, "seconds": before[-1][f"{clock}_s"]},
        "curve": [
            {"epoch": new["epoch"], "top1": top1, "before_s": old[f"{clock}_s"], "emulated_s": new["emulated_s"]}
            for (old, new), top1 in zip(pairs, top1s, strict=True)
        ],
    }
