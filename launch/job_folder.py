"""A submitted job as a folder, <run_root>/jobs/<id>/: what was asked, where it runs, its log and how it ended.

config.yaml (resolved), command.txt (exact), job.json (kind, addresses, run folder, times, exit code), log.txt.
"""

import codecs
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from launch.run_folder import NAME, RESERVED, write_json
from train.config import ConfigError
from train.metrics import write_aside

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds train/, launch/ and conf/: every job's working directory, or what is uploaded to be it."""

UNPACKED = ("runtime_resources", "working_dir_files")
"""Folders in which Ray unpacks what a job has uploaded."""

MAX_ID = 100
SHOWN_IDS = 10


@dataclass(frozen=True)
class State:
    """How a job stands. `exit_code` is the command's own (negative: the signal that killed it), null where unknown."""

    status: Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED", "LOST"]
    exit_code: int | None = None
    note: str = ""

    @property
    def ended(self) -> bool:
        return self.status not in ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Job:
    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def facts(self) -> dict:
        """What job.json says now."""
        return json.loads((self.folder / "job.json").read_text(encoding="utf-8"))

    def add(self, **facts: object) -> None:
        write_json(self.folder / "job.json", self.facts | facts)

    def create(self, config: dict, command: list[str], facts: dict) -> bool:
        """Make the whole folder or nothing; False where the id is taken, be it by somebody at this very moment."""
        from yaml import safe_dump

        aside = self.folder.with_name(f".{self.id}.{os.getpid()}")
        aside.mkdir(parents=True, exist_ok=True)
        try:
            write_aside(aside / "config.yaml", safe_dump(config, sort_keys=False, allow_unicode=True))
            write_aside(aside / "command.txt", shlex.join(command) + "\n")
            write_json(aside / "job.json", facts | {"command": command, "submitted_at": now()})
            (aside / "log.txt").touch()
            return _claim(aside, self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def ended_as(self) -> State | None:
        """How the job ended, where that is written down."""
        facts = self.facts
        if "status" not in facts:
            return None
        return State(facts["status"], facts["exit_code"], facts["note"])

    def end(self, state: State, ended_at: str) -> State:
        self.add(status=state.status, exit_code=state.exit_code, note=state.note, ended_at=ended_at)
        return state


def follow_file(job: Job, state: Callable[[Job], State], poll_s: float) -> Iterator[str]:
    """The job's log from its beginning, as it is written, to its end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with job.log.open("rb") as log:
        while True:
            ended = state(job).ended  # asked before reading: what was written until then is read
            yield decoder.decode(log.read(), final=ended)
            if ended:
                return
            time.sleep(poll_s)


def find(run_root: Path, name: str | None, action: str) -> Job:
    """The job of that id; ConfigError with the ids there are."""
    found = sorted(run_root.glob("jobs/*/job.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    ids = [path.parent.name for path in found if not path.parent.name.startswith(".")]
    if name in ids:
        return Job(run_root / "jobs" / name)
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    there = f"there is {', '.join(ids[:SHOWN_IDS])}{more}" if ids else "there is none"
    problem = f"no job {name}" if name else f"action={action} needs the id of a job"
    raise ConfigError("job", f"{problem}; in {run_root / 'jobs'} {there}")


def check_run_root(config: dict) -> None:
    """ConfigError where a run would write to what its job's submitter does not see, or what is deleted with the job."""
    root = Path(config["run_root"]).expanduser().absolute()
    if root.resolve().is_relative_to(ROOT) and set(UNPACKED) <= set(ROOT.parts):
        raise ConfigError(
            "run_root", f"{root} lies inside the uploaded program, which Ray deletes; take another folder"
        )
    if config["job"] is None:
        return
    check_id("job", config["job"])
    if not (root / "jobs" / config["job"] / "job.json").exists():
        problem = f"{root}: holds no job {config['job']} on this machine, so it is not the folder of launch.submit"
        raise ConfigError("run_root", f"{problem}; name one on storage that both machines share")


def check_id(key: str, name: str) -> None:
    """Ids name folders and stand on command lines: nothing in them may need care."""
    if not NAME.fullmatch(name) or len(name) > MAX_ID or name in RESERVED:
        taken = ", ".join(sorted(RESERVED))
        raise ConfigError(key, f"{name!r}: an id is up to {MAX_ID} letters, digits, '.', '_' and '-', none of {taken}")


def new_id(run_root: Path, experiment: str) -> str:
    """<experiment>-<date>-<time>, counted on where several jobs are submitted in one second."""
    base = name = f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}"
    count = 1
    while (run_root / "jobs" / name).exists() or (run_root / name).exists():
        count += 1
        name = f"{base}-{count}"
    return name


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _claim(aside: Path, folder: Path) -> bool:
    """Rename is atomic and fails on a folder that holds something."""
    try:
        os.rename(aside, folder)
    except OSError:
        if folder.exists():
            return False
        raise
    return True
