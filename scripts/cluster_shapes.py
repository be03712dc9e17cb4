"""The same short run on one Ray node, on four, and on two hosts with own addresses: where it lay, what came out.

    python scripts/cluster_shapes.py [overrides]      (root, for the network namespaces that stand for hosts; iproute2)

Prints a table of placement and the SHA-256 of the weights, which must be equal with numerics=exact, or it exits with 1.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("experiment=digits_atlas", "max_steps=6", "hang_timeout_s=300", "cluster.wait_s=60")
CHIPS = 64
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HEAD_PORT = 6399
START_TIMEOUT_S = 90.0


def main(overrides: list[str]) -> int:
    rows, hashes = [], set()
    with tempfile.TemporaryDirectory(prefix="shapes-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        shapes = {
            "one node": (alone, "workers=2"),
            "4 nodes": (four_nodes, "workers=4"),
            "2 hosts": (two_hosts, "workers=2"),
        }
        shapes["2 hosts, speeds 3 and 1"] = (lambda home: two_hosts(home, ("3", "1")), "workers=2")
        for name, (shape, workers) in shapes.items():
            home = Path(folder) / str(len(rows))
            home.mkdir()
            print(f"{name} ...", file=sys.stderr)
            with shape(home) as (prefix, environment, words):
                run = train(home, prefix, environment, [*SHORT, workers, *words, *overrides])
            rows.append(row(name, run))
            hashes.add(rows[-1][-1])
    titles = ("nodes", "hosts of the mesh, by worker", "addresses", "wall, s", "SHA-256 of the weights")
    for cells in (titles, ["---"] * len(titles), *rows):
        print("| " + " | ".join(cells) + " |")
    return 0 if len(hashes) == 1 else 1


def train(home: Path, prefix: list[str], environment: dict, words: list[str]) -> Path:
    """The run folder of `python -m launch.run`."""
    command = [*prefix, sys.executable, "-m", "launch.run", *words, f"run_root={home / 'runs'}", "run=shape"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(("cluster", "mesh")):
            print(f"  {line}", file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return home / "runs" / "shape"


def row(name: str, run: Path) -> list[str]:
    result, placed = (json.loads((run / file).read_text()) for file in ("result.json", "env.json"))
    placed = placed["placement"]
    hosts = "; ".join(f"{first}-{last}" for first, last in (worker["hosts"] for worker in placed))
    nodes = [worker["node"] for worker in placed]
    where = "; ".join(f"{worker['address']} (node {sorted(set(nodes)).index(worker['node'])})" for worker in placed)
    return [name, hosts, where, f"{result['wall_s']:.1f}", f"`{result['weights_sha256']}`"]


def ours(home: Path) -> dict[str, str]:
    """The environment: this checkout, Ray's files in a folder of their own, a token of our own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return inherited | token | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(home)}


Shape = Iterator[tuple[list[str], dict, list[str]]]


@contextmanager
def alone(home: Path) -> Shape:
    yield [], ours(home), []


@contextmanager
def four_nodes(home: Path) -> Shape:
    """Four raylets on loopback, 16 chips each: a worker needs one for itself."""
    environment = ours(home)
    nodes = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "ray_nodes.py", "4"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield [], environment, [f"cluster.address={nodes.stdout.readline().strip()}"]
    finally:
        nodes.communicate(timeout=60)


@contextmanager
def two_hosts(home: Path, speeds: tuple[str, str] | None = None) -> Shape:
    """Two network namespaces with a cable between them; `ray start` in each, each offering half of the chips, or all
    of them where they say how fast they are."""
    environment, chips = ours(home), CHIPS if speeds else CHIPS // 2
    names = [f"rr{os.getpid() % 10000}{letter}" for letter in "ab"]
    inside = [["ip", "netns", "exec", name] for name in names]
    with ExitStack() as stack:
        for name in names:
            call("ip", "netns", "add", name)
            stack.callback(call, "ip", "netns", "delete", name)
        call("ip", "link", "add", "mesh0", "netns", names[0], "type", "veth", "peer", "mesh0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            call("ip", "-n", name, "address", "add", f"{address}/24", "dev", "mesh0")
            for link in ("lo", "mesh0"):
                call("ip", "-n", name, "link", "set", link, "up")
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=2"]
        ray += [f"--resources={json.dumps({'ascend910': chips})}"]
        roles = (
            ["--head", f"--port={HEAD_PORT}", "--include-dashboard=false"],
            [f"--address={ADDRESSES[0]}:{HEAD_PORT}"],
        )
        for number, role in enumerate(roles):
            labels = [f"--labels=speed={speeds[number]}"] if speeds else []
            command = [*inside[number], *ray, *role, f"--node-ip-address={ADDRESSES[number]}", *labels]
            log = stack.enter_context((home / f"node{number}.log").open("w"))
            node = subprocess.Popen(command, env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(end, node)
            if number == 0:
                until_answers(inside[0], node, home / "node0.log")
        yield inside[0], environment, [f"cluster.address={ADDRESSES[0]}:{HEAD_PORT}", "cluster.nodes=2"]


def until_answers(prefix: list[str], node: subprocess.Popen, log: Path) -> None:
    probe = f"import socket; socket.create_connection(({ADDRESSES[0]!r}, {HEAD_PORT}), 1)"
    deadline = time.monotonic() + START_TIMEOUT_S
    while subprocess.run([*prefix, sys.executable, "-c", probe], capture_output=True).returncode:
        if node.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"no Ray head: {log.read_text()[-1000:]}")
        time.sleep(0.2)


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def call(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
