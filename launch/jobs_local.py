"""Jobs as processes of this machine that outlive the command: a supervisor (launch/supervise) each, in its session."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime

from launch.job_folder import ROOT, Job, State, follow_file, now
from launch.supervise import STOP_GRACE_S, identity

PYTHON = sys.executable
SHARES_RUN_ROOT = False  # a process of this machine sees what this command sees
START_TIMEOUT_S = 20.0
POLL_S = 0.1
LOST = "its supervisor left no exit status: it was killed, or the machine restarted, or this is another machine"


def overrides(config: dict) -> list[str]:
    """What the run needs besides the user's own overrides."""
    return []


def prepare(config: dict) -> dict:
    """Refuses what can't be, before anything is written; returns what job.json shall say besides."""
    return {}


def start(job: Job) -> None:
    """Returns as soon as the supervisor has written down that the command runs."""
    with job.log.open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "launch.supervise", str(job.folder)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while "supervisor" not in job.facts:
        if supervisor.poll() is not None or time.monotonic() > deadline:
            supervisor.kill()
            said = job.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise RuntimeError(f"job {job.id} did not start; its supervisor said: {said[-1]}")
        time.sleep(POLL_S)


def state(job: Job) -> State:
    facts = job.facts
    process = facts.get("supervisor")
    if "status" in facts:
        return job.ended_as()
    if process is not None and identity(process["pid"]) == process:
        return State("RUNNING")
    if process is None and _seconds_since(facts["submitted_at"]) < START_TIMEOUT_S:
        return State("PENDING")
    return job.ended_as() or State("LOST", note=LOST)  # the supervisor may have written it just before it left


def follow(job: Job) -> Iterator[str]:
    """The log from its beginning; while the job runs, to its end."""
    return follow_file(job, state, POLL_S)


def stop(job: Job) -> State:
    """Asks the supervisor to end the run, and waits until it has."""
    deadline = time.monotonic() + STOP_GRACE_S + START_TIMEOUT_S
    asked = False
    while not (stands := state(job)).ended and time.monotonic() < deadline:
        if stands.status == "RUNNING" and not asked:
            os.kill(job.facts["supervisor"]["pid"], signal.SIGTERM)
            asked = True
        time.sleep(POLL_S)
    return stands


def _seconds_since(moment: str) -> float:
    return (datetime.fromisoformat(now()) - datetime.fromisoformat(moment)).total_seconds()
