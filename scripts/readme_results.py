"""Writes the README's tables: finished runs from docs/results, the record from the emulator.

    python scripts/readme_results.py [RUN ...]

keeps each RUN folder's config.yaml, env.json and result.json under docs/results/ and rewrites the tables between the README's
markers. A test calls `tables` and compares.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "results"
FILES = ("config.yaml", "env.json", "result.json")


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
    return {"results": runs_table(), "record": record_table()}


def runs_table() -> str:
    lines = [
        "| run | seed | top-1 (measured) | epochs | to the target, emulated | to the target, measured | images/s (measured) | computed by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for folder in sorted(KEPT.iterdir()):
        result = json.loads((folder / "result.json").read_text())
        environment = json.loads((folder / "env.json").read_text())
        reached = result["reached"]
        lines.append(
            f"| `{result['experiment']}`, {result['chips']:,} chips x {result['chip_batch_size']} | {result['seed']} "
            f"| {result['top1']:.2%} of {result['num_eval']} (target {result['target_top1']:.1%}) | {result['epochs']:.1f} "
            f"| {_seconds(result['emulated_s'], reached)} | {_seconds(result['measured_s'], reached)} | {result['images_per_s']:,.0f} "
            f"| {result['workers']} workers, {environment['contract']['instruction_set']}, {result['precision']}, {result['numerics']} |"
        )
    return "\n".join(lines)


def record_table() -> str:
    from launch.compose import compose
    from train import emulator
    from train.records import find, load

    config = compose([], experiment="imagenet_atlas900")
    made = emulator.build(config).run()
    records = load()
    low, high = made["interval_s"]
    lines = ["| who | chips | batch | epochs | claimed or published | emulated (5 % to 95 %) |", "|---|---|---|---|---|---|"]
    for name in (config["claim"]["record"], *config["claim"]["neighbours"]):
        record = find(records, name)
        batch = f"{record.global_batch:,}" if record.global_batch else "not published"
        epochs = f"{record.epochs:g}" if record.epochs else "not published"
        lines.append(f"| {record.system} | {record.chips:,} {record.chip} | {batch} | {epochs} | {record.seconds:.1f} s | |")
    lines.append(
        f"| this emulator, `experiment=imagenet_atlas900` | {made['chips']:,} Ascend 910 | {made['global_batch_size']:,} "
        f"| 64 to 72, our reading | | {made['time_to_train_s']:.1f} s ({low:.0f} to {high:.0f} s) |"
    )
    return "\n".join(lines)


def fill(text: str, content: dict[str, str]) -> str:
    """The README with each table between its markers."""
    for name, table in content.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md: the markers {begin} and {end} must stand there exactly once, found {count} times")
    return text


def _seconds(seconds: float, reached: bool) -> str:
    return f"{seconds:.1f} s" if reached else f"not reached ({seconds:.1f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders to keep before the tables are written")
    readme = ROOT / "README.md"
    try:
        for run in parser.parse_args().runs:
            keep(run)
        text = fill(readme.read_text(encoding="utf-8"), tables())
    except ValueError as error:
        print(f"readme_results: {error}", file=sys.stderr)
        return 2
    aside = readme.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
