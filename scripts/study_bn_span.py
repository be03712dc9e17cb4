"""The study of batch-norm spans as a table and a plot, from run folders alone.

    python scripts/study_bn_span.py RUN...           # these runs
    python scripts/study_bn_span.py --root runs      # every run of the experiment below a folder
    ... --write                                      # also docs/bn_span.md and docs/bn_span.png

Spread is the sample standard deviation over seeds (n - 1). Runs that are missing or unfinished are named, and the exit
status is then 1; runs of different recipes are refused.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.run_folder import HERE, OF_THE_COMMAND, leaves, read_json
from train.conditions import as_count
from train.metrics import read_rows, write_aside
from train.report import markdown_table

EXPERIMENT = "cifar10_bn_span"
SPANS = (1, 4, 16, 64, 256, 1024)  # chips
SEEDS = (0, 1, 2)
DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMAND = (
    f"python -m launch.run -m experiment={EXPERIMENT} data.root=/data/cifar10 \\\n"
    f"    bn_span={','.join(map(str, SPANS))} seed={','.join(map(str, SEEDS))} resume=auto"
)

MAY_DIFFER = {"bn_span", "seed", *HERE, *OF_THE_COMMAND} - {"max_steps"}
"""Keys in which the runs of one study may differ; all others make another recipe."""

COLUMNS = (
    "images that share statistics",
    "chips",
    "runs",
    "top-1, measured: mean +- sd",
    "each seed",
    "final training loss, measured",
    "seconds, measured",
    "seconds, emulated",
)


@dataclass(frozen=True)
class Run:
    """A finished run. `loss` is the mean over the steps of its last epoch; times in seconds."""

    folder: Path
    config: dict
    environment: dict
    result: dict
    loss: float

    @property
    def span(self) -> int:
        return self.config["bn_span"]

    @property
    def seed(self) -> int:
        return self.config["seed"]


@dataclass(frozen=True)
class Study:
    """Runs by (span in chips, seed), and a line for each one that is not there."""

    runs: dict[tuple[int, int], Run]
    missing: list[str]

    def of_span(self, span: int) -> list[Run]:
        return [run for (chips, _), run in sorted(self.runs.items()) if chips == span]

    @property
    def spans(self) -> list[int]:
        return sorted({span for span, _ in self.runs})

    @property
    def any(self) -> Run:
        return next(iter(self.runs.values()))


def study(folders: Iterable[Path], spans: Iterable[int] = SPANS, seeds: Iterable[int] = SEEDS) -> Study:
    """The runs of the folders. ValueError where two are the same run, one has another recipe, or none is finished."""
    runs: dict[tuple[int, int], Run] = {}
    unfinished: dict[tuple[int, int], list[str]] = {}
    for folder in folders:
        config, result = read_config(folder), read_json(folder / "result.json")
        key = config["bn_span"], config["seed"]
        if result.get("status") != "done":
            unfinished.setdefault(key, []).append(f"{folder} is {result.get('status', 'unfinished')}")
            continue
        run = Run(folder, config, read_json(folder / "env.json"), result, final_loss(folder, result))
        if key in runs:
            raise ValueError(f"{runs[key].folder} and {folder} are both bn_span={key[0]} seed={key[1]}: leave one out")
        runs[key] = run
        demand_same_recipe(next(iter(runs.values())), run)
    if not runs:
        raise ValueError(f"no finished run of {EXPERIMENT}: make them with\n{COMMAND}")
    wanted = sorted({(span, seed) for span in spans for seed in seeds} | unfinished.keys())
    absent = [key for key in wanted if key not in runs]
    missing = [f"bn_span={s} seed={n}: {'; '.join(unfinished.get((s, n), ['there is no run']))}" for s, n in absent]
    return Study(runs, missing)


def find(root: Path) -> list[Path]:
    """The folders below `root` of runs of the experiment."""
    if not root.is_dir():
        raise ValueError(f"--root {root}: there is no such folder")
    folders = sorted(path.parent for path in root.glob("*/config.yaml"))
    return [folder for folder in folders if read_config(folder).get("experiment") == EXPERIMENT]


def read_config(folder: Path) -> dict:
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder, it has no config.yaml")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not {"bn_span", "seed"} <= config.keys():
        raise ValueError(f"{path}: not the configuration of a run")
    return config


def final_loss(folder: Path, result: dict) -> float:
    """Mean training loss of the last epoch's steps."""
    steps = [row for row in read_rows(folder) if row["kind"] == "step"]
    first = result["steps"] - result["steps_per_epoch"]
    last_epoch = [row["values"]["train/loss"] for row in steps if row["step"] > first]
    return statistics.fmean(last_epoch) if last_epoch else math.nan


def demand_same_recipe(one: Run, other: Run) -> None:
    mine, theirs = (dict(leaves("", run.config, MAY_DIFFER)) for run in (one, other))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{other.folder} has {key}={theirs.get(key)}, {one.folder} {mine.get(key)}: "
                "a study compares runs of one recipe; leave one of them out"
            )


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for that of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(found: Study) -> str:
    rows = [COLUMNS]
    for span in found.spans:
        runs = found.of_span(span)
        top1 = [100 * run.result["top1"] for run in runs]
        rows.append(
            (
                f"{span * runs[0].result['chip_batch_size']:,}",
                f"{span:,}",
                str(len(runs)),
                with_spread(top1, 2, " %"),
                ", ".join(f"{value:.2f}" for value in top1),
                with_spread([run.loss for run in runs], 3),
                with_spread([run.result["measured_s"] for run in runs], 0),
                with_spread([run.result["emulated_s"] for run in runs], 3),
            )
        )
    return markdown_table(rows)


def with_spread(values: list[float], digits: int, unit: str = "") -> str:
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}{unit}" if deviation is None else f"{mean:.{digits}f} +- {deviation:.{digits}f}{unit}"


def document(found: Study) -> str:
    """docs/bn_span.md."""
    run = found.any
    config, result = run.config, run.result
    optim, schedule = config["optim"], config["schedule"]
    model = result["model"]
    best, worst = (choose(found.spans, key=lambda span: mean_top1(found, span)) for choose in (max, min))
    chip_batch = result["chip_batch_size"]
    lines = [
        "# How many images should share their batch-norm statistics?",
        "",
        f"{as_count(result['chips'])} emulated chips train on {result['data']['name']} with {chip_batch} images each, "
        f"a global batch of {as_count(result['global_batch_size'])}. Between the rows nothing changes but how many "
        f"chips put their images together for batch norm's mean and variance (`bn_span`): from {chip_batch} images to "
        "the whole batch. Order, augmentation and first weights of a seed are the same in all rows.",
        "",
        table(found),
        "",
        "![Top-1 accuracy over the images that share statistics](bn_span.png)",
        "",
        f"Highest mean: {best * chip_batch:,} images, {mean_top1(found, best):.2f} %; lowest: {worst * chip_batch:,} "
        f"images, {mean_top1(found, worst):.2f} %. +- is the sample standard deviation over seeds (n - 1).",
        "",
    ]
    if found.missing:
        lines += ["**Missing runs:**", "", *(f"- {line}" for line in found.missing), ""]
    lines += [
        "## Recipe",
        "",
        f"- model: ResNet-{model['depth']} for CIFAR-10 (He et al. 2015, section 4.2, shortcuts B), {model['stem']} "
        f"stem, {as_count(model['parameters'])} parameters, last gamma of each block "
        f"{'zero' if model['zero_init_last_gamma'] else 'one'} at the start",
        f"- {result['epochs']:g} epochs of {result['steps_per_epoch']} steps; pad, crop and flip; label smoothing "
        f"{config['label_smoothing']:g}",
        f"- optimizer {optim['_target_'].rpartition('.')[2]}, {settings(optim)}",
        f"- schedule {schedule['_target_'].rpartition('.')[2]}, {settings(schedule)}",
        f"- evaluation over {as_count(result['num_eval'])} held-out images at the end, with the mean over chips of "
        "their running means and variances",
        *(f"- computed by {line}" for line in sorted({computed_by(run) for run in found.runs.values()})),
        "",
        "Final training loss: mean over the last epoch's steps, with each chip's own statistics. Measured seconds: the "
        "run's clock here, evaluations included; they compare only where the machine was otherwise idle. "
        "Emulated seconds: the modelled cluster's clock, which does not charge "
        "the exchange of statistics that a span of more than one chip would need there.",
        "",
        "## Again",
        "",
        "```",
        COMMAND,
        "python scripts/study_bn_span.py --root runs --write",
        "```",
        "",
        "The first command may be stopped or killed and given again: finished runs are skipped, an unfinished one "
        "goes on from its last checkpoint.",
    ]
    return "\n".join(lines) + "\n"


def computed_by(run: Run) -> str:
    result, contract = run.result, run.environment.get("contract", {})
    machine = contract.get("instruction_set", result["device"])
    return (
        f"{result['workers']} worker(s) with {result['threads']} thread(s), {machine}, {result['precision']}, "
        f"numerics {result['numerics']}"
    )


def settings(node: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in node.items() if not key.startswith("_") and value is not None)


def mean_top1(found: Study, span: int) -> float:
    return statistics.fmean(100 * run.result["top1"] for run in found.of_span(span))


def draw(found: Study, path: Path) -> None:
    """Mean and standard deviation over a logarithmic axis, with each seed's own value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chip_batch = found.any.result["chip_batch_size"]
    images = [span * chip_batch for span in found.spans]
    values = [[100 * run.result["top1"] for run in found.of_span(span)] for span in found.spans]
    means, deviations = zip(*map(spread, values), strict=True)
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    bars = [deviation or 0.0 for deviation in deviations]
    axes.errorbar(images, means, yerr=bars, marker="o", capsize=4, color="tab:blue", label="mean and sd over seeds")
    points = [(size, value) for size, group in zip(images, values, strict=True) for value in group]
    axes.scatter(*zip(*points, strict=True), s=14, color="tab:gray", zorder=3, label="one seed")
    axes.set_xscale("log", base=2)
    axes.set_xticks(images, [f"{size:,}" for size in images])
    axes.set(xlabel="images that share batch-norm statistics", ylabel="top-1, % (measured)")
    axes.set_title(f"{found.any.result['data']['name']}, global batch {found.any.result['global_batch_size']:,}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # no version in it: the same runs give the same file
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--root", type=Path, help=f"take every run of {EXPERIMENT} below this folder")
    parser.add_argument("--write", action="store_true", help="write docs/bn_span.md and docs/bn_span.png")
    given = parser.parse_args(argv)
    try:
        found = study([*given.runs, *(find(given.root) if given.root else ())])
    except ValueError as error:
        print(f"study_bn_span: {error}", file=sys.stderr)
        return 2
    print(table(found))
    for line in found.missing:
        print(f"missing  {line}")
    if given.write:
        DOCS.mkdir(exist_ok=True)
        draw(found, DOCS / "bn_span.png")
        write_aside(DOCS / "bn_span.md", document(found))
        print(f"written  {DOCS / 'bn_span.md'}, {DOCS / 'bn_span.png'}")
    return 1 if found.missing else 0


if __name__ == "__main__":
    sys.exit(main())
