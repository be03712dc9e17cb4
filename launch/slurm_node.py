"""Ray on one node of a Slurm allocation: `srun python -m launch.slurm_node JOB_FOLDER INTERFACE RESOURCES`.

The first node starts the head and notes its address in the job's folder, the others join it there. Each attempt of a
job has a note of its own, so that a requeued one never joins the head of the attempt before.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.nodes import own_address
from train.metrics import write_aside

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Of heads, by the job's number: above what Ray gives its workers (10002 to 19999), below what Linux gives clients."""

HEAD_TIMEOUT_S = 120.0
ATTEMPTS, START_S = 3, 120.0
POLL_S = 0.2


def note(folder: Path, environment: dict[str, str]) -> Path:
    """Where the head of this attempt says its address."""
    return folder / f"head-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT', '0')}.txt"


def command(address: str, resources: str, head: str | None, environment: dict[str, str]) -> list[str]:
    """`ray start` on a node that has `address`; `head`: host:port of the one to join, None on the node that is it."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    start += [f"--node-ip-address={address}", f"--num-cpus={environment['SLURM_CPUS_ON_NODE']}"]
    # ports of the system's choice: another job may run on the same machine
    start += ["--min-worker-port=0", "--max-worker-port=0", f"--resources={resources}"]
    if head is not None:
        return [*start, f"--address={head}"]
    port = FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS
    return [*start, "--head", f"--port={port}", "--include-dashboard=false"]


def main() -> None:
    folder, interface, resources = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3]
    address, where = own_address(interface), note(Path(folder), dict(os.environ))
    head = None
    if os.environ["SLURM_NODEID"] == "0":
        start = command(address, resources, None, dict(os.environ))
        port = next(word for word in start if word.startswith("--port=")).partition("=")[2]
        write_aside(where, f"{address}:{port}\n")
    else:
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        while not where.exists():
            if time.monotonic() > deadline:
                sys.exit(f"slurm_node: no head within {HEAD_TIMEOUT_S:.0f} s: {where} is missing; do nodes share it?")
            time.sleep(POLL_S)
        head = where.read_text().strip()
        start = command(address, resources, head, dict(os.environ))
    print(
        f"node     {os.environ['SLURMD_NODENAME']} at {address}: {'head' if head is None else f'joins {head}'}",
        flush=True,
    )
    status = keep(start)
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    sys.exit(status)


def keep(start: list[str]) -> int:
    """Runs Ray until it ends or SIGTERM comes. Ray gives its own start 30 s, too little on a busy machine: what ends
    within START_S is tried again."""
    asked: list[int] = []
    for _ in range(ATTEMPTS):
        begun = time.monotonic()
        ray = subprocess.Popen(start, stdin=subprocess.DEVNULL)
        signal.signal(signal.SIGTERM, lambda number, _, ray=ray: (asked.append(number), ray.terminate()))
        status = ray.wait()
        if asked or status == 0 or time.monotonic() - begun > START_S:
            break
    return status


if __name__ == "__main__":
    main()
