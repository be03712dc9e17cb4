"""The Ray cluster of a run: one started here, on loopback only, or one that is joined.

Ray listens on every interface by default, its gRPC servers even when a node address of 127.0.0.1 is given. The variable
below, meant for laptops, makes it bind to loopback; Ray reads it when it is imported, so it is set before.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
QUIET = {"logging_level": "ERROR", "log_to_driver": False}


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process has joined; `loopback`: all its nodes are this machine, seen on 127.0.0.1."""

    address: str | None
    resources: dict[str, float]
    loopback: bool

    def demand(self, needed: dict[str, float]) -> None:
        """ValueError where the cluster can't carry all workers together; it names what is lacking."""
        lacking = {name: amount for name, amount in needed.items() if self.resources.get(name, 0) < amount}
        if not lacking:
            return
        parts = [f"{amount:g} {name} (there are {self.resources.get(name, 0):g})" for name, amount in lacking.items()]
        chips = {name: int(amount) for name, amount in lacking.items() if name not in ("CPU", "GPU")}
        remedy = "use fewer workers or threads" if "CPU" in lacking else "use fewer workers, or device=cpu"
        if chips:
            remedy = f"start its nodes with --resources='{json.dumps(chips)}' shared among them, whole hosts on each"
        raise ValueError(f"cluster.address={self.address}: the cluster lacks {', '.join(parts)}; {remedy}")


@contextmanager
def join(settings: dict, chips: dict[str, int], num_cpus: int) -> Iterator[Cluster]:
    """Start Ray here, offering the `chips` and at least `num_cpus` (address null), or join a running cluster."""
    address = settings["address"]
    if address is None and not settings["expose"]:
        os.environ[LOOPBACK_VARIABLE] = "0"
    import ray

    if address is None:
        cpus = max(num_cpus, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cpus, resources=chips, include_dashboard=False, **QUIET)
    else:
        _connect(address)
    try:
        addresses = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        yield Cluster(address, ray.cluster_resources(), loopback=all(a.startswith("127.") for a in addresses))
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address=address, **QUIET)
    except ConnectionError as error:
        raise ValueError(
            f"cluster.address={address}: no Ray cluster answers there ({str(error).splitlines()[0]}); start one with "
            "'ray start --head', or leave cluster.address out to start one here"
        ) from None
