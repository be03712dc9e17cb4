"""A published MLPerf result (result_0.txt of training v0.6 and later) as rows of a run.

Format: mlcommons/logging (mlperf_logging.mllog), ':::MLLOG {json}' from v0.7 on, ':::MLL <Unix seconds> <key>: {json}'
in v0.6, as the published logs have it (mlcommons/training_results_v0.6 to v2.0), which is more than the rules say: some
write no event_type, several ranks write the same line, and a block's end may stand before or after its evaluation. The
clock is the log's own: 0 at run_start, as MLPerf's rules time it. Every number is what others published; nothing of it
was measured or emulated here.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

MARK = ":::MLLOG"
V06 = re.compile(r":::MLL (\d+\.?\d*) (\w+): (\{.*)")
OLDER = (":::MLPv0.5", ":::MLLv0.5")
BENCHMARKS = ("resnet",)


@dataclass(frozen=True)
class Published:
    """rows: evaluations, as train/metrics' rows but with `published_s` as their only clock.

    seconds: run_start to run_stop. settings: key -> value of the log's hyperparameters and of who submitted it.
    """

    rows: list[dict]
    seconds: float
    status: str
    global_batch_size: int
    epochs: float
    eval_every: float
    eval_offset: float
    num_train: int
    num_eval: int
    settings: dict


def parse(lines: Iterable[str], sizes: tuple[int, int] = (1_281_167, 50_000)) -> Published:
    """Reads a log of one run; `sizes` are the images for training and evaluation where it doesn't state them.

    ValueError says which line or key is wrong or missing.
    """
    events = list(_events(lines))
    if not events:
        raise ValueError(f"no line has {MARK}; give a result_N.txt of MLPerf training v0.6 or later")
    settings: dict = {}
    for _, event in events:
        if event.get("value") is not None and event["key"] != "eval_accuracy":
            settings.setdefault(event["key"], event["value"])
    if settings.get("submission_benchmark", "resnet") not in BENCHMARKS:
        raise ValueError(f"submission_benchmark={settings['submission_benchmark']!r}: only resnet can be imported")
    start, (_, stop) = _first(events, "run_start")[1]["time_ms"], _first(events, "run_stop")
    batch = _whole(settings, "global_batch_size")
    num_train, num_eval = (
        _whole(settings, key, known) for key, known in zip(("train_samples", "eval_samples"), sizes, strict=True)
    )
    rows = _rows(events, start, max(1, num_train // batch))
    gaps = [after["epoch"] - before["epoch"] for before, after in zip(rows, rows[1:], strict=False)]
    every = min(gaps) if gaps else rows[0]["epoch"]
    return Published(
        rows=rows,
        seconds=(stop["time_ms"] - start) / 1000,
        status=str((stop.get("metadata") or {}).get("status", "unknown")),
        global_batch_size=batch,
        epochs=rows[-1]["epoch"],
        eval_every=every,
        eval_offset=rows[0]["epoch"] if rows[0]["epoch"] != every else 0,
        num_train=num_train,
        num_eval=num_eval,
        settings=settings,
    )


def _events(lines: Iterable[str]) -> Iterable[tuple[int, dict]]:
    """(line number, event); what a launcher wrote before the mark, such as a rank, is passed over."""
    for number, line in enumerate(lines, 1):
        if any(mark in line for mark in OLDER):
            raise ValueError(f"line {number}: the format of MLPerf training v0.5; v0.6 and later can be read")
        _, mark, text = line.partition(MARK)
        older = V06.search(line)
        if not (mark or older):
            continue
        try:
            if older:
                event = json.loads(older[3]) | {"time_ms": 1000 * float(older[1]), "key": older[2]}
            else:
                event = json.loads(text)
            event["key"], event["time_ms"] / 1
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"line {number}: {MARK} is not followed by an event with key and time_ms") from None
        yield number, event


def _first(events: list[tuple[int, dict]], key: str) -> tuple[int, dict]:
    for number, event in events:
        if event["key"] == key:
            return number, event
    raise ValueError(f"{key} is missing: the log of a whole run is needed")


def _whole(settings: dict, key: str, known: int | None = None) -> int:
    value = settings.get(key, known)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value != int(value):
        raise ValueError(f"{key}={value!r} must be a whole number of images, at least 1")
    return int(value)


def _rows(events: list[tuple[int, dict]], start_ms: float, steps_per_epoch: int) -> list[dict]:
    rows, epoch = [], None
    for number, event in events:
        metadata = event.get("metadata") or {}
        if event["key"] == "block_stop" and "first_epoch_num" in metadata:
            epoch = metadata["first_epoch_num"] + metadata.get("epoch_count", 1) - 1
        if event["key"] != "eval_accuracy":
            continue
        at, top1 = metadata.get("epoch_num", epoch), event.get("value")
        if isinstance(top1, bool) or not isinstance(top1, (int, float)) or not 0 <= top1 <= 1:
            raise ValueError(f"line {number}: eval_accuracy={top1!r} must be a fraction from 0 to 1")
        if not isinstance(at, (int, float)) or at <= 0 or (rows and at <= rows[-1]["epoch"]):
            raise ValueError(f"line {number}: an evaluation after epoch {at!r}: epochs must be given, above 0 and rise")
        seconds = (event["time_ms"] - start_ms) / 1000
        rows.append(
            {"kind": "eval", "step": round(at * steps_per_epoch), "epoch": float(at), "published_s": seconds}
            | {"values": {"eval/top1": float(top1)}}
        )
    if not rows:
        raise ValueError("eval_accuracy is missing: the log of a whole run is needed")
    return rows
