"""Jobs of a running Ray head, through its job server.

The head keeps the job's status and log; both are copied into the job's folder once the job has ended.
Source: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/
"""

import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launch.job_folder import ROOT, Job, State
from launch.supervise import STOP_GRACE_S
from train.config import ConfigError

UPLOADED = ("train", "launch", "conf", "pyproject.toml")
PYTHON = "python"
SHARES_RUN_ROOT = True  # checked by the run, which looks for its job there
CONNECT_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = STOP_GRACE_S + 15.0
POLL_S = 0.5


def overrides(config: dict) -> list[str]:
    """What the run needs besides the user's own overrides: it joins its head's cluster."""
    address = config["cluster"]["address"]
    if address not in (None, "auto"):
        problem = f"{address} with launch=ray_job: the job joins the cluster of its head; leave it out"
        raise ConfigError("cluster.address", problem)
    return ["cluster.address=auto"]


def prepare(config: dict) -> dict:
    """Refuses what can't be, before anything is written; returns what job.json shall say besides."""
    address = config["launch"]["address"]
    run_root = Path(config["run_root"]).resolve()
    for name in UPLOADED:
        if run_root.is_relative_to(ROOT / name):
            problem = f"{run_root} lies inside {ROOT / name}, which is uploaded; take a folder outside of it"
            raise ConfigError("run_root", problem)
    _client(address)
    return {"address": address}


def start(job: Job) -> None:
    """Harmless where the head knows the job already."""
    client, entrypoint = _client(job.facts["address"]), shlex.join(job.facts["command"])
    known = _details(client, job)
    if known is not None:
        if known.entrypoint != entrypoint:
            raise ConfigError("job", f"{job.id}: {job.facts['address']} has another job of that id; take another one")
        return
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": f"{STOP_GRACE_S:.0f}"}
    if sys.prefix != sys.base_prefix:  # where the head has this virtual environment too, its python comes first
        environment["PATH"] = f"{Path(sys.prefix) / 'bin'}:${{PATH}}"
    with tempfile.TemporaryDirectory() as package:
        copy_package(Path(package))
        runtime_env = {"working_dir": package, "env_vars": environment}
        client.submit_job(entrypoint=entrypoint, submission_id=job.id, runtime_env=runtime_env)
    job.add(submission_id=job.id)


def copy_package(target: Path) -> None:
    """What is uploaded: the program and nothing that lies beside it."""
    for name in UPLOADED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():  # an installed package has no pyproject.toml
            shutil.copy2(ROOT / name, target / name)


def state(job: Job) -> State:
    ended = job.ended_as()
    if ended is not None:
        return ended
    client = _client(job.facts["address"])
    details = _details(client, job)
    if details is None:
        note = f"{job.facts['address']} does not know it: that head was started anew, or the job never reached it"
        return State("LOST", note=note)
    if details.start_time and "started_at" not in job.facts:
        job.add(started_at=_time(details.start_time))
    if not details.status.is_terminal():
        return State(str(details.status))
    job.log.write_text(client.get_job_logs(job.id), encoding="utf-8")
    code = details.driver_exit_code
    # the head's message repeats the log where the command itself has failed
    note = " ".join((details.message or "").split())[:300] if code is None and str(details.status) == "FAILED" else ""
    return job.end(State(str(details.status), code, note), _time(details.end_time))


def follow(job: Job) -> Iterator[str]:
    """The log from its beginning; while the job runs, to its end."""
    if state(job).ended:
        yield job.log.read_text(encoding="utf-8")
        return
    import asyncio

    pieces = _client(job.facts["address"]).tail_job_logs(job.id)

    async def following() -> str | None:
        return await anext(pieces, None)

    with asyncio.Runner() as runner:
        try:
            while (text := runner.run(following())) is not None:
                yield text
        except RuntimeError as error:
            problem = f"{job.facts['address']} has closed the connection ({_line(error)})"
            raise RuntimeError(f"job {job.id}: {problem}") from error


def stop(job: Job) -> State:
    """SIGTERM through the head, and waits until the run has left."""
    _client(job.facts["address"]).stop_job(job.id)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not (stands := state(job)).ended and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return stands


def _client(address: str | None) -> Any:
    """Ray's client of a job server that answers; ConfigError with the reason in one line."""
    url = urlsplit(address or "")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError("launch.address", f"{address!r} is no address of a job server, such as http://127.0.0.1:8265")
    try:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        socket.create_connection((url.hostname, port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        remedy = "start a head with 'ray start --head', or name the one that runs"
        raise ConfigError("launch.address", f"{address}: no job server answers ({_line(error)}); {remedy}") from error

    logging.disable(logging.INFO)  # Ray's account of its own doings
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # ray start and ray.init use tokens, a client alone would not
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray lets them win over the address that was asked for
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        remedy = "set RAY_AUTH_TOKEN_PATH to the head's token file, or RAY_AUTH_MODE=disabled where it has none"
        problem = f"{address}: no token, or not the one that the head asks for; {remedy}"
        raise ConfigError("launch.address", problem) from error
    except (RuntimeError, OSError, ValueError) as error:
        problem = f"{address} answers, but not as Ray's job server: {_line(error)}"
        raise ConfigError("launch.address", problem) from error


def _details(client: Any, job: Job) -> Any:
    """What the head says of the job; None where it does not know it."""
    return next((details for details in client.list_jobs() if details.submission_id == job.id), None)


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
