"""The Ray cluster of a run: one started here, on loopback only, or one that is joined.

Ray listens on every interface by default, its gRPC servers even when a node address of 127.0.0.1 is given. The variable
below, meant for laptops, makes it bind to loopback; Ray reads it when it is imported, so it is set before.
"""

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
QUIET = {"logging_level": "ERROR", "log_to_driver": False}


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process has joined; `loopback`: all its nodes are this machine, seen on 127.0.0.1."""

    address: str | None
    nodes: list[dict[str, float]]
    """What each node has in all."""
    loopback: bool

    @property
    def resources(self) -> dict[str, float]:
        return sum((Counter(node) for node in self.nodes), Counter())

    def demand(self, bundles: list[dict[str, float]]) -> None:
        """ValueError where the cluster can't carry all workers together; it names what is lacking."""
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
        raise ValueError(f"cluster.address={self.address or 'null'}: the cluster lacks {', '.join(parts)}; {remedy}")

    def _demand_room(self, bundles: list[dict[str, float]]) -> None:
        """A worker is never split between nodes."""
        for bundle in bundles:
            if not any(all(node.get(name, 0) >= bundle[name] for name in bundle) for node in self.nodes):
                spelt = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
                raise ValueError(
                    f"workers={len(bundles)}: no node of the cluster has {spelt}, which one worker needs; "
                    "use more workers, so that each carries fewer hosts, or fewer threads"
                )


@contextmanager
def join(settings: dict, chips: dict[str, int], num_cpus: int) -> Iterator[Cluster]:
    """Start Ray here, offering the `chips` and at least `num_cpus` (address null), or join a running cluster."""
    address = settings["address"]
    if not settings["expose"] and (address is None or _on_loopback(address)):
        os.environ[LOOPBACK_VARIABLE] = "0"
    import ray

    try:
        if address is None:
            cpus = max(num_cpus, os.cpu_count() or 1)
            with _interrupts_deferred():
                ray.init(address="local", num_cpus=cpus, resources=chips, include_dashboard=False, **QUIET)
        else:
            _connect(address)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        loopback = all(node["NodeManagerAddress"].startswith("127.") for node in nodes)
        yield Cluster(address, [node["Resources"] for node in nodes], loopback)
    finally:
        ray.shutdown()


def _on_loopback(address: str) -> bool:
    """Whether a cluster lies on this machine's loopback; `auto` is looked up where Ray does."""
    if address == "auto":
        noted = Path(os.environ.get("RAY_TMPDIR") or gettempdir()) / "ray" / "ray_current_cluster"
        address = os.environ.get("RAY_ADDRESS") or (noted.read_text() if noted.exists() else "")
    return address.startswith(("127.", "localhost"))


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


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address=address, **QUIET)
    except ConnectionError as error:
        raise ValueError(
            f"cluster.address={address}: no Ray cluster answers there ({str(error).splitlines()[0]}); start one with "
            "'ray start --head', or leave cluster.address out to start one here"
        ) from None
