"""A published MLPerf result as a run folder, for TensorBoard and to be re-timed on other machines.

    python scripts/import_mlperf.py result_0.txt [--out DIR]
    python -m launch.emulate run=DIR mesh=dgx_h100

Reads logs of training v0.6 and later, benchmark resnet (mlcommons/training_results_v*). The folder has
config.yaml, metrics.jsonl, published.json and tb/published; every number in it is published, none measured or emulated.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.compose import compose, one_line  # noqa: E402
from launch.run_folder import write_json  # noqa: E402
from train import mlperf_import  # noqa: E402
from train.metrics import METRICS_FILE, json_line, write_aside  # noqa: E402
from train.mlperf_import import Published  # noqa: E402

# Keys of the log (mlcommons/logging, compliance_checker, training_4.0.0/closed_resnet.yaml) -> ours.
HYPERPARAMETERS = {
    "{opt}_base_learning_rate": "schedule.base_lr",
    "{opt}_end_learning_rate": "schedule.end_lr",
    "{opt}_learning_rate_decay_poly_power": "schedule.power",
    "{opt}_momentum": "optim.momentum",
    "{opt}_weight_decay": "optim.weight_decay",
    "lars_opt_learning_rate_warmup_epochs": "schedule.warmup_epochs",
    "opt_learning_rate_warmup_epochs": "schedule.warmup_epochs",
}
TARGET_TOP1 = 0.759  # of the benchmark since v0.5 (mlcommons/training_policies)


def write_run(log: Path, out: Path | None) -> Path:
    """Imports a log; returns the folder. ValueError where the log can't be read as one, or the folder is there."""
    from yaml import safe_dump

    from train.tensorboard import EPOCH, TensorBoardSink

    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            found = mlperf_import.parse(lines)
    except ValueError as error:
        raise ValueError(f"{log}: {error}") from None
    folder = out or Path("runs") / name(found, log)
    if folder.exists():
        raise ValueError(f"--out={folder}: exists; name another folder")
    config = configuration(found) | {"run": folder.name}
    folder.mkdir(parents=True)
    write_aside(folder / "config.yaml", safe_dump(config, sort_keys=False, allow_unicode=True))
    facts = {key: value for key, value in vars(found).items() if key != "rows"}
    write_json(folder / "published.json", {"label": "published", "source": log.name, **facts})
    write_aside(folder / METRICS_FILE, "".join(map(json_line, found.rows)))
    board = TensorBoardSink(folder, EPOCH, config, clocks=("published",))
    for row in found.rows:
        board.log(row)
    board.close()
    return folder


def configuration(found: Published) -> dict:
    """The record's experiment with the log's own batch, epochs and hyperparameters; its machine is not in a log."""
    lars = str(found.settings.get("opt_name", "")).lower().startswith("lars")
    words = [
        "experiment=imagenet_atlas900",
        "recipe=none",
        f"optim={'lars' if lars else 'sgd'}",
        f"global_batch_size={found.global_batch_size}",
        f"epochs={found.epochs:g}",
        f"eval_every={found.eval_every:g}",
        f"eval_offset={found.eval_offset:g}",
        f"target_top1={TARGET_TOP1}",
    ]
    for pattern, key in HYPERPARAMETERS.items():
        value = found.settings.get(pattern.format(opt="lars_opt" if lars else "sgd_opt"))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            words.append(f"{key}={value}")
    return compose(words)


def name(found: Published, log: Path) -> str:
    """<who>-<platform>-<file>, as far as the log says."""
    words = [found.settings.get("submission_org"), found.settings.get("submission_platform"), log.stem]
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", str(word)).strip("_") for word in words if word)[:120]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="result_N.txt of a submission")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to make (default: runs/<who>-<platform>-<file>)"
    )
    arguments = parser.parse_args(argv)
    try:
        folder = write_run(arguments.log, arguments.out)
    except (ValueError, OSError) as error:
        print(f"import_mlperf: {one_line(error)}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
