"""A Ray head on this machine, on loopback alone, with a token and its job server; for scripts and tests of jobs."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.cluster import LOOPBACK_VARIABLE
from scripts.slurm_here import end, free_ports

START_TIMEOUT_S = 180.0
POLL_S = 0.1


@contextmanager
def ray_head(folder: Path, cpus: int, chips: int) -> Iterator[tuple[str, dict[str, str]]]:
    """`ray start --head` for as long as this lasts; yields the job server's address, and the environment to reach it.

    `folder` is Ray's, with a short path, for it holds sockets; in that environment cluster.address=auto is this head.
    RuntimeError with the head's log where it won't start.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = inherited | token | {"RAY_TMPDIR": str(folder), LOOPBACK_VARIABLE: "0"}
    gcs, dashboard, client, agent, grpc = free_ports(5)
    options = {
        "--node-ip-address": "127.0.0.1",
        "--port": gcs,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": dashboard,
        "--ray-client-server-port": client,
        "--dashboard-agent-listen-port": agent,
        "--dashboard-agent-grpc-port": grpc,
        "--num-cpus": cpus,
        "--resources": json.dumps({"ascend910": chips}),
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"{name}={value}" for name, value in options.items()]
    log, noted = folder / "head.log", folder / "ray" / "ray_current_cluster"
    with log.open("w") as out:
        head = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (noted.exists() and _answers(dashboard)):  # its server answers before it can serve
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Ray head within {START_TIMEOUT_S:.0f} s:\n{log.read_text()[-2000:]}")
            time.sleep(POLL_S)
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        end(head)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
