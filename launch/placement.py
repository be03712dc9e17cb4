"""What the workers of a run ask of the cluster: how many there are, which hosts of the mesh each carries, which device.

Deciding only: nothing here talks to Ray. A run is never mixed: all its workers compute on GPUs, or all on processors.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from launch.cluster import Cluster, Lacking, Node
from train.emulator import Emulator
from train.mesh.blocks import blocks

CORES_PER_AUTO_WORKER = 2
SPEED_LABEL = "speed"
"""A node's label: how fast it is, in any unit that all nodes share, such as the images/s of a run on it alone."""


@dataclass(frozen=True)
class Request:
    """What each worker asks of Ray: one bundle. `hosts` are the hosts of the mesh that it carries."""

    hosts: range
    chips: int
    resource: str
    threads: int
    gpus: int
    labels: dict[str, str] = field(default_factory=dict)
    """Those that its node must have."""

    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.threads, self.resource: self.chips}
        return bundle | {"GPU": self.gpus} if self.gpus else bundle


@dataclass(frozen=True)
class Layout:
    """What was decided of the workers; `shares` as in the configuration, `notes` for the console."""

    requests: list[Request]
    device: str
    shares: list[int] | None
    notes: list[str]


def ask(config: dict, emulated: Emulator, cluster: Cluster) -> Layout:
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
    notes, where = _mixed(config, cluster, workers, device), [config["cluster"]["labels"]] * workers
    speeds = node_speeds(cluster.nodes)
    if split.sizes is None and len(set(speeds)) > 1:
        needs = {"CPU": threads, "GPU": on_gpu}
        seats = deal(cluster.nodes, speeds, needs, {resource: split.chips}, workers, split.count)
        split = replace(split, sizes=[size for _, size in seats])
        where = [{"ray.io/node-id": cluster.nodes[number].id} for number, _ in seats]
        by_node = ", ".join(f"{cluster.nodes[number].address} {speeds[number]:g}" for number, _ in seats)
        notes.append(f"shares {split.sizes} follow the nodes' labels {SPEED_LABEL}: {by_node}")
    hosts = [range(share.start * split.hosts, share.stop * split.hosts) for share in split.shares(workers)]
    requests = [
        Request(mine, len(mine) * chips, resource, threads, on_gpu, labels)
        for mine, labels in zip(hosts, where, strict=True)
    ]
    cluster.demand([request.bundle() for request in requests])
    return Layout(requests, device, split.sizes, notes)


def node_speeds(nodes: list[Node]) -> list[float]:
    """How fast each node says it is, or 1; ValueError for what is no number above 0."""
    speeds = []
    for node in nodes:
        label = node.labels.get(SPEED_LABEL, "1")
        try:
            speeds.append(float(label))
        except ValueError:
            speeds.append(0.0)
        if not 0 < speeds[-1] < float("inf"):
            problem = f"the label {SPEED_LABEL}={label!r}, which must be a number above 0"
            raise ValueError(f"cluster: node {node.address} has {problem}; start its Ray with another")
    return speeds


def deal(
    nodes: list[Node],
    speeds: list[float],
    worker_needs: dict[str, float],
    block_needs: dict[str, float],
    workers: int,
    blocks: int,
) -> list[tuple[int, int]]:
    """(number of its node, blocks) of each worker, so that they end a step together as nearly as whole blocks allow.

    The workers of a node share its speed, and lie side by side on the mesh. Each goes to a node without any, or else
    where it is fastest; each block after a worker's first to the one that will have done it first: for equal blocks no
    other split ends earlier (Graham's list scheduling on machines of different speeds). Lacking where a node's
    resources don't go so far.
    """
    left = [Counter(node.resources) for node in nodes]
    count = [0] * len(nodes)

    def best(needs: Counter, rank: list, among: list[int], what: str) -> int:
        room = [at for at in among if all(left[at][name] >= amount for name, amount in needs.items())]
        if not room:
            spelt = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            raise Lacking(f"workers={workers}: no node has room for {what} ({spelt}); use fewer workers or threads")
        at = max(room, key=lambda at: (rank[at], -at))
        left[at].subtract(needs)
        return at

    everywhere = list(range(len(nodes)))
    for number in range(workers):
        alone = [(count[at] == 0, speed / (count[at] + 1)) for at, speed in enumerate(speeds)]
        count[best(Counter(worker_needs) + Counter(block_needs), alone, everywhere, f"worker {number}")] += 1
    seats = [at for at in everywhere for _ in range(count[at])]
    sizes = [1] * workers
    for number in range(workers, blocks):
        # of a node's workers the one with the fewest blocks is the next
        fewest = {at: min(size for seat, size in zip(seats, sizes, strict=True) if seat == at) for at in set(seats)}
        ends = [-count[at] * (fewest.get(at, 0) + 1) / speed for at, speed in enumerate(speeds)]
        at = best(Counter(block_needs), ends, sorted(fewest), f"block {number}")
        sizes[next(i for i, seat in enumerate(seats) if seat == at and sizes[i] == fewest[at])] += 1
    return list(zip(seats, sizes, strict=True))


def _mixed(config: dict, cluster: Cluster, workers: int, device: str) -> list[str]:
    """What is said of a cluster in which some processors or GPUs stay unused by the rule that a run is never mixed."""
    gpus, without = (
        int(cluster.resources.get("GPU", 0)),
        [node for node in cluster.nodes if "GPU" not in node.resources],
    )
    if device == "cpu" and gpus and config["device"] == "auto":
        what = f"{gpus} GPU(s) for {workers} workers: all compute on processors, for a run is never mixed"
        return [f"{what}; workers={gpus} computes on the GPUs"]
    if device == "cuda" and without:
        return [f"{len(without)} node(s) without a GPU carry no worker, for a run is never mixed"]
    return []


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
