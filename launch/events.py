"""What befalls a run's workers: each event as a line of events.jsonl in the run folder, and in words for people."""

import json
import sys
from pathlib import Path

from train.metrics import finite

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends events, dictionaries of plain data with `time` (Unix seconds) and `event`; says them on stderr.

    A disk that is full loses the line, not the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_FILE

    def __call__(self, event: dict) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(event), allow_nan=False) + "\n")
        except OSError as error:
            print(f"launch.run: {self._path}: {error.strerror}; this event is not written down", file=sys.stderr)
        if words := sentence(event):
            print(f"launch.run: {words}", file=sys.stderr, flush=True)


def sentence(event: dict) -> str | None:
    """An event in words; None for what is only of interest afterwards."""
    match event["event"]:
        case "worker_lost":
            first, last = event["hosts"]
            return f"worker {event['worker']} (hosts {first}-{last}) is lost, {event['kind']}: {event['reason']}"
        case "worker_starting":
            return f"worker {event['worker']}: a new one starts beside the others"
        case "worker_given_up":
            return f"worker {event['worker']} is not replaced: max_restarts is used up; the others go on without"
        case "connection_lost":
            return f"worker {event['worker']} has lost a connection: {event['reason']}"
        case "training":
            who = ", ".join(map(str, event["members"]))
            where = {
                "memory": "with nothing lost",
                "checkpoint": f"from the last checkpoint, {event['steps_repeated']} step(s) again",
                "beginning": "from the beginning: there was no checkpoint",
            }[event["source"]]
            lines = [f"worker(s) {who} train on from step {event['step']}, {where}", *event["defects"]]
            return "; ".join(lines)
        case "note":
            return f"worker {event['worker']}: {event['text']}"
    return None
