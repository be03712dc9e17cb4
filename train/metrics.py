"""What a run writes while it trains: rows, the file metrics.jsonl, and the sinks that take a row.

A row is {"kind": "step" | "eval", "step", "epoch", "measured_s", "emulated_s", "values": {tag: float}}. metrics.jsonl
is the truth; TensorBoard's event files are a view of it and are made anew from it when a run is resumed.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from train.tensorboard import TensorBoardSink

METRICS_FILE = "metrics.jsonl"
RETRY_S = 30.0


class Sink(Protocol):
    def log(self, row: dict) -> None: ...

    def close(self, status: str = "done") -> None: ...


def step_row(record) -> dict:
    """The row of a trainer's StepRecord. Images per second are those of the training step alone, on either clock."""
    emulated = record.emulated
    values = {
        "train/loss": record.loss,
        "train/top1": record.top1,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "train/loss_scale": record.loss_scale,
        "train/skipped_steps": record.skipped_steps,
        "measured/images_per_s": record.images / record.step_s if record.step_s else None,
        "measured/step_s": record.step_s,
        "measured/data_wait_s": record.data_wait_s,
        "measured/comm_s": record.comm_s,
        "measured/update_s": record.update_s,
        "measured/checkpoint_s": record.checkpoint_s or None,
        "emulated/images_per_s": record.images / emulated.step_s if emulated.step_s else None,
        "emulated/step_s": emulated.step_s,
        "emulated/compute_s": emulated.compute_s,
        "emulated/exposed_comm_s": emulated.exposed_comm_s,
        "emulated/straggler_s": emulated.straggler_s,
        "emulated/input_s": emulated.input_s,
        "emulated/other_s": emulated.other_s,
        "emulated/recovery_s": emulated.recovery_s or None,
        **record.faults,
    }
    return _row("step", record, values)


def eval_row(record) -> dict:
    """The row of a trainer's EvalRecord; `seconds` is what the evaluation took here."""
    values = {
        "eval/top1": record.top1,
        "eval/loss": record.loss,
        "measured/eval_s": record.seconds,
        "emulated/eval_s": record.emulated_eval_s,
        **record.chips,
    }
    return _row("eval", record, values)


def _row(kind: str, record, values: dict) -> dict:
    return {
        "kind": kind,
        "step": int(record.step),
        "epoch": float(record.epoch),
        "measured_s": float(record.measured_s),
        "emulated_s": float(record.emulated_s),
        "values": {tag: float(value) for tag, value in values.items() if value is not None},
    }


class JsonlSink:
    """Appends rows to metrics.jsonl, one JSON object a line, each at once; a value that is not finite is null.

    What a full disk does not take (OSError) is written with the next row, or at the end.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._file = open(Path(run_dir) / METRICS_FILE, "ab", buffering=0)
        self._pending = b""

    def log(self, row: dict) -> None:
        self._pending += json_line(row).encode()
        self._write()

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def close(self, status: str = "done") -> None:
        with self._file:
            self._write()


class ViewSink:
    """A view of metrics.jsonl that a full disk breaks (OSError): it is made anew at the end, or after RETRY_S.

    `make` returns a sink that has all rows of the file.
    """

    def __init__(self, make: Callable[[], Sink]) -> None:
        self._make = make
        self._sink: Sink | None = make()
        self._broken_at = 0.0

    def log(self, row: dict) -> None:
        if self._sink is None and time.monotonic() - self._broken_at < RETRY_S:
            return
        try:
            if self._sink is None:
                self._sink = self._make()  # the row is in the file by now
            else:
                self._sink.log(row)
        except OSError:
            self._sink, self._broken_at = None, time.monotonic()
            raise

    def close(self, status: str = "done") -> None:
        try:
            if self._sink is not None:
                self._sink.close(status)
                return
        except OSError:
            self._sink = None
        self._make().close(status)


def json_line(row: dict) -> str:
    """A row as metrics.jsonl has it."""
    return json.dumps(finite(row), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Plain data with null for every number that is not finite: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(run_dir: str | Path) -> Iterator[dict]:
    """The rows of a run folder in order; none if it has no metrics yet. A last line cut off by a crash is left out."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
                row["values"] = {tag: math.nan if value is None else value for tag, value in row["values"].items()}
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: not a row of metrics; delete the line") from None
            yield row


def write_aside(path: Path, text: str) -> None:
    """Replace a file so that no reader ever sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def truncate(run_dir: str | Path, last_step: int) -> list[dict]:
    """Drop the rows after `last_step` from metrics.jsonl, in one rename, and return those kept."""
    rows = [row for row in read_rows(run_dir) if row["step"] <= last_step]
    if rows or (Path(run_dir) / METRICS_FILE).exists():
        write_aside(Path(run_dir) / METRICS_FILE, "".join(map(json_line, rows)))
    return rows


def open_sinks(
    run_dir: str | Path, config: dict, *, resumed_step: int = 0, started_at_wall: float | None = None, claim=None
) -> list[Sink]:
    """The sinks of a new run, or of one resumed after `resumed_step` finished steps.

    What an earlier attempt wrote beyond that step is dropped and TensorBoard's files are replayed from the rows kept,
    so no point is there twice. `started_at_wall` (Unix seconds at which the measured clock stood at 0) is by default
    such that the last row kept lies at the present moment. `claim` is the record whose target is drawn as a line.
    """
    rows = truncate(run_dir, resumed_step)
    if started_at_wall is None:
        started_at_wall = time.time() - (rows[-1]["measured_s"] if rows else 0.0)

    def board() -> TensorBoardSink:
        shutil.rmtree(Path(run_dir) / "tb", ignore_errors=True)
        made = TensorBoardSink(run_dir, started_at_wall, config, claim)
        for row in read_rows(run_dir):
            made.log(row)
        return made

    return [JsonlSink(run_dir), ViewSink(board)]
