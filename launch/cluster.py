"""The Ray cluster of a run: one started here, on loopback only, or one that is joined and waited for.

Ray listens on every interface by default, its gRPC servers even when a node address of 127.0.0.1 is given. The variable
below, meant for laptops, makes it bind to loopback; Ray reads it when it is imported, so it is set before.
"""

import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import TypeVar

from launch.nodes import address_of
from train.memory import use_in_ray_workers

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
QUIET = {"logging_level": "ERROR", "log_to_driver": False}
CONNECT_TIMEOUT_S = 5.0
REMEDY = "start one with 'ray start --head', or leave cluster.address out to start one here"


LOOK_EVERY_S = 0.5
Found = TypeVar("Found")


class Lacking(ValueError):
    """Something is not there that nodes yet to come may bring."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or what Ray takes for one."""

    id: str
    address: str
    resources: dict[str, float]
    """What it has in all."""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process has joined; `loopback`: all its nodes are this machine, seen on 127.0.0.1."""

    address: str | None
    nodes: list[Node]
    """Those that carry the labels which are asked for, in the order of their addresses."""
    loopback: bool

    @property
    def resources(self) -> dict[str, float]:
        return sum((Counter(node.resources) for node in self.nodes), Counter())

    def demand_nodes(self, settings: dict) -> None:
        """Lacking where there are fewer than `cluster.nodes`."""
        wanted, labels = settings["nodes"] or 1, settings["labels"]
        if len(self.nodes) < wanted:
            spelt = f" with the labels {json.dumps(labels)}" if labels else ""
            raise Lacking(
                f"cluster.address={self.address or 'null'}: the cluster lacks {wanted - len(self.nodes)} of {wanted} "
                f"nodes{spelt} (there is {', '.join(node.address for node in self.nodes) or 'none'}); start them with "
                "'ray start --address=...', or give cluster.nodes, cluster.labels or cluster.wait_s other values"
            )

    def demand(self, bundles: list[dict[str, float]]) -> None:
        """Lacking where the cluster can't carry all workers together; it names what is missing."""
        needed = sum((Counter(bundle) for bundle in bundles), Counter())
        lacking = {name: amount for name, amount in needed.items() if self.resources.get(name, 0) < amount}
        if not lacking:
            self._demand_room(bundles)
            return
        parts = [f"{amount:g} {name} (there are {self.resources.get(name, 0):g})" for name, amount in lacking.items()]
        chips = {name: int(amount) for name, amount in lacking.items() if name not in ("CPU", "GPU")}
        remedy = "use fewer workers or threads" if "CPU" in lacking else "use fewer workers, or device=cpu"
        if chips:
            remedy = f"start its nodes with --resources='{json.dumps(chips)}' shared among them, whole hosts on each"
        raise Lacking(f"cluster.address={self.address or 'null'}: the cluster lacks {', '.join(parts)}; {remedy}")

    def _demand_room(self, bundles: list[dict[str, float]]) -> None:
        """A worker is never split between nodes."""
        for bundle in bundles:
            if not any(all(node.resources.get(name, 0) >= bundle[name] for name in bundle) for node in self.nodes):
                spelt = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
                raise Lacking(
                    f"workers={len(bundles)}: no node of the cluster has {spelt}, which one worker needs; "
                    "use more workers, so that each carries fewer hosts, or fewer threads"
                )


@contextmanager
def join(settings: dict, chips: dict[str, int], num_cpus: int) -> Iterator[Cluster]:
    """Start Ray here, offering the `chips` and at least `num_cpus` (address null), or join a running cluster."""
    address = settings["address"]
    if address == "auto":
        address = _noted_address()
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray has it for the cluster of this machine
    if address is not None:
        _call(address, settings["wait_s"])
    if not settings["expose"] and (address is None or address.startswith(("127.", "localhost:"))):
        os.environ[LOOPBACK_VARIABLE] = "0"
    import ray

    try:
        if address is None:
            use_in_ray_workers()
            cpus = max(num_cpus, os.cpu_count() or 1)
            with _interrupts_deferred():
                ray.init(
                    address="local", num_cpus=cpus, resources=chips, include_dashboard=False, **_on(settings), **QUIET
                )
        else:
            _connect(address, settings["wait_s"])
        yield look(address, settings)
    finally:
        ray.shutdown()


def look(address: str | None, settings: dict) -> Cluster:
    """The cluster as it is now."""
    import ray

    there = [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    there.sort(key=lambda node: (node.address, node.id))
    fitting = [node for node in there if settings["labels"].items() <= node.labels.items()]
    return Cluster(address, fitting, all(node.address.startswith("127.") for node in there))


def settle(cluster: Cluster, settings: dict, decide: Callable[[Cluster], Found]) -> tuple[Cluster, Found]:
    """What is decided on the cluster, as soon as nothing is lacking; after `cluster.wait_s` the ValueError that says
    what is."""
    deadline, said = time.monotonic() + settings["wait_s"], ""
    while True:
        try:
            cluster.demand_nodes(settings)
            return cluster, decide(cluster)
        except Lacking as problem:
            if time.monotonic() >= deadline:
                raise Lacking(f"{problem} (waited {settings['wait_s']:g} s)") from None
            if str(problem) != said:
                said = str(problem)
                print(f"waiting  {deadline - time.monotonic():.0f} s at most: {said}", file=sys.stderr, flush=True)
        time.sleep(LOOK_EVERY_S)
        cluster = look(cluster.address, settings)


def exposure(cluster: Cluster, interfaces: set[str]) -> str:
    """Who listens where, said of a cluster that is not on loopback alone."""
    over = f"workers listen on {', '.join(sorted(interfaces))} alone, Ray on every interface"
    token = "Ray asks for a token"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        token = "WITHOUT a token: who reaches Ray can run programs; start its nodes with RAY_AUTH_MODE=token"
    return f"{len(cluster.nodes)} node(s) at {cluster.address or 'this machine'}, exposed: {over}; {token}"


def _noted_address() -> str:
    """What `auto` stands for: what RAY_ADDRESS names, or what `ray start` has noted on this machine."""
    noted = Path(os.environ.get("RAY_TMPDIR") or gettempdir()) / "ray" / "ray_current_cluster"
    address = os.environ.get("RAY_ADDRESS") or (noted.read_text().strip() if noted.exists() else "")
    if not address:
        raise ValueError(f"cluster.address=auto: neither RAY_ADDRESS nor {noted} names a Ray head; {REMEDY}")
    return address


def _call(address: str, wait_s: float) -> None:
    """ValueError where nobody answers within `wait_s`; Ray itself would try for two minutes."""
    if not re.fullmatch(r"[^/]+:\d{1,5}", address):
        raise ValueError(f"cluster.address={address}: must be host:port of a Ray head, auto, or null; {REMEDY}")
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline or isinstance(error, OverflowError):
                problem = f"no Ray head answers there ({error})"
                raise ValueError(f"cluster.address={address}: {problem}; {REMEDY}") from None
        time.sleep(LOOK_EVERY_S)


def _connect(address: str, wait_s: float) -> None:
    """A head that answers may still be starting: it is asked again until `wait_s` are over."""
    import ray

    deadline = time.monotonic() + wait_s
    while True:
        try:
            ray.init(address=address, **QUIET)
            return
        except ConnectionError:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"cluster.address={address}: what answers there is no Ray head, or wants a token: set "
                    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
                ) from None
        ray.shutdown()
        time.sleep(LOOK_EVERY_S)


def _on(settings: dict) -> dict[str, str]:
    """Ray's address on the interface that is named; ValueError where this machine has none of that name."""
    if settings["interface"] is None:
        return {}
    if not settings["expose"]:
        problem = "a Ray started here listens on loopback only; set cluster.expose=true, or leave the interface out"
        raise ValueError(f"cluster.interface={settings['interface']}: {problem}")
    return {"_node_ip_address": address_of("cluster.interface", settings["interface"])}


def _has_token() -> bool:
    """Whether this account holds a token for Ray clusters, where Ray looks for one."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return "RAY_AUTH_TOKEN" in os.environ or Path(path).is_file()


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM count once Ray stands: half started, it would leave processes behind for a minute."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda received, _: asked.append(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt
