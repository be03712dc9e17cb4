"""What a report says of faults on the emulated machine, and of several runs beside each other.

From result.json alone: its `faults` are those of train/sim/toll.Toll.report, all of them emulated.
"""

from collections.abc import Sequence

from train.conditions import as_count, as_number, as_percent, as_rate, as_seconds

WITHOUT = "none"


def lines(faults: dict) -> list[str]:
    """A sentence and a table of the events."""
    added, recovery_s = faults["cost_s"], faults["recovery_s"]
    text = (
        f"They added {as_seconds(added)} to the emulated clock: {as_seconds(recovery_s)} until all worked again, "
        f"{as_seconds(faults['slower_steps_s'])} by slower (or, with fewer chips, faster) steps."
    )
    if lost := faults["lost_chips"]:
        text += f" Chips that were gone at the end, and with them their share of every batch: {as_count(lost)}."
    if not faults["num_events"]:
        return [text, "", "None of them struck in this run."]
    rows = [("step", "epoch", "fault", "chips", "what happened", "steps repeated", "to recover, emulated")]
    for event in faults["events"]:
        chips = event["chips"]
        where = "-" if chips is None else f"{chips[0]:,}" if chips[0] == chips[1] else f"{chips[0]:,} to {chips[1]:,}"
        until = event["until_step"]
        what = event["what"] + (f", to step {until - 1:,}" if until and until > event["step"] + 1 else "")
        when = as_count(event["step"]), as_number(event["epoch"])
        recovery = as_seconds(event["recovery_s"]) if event["recovery_s"] else "-"
        rows.append((*when, event["fault"], where, what, as_count(event["repeated_steps"]), recovery))
    more = faults["num_events"] - len(faults["events"])
    return [text, "", *table(rows), *(["", f"and {more:,} more."] if more else [])]


def beside(runs: Sequence[dict]) -> list[str]:
    """Runs beside each other, a row each, so that what is emulated and what is measured share no column.

    `runs` are the data of their reports.
    """
    columns = {
        "run": lambda run: run["run"],
        "faults": lambda run: _named(run["faults"]),
        "top-1, measured": lambda run: as_percent(run["measured"]["top1"]),
        "epochs": lambda run: as_number(run["measured"]["epochs"]),
        "to target, emulated": lambda run: as_seconds(run["emulated"]["time_to_target_s"], "not reached"),
        "clock, emulated": lambda run: as_seconds(run["emulated"]["clock_s"]),
        "added by faults, emulated": lambda run: _of(run["faults"], "cost_s"),
        "to recover, emulated": lambda run: _of(run["faults"], "recovery_s"),
        "images/s, emulated": lambda run: as_rate(run["emulated"]["images_per_s"]),
        "clock, measured": lambda run: as_seconds(run["measured"]["clock_s"]),
        "weights": lambda run: (run["weights_sha256"] or "-")[:12],
    }
    rows = [[cell(run) for cell in columns.values()] for run in runs]
    return ["# Beside each other", "", *table([list(columns), *rows])]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown with columns of one width; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    made = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [made[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *made[1:]]


def _named(faults: dict | None) -> str:
    """The kinds of a run's events, each with its number."""
    if not faults:
        return WITHOUT
    names = [event["fault"] for event in faults["events"]]
    each = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
    return ", ".join(each) or "none struck"


def _of(faults: dict | None, name: str) -> str:
    return as_seconds(faults[name]) if faults else "-"
