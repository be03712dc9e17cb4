"""Predicts every published record of a file and prints the errors: emulated against published.

    python scripts/validate.py [--runs FILE.csv] [--json]

See launch/validation for what counts; docs/validation.md (scripts/validation_page.py) has the project's own records.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from launch.validation import Row, load_catalog, rows_of, step_scores, summary, time_scores, twins
from train import records
from train.mesh.chip import Chip
from train.records import EpochTime


def as_json(rows: list[Row]) -> dict:
    """The time with epochs as published."""
    found = summary(time_scores(rows))
    keys = "median_abs_error p90_abs_error bias coverage mean_width".split()
    return {key: found[key] for key in keys} | {
        "modelled": sum(row.reason is None for row in rows),
        "rows": len(rows),
        "baseline_median": found["baseline_median"],
        "rows_detail": [
            {
                "id": row.record.id,
                "published_s": row.record.seconds,
                "predicted_s": None if row.reason else row.predicted_s,
                "interval_s": None if row.reason else list(row.run.interval_s),
                "fitted_on": row.fitted_on,
                "reason": row.reason,
            }
            for row in rows
        ],
    }


def score_line(name: str, found: dict) -> str:
    if not found["scored"]:
        return f"{name:<46} no rows"
    return (
        f"{name:<46} {found['scored']:>4} {found['median_abs_error']:>8.1%} {found['p90_abs_error']:>8.1%} "
        f"{found['bias']:>+8.1%} {found['baseline_median']:>10.1%} {found['baseline_p90']:>8.1%}"
    )


def table(rows: list[Row], with_reference: list[Row], epochs: dict[str, EpochTime], chips: dict[str, Chip]) -> str:
    lines = [f"{'':<52} {'chips':>6} {'published':>10} {'emulated':>10} {'error':>7}   5 to 95 %"]
    for row in rows:
        seconds = row.record.seconds
        claimed = "-" if seconds is None else f"{seconds:,.1f} s"
        start = f"{row.record.id.removeprefix('mlperf-')[:52]:<52} {row.record.chips:>6,} {claimed:>10}"
        if row.reason:
            lines.append(f"{start} not modelled: {row.reason}")
            continue
        low, high = row.run.interval_s
        error = "" if seconds is None else f"{row.predicted_s / seconds - 1:+.1%}"
        lines.append(
            f"{start} {row.predicted_s:>8,.1f} s {error:>7}   {low:,.1f} to {high:,.1f} s"
            f"{'  (fitted on)' if row.fitted_on else ''}{''.join(f'  ({note})' for note in row.prediction.notes)}"
        )
    time, step = summary(time_scores(rows)), summary(step_scores(rows, epochs))
    lines += [
        "",
        f"{'':<46} rows   median     90th     bias   perfect scaling (median, 90th)",
        score_line("(a) an epoch, closed MLPerf rows", step),
        score_line("(b) time, epochs as published", time),
        score_line("(c) time, epochs from the reference points", summary(time_scores(with_reference))),
    ]
    floor = np.abs([error for _, error in twins([row.record for row in rows], epochs, chips)])
    if len(floor):
        lines.append(f"{'(d) a row by the mean of its twins':<46} {len(floor):>4} {np.median(floor):>8.1%}")
    if time["scored"]:
        lines.append(f"interval of (b): covers {time['coverage']:.0%}, {time['mean_width']:.0%} wide on average")
    notes = sum(row.fitted_on for row in rows)
    lines.append(f"{sum(r.reason is None for r in rows)} of {len(rows)} rows are modelled; {notes} are fitted on")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="validate", description="emulated against published, record by record")
    parser.add_argument("--runs", type=Path, default=records.PUBLISHED, help="records file (default: the project's)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    try:
        published = records.load(arguments.runs, results_needed=False)
    except ValueError as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    catalog, epochs = load_catalog(), records.load_epochs()
    rows = rows_of(published, catalog)
    if arguments.json:
        print(json.dumps(as_json(rows)))
    else:
        print(table(rows, rows_of(published, catalog, reference=True), epochs, catalog.chips))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
