"""Run folders and published records -> report.md and report.json: claimed, emulated and measured side by side.

What was computed (accuracy, images per second here) is measured; what the modelled machine would have shown is
emulated; what others published is claimed. Nothing is reported that was not reached: without the target there is no
time to target.
"""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from train import report_faults
from train.conditions import (
    Condition,
    as_count,
    as_interval,
    as_number,
    as_percent,
    as_rate,
    as_seconds,
    conditions,
    to_fraction,
)
from train.metrics import read_rows, write_aside
from train.records import Record, find, load

WIDTH = 100

NOT_TRAINED = {
    "published.json": "a published result, imported: nothing of it was measured or emulated",
    "retimed.json": "a run re-timed on another machine: nothing of it was measured",
}
"""Files that mark a folder which only looks like a run's."""


@dataclass(frozen=True)
class RunReport:
    run_dir: Path
    markdown: str
    data: dict


@dataclass(frozen=True)
class Report:
    runs: list[RunReport]

    @property
    def text(self) -> str:
        several = ["\n".join(report_faults.beside([run.data for run in self.runs])) + "\n"] if self.runs[1:] else []
        return "\n".join([*(run.markdown for run in self.runs), *several])


def report(run_dirs: list[str | Path], records: list[Record] | None = None) -> Report:
    """Reads the folders, writes report.md and report.json into each; ValueError if one is not a run folder."""
    records = load() if records is None else records
    runs = [_report(Path(folder), records) for folder in run_dirs]
    for run in runs:
        write_aside(run.run_dir / "report.md", run.markdown)
        write_aside(run.run_dir / "report.json", json.dumps(run.data, indent=2) + "\n")
    return Report(runs)


def _report(run_dir: Path, records: list[Record]) -> RunReport:
    config = _read_config(run_dir)
    for name, words in NOT_TRAINED.items():
        if (run_dir / name).exists():
            raise ValueError(f"{run_dir}: {words}; a report needs a run that was trained here")
    result = _read_json(run_dir / "result.json") or _unfinished(run_dir)
    contract = (_read_json(run_dir / "env.json") or {}).get("contract") or {}
    named = config.get("claim") or {}
    claim = find(records, named["record"]) if named.get("record") else None
    neighbours = [find(records, id) for id in named.get("neighbours") or []]
    columns = {"claimed": _claimed(claim), "emulated": _emulated(result), "measured": _measured(result)}
    differing = conditions(config, result, claim) if claim else []
    data = {
        "run": run_dir.name,
        "status": result["status"],
        "error": result.get("error"),
        "reached": bool(result.get("reached")),
        **columns,
        "conditions": [asdict(condition) for condition in differing],
        "claim": asdict(claim) if claim else None,
        "neighbours": [asdict(record) for record in neighbours],
        "data_notes": (result.get("data") or {}).get("notes") or [],
        "notes": result.get("notes") or [],
        "contract": contract,
        "time_to_first_step_s": result.get("time_to_first_step_s"),
        "first_step": result.get("first_step") or {},
        "weights_sha256": result.get("weights_sha256"),
        "restarts": result.get("restarts"),
        "losses": result.get("losses") or [],
        "faults": result.get("faults"),
    }
    return RunReport(run_dir, _markdown(data, result, claim, neighbours, differing), data)


# ---- the three columns: numbers in seconds, fractions and images, None where there is none ----


def _claimed(claim: Record | None) -> dict:
    if claim is None:
        return {}
    return {
        "time_to_target_s": claim.seconds,
        "target_top1": to_fraction(claim.target_top1),
        "top1": to_fraction(claim.reached_top1),
        "images_per_s": claim.images_per_s,
        "images_per_s_per_chip": claim.images_per_s_per_chip,
        "epochs": claim.epochs,
        "chips": claim.chips,
        "global_batch_size": claim.global_batch,
    }


def _emulated(result: dict) -> dict:
    seconds, chips = result.get("emulated_s"), result.get("chips")
    rate = _images(result) / seconds if seconds else None
    return {
        "time_to_target_s": seconds if result.get("reached") else None,
        "clock_s": seconds,
        "interval_s": result.get("emulated_interval_s"),
        "target_top1": result.get("target_top1"),
        "images_per_s": rate,
        "images_per_s_per_chip": rate / chips if rate and chips else None,
        "epochs": result.get("epochs"),
        "chips": chips,
        "global_batch_size": result.get("global_batch_size"),
    }


def _measured(result: dict) -> dict:
    seconds, workers = result.get("measured_s"), result.get("workers")
    rate = _images(result) / seconds if seconds else None
    return {
        "time_to_target_s": seconds if result.get("reached") else None,
        "clock_s": seconds,
        "wall_s": result.get("wall_s"),
        "target_top1": result.get("target_top1"),
        "top1": result.get("top1"),
        "images_per_s": rate,
        "images_per_s_per_worker": rate / workers if rate and workers else None,
        "epochs": result.get("epochs"),
        "workers": workers,
        "device": result.get("device"),
        "peak_memory_bytes": result.get("peak_memory_bytes"),
        "global_batch_size": result.get("global_batch_size"),
    }


def _images(result: dict) -> int:
    """Training images of the run: rates are over the whole clock, as published ones are."""
    if result.get("images") is not None:
        return result["images"]
    return (result.get("steps") or 0) * (result.get("global_batch_size") or 0)


# ---- the text ----


def _markdown(
    data: dict, result: dict, claim: Record | None, neighbours: list[Record], differing: list[Condition]
) -> str:
    lines = [f"# Run {data['run']}", "", *_wrap(outcome(data, result)), ""]
    if data["error"]:
        lines += [*_wrap(f"Error: {data['error']}"), ""]
    lines += [*side_by_side(data), ""]
    lines += _wrap(
        "Rates are over the whole clock, evaluations included. The emulated clock is a model's; accuracy is not: "
        f"it was computed here, by {as_count(result.get('workers'))} workers on {result.get('device') or 'unknown'}."
    )
    if claim:
        lines += ["", *_wrap(f"Claim: {_record(claim)}. Source: {claim.source}.")]
        lines += ["", "## Conditions that differ from the claim", ""]
        lines += _bullets(f"{c.name}: claim {c.claim}; this run {c.run}" for c in differing if c.differs)
        if unknown := [f"{c.name}: this run {c.run}" for c in differing if c.differs is None]:
            lines += ["", "Not published with the claim, so not comparable:", "", *_bullets(unknown)]
        if same := [c.name for c in differing if c.differs is False]:
            lines += ["", *_wrap(f"Same as the claim: {', '.join(same)}.")]
    if neighbours:
        lines += ["", "## Published neighbours of the claim", "", *_bullets(map(_record, neighbours))]
    if data["losses"]:
        lines += ["", "## Workers that were lost", "", *_bullets(map(_loss, data["losses"]))]
    if data["faults"]:
        lines += ["", "## Faults on the emulated machine", ""]
        lines += [line for text in report_faults.lines(data["faults"]) for line in _lines(text)]
    if data["data_notes"]:
        lines += ["", "## About the data", "", *_bullets(data["data_notes"])]
    if data["notes"]:
        lines += ["", "## What the emulated clock assumes", "", *_bullets(data["notes"])]
    if data["contract"]:
        lines += [
            "",
            "## Numerics contract",
            "",
            *_bullets(f"{key}: {value}" for key, value in data["contract"].items()),
        ]
    if data["first_step"]:
        total = data["time_to_first_step_s"]
        lines += ["", f"## First training step{f' after {total:.1f} s' if total is not None else ''}", ""]
        lines += _bullets(f"{phase}: {seconds:.2f} s" for phase, seconds in data["first_step"].items())
    return "\n".join(lines) + "\n"


def outcome(data: dict, result: dict) -> str:
    top1, target = as_percent(result.get("top1")), as_percent(result.get("target_top1"))
    where = f"after {as_number(result.get('epochs'))} epochs ({as_count(result.get('steps'))} steps)"
    if data["reached"]:
        outcome = f"The target of {target} was reached: {top1} top-1 {where}."
    else:
        seen = f"{top1} top-1" if result.get("top1") is not None else "no evaluation was made"
        outcome = f"The target of {target} was NOT reached: {seen} {where}. There is no time to target."
    restarts = f" Restarts: {result['restarts']}." if result.get("restarts") else ""
    return f"Status: {data['status']}. {outcome}{restarts}"


def _loss(loss: dict) -> str:
    """One worker's, and how it was made good."""
    text = f"worker {loss['worker']} (hosts {loss['hosts'][0]} to {loss['hosts'][1]}), {loss['kind']}"
    if "training_at" not in loss:
        return f"{text}: the run did not go on"
    again = f"{loss['training_at'] - loss['detected_at']:.2f} s after it was noticed"
    source = {
        "memory": "nothing was lost or repeated",
        "checkpoint": f"the last checkpoint's, {loss['steps_repeated']} step(s) repeated",
        "beginning": "the beginning: there was no checkpoint",
    }[loss["source"]]
    return f"{text}: training went on {again}, from step {loss['step']}: {source}"


def side_by_side(data: dict) -> list[str]:
    """Claimed, emulated and measured as a table in Markdown, a line a row, of a report's data."""
    claimed, emulated, measured = data["claimed"], data["emulated"], data["measured"]
    missed = "not reached" if not data["reached"] else None
    batch = "global_batch_size"
    rows = [
        ("time to target", *(as_seconds(c.get("time_to_target_s"), missed) for c in (emulated, measured))),
        ("target top-1", *(as_percent(c["target_top1"]) for c in (emulated, measured))),
        ("top-1", "-", as_percent(measured["top1"])),
        ("images/s", *(as_rate(c["images_per_s"]) for c in (emulated, measured))),
        (
            "images/s per chip (worker)",
            as_rate(emulated["images_per_s_per_chip"]),
            f"{as_rate(measured['images_per_s_per_worker'])} a worker",
        ),
        ("epochs", *(as_number(c["epochs"]) for c in (emulated, measured))),
        ("chips (workers)", as_count(emulated["chips"]), f"{as_count(measured['workers'])} workers"),
        ("global batch", *(as_count(c[batch]) for c in (emulated, measured))),
    ]
    claims = [
        as_seconds(claimed.get("time_to_target_s")),
        as_percent(claimed.get("target_top1")),
        as_percent(claimed.get("top1")),
        as_rate(claimed.get("images_per_s")),
        as_rate(claimed.get("images_per_s_per_chip")),
        as_number(claimed.get("epochs")),
        as_count(claimed.get("chips")),
        as_count(claimed.get(batch)),
    ]
    cells = [("", "claimed", "emulated", "measured")]
    cells += [(name, claim, *rest) for (name, *rest), claim in zip(rows, claims, strict=True)]
    if missed:
        clocks = (as_seconds(c["clock_s"]) for c in (emulated, measured))
        cells.insert(2, ("clock when the run ended", "-", *clocks))
    if interval := emulated["interval_s"]:
        cells.insert(3 if missed else 2, ("5 % to 95 %, by the model's error", "-", as_interval(interval), "-"))
    if peak := measured["peak_memory_bytes"]:
        cells.append(("peak memory of a worker", "-", "-", f"{peak / 1e9:.1f} GB"))
    return report_faults.table(cells)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its head, for the documents that the scripts write."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _record(record: Record) -> str:
    parts = [f"{record.seconds:g} s", f"{record.chips:,} x {record.chip}", record.system]
    if record.global_batch:
        parts.append(f"batch {as_count(record.global_batch)}")
    if record.epochs:
        parts.append(f"{as_number(record.epochs)} epochs")
    if record.reached_top1:
        parts.append(f"{record.reached_top1:g} % top-1")
    elif record.target_top1:
        parts.append(f"target {record.target_top1:g} %")
    return ", ".join(parts)


def _wrap(text: str, indent: str = "") -> list[str]:
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, **options)


def _lines(text: str) -> list[str]:
    """A paragraph wrapped, a row of a table as it is."""
    return [text] if text.startswith("|") or not text else _wrap(text)


def _bullets(texts) -> list[str]:
    return [line for text in texts for line in _wrap(f"- {text}", "  ")]


# ---- reading a run folder ----


def _read_config(run_dir: Path) -> dict:
    import yaml

    path = run_dir / "config.yaml"
    if not path.is_file():
        problem = "it has no config.yaml" if run_dir.is_dir() else "there is no such folder"
        raise ValueError(f"{run_dir}: not a run folder, {problem}; give a folder that a training run made")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict) or "experiment" not in config:
        raise ValueError(f"{path}: not the configuration of a run; give a folder that a training run made")
    return config


def _read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; restore or remove the file")
    return value


def _unfinished(run_dir: Path) -> dict:
    """What the metrics say of a run that wrote no result: it still runs, or was killed."""
    result: dict = {"status": "unfinished", "reached": False}
    for row in read_rows(run_dir):
        result |= {"steps": row["step"], **{key: row[key] for key in ("epoch", "measured_s", "emulated_s")}}
        result["top1"] = row["values"].get("eval/top1", result.get("top1"))
    return {**result, "epochs": result.get("epoch")}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m train.report RUN [RUN ...]   (folders that training runs made)")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        print(report(arguments).text, end="")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
