"""A run as a trace in Chrome's event format (opens in Perfetto): the emulated machine's lanes and this machine's.

Format: "Trace Event Format", complete events (ph X, microseconds) and name metadata (ph M). Perfetto takes the events
of a lane for calls of one thread: they may nest, but not overlap in part (its docs/reference/synthetic-track-event).
Only the first and the last NUM_STEPS steps, those with a recovery from a fault, and the evaluations are drawn.
Durations are those of the rows. An emulated step that costs what the machine's own does is drawn as the emulator has
it, with its links; inside any other, and inside a measured one, the order of the parts is schematic.
"""

import json
import math
from dataclasses import dataclass, field, fields, replace

from train.metrics import finite
from train.sim.step import StepTime

NUM_STEPS = 20
MAX_RECOVERIES = 100  # the first ones
MAX_EVALS = 500  # the last ones, so that the file stays under 2 MB

EMULATED, MEASURED, LINKS = 1, 2, 3  # process ids
# emulated lanes in the order the parts of a step are drawn: value of the row -> lane
EMULATED_LANES = {
    "emulated/input_s": "input",
    "emulated/compute_s": "compute",
    "emulated/straggler_s": "waiting for the slowest chip",
    "emulated/exposed_comm_s": "exposed communication",
    "emulated/other_s": "other",
    "emulated/recovery_s": "recovering from a fault",
    "emulated/eval_s": "evaluation",
}
MEASURED_LANES = {
    "measured/step_s": "step",
    "measured/data_wait_s": "waiting for data",
    "compute": "compute",
    "measured/comm_s": "waiting for the all-reduce",
    "measured/update_s": "update",
    "measured/eval_s": "evaluation",
    "measured/checkpoint_s": "checkpoint",
}


@dataclass(frozen=True)
class Part:
    """Something that a lane does, from `begin_s` after the begin of the step on."""

    lane: str
    """Its key."""
    begin_s: float
    seconds: float
    name: str = ""
    args: dict = field(default_factory=dict)

    def event(self, process: int, lanes: dict[str, str], step_begin_s: float, args: dict) -> dict:
        return event(process, lanes, self.lane, step_begin_s + self.begin_s, self.seconds, args | self.args, self.name)


@dataclass(frozen=True)
class Drawing:
    """A step of an emulated machine as it goes on: see train/emulator_trace."""

    step: StepTime
    chip_lanes: dict[str, str]
    chip: list[Part]
    """Of the mean chip; the keys of its lanes are those of StepTime."""
    title: str
    """Of the links."""
    link_lanes: dict[str, str]
    links: list[Part]

    def links_within_the_step(self) -> list[Part]:
        """Cut where the step ends: an all-reduce that the chip's rate holds already may outlast it (emulator_trace)."""
        end_s = self.step.step_s
        early = [part for part in self.links if part.begin_s < end_s]
        return [replace(part, seconds=min(part.seconds, end_s - part.begin_s)) for part in early]

    def shows(self, values: dict) -> bool:
        """Whether a row's step is this one: a fault may change its price, an epoch's last step be smaller."""
        return all(
            math.isclose(values.get(f"emulated/{part.name}", 0.0), getattr(self.step, part.name), abs_tol=1e-12)
            for part in fields(StepTime)
        )


def events(steps: list[dict], evals: list[dict], name: str, drawing: Drawing | None = None) -> list[dict]:
    """Trace events of rows of kind step and eval; without `drawing` the links are left out."""
    found = process_names(EMULATED, f"{name}: emulated machine, emulated clock", EMULATED_LANES)
    found += process_names(MEASURED, f"{name}: this machine, measured clock", MEASURED_LANES)
    if drawing:
        found += process_names(LINKS, f"{drawing.title}, emulated clock", drawing.link_lanes)
    for row in steps:
        found += _emulated(row, drawing) + _measured(row)
    for row in evals[-MAX_EVALS:]:
        args = {"step": row["step"], "epoch": row["epoch"], "top1": row["values"]["eval/top1"]}
        for process, lanes, clock in ((EMULATED, EMULATED_LANES, "emulated"), (MEASURED, MEASURED_LANES, "measured")):
            seconds = row["values"][f"{clock}/eval_s"]
            found.append(event(process, lanes, f"{clock}/eval_s", row[f"{clock}_s"] - seconds, seconds, args))
    return found


def _emulated(row: dict, drawing: Drawing | None) -> list[dict]:
    values, args = row["values"], {"step": row["step"], "epoch": row["epoch"]}
    begin = row["emulated_s"] - values["emulated/step_s"]
    if drawing and drawing.shows(values):
        lanes = {f"emulated/{key}": lane for key, lane in drawing.chip_lanes.items()}
        assert lanes.items() <= EMULATED_LANES.items(), lanes
        chip = [replace(part, lane=f"emulated/{part.lane}") for part in drawing.chip]
        return [
            *(part.event(EMULATED, EMULATED_LANES, begin, args) for part in chip),
            *(part.event(LINKS, drawing.link_lanes, begin, args) for part in drawing.links_within_the_step()),
        ]
    found = []
    for key in EMULATED_LANES:
        if values.get(key):
            found.append(event(EMULATED, EMULATED_LANES, key, begin, values[key], args))
            begin += values[key]
    return found


def _measured(row: dict) -> list[dict]:
    """A checkpoint was written before the step; what is neither waiting, summing nor updating counts as compute."""
    values = row["values"]
    args = {"step": row["step"], "epoch": row["epoch"], "loss": values.get("train/loss")}
    args["top1"] = values.get("train/top1")
    step_s, saving = values["measured/step_s"], values.get("measured/checkpoint_s") or 0.0
    begin = row["measured_s"] - step_s
    parts = {"measured/checkpoint_s": (begin - saving, saving), "measured/step_s": (begin, step_s)}
    end = row["measured_s"]
    for key in ("measured/update_s", "measured/comm_s"):
        seconds = min(values.get(key) or 0.0, end - begin)
        end -= seconds
        parts[key] = end, seconds
    wait = min(values.get("measured/data_wait_s") or 0.0, end - begin)
    parts |= {"measured/data_wait_s": (begin, wait), "compute": (begin + wait, end - begin - wait)}
    return [
        event(MEASURED, MEASURED_LANES, key, at, seconds, args) for key, (at, seconds) in parts.items() if seconds > 0
    ]


def dumps(steps: list[dict], evals: list[dict], name: str, drawing: Drawing | None = None) -> str:
    """The whole file; a value that is not finite becomes null."""
    text = {
        "displayTimeUnit": "ms",
        "otherData": {"emulated": "positions on the emulated clock", "measured": "positions on the measured clock"},
        "traceEvents": events(steps, evals, name, drawing),
    }
    return json.dumps(finite(text), allow_nan=False, separators=(",", ":"))


def process_names(process: int, name: str, lanes: dict[str, str]) -> list[dict]:
    """Metadata that names a process and its lanes (key -> name), in their order."""
    named = [{"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}}]
    for thread, lane in enumerate(lanes.values(), 1):
        named.append({"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": lane}})
        named.append(
            {"ph": "M", "pid": process, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}
        )
    return named


def event(
    process: int, lanes: dict[str, str], key: str, begin_s: float, seconds: float, args: dict, name: str = ""
) -> dict:
    """A complete event; whole nanoseconds, so that events which follow each other touch and never overlap."""
    begin = round(1e6 * max(0.0, begin_s), 3)
    return {
        "ph": "X",
        "pid": process,
        "tid": list(lanes).index(key) + 1,
        "name": name or lanes[key],
        "ts": begin,
        "dur": round(round(1e6 * (max(0.0, begin_s) + seconds), 3) - begin, 3),
        "args": args,
    }
