"""The folder of a run: its name, what is in it before and after training, and which one a run continues."""

import fcntl
import json
import os
import platform
import re
import sys
from collections.abc import Container, Iterator
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import IO, Any

from launch.compose import load_run_config
from train.checkpoint_files import list_checkpoints, newest_sound
from train.config import ConfigError, show
from train.metrics import finite, read_rows, write_aside

RESERVED = {"reference", "jobs", "verdict", "multirun"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Of runs and of jobs: names folders and stands on command lines, so nothing in it may need care."""
LONGEST_NAME = 150

HERE = """workers shares threads device backend cluster launch max_steps run_root checkpoints_kept hang_timeout_s
max_restarts min_workers replacement_wait_s""".split()
"""Keys of a continued run that the command line sets: where it computes and how far. All others are the run's own."""
OF_THE_COMMAND = "run resume checkpoint_steps checkpoint_s format explain out trace action job".split()
"""Keys that say nothing of what is trained."""

PACKAGES = ("torch", "torchvision", "ray", "hydra-core", "tensorboard", "numpy", "scikit-learn")


def locate(config: dict) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to continue from or None).

    A name and resume=auto mean exactly that folder: one without a checkpoint begins anew (see `create`). ValueError
    where the names clash, or nothing can be continued, or the folder is of another recipe.
    """
    root = Path(config["run_root"]).expanduser().absolute()
    for key in ("run", "resume"):
        _check_name(key, config[key])
    if config["resume"] == "auto" and config["run"]:
        folder = root / config["run"]
        checkpoint = _newest(folder)
        if checkpoint:
            _demand_same_recipe(folder, config, but=HERE)
        if folder.is_dir():
            hold(folder).close()  # refused here rather than after the workers' start
            return folder, checkpoint
    elif config["resume"] == "auto":
        found = _newest_unfinished(root, config["experiment"])
        if found is not None:
            return found, _newest(found)
    elif config["resume"] is not None:
        folder = root / config["resume"]
        checkpoint = _newest(folder)
        if not checkpoint:
            problem = f"{folder} has no checkpoints" if folder.is_dir() else f"there is no {folder}"
            raise ValueError(f"resume={config['resume']}: {problem}; name a run of {root} that has some, or use auto")
        return folder, checkpoint
    if root.exists() and not root.is_dir():
        raise ValueError(f"run_root={config['run_root']}: is a file; name a folder")
    folder = root / (config["run"] or f"{config['experiment']}-{datetime.now():%Y%m%d-%H%M%S}")
    if folder.exists():
        name = folder.name
        raise ValueError(f"run={name}: {folder} exists; take another name, or continue it with resume={name}")
    return folder, None


def finished(config: dict) -> Path | None:
    """The folder that resume=auto and a name lead to, where its run is done; ValueError where it had another recipe."""
    if config["resume"] != "auto" or not config["run"]:
        return None
    folder = Path(config["run_root"]).expanduser().absolute() / config["run"]
    if read_json(folder / "result.json").get("status") != "done":
        return None
    _demand_same_recipe(folder, config, but=[key for key in HERE if key != "max_steps"])
    return folder


def continued(config: dict, folder: Path) -> dict:
    """The configuration of a continued run: its own, but where and how far the command line says."""
    own = load_run_config(folder)
    return own | {key: config[key] for key in HERE} | {"resume": folder.name, "run": folder.name}


def sweep_names(jobs: list[list[str]]) -> list[str]:
    """What tells each job of a sweep from the others, fit for a run's name: its overrides that differ between jobs.

    `jobs` are the overrides of each, in one order: [["a=1", "b=2"], ["a=1", "b=3"]] gives ["b.2", "b.3"].
    """
    swept = [words for words in zip(*jobs, strict=True) if len(set(words)) > 1]
    return ["-".join(_in_a_name(words[number]) for words in swept) for number in range(len(jobs))]


def _in_a_name(word: str) -> str:
    """key=value as key.value; what a name can't hold, or is too long for one, makes room for a hash."""
    text = word.lstrip("+").replace("=", ".", 1)
    legal = re.sub(r"[^A-Za-z0-9._-]+", "_", text)
    if legal == text and len(text) <= LONGEST_NAME // 3:
        return text
    return f"{legal[: LONGEST_NAME // 3]}-{sha256(text.encode()).hexdigest()[:6]}"


def create(folder: Path, config: dict, environment: dict, resumed: bool) -> IO:
    """Make the folder with config.yaml and env.json; returns what to close when the run has ended (see `hold`).

    With resume=auto a folder may be there that has nothing to continue from: it is used where nothing was trained in
    it, else it is moved aside, whole. ValueError where another run has taken the name meanwhile.
    """
    from yaml import safe_dump

    anew = config["resume"] == "auto" and not resumed
    try:
        folder.mkdir(parents=True, exist_ok=resumed or anew)
    except FileExistsError:
        raise ValueError(f"run={folder.name}: {folder} exists by now; take another name") from None
    held = hold(folder)
    if anew and next(read_rows(folder), None) is not None:
        aside = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}.unsaved-{n}")).exists())
        folder.rename(aside)
        print(f"moved aside: {aside}, which was stopped before its first checkpoint; {folder.name} begins anew")
        folder.mkdir()
        held.close()
        held = hold(folder)
    write_aside(folder / "config.yaml", safe_dump(config, sort_keys=False, allow_unicode=True))
    write_json(folder / "env.json", environment)
    return held


def hold(folder: Path) -> IO:
    """An open file whose lock says that this process trains the run: until it is closed, or the process ends anyhow.

    ValueError where another process holds it.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        problem = "another process trains it at this moment; wait for its end, or take another name"
        raise ValueError(f"run={folder.name}: {problem}") from None
    except OSError:  # a file system without locks: as if there were no second process
        pass
    return file


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


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; says which newer ones are not."""
    return newest_sound(folder / "checkpoints", lambda problem: print(f"launch.run: {problem}", file=sys.stderr))


def _newest_unfinished(root: Path, experiment: str) -> Path | None:
    """The last run of an experiment that has a checkpoint and did not end by itself."""
    newest = sorted(root.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in [path.parent for path in newest]:
        if not list_checkpoints(folder / "checkpoints") or read_json(folder / "result.json").get("status") == "done":
            continue
        with suppress(ConfigError):  # of another version of the program
            if load_run_config(folder)["experiment"] == experiment:
                return folder
    return None


def _demand_same_recipe(folder: Path, config: dict, but: list[str]) -> None:
    """ValueError where a run of this name was, or is to be, another training than the configuration says."""
    own, wanted = (dict(leaves("", it, {*but, *OF_THE_COMMAND})) for it in (load_run_config(folder), config))
    for key in sorted(own.keys() | wanted.keys()):
        if own.get(key) != wanted.get(key):
            raise ValueError(
                f"run={folder.name}: {folder} has {key}={show(own.get(key))}, this command {show(wanted.get(key))}; "
                f"take another run_root or name, or resume={folder.name} for that run's own recipe"
            )


def leaves(path: str, value: Any, but: Container[str] = ()) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a configuration; `but` are keys of its top that are left out."""
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        if name not in but:
            yield from leaves(f"{path}.{name}" if path else name, inner)
