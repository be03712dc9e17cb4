"""Jobs of Slurm: a batch script starts Ray on all its nodes and runs launch.run; sbatch, scontrol, scancel are asked.

The script writes its exit code into the job's folder, since Slurm forgets a job minutes after its end (MinJobAge).
Before the time limit Slurm says so (--signal); the run then saves, and the job is queued again to go on.
Source: https://slurm.schedmd.com/sbatch.html, scontrol.html, scancel.html
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime

from launch.job_folder import ROOT, Job, State, follow_file, now
from launch.placement import resource_name
from launch.run import emulated_machine
from launch.supervise import STOP_GRACE_S
from train.config import ConfigError
from train.metrics import write_aside

PYTHON = sys.executable
SHARES_RUN_ROOT = True  # checked by the run, which looks for its job there
WAIT_S = 300
"""For the nodes' Ray: the slowest of many."""
POLL_S = 1.0
TIMEOUT_S = 60.0
"""Of Slurm's own commands."""
KILL_TIMEOUT_S = 60.0

OPTION, VALUE = re.compile(r"[a-z][a-z-]*"), re.compile(r"[A-Za-z0-9@%+=:,./\[\]&|*()_-]*")
SETTLED = (
    "chdir export job-name nodes ntasks-per-node open-mode output error requeue no-requeue signal time wrap".split()
)
"""sbatch's options that are not the user's."""

RUNS = ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
WAITS = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "RESIZING")
"""States of scontrol; all others are ends."""

SCRIPT = """\
#!/bin/bash
# Job {id} of launch.submit: Ray on all nodes of the allocation, then the run (command.txt) on the first.
{options}
set -uo pipefail
job={folder}
python={python}
cd {root} || exit 1
RAY_TMPDIR="$(mktemp --directory /tmp/ray-XXXXXX)"
export PYTHONUNBUFFERED=1 RAY_TMPDIR RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$job/ray_token"
head="$job/head-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}.txt"
rm -f "$job/exit_code"
(umask 077; "$python" -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH")
leave() {{
    rm -rf "$RAY_AUTH_TOKEN_PATH" "$head" "$RAY_TMPDIR"
    echo "$1" > "$job/exit_code.new" && mv "$job/exit_code.new" "$job/exit_code"
    exit "$1"
}}

# Ray on every node, the head on the first, over one interface; each offers its share of the emulated chips
srun --overlap --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 \\
    "$python" -m launch.slurm_node "$job" {interface} {resources} >> "$job/ray.txt" 2>&1 &
ray=$!
until [ -s "$head" ] || ! kill -0 "$ray" 2>/dev/null; do sleep 0.2; done
[ -s "$head" ] || {{ tail -n 5 "$job/ray.txt"; leave 1; }}
RAY_ADDRESS="$(cat "$head")"
export RAY_ADDRESS

# the run; action=stop sends TERM, Slurm sends USR1 when the time limit is near: it saves after the step at hand
{command} &
run=$!
near_limit=no
trap 'kill -TERM "$run" 2>/dev/null' TERM
trap 'near_limit=yes; kill -TERM "$run" 2>/dev/null' USR1
while kill -0 "$run" 2>/dev/null; do wait "$run"; done
wait "$run"
status=$?

kill "$ray" 2>/dev/null
wait "$ray"
if [ "$near_limit" = yes ] && [ "$status" = 1 ]; then
    echo "the time limit is near: queued again, to go on from the checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
leave "$status"
"""


def overrides(config: dict) -> list[str]:
    """What the run needs besides the user's own overrides: its own cluster, all of it, and to go on when requeued."""
    if config["cluster"]["address"] is not None:
        problem = f"{config['cluster']['address']} with launch=slurm: the job starts its own Ray; leave it out"
        raise ConfigError("cluster.address", problem)
    nodes = config["launch"]["nodes"]
    goes_on = ["resume=auto"] if config["resume"] is None else []
    return ["cluster.address=auto", f"cluster.nodes={nodes}", f"cluster.wait_s={WAIT_S}", *goes_on]


def prepare(config: dict) -> dict:
    """Refuses what can't be, before anything is written; returns what job.json shall say besides."""
    for name, value in config["launch"]["sbatch"].items():
        if not OPTION.fullmatch(name) or name in SETTLED or not VALUE.fullmatch(value):
            remedy = "options are sbatch's long ones without their dashes, values without spaces and quotes"
            raise ConfigError(
                f"launch.sbatch.{name}", f"{value!r} is not handed on: {remedy}; not {', '.join(SETTLED)}"
            )
    if shutil.which("sbatch") is None:
        raise ConfigError("launch", "slurm: there is no sbatch on this machine; submit from one that is part of Slurm")
    machine, nodes = emulated_machine(config), config["launch"]["nodes"]
    hosts = -(-machine.mesh.num_hosts // nodes)
    chips = {resource_name(machine.chip.name): hosts * machine.mesh.chips_per_host}
    launch = {name: config["launch"][name] for name in ("nodes", "minutes", "notice_s", "sbatch")}
    return {"slurm": launch, "resources": chips, "interface": config["cluster"]["interface"]}


def script(job: Job) -> str:
    """The batch script. All that comes from a configuration is quoted, or a number, or checked in `prepare`."""
    facts = job.facts
    asked = facts["slurm"]
    options = {"nodes": asked["nodes"], "ntasks-per-node": 1, "signal": f"B:USR1@{asked['notice_s']}"}
    if asked["minutes"] is not None:
        options["time"] = asked["minutes"]
    lines = [
        f"#SBATCH --{name}" + (f"={value}" if value != "" else "")
        for name, value in (options | asked["sbatch"]).items()
    ]
    return SCRIPT.format(
        id=job.id,
        options="\n".join([*lines, "#SBATCH --requeue", "#SBATCH --open-mode=append"]),
        folder=shlex.quote(str(job.folder)),
        python=shlex.quote(PYTHON),
        root=shlex.quote(str(ROOT)),
        interface=shlex.quote(facts["interface"] or ""),
        resources=shlex.quote(json.dumps(facts["resources"])),
        command=shlex.join(facts["command"]),
    )


def start(job: Job) -> None:
    write_aside(job.folder / "job.sbatch", script(job))
    output = str(job.log).replace("%", "%%")
    said = _slurm("sbatch", "--parsable", f"--job-name={job.id}", f"--output={output}", str(job.folder / "job.sbatch"))
    if said.returncode:
        raise ConfigError("launch", f"slurm: {_line(said.stderr)}")
    job.add(slurm_id=int(said.stdout.strip().partition(";")[0]))


def state(job: Job) -> State:
    ended = job.ended_as()
    if ended is not None:
        return ended
    if "slurm_id" not in job.facts:
        return State("LOST", note="it never reached Slurm")
    known = _known(job)
    left = job.folder / "exit_code"
    if not known and not left.exists():
        return State("LOST", note="Slurm does not know it any more, and its script left no exit code")
    if known.get("StartTime", "Unknown") != "Unknown" and known["JobState"] not in WAITS:
        job.add(started_at=_time(known["StartTime"]))
    again = f"queued again {known['Restarts']} time(s)" if known.get("Restarts", "0") != "0" else ""
    if known.get("JobState") in WAITS:
        reason = known.get("Reason", "None")
        return State("PENDING", note=", ".join(filter(None, [again, f"waits: {reason}" if reason != "None" else ""])))
    if known.get("JobState") in RUNS:
        return State("RUNNING", note=again)
    code = int(left.read_text()) if left.exists() else int(known["ExitCode"].partition(":")[0])
    return job.end(ending(code, known.get("JobState", ""), "stop_asked_at" in job.facts), _ended_at(known))


def ending(code: int, slurm_state: str, stop_asked: bool) -> State:
    """How a job ended: the exit code of its run (above 128: the signal that killed it), and what Slurm says of it."""
    code = 128 - code if code > 128 else code
    if code == 0 and slurm_state in ("", "COMPLETED"):
        return State("SUCCEEDED", 0)
    note = "" if slurm_state in ("", "COMPLETED", "FAILED") else f"Slurm: {slurm_state}"
    if stop_asked or slurm_state == "CANCELLED":
        return State("STOPPED", code or None, note)
    return State("FAILED", code or None, note)


def follow(job: Job) -> Iterator[str]:
    """The log from its beginning; while the job waits or runs, to its end."""
    return follow_file(job, state, POLL_S)


def stop(job: Job) -> State:
    """TERM to the script, which hands it on: the run saves and leaves. What stays is cancelled."""
    job.add(stop_asked_at=now())
    number = str(job.facts["slurm_id"])
    if state(job).status == "PENDING":
        _slurm("scancel", number)
    else:
        _slurm("scancel", "--batch", "--signal=TERM", number)
    if not (stands := _wait(job, STOP_GRACE_S)).ended:
        _slurm("scancel", number)
        stands = _wait(job, KILL_TIMEOUT_S)
    return stands


def _wait(job: Job, timeout_s: float) -> State:
    deadline = time.monotonic() + timeout_s
    while not (stands := state(job)).ended and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return stands


def _known(job: Job) -> dict[str, str]:
    """What Slurm says of the job; {} where it has forgotten it. RuntimeError where it does not answer."""
    said = _slurm("scontrol", "--oneliner", "show", "job", str(job.facts["slurm_id"]))
    if said.returncode and "Invalid job id" in said.stderr:
        return {}
    if said.returncode:
        raise RuntimeError(f"job {job.id}: {_line(said.stderr)}")
    words = dict(word.partition("=")[::2] for word in reversed(said.stdout.split()))  # paths come last: first ones win
    return words if words.get("JobName") == job.id else {}  # numbers start anew where Slurm was set up anew


def _slurm(*command: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise RuntimeError(f"there is no {command[0]} on this machine; ask from one that is part of Slurm") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} gave no answer within {TIMEOUT_S:.0f} s") from error


def _time(text: str) -> str:
    """Slurm's local time as ours."""
    return datetime.fromisoformat(text).astimezone().isoformat(timespec="milliseconds")


def _ended_at(known: dict[str, str]) -> str:
    return _time(known["EndTime"]) if known.get("EndTime", "Unknown") != "Unknown" else now()


def _line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
