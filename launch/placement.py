"""What the workers of a run ask of the cluster: how many there are, which hosts of the mesh each carries, which device.

Deciding only: nothing here talks to Ray.
"""

from dataclasses import dataclass

from launch.cluster import Cluster
from train.emulator import Emulator
from train.mesh.blocks import blocks

CORES_PER_AUTO_WORKER = 2


@dataclass(frozen=True)
class Request:
    """What each worker asks of Ray: one bundle. `hosts` are the hosts of the mesh that it carries."""

    hosts: range
    chips: int
    resource: str
    threads: int
    gpus: int

    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.threads, self.resource: self.chips}
        return bundle | {"GPU": self.gpus} if self.gpus else bundle


def ask(config: dict, emulated: Emulator, cluster: Cluster) -> tuple[list[Request], str]:
    """What each worker needs of the cluster, and the device they all compute on. ValueError where it can't be had."""
    gpus = int(cluster.resources.get("GPU", 0))
    cores = int(cluster.resources.get("CPU", 0))
    split = blocks(config, emulated.mesh)
    workers = wanted_workers(config)
    if workers is None:
        usable = gpus if gpus and config["device"] != "cpu" else max(cores // CORES_PER_AUTO_WORKER, 1)
        workers = min(usable, split.count)
    device = config["device"]
    if device == "auto":
        device = "cuda" if gpus >= workers else "cpu"
    threads = config["threads"]
    if threads == "auto":
        # exact: the count belongs to the contract, so it must not follow the number of workers
        threads = 1 if config["numerics"] == "exact" and device == "cpu" else max(cores // workers, 1)
    chips, resource = emulated.mesh.chips_per_host, resource_name(emulated.chip.name)
    on_gpu = int(device == "cuda")
    hosts = [range(share.start * split.hosts, share.stop * split.hosts) for share in split.shares(workers)]
    requests = [Request(mine, len(mine) * chips, resource, threads, on_gpu) for mine in hosts]
    cluster.demand([request.bundle() for request in requests])
    return requests, device


def wanted_workers(config: dict) -> int | None:
    """How many workers the configuration asks for; None: as many as the cluster is good for."""
    if config["workers"] != "auto":
        return config["workers"]
    if config["gradient_sum"] == "plan":
        return 1
    return None if config["shares"] is None else len(config["shares"])


def resource_name(chip: str) -> str:
    """What a chip is called among Ray's resources: Ascend 910 -> ascend910."""
    return "".join(c for c in chip.lower() if c.isalnum())
