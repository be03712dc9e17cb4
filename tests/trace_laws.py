"""What Perfetto needs of a trace file: the schema of the phases that are used here, and laws that no schema can say.

Chrome's "Trace Event Format": complete events (X) have name, ts, dur, pid and tid, times in microseconds; metadata (M)
name processes and threads. Perfetto takes the events of a thread for calls, which nest and never overlap in part (its
docs/reference/synthetic-track-event), and keeps whole nanoseconds.
"""

import json
from collections import defaultdict

from jsonschema import Draft202012Validator

WHOLE, TEXT = {"type": "integer", "minimum": 0}, {"type": "string", "minLength": 1}
METADATA = {"process_name": {"name": TEXT}, "thread_name": {"name": TEXT}, "thread_sort_index": {"sort_index": WHOLE}}


def _object(**properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


COMPLETE = _object(
    ph={"const": "X"},
    pid=WHOLE,
    tid=WHOLE,
    name=TEXT,
    ts={"type": "number", "minimum": 0},
    dur={"type": "number", "exclusiveMinimum": 0},
    args={"type": "object"},
)
NAMING = [
    _object(ph={"const": "M"}, pid=WHOLE, tid=WHOLE, name={"const": name}, args=_object(**args))
    for name, args in METADATA.items()
]
SCHEMA = _object(
    displayTimeUnit={"enum": ["ms", "ns"]},
    otherData={"type": "object", "additionalProperties": {"type": "string"}},
    traceEvents={"type": "array", "items": {"oneOf": [COMPLETE, *NAMING]}},
)


def checked(text: str) -> dict[tuple[int, str], list[dict]]:
    """(process, lane) -> its events in time, of a file that keeps all of it; AssertionError for one that does not."""
    Draft202012Validator.check_schema(SCHEMA)
    content = json.loads(text, parse_constant=lambda word: _refuse(f"{word} is not JSON"))
    for error in Draft202012Validator(SCHEMA).iter_errors(content):
        _refuse(f"{error.json_path}: {error.message[:300]}")
    events = content["traceEvents"]
    processes = [event["pid"] for event in events if event["name"] == "process_name"]
    assert len(processes) == len(set(processes)), "a process is named twice"
    names: dict[tuple[int, int], str] = {}
    for event in events:
        if event["ph"] == "M" and event["name"] == "thread_name":
            assert (event["pid"], event["tid"]) not in names, f"a lane is named twice: {event}"
            names[event["pid"], event["tid"]] = event["args"]["name"]
    assert len({(pid, name) for (pid, _), name in names.items()}) == len(names), "two lanes of a process have one name"
    lanes = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert (event["pid"], event["tid"]) in names and event["pid"] in processes, (
                f"nobody names its lane: {event}"
            )
            lanes[event["pid"], names[event["pid"], event["tid"]]].append(event)
    for lane, found in lanes.items():
        found.sort(key=lambda event: (event["ts"], -event["dur"]))
        _nests(lane, found)
    return lanes


def _nests(lane: tuple[int, str], events: list[dict]) -> None:
    """Every event lies apart from the others of its lane, or wholly inside."""
    around: list[int] = []  # when those that are open end
    for event in events:
        begin, end = nanoseconds(event["ts"]), nanoseconds(event["ts"] + event["dur"])
        while around and around[-1] <= begin:
            around.pop()
        assert not around or end <= around[-1], f"lane {lane}: {event} overlaps another in part"
        around.append(end)


def nanoseconds(microseconds: float) -> int:
    return round(1000 * microseconds)


def seconds(events: list[dict]) -> float:
    """All of them together."""
    return sum(nanoseconds(event["dur"]) for event in events) / 1e9


def _refuse(problem: str) -> None:
    raise AssertionError(problem)
