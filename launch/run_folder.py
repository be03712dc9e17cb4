"""The folder of a run: its name, what is in it before and after training, and which one a run continues."""

import json
import os
import platform
import re
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from launch.compose import load_run_config
from train.checkpoint_files import list_checkpoints
from train.config import ConfigError
from train.metrics import finite, read_rows, write_aside

RESERVED = {"reference", "jobs", "verdict", "multirun"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Of runs and of jobs: names folders and stands on command lines, so nothing in it may need care."""

PACKAGES = ("torch", "torchvision", "ray", "hydra-core", "tensorboard", "numpy", "scikit-learn")


def locate(config: dict) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to continue from or None).

    ValueError where the names clash or nothing can be continued.
    """
    root = Path(config["run_root"]).expanduser().absolute()
    for key in ("run", "resume"):
        _check_name(key, config[key])
    if config["resume"] == "auto":
        found = _newest_unfinished(root, config["experiment"], config["run"])
        if found is not None:
            return found, list_checkpoints(found / "checkpoints")[-1]
    elif config["resume"] is not None:
        folder = root / config["resume"]
        checkpoints = list_checkpoints(folder / "checkpoints")
        if not checkpoints:
            problem = f"{folder} has no checkpoints" if folder.is_dir() else f"there is no {folder}"
            raise ValueError(f"resume={config['resume']}: {problem}; name a run of {root} that has some, or use auto")
        return folder, checkpoints[-1]
    if root.exists() and not root.is_dir():
        raise ValueError(f"run_root={config['run_root']}: is a file; name a folder")
    folder = root / (config["run"] or f"{config['experiment']}-{datetime.now():%Y%m%d-%H%M%S}")
    if folder.exists():
        name = folder.name
        raise ValueError(f"run={name}: {folder} exists; take another name, or continue it with resume={name}")
    return folder, None


def continued(config: dict, folder: Path) -> dict:
    """The configuration of a continued run: its own, but where and how far the command line says."""
    own = load_run_config(folder)
    here = ("workers", "threads", "device", "backend", "cluster", "launch", "max_steps", "hang_timeout_s", "run_root")
    return own | {key: config[key] for key in here} | {"resume": folder.name, "run": folder.name}


def create(folder: Path, config: dict, environment: dict, resumed: bool) -> None:
    """Make the folder with config.yaml and env.json. ValueError where another run has taken the name meanwhile."""
    from yaml import safe_dump

    try:
        folder.mkdir(parents=True, exist_ok=resumed)
    except FileExistsError:
        raise ValueError(f"run={folder.name}: {folder} exists by now; take another name") from None
    write_aside(folder / "config.yaml", safe_dump(config, sort_keys=False, allow_unicode=True))
    write_json(folder / "env.json", environment)


def write_json(path: Path, content: dict) -> None:
    """A number that is not finite (a loss after the last step of a run that diverged) becomes null."""
    write_aside(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """The content of a JSON file; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def complete(folder: Path, summary: dict) -> dict:
    """The summary with what a run that broke off could not say itself, from the last rows of its metrics."""
    last: dict = {}
    for row in read_rows(folder):
        last |= {"steps": row["step"], "epochs": row["epoch"]}
        last |= {"measured_s": row["measured_s"], "emulated_s": row["emulated_s"]}
        if row["kind"] == "eval":
            last |= {"top1": row["values"]["eval/top1"], "eval_loss": row["values"]["eval/loss"]}
    empty = {"top1": None, "reached": False, "steps": 0, "epochs": 0.0, "measured_s": 0.0, "emulated_s": None}
    empty |= {"images_per_s": None, "weights_sha256": None}
    return empty | last | summary


def environment() -> dict:
    """Versions and machine, without names of people, hosts or secrets."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
    }


def _check_name(key: str, name: str | None) -> None:
    if name is None or (key == "resume" and name == "auto"):
        return
    if not NAME.fullmatch(name) or name in RESERVED:
        taken = ", ".join(sorted(RESERVED))
        raise ValueError(f"{key}={name}: a run's name is letters, digits, '.', '_' and '-', none of {taken}")


def _newest_unfinished(root: Path, experiment: str, run: str | None) -> Path | None:
    """The last run of an experiment that has a checkpoint and did not end by itself; `run` narrows it to one name."""
    newest = sorted(root.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in [root / run] if run else [path.parent for path in newest]:
        if not list_checkpoints(folder / "checkpoints") or read_json(folder / "result.json").get("status") == "done":
            continue
        try:
            if run or load_run_config(folder)["experiment"] == experiment:
                return folder
        except ConfigError:  # of another version of the program
            continue
    return None
