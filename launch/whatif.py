"""What launch.emulate makes of all jobs of its command line together: one table, one CSV, one plot, traces.

Every number is emulated. A job that can't be priced is a row with its reason.
"""

import csv
import io
import sys
from pathlib import Path
from typing import NamedTuple

from launch import compose, retime
from launch.compose import Job
from launch.run_folder import sweep_names
from train import emulator_trace, records
from train.emulator import Emulator
from train.metrics import write_aside

STEP_PARTS = {
    "compute_s": "compute",
    "exposed_comm_s": "exposed",
    "straggler_s": "waiting",
    "input_s": "input",
    "other_s": "other",
}
RUN_PARTS = {**STEP_PARTS, "eval_s": "evaluation", "startup_s": "start-up"}
COLORS = ("#4c72b0", "#c44e52", "#dd8452", "#8172b3", "#937860", "#55a868", "#b0b0b0")
NOT_SHOWN = ("out", "trace", "format", "explain", "run_root")
MOST_INCHES = 300
"""Height of the plot: a row shrinks where there are more than fit."""

CSV_FIELDS = """
chips active_chips chip mesh global_batch_size wire_dtype collective network epochs steps time_to_train_s
interval_low_s interval_high_s step_s
compute_s exposed_comm_s straggler_s input_s other_s eval_s startup_s images_per_s images_per_s_per_chip
scaling_efficiency time_to_target_s
""".split()


class Priced(NamedTuple):
    """One priced job: what format=json prints of it, the machine, and the rows of a run that was re-timed."""

    result: dict
    made: Emulator
    rows: list[dict] | None


def finish(jobs: list[Job]) -> None:
    """The table of a sweep on stdout, and the files that `out` and `trace` ask for, named on stderr."""
    if len(jobs) > 1 and jobs[0].config["format"] == "table":
        compose.say("\n" + table(jobs))
    written = []
    if jobs[0].config["out"] is not None:
        written += write(Path(jobs[0].config["out"]).expanduser(), jobs)
    for number, job in enumerate(jobs, 1):
        if job.config["trace"] is not None and not job.refusal:
            path = Path(job.config["trace"]).expanduser()
            path = path.with_name(f"{path.stem}-{number}{path.suffix}") if len(jobs) > 1 else path
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, emulator_trace.dumps(job.value.made, job.config["seed"]))
            written.append(path)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)


def write(folder: Path, jobs: list[Job]) -> list[Path]:
    """whatif.txt, whatif.csv and whatif.png, and a folder for TensorBoard of each run that was re-timed."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={folder}: is a file; name a folder")
    runs = [folder] if len(jobs) == 1 else [folder / name for name in sweep_names([job.words for job in jobs])]
    made = []
    for path, job in zip(runs, jobs, strict=True):
        if not job.refusal and job.value.rows is not None:
            retime.write(path, job.config, job.value.result, job.value.rows)
            made.append(path / "tb" / "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "whatif.txt", table(jobs) + "\n")
    write_aside(folder / "whatif.csv", as_csv(jobs))
    plot(jobs, folder / "whatif.png")
    return [*made, *(folder / f"whatif.{kind}" for kind in ("txt", "csv", "png"))]


def swept(jobs: list[Job]) -> dict[str, list[str]]:
    """Key -> its value in each job, of the keys that differ between jobs; of a single job all that were given."""
    of_each = [dict(word.partition("=")[::2] for word in job.words) for job in jobs]
    keys = dict.fromkeys(key for given in of_each for key in given if key not in NOT_SHOWN)
    values = {key: [given.get(key, "") for given in of_each] for key in keys}
    return {key: each for key, each in values.items() if len(jobs) == 1 or len(set(each)) > 1}


def table(jobs: list[Job]) -> str:
    """One line a job: what was swept, then what was emulated; the parts are of one step."""
    head = ["chips", "batch", "time s", "5 to 95 %", "step ms", *STEP_PARTS.values(), "images/s", "efficiency"]
    keys, of_runs = swept(jobs), any(job.config["run"] for job in jobs)
    head += ["target s"] if of_runs else []
    rows = [["job", *keys, *head]]
    reasons = {}
    for number, job in enumerate(jobs, 1):
        row = [str(number), *(values[number - 1] for values in keys.values())]
        if job.refusal:
            reasons[number] = f"not priced: {job.refusal}"
            rows.append(row)
        else:
            when = job.value.result.get("time_to_target_s")
            rows.append(row + _cells(job.value.result) + ([_seconds(when) if when else "missed"] if of_runs else []))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    left = 1 + len(keys)
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, *([reasons[number]] if number in reasons else [])]).rstrip())
    jobs_word = "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"
    claim = records.find(records.load(), jobs[0].config["claim"]["record"])
    title = f"what if: {jobs_word}, all emulated; parts are ms of a step"
    same = [word for word in jobs[0].words if word.partition("=")[0] not in (*keys, *NOT_SHOWN)]
    title += f"; in all of them {' '.join(same)}" if same else ""
    return "\n".join([title, *lines, f"claimed: {claim.seconds:g} s, {claim.chips:,} x {claim.chip}, {claim.system}"])


def _cells(result: dict) -> list[str]:
    low, high = result["interval_s"]
    steps = max(1, result["steps"])
    return [
        f"{result['chips']:,}",
        f"{result['global_batch_size']:,}",
        _seconds(result["time_to_train_s"]),
        f"{_seconds(low)} to {_seconds(high)}",
        f"{1e3 * result['step_s']:,.3f}",
        *(f"{1e3 * result[name] / steps:,.3f}" for name in STEP_PARTS),
        f"{result['images_per_s']:,.0f}",
        f"{100 * result['scaling_efficiency']:.1f} %",
    ]


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}"


def as_csv(jobs: list[Job]) -> str:
    """A line a job: swept keys, `emulated/...` in seconds (the seven parts are of the run), or the reason."""
    keys = swept(jobs)
    text = io.StringIO()
    write_row = csv.writer(text, lineterminator="\n").writerow
    write_row(["job", *keys, *(f"emulated/{name}" for name in CSV_FIELDS), "not_priced"])
    for number, job in enumerate(jobs, 1):
        values: dict = {}
        if not job.refusal:
            low, high = job.value.result["interval_s"]
            values = job.value.result | {"interval_low_s": low, "interval_high_s": high}
        row = [values.get(name) for name in CSV_FIELDS]
        write_row([number, *(each[number - 1] for each in keys.values()), *row, job.refusal])
    return text.getvalue()


def plot(jobs: list[Job], path: Path) -> None:
    """A row a job: time to train with its interval beside the claim, and the parts' shares of it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    keys = swept(jobs)
    claim = records.find(records.load(), jobs[0].config["claim"]["record"])
    labels = ["\n".join(f"{key}={each[n]}" for key, each in keys.items()) or "as configured" for n in range(len(jobs))]
    lines = max(1, len(keys))
    figure = Figure(figsize=(12, min(1.9 + len(jobs) * (0.22 + 0.17 * lines), MOST_INCHES)), layout="constrained")
    time, shares = figure.subplots(1, 2, sharey=True, width_ratios=(1.3, 1))
    priced = [(row, job.value.result) for row, job in enumerate(jobs) if not job.refusal]
    for row, result in priced:
        seconds, (low, high) = result["time_to_train_s"], result["interval_s"]
        error = [[max(0.0, seconds - low)], [max(0.0, high - seconds)]]
        time.errorbar(seconds, row, xerr=error, fmt="o", color=COLORS[0], capsize=3)
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        time.annotate(f"{_seconds(seconds)} s", (high, row), **beside)
        start = 0.0
        for color, (name, words) in zip(COLORS, RUN_PARTS.items(), strict=True):
            share = 100 * result[name] / seconds
            shares.barh(row, share, left=start, color=color, height=0.7, label=words if row == priced[0][0] else None)
            start += share
    for row, job in enumerate(jobs):
        if job.refusal:
            reason = f"not priced: {job.refusal}"
            reason = reason if len(reason) <= 88 else f"{reason[:85]}..."
            time.text(0.01, row, reason, transform=time.get_yaxis_transform(), va="center", fontsize=8, color=COLORS[1])
    time.axvline(claim.seconds, color="black", linestyle="--", linewidth=1, label=f"claimed: {claim.seconds:g} s")
    ends = [claim.seconds, *(end for _, result in priced for end in result["interval_s"])]
    if max(ends) > 8 * min(ends):
        time.set_xscale("log")
        time.set_xlim(min(ends) / 1.3, max(ends) * (max(ends) / min(ends)) ** 0.2)
    else:
        time.set_xlim(0, 1.2 * max(ends))
    time.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    time.set_yticks(range(len(jobs)), labels, fontsize=9)
    time.set_ylim(len(jobs) - 0.4, -0.6)
    time.set_xlabel("emulated time to train, s (bar: 5 to 95 %)")
    time.grid(axis="x", alpha=0.3)
    time.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=9, frameon=False)
    shares.set_xlabel("share of the emulated time, %")
    shares.set_xlim(0, 100)
    if priced:
        shares.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, frameon=False)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, format="png", dpi=100)
    aside.replace(path)
