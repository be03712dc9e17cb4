"""Runs the command of a job folder and writes down how it ended: `python -m launch.supervise FOLDER`.

SIGTERM stops the job: it is handed on, and what has not left after a grace period is killed. Linux only (/proc, prctl).
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.job_folder import ROOT, Job, State, now

STOP_GRACE_S = 120.0
"""Above what launch.run needs to finish the step at hand and save, also on a machine that is busy with other things."""

POLL_S = 0.2
PR_SET_PDEATHSIG = 1


def supervise(job: Job, grace_s: float = STOP_GRACE_S) -> State:
    """Runs the command to its end. The command ends with its supervisor, so that none is left without a record."""
    stop_asked: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(time.monotonic()))
    with job.log.open("ab") as log:
        child = subprocess.Popen(
            job.facts["command"],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a group of its own, which can be killed without the supervisor
            preexec_fn=_end_with_parent,
        )
    job.add(started_at=now(), pid=child.pid, supervisor=identity(os.getpid()))
    handed_on = False
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT  # seen, but not taken yet: until then nobody else gets its number
    while os.waitid(os.P_PID, child.pid, ended) is None:
        if stop_asked and not handed_on:
            child.send_signal(signal.SIGTERM)
            handed_on = True
        elif stop_asked and time.monotonic() > stop_asked[0] + grace_s:
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(POLL_S)
    os.killpg(child.pid, signal.SIGKILL)  # whatever it has left behind
    return job.end(ending(child.wait(), bool(stop_asked)), now())


def ending(exit_code: int, stop_asked: bool) -> State:
    if exit_code == 0:
        return State("SUCCEEDED", exit_code)
    note = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else ""
    return State("STOPPED" if stop_asked else "FAILED", exit_code, note)


def identity(pid: int) -> dict | None:
    """What tells a process from a later one of the same number: when it started, since which start of the machine.

    None where there is none, or a dead one that nobody has waited for.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    state, started_ticks = fields[0], int(fields[19])
    return None if state in "ZX" else {"pid": pid, "started_ticks": started_ticks, "boot": boot}


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    supervise(Job(Path(sys.argv[1])))
