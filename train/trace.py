"""A run as a trace in Chrome's event format (opens in Perfetto): the emulated machine's lanes and this machine's.

Format: "Trace Event Format", complete events (ph X, microseconds) and name metadata (ph M). Only the first and the
last NUM_STEPS steps, those with a recovery from a fault, and the evaluations are drawn. Durations are those of the
rows; inside a step the order of the parts is schematic.
"""

import json

from train.metrics import finite

NUM_STEPS = 20
MAX_RECOVERIES = 100  # the first ones
MAX_EVALS = 500  # the last ones, so that the file stays under 2 MB

EMULATED, MEASURED = 1, 2  # process ids
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
    "measured/comm_s": "communication",
    "measured/eval_s": "evaluation",
}


def events(steps: list[dict], evals: list[dict], name: str) -> list[dict]:
    """Trace events of rows of kind step and eval."""
    found = process_names(EMULATED, f"{name}: emulated machine, emulated clock", EMULATED_LANES)
    found += process_names(MEASURED, f"{name}: this machine, measured clock", MEASURED_LANES)
    for row in steps:
        args = {"step": row["step"], "epoch": row["epoch"]}
        values = row["values"]
        begin = row["emulated_s"] - values["emulated/step_s"]
        for key in EMULATED_LANES:
            if values.get(key):
                found.append(event(EMULATED, EMULATED_LANES, key, begin, values[key], args))
                begin += values[key]
        end, step_s = row["measured_s"], values["measured/step_s"]
        args = {**args, "loss": values.get("train/loss"), "top1": values.get("train/top1")}
        found.append(event(MEASURED, MEASURED_LANES, "measured/step_s", end - step_s, step_s, args))
        if wait := min(values.get("measured/data_wait_s") or 0.0, step_s):
            found.append(event(MEASURED, MEASURED_LANES, "measured/data_wait_s", end - step_s, wait, args))
        if comm := min(values.get("measured/comm_s") or 0.0, step_s):
            found.append(event(MEASURED, MEASURED_LANES, "measured/comm_s", end - comm, comm, args))
    for row in evals[-MAX_EVALS:]:
        args = {"step": row["step"], "epoch": row["epoch"], "top1": row["values"]["eval/top1"]}
        for process, lanes, clock in ((EMULATED, EMULATED_LANES, "emulated"), (MEASURED, MEASURED_LANES, "measured")):
            seconds = row["values"][f"{clock}/eval_s"]
            found.append(event(process, lanes, f"{clock}/eval_s", row[f"{clock}_s"] - seconds, seconds, args))
    return found


def dumps(steps: list[dict], evals: list[dict], name: str) -> str:
    """The whole file; a value that is not finite becomes null."""
    text = {
        "displayTimeUnit": "ms",
        "otherData": {"emulated": "positions on the emulated clock", "measured": "positions on the measured clock"},
        "traceEvents": events(steps, evals, name),
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
