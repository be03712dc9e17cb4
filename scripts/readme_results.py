"""Writes the README's tables: finished runs, certificate and chaos from docs/results, the record from the emulator.

    python scripts/readme_results.py [RUN ...]

keeps each RUN folder's env.json and result.json under docs/results/ and rewrites the tables between the
README's markers. A test calls `tables` and compares. The certificate and chaos there are outputs:

    python scripts/certify.py --json > docs/results/certificate.json
    python scripts/chaos.py --kills 30 --json data.image_size=8 > docs/results/chaos.json
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from launch.compose import compose
from launch.validation import load_catalog, rows_of, step_scores, summary, time_scores, twins
from train import emulator
from train.conditions import as_percent
from train.metrics import write_aside
from train.records import find, load, load_epochs
from train.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "results"
FILES = ("env.json", "result.json")

RUN_COLUMNS = (
    "run",
    "seed",
    "top-1, measured",
    "epochs",
    "time to the target, emulated (5 % to 95 %)",
    "time to the target, measured",
    "images/s, measured",
    "computed by",
)
VALIDATION_COLUMNS = (
    "emulated against published",
    "rows",
    "median error",
    "90th percentile",
    "bias",
    "perfect scaling",
)
RECORD_COLUMNS = ("who", "chips", "batch", "epochs", "claimed or published", "emulated (5 % to 95 %)")


def keep(run: Path) -> None:
    """Copy what the tables need of a finished run."""
    missing = [name for name in FILES if not (run / name).is_file()]
    if missing:
        raise ValueError(f"{run}: not a finished run folder, {', '.join(missing)} is missing")
    (KEPT / run.name).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(run / name, KEPT / run.name / name)


def tables() -> dict[str, str]:
    """The Markdown between each pair of markers, by the markers' name."""
    return {
        "results": runs_table(),
        "record": record_table(),
        "certificate": certificate_table(),
        "chaos": chaos_table(),
        "validation": validation_table(),
    }


def runs_table() -> str:
    rows = [RUN_COLUMNS]
    for folder in sorted(path for path in KEPT.iterdir() if path.is_dir()):
        result = json.loads((folder / "result.json").read_text())
        contract = json.loads((folder / "env.json").read_text())["contract"]
        low, high = result["emulated_interval_s"]
        emulated = f"{result['emulated_s']:.2f} s ({low:.2f} to {high:.2f} s)"
        measured = f"{result['measured_s']:.0f} s"
        rows.append(
            (
                f"`{result['experiment']}`, {result['chips']:,} chips x {result['chip_batch_size']}",
                str(result["seed"]),
                f"{as_percent(result['top1'])} of {result['num_eval']} (target {as_percent(result['target_top1'])})",
                f"{result['epochs']:.0f}",
                emulated if result["reached"] else f"not reached ({emulated})",
                measured if result["reached"] else f"not reached ({measured})",
                f"{result['images_per_s']:,.0f}",
                f"{result['workers']} workers, {contract['instruction_set']}, {result['precision']}, "
                f"{result['numerics']}",
            )
        )
    return markdown_table(rows)


def record_table() -> str:
    config = compose([], experiment="imagenet_atlas900")
    made = emulator.build(config).run()
    rows, records = [RECORD_COLUMNS], load()
    for name in (config["claim"]["record"], *config["claim"]["neighbours"]):
        record = find(records, name)
        batch = f"{record.global_batch:,}" if record.global_batch else "not published"
        epochs = f"{record.epochs:g}" if record.epochs else "not published"
        rows.append((record.system, f"{record.chips:,} {record.chip}", batch, epochs, f"{record.seconds:.1f} s", ""))
    chips, batch = f"{made['chips']:,} {made['chip']}", f"{made['global_batch_size']:,}"
    low, high = made["interval_s"]
    emulated = f"{made['time_to_train_s']:.1f} s ({low:.0f} to {high:.0f} s)"
    rows.append(("this emulator, `imagenet_atlas900`", chips, batch, "64 to 72, our reading", "", emulated))
    return markdown_table(rows)


def certificate_table() -> str:
    made = json.loads((KEPT / "certificate.json").read_text())
    rows = [("layout", "SHA-256 of the weights"), *((name, f"`{sha256}`") for name, sha256 in made["hashes"].items())]
    loss = f"loss {made['loss_first']:.3f} to {made['loss_last']:.3f}"
    found = "all equal" if made["all_equal"] else "NOT all equal"
    head = (
        f"numerics={made['mode']}, {made['chips']} chips in blocks of {made['block']}, {made['steps']} steps, {loss}: "
    )
    return f"{head}**{found}**.\n\n{markdown_table(rows)}"


def chaos_table() -> str:
    made = json.loads((KEPT / "chaos.json").read_text())

    def seconds(value: float | None) -> str:
        return "nothing was lost" if value is None else f"{value:.2f} s"

    rows = [("", "how often", "noticed within", "training again within", "steps repeated, in all")]
    for kind, found in made["by_kind"].items():
        times = seconds(found["max_detect_s"]) if kind != "driver killed" else "started again from outside"
        again = seconds(found["max_recover_s"])
        rows.append((kind, str(sum(made["kills"][kind].values())), times, again, str(found["steps_repeated"])))
    equal = "equal the undisturbed run's to the bit" if made["hash_equal"] else "DIFFER from the undisturbed run's"
    kills = sum(sum(moments.values()) for moments in made["kills"].values())
    return f"{kills} kills in {made['runs']} runs: the weights **{equal}**.\n\n{markdown_table(rows)}"


def validation_table() -> str:
    published, epochs, catalog = load(), load_epochs(), load_catalog()
    rows = rows_of(published, catalog)
    scored = {
        "an epoch, closed MLPerf rows": step_scores(rows, epochs),
        "time to train, epochs as published": time_scores(rows),
        "time to train, epochs from the reference points": time_scores(rows_of(published, catalog, reference=True)),
    }
    lines = [VALIDATION_COLUMNS]
    for name, found in scored.items():
        score = summary(found)
        figures = [score[key] for key in ("median_abs_error", "p90_abs_error", "bias")]
        perfect = f"{score['baseline_median']:.1%}, {score['baseline_p90']:.1%}"
        lines.append((name, str(score["scored"]), *(f"{each:.1%}" for each in figures), perfect))
    floor = [abs(error) for _, error in twins(published, epochs, catalog.chips)]
    middle, high = np.quantile(floor, [0.5, 0.9])
    lines.append(
        ("published rows of one chip, count and batch apart", str(len(floor)), f"{middle:.1%}", f"{high:.1%}", "", "")
    )
    return markdown_table(lines)


def fill(text: str, content: dict[str, str]) -> str:
    """The README with each table between its markers."""
    for name, table in content.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        count = len(re.findall(f"{begin}.*?{end}", text, flags=re.DOTALL))
        if count != 1:
            raise ValueError(f"README.md: the markers {begin} and {end} must stand there exactly once, found {count}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders to keep before writing")
    readme = ROOT / "README.md"
    try:
        for run in parser.parse_args().runs:
            keep(run)
        text = fill(readme.read_text(encoding="utf-8"), tables())
    except ValueError as error:
        print(f"readme_results: {error}", file=sys.stderr)
        return 2
    write_aside(readme, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
