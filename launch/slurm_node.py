"""Ray on one node of a Slurm allocation: `srun python -m launch.slurm_node JOB_FOLDER INTERFACE RESOURCES`.

The first node starts the head and notes its address in the job's folder, the others join it there. Each attempt of a
job has a note of its own, so that a requeued one never joins the head of the attempt before.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from launch.nodes import own_address
from train.memory import use_in_ray_workers
from train.metrics import write_aside

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Of heads, by the job's number: above what Ray gives its workers (10002 to 19999), below what Linux gives clients."""

HEAD_TIMEOUT_S = 120.0
ATTEMPTS, START_S = 3, 120.0
POLL_S = 0.2


def note(folder: Path, environment: dict[str, str]) -> Path:
    """Where the head of this attempt says its address."""
    return folder / f"head-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT', '0')}.txt"


def free_port(address: str, job: int) -> int:
    """A port for the head: the first free one from the job's own on. ValueError where none is."""
    for number in range(NUM_PORTS):
        port = FIRST_PORT + (job + number) % NUM_PORTS
        with socket.socket() as probe, suppress(OSError):
            probe.bind((address, port))
            return port
    raise ValueError(f"no port from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} is free on {address}")


def command(address: str, resources: str, cpus: str, *role: str) -> list[str]:
    """`ray start` on a node that has `address`; role: --head with its port, or the --address of the head to join."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    start += [f"--node-ip-address={address}", f"--num-cpus={cpus}"]
    # ports of the system's choice: another job may run on the same machine
    return [*start, "--min-worker-port=0", "--max-worker-port=0", f"--resources={resources}", *role]


def main() -> None:
    folder, interface, resources = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3]
    address, where = own_address(interface), note(folder, dict(os.environ))
    if os.environ["SLURM_NODEID"] == "0":
        port = free_port(address, int(os.environ["SLURM_JOB_ID"]))
        write_aside(where, f"{address}:{port}\n")
        client = free_port(address, port + 1 - FIRST_PORT)  # Ray's own choice is one port for all heads of a machine
        role = ["--head", f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
    else:
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        while not where.exists():
            if time.monotonic() > deadline:
                sys.exit(f"slurm_node: no head within {HEAD_TIMEOUT_S:.0f} s: {where} is missing; do nodes share it?")
            time.sleep(POLL_S)
        role = [f"--address={where.read_text().strip()}"]
    use_in_ray_workers()
    start = command(address, resources, os.environ["SLURM_CPUS_ON_NODE"], *role)
    print(f"node     {os.environ['SLURMD_NODENAME']} at {address}: {' '.join(role)}", flush=True)
    status = keep(start)
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    sys.exit(status)


def keep(start: list[str]) -> int:
    """Runs Ray until it ends or SIGTERM comes. Ray gives its own start 30 s, too little on a busy machine: what ends
    within START_S is tried again."""
    asked: list[int] = []
    running: list[subprocess.Popen] = []

    def end(number: int, _: object) -> None:
        asked.append(number)
        for ray in running:
            ray.terminate()

    signal.signal(signal.SIGTERM, end)
    for _ in range(ATTEMPTS):
        begun = time.monotonic()
        running[:] = [subprocess.Popen(start, stdin=subprocess.DEVNULL)]
        if asked:  # while it was being started
            running[0].terminate()
        status = running[0].wait()
        if asked or status == 0 or time.monotonic() - begun > START_S:
            break
    return status


if __name__ == "__main__":
    main()
