"""A run as a job that outlives the command: submit it, ask how it stands, follow its log, stop it, fetch the results.

The kinds of jobs are modules with the same five functions: overrides and prepare (before anything is written), start,
state, follow and stop.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from launch import compose, jobs_kuberay, jobs_local, jobs_ray, jobs_slurm, rank_table, run_folder
from launch.job_folder import Job, State, check_id, find, new_id
from launch.run import emulated_machine
from train.config import ConfigError

KINDS: dict[str, ModuleType] = {
    "local": jobs_local,
    "ray_job": jobs_ray,
    "slurm": jobs_slurm,
    "kuberay": jobs_kuberay,
}
OURS = ("launch", "action", "job", "format")
"""Keys of the command line that launch.submit itself answers to."""

PROG = "launch.submit"


def submit(config: dict, words: list[str]) -> int:
    """Start the run that `words` describe. Where a job of that id exists, only say how it stands."""
    run_root = Path(config["run_root"]).expanduser().absolute()
    if config["job"] and config["run"] and config["job"] != config["run"]:
        problem = f"{config['run']} with job={config['job']}: a job's run has its id; leave one of the two out"
        raise ConfigError("run", problem)
    name = config["job"] or config["run"] or new_id(run_root, config["experiment"])
    check_id("job" if config["job"] else "run", name)
    launch = config["launch"]
    job, kind = Job(run_root / "jobs" / name), KINDS[launch["kind"]]
    if not job.folder.exists():
        settled = [*_resumed(config), *_absolute(config, run_root), f"run={_quoted(name)}", *kind.overrides(config)]
        settled += [f"job={_quoted(name)}"] if kind.SHARES_RUN_ROOT else []
        words = words_for_run(words, settled)
        run = compose.compose(words)
        assert (run["run_root"], run["run"]) == (str(run_root), name), "an override was not quoted well"
        machine = emulated_machine(run)  # what launch.run would refuse at once is still seen here
        folder, _ = run_folder.locate(run)
        facts = {"kind": launch["kind"], "run_folder": str(folder)} | kind.prepare(run | {"launch": launch})
        if job.create(run, [kind.PYTHON, "-m", "launch.run", *words], facts):
            if rank_table.fits(machine.mesh):  # for the real machine of this mesh
                rank_table.write(job.folder, machine.plan)
            return _start(job, config)
    print(f"{PROG}: job {name} exists; nothing was submitted", file=sys.stderr)
    return status(job, config)


def _start(job: Job, config: dict) -> int:
    kind = KINDS[job.facts["kind"]]
    try:
        kind.start(job)
    except Exception:
        job.remove()
        raise
    if config["format"] == "json":
        return status(job, config)
    root = [] if config["run_root"] == "runs" else [f"run_root={_quoted(config['run_root'])}"]
    print(f"job      {job.id} ({job.facts['kind']}), in {job.folder}")
    print(f"run      {job.facts['run_folder']}")
    if "to_do" in job.facts:
        print(f"to do    {job.facts['to_do']}")
    print("follow   " + shlex.join(["python", "-m", PROG, "action=logs", f"job={_quoted(job.id)}", *root]))
    return 0


def status(job: Job, config: dict) -> int:
    """One line, or one JSON object."""
    state = KINDS[job.facts["kind"]].state(job)
    stands = {"status": state.status, "exit_code": state.exit_code, "note": state.note, "log": str(job.log)}
    print(json.dumps({"job": job.id} | job.facts | stands) if config["format"] == "json" else _line(job, state))
    return 0


def logs(job: Job, config: dict) -> int:
    """The log; of a job that runs, as it comes, to its end. Returns the job's own exit status."""
    kind = KINDS[job.facts["kind"]]
    try:
        for text in kind.follow(job):
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{PROG}: job {job.id} goes on; action=stop ends it", file=sys.stderr)
        return 0
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    state = kind.state(job)
    if state.status == "SUCCEEDED":
        return 0
    print(f"{PROG}: {_line(job, state)}", file=sys.stderr)
    return 2 if state.exit_code == 2 else 1


def stop(job: Job, config: dict) -> int:
    """End the run after the step at hand; it saves."""
    kind = KINDS[job.facts["kind"]]
    if kind.state(job).ended:
        print(f"{PROG}: job {job.id} had ended already", file=sys.stderr)
    elif not kind.stop(job).ended:
        raise RuntimeError(f"job {job.id} has been asked to stop but still runs")
    return status(job, config)


def fetch(job: Job, config: dict) -> int:
    """Copy the run folder to <launch.fetch_to>/<id>: the whole of it or nothing, and over nothing that is there."""
    state = KINDS[job.facts["kind"]].state(job)
    source = Path(job.facts["run_folder"])
    target = Path(config["launch"]["fetch_to"]).expanduser().absolute() / job.id
    if not state.ended:
        raise ConfigError("job", f"{job.id} is {state.status}: fetch it when it has ended; until then watch {source}")
    if not source.is_dir():
        why = "it ended before it had one, or run_root is on storage that this machine does not see; see action=logs"
        raise ConfigError("job", f"{job.id} ({state.status}): there is no run folder {source}: {why}")
    if target.exists():
        raise ConfigError("launch.fetch_to", f"{target} exists; take another folder (nothing was copied from {source})")
    aside = target.with_name(f".{job.id}.{os.getpid()}")
    try:
        shutil.copytree(source, aside, symlinks=True)
        os.rename(aside, target)
    except OSError as error:
        raise ConfigError("launch.fetch_to", f"{target}: could not be copied: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{target} (copied from {source})")
    return 0


ACTIONS: dict[str, Callable[[Job, dict], int]] = {"status": status, "logs": logs, "stop": stop, "fetch": fetch}


def words_for_run(words: list[str], settled: list[str]) -> list[str]:
    """The overrides that launch.run is to have: as they were given, but for those that have been `settled` here."""
    decided = {*OURS, *map(_key, settled)}
    kept = [word for word in words if _key(word) not in decided and not _key(word).startswith("launch.")]
    return [word.lstrip("+") for word in kept] + settled


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _resumed(config: dict) -> list[str]:
    """resume=auto names no run: the newest one now, not when the job starts, and under its own name."""
    if config["resume"] != "auto" or config["run"]:
        return []
    folder, checkpoint = run_folder.locate(config)
    return [f"resume={_quoted(folder.name)}"] if checkpoint else []


def _absolute(config: dict, run_root: Path) -> list[str]:
    """Paths of the configuration that must not depend on the folder in which the job runs."""
    data = config["data"].get("root")
    absolute = Path(data).expanduser().absolute() if data else None
    moved = [f"data.root={_quoted(str(absolute))}"] if absolute and str(absolute) != data else []
    return [*moved, f"run_root={_quoted(str(run_root))}"]


def _quoted(text: str) -> str:
    """A string as the value of an override: in quotes where Hydra would read anything else into it."""
    if re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    return "'" + re.sub(r"(\\+)(?='|\Z)", r"\1\1", text).replace("'", "\\'") + "'"


def _line(job: Job, state: State) -> str:
    facts = job.facts
    parts = [f"job {job.id} ({facts['kind']}): {state.status}"]
    if "started_at" in facts and state.status != "LOST":
        end = datetime.fromisoformat(facts["ended_at"]) if "ended_at" in facts else datetime.now(UTC)
        seconds = (end - datetime.fromisoformat(facts["started_at"])).total_seconds()
        parts[0] += f" {'after' if state.ended else 'for'} {seconds:.0f} s"
    parts += [f"exit code {state.exit_code}"] if state.exit_code else []
    parts += [state.note] if state.note else []
    return ", ".join([*parts, f"run folder {facts['run_folder']}"])


def main() -> int:
    argv = sys.argv[1:]
    jobs: Iterator[list[str]] | None = None

    def act(config: dict) -> int:
        """Submit the run that the other overrides describe as a job that outlives this command (action=submit), or see
        after one: action=status|logs|stop|fetch job=<id>. Its folder is <run_root>/jobs/<id>/."""
        nonlocal jobs
        if jobs is None:  # compose.main has found them right by now
            words = [word for word in argv if not word.startswith("-")]
            jobs = iter(compose.expand(words, sweep=bool({"-m", "--multirun"} & set(argv))))
        words = next(jobs)
        try:
            if config["action"] == "submit":
                return submit(config, words)
            run_root = Path(config["run_root"]).expanduser().absolute()
            return ACTIONS[config["action"]](find(run_root, config["job"], config["action"]), config)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise
        except (RuntimeError, OSError) as error:
            print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
            return 1

    return compose.main(act, argv, PROG)


if __name__ == "__main__":
    sys.exit(main())
