"""Topologies: link classes, and the way between two chips by formula (no list of links is ever built).

An Atlas 900 host is two full meshes of four chips (HCCS), joined by cross links i <-> i + 4 over PCIe; between hosts
every chip has one 100GE RoCE port on a non-blocking fabric (Huawei Connect, 18 Sep 2019; Hot Chips 31; Huawei Cloud
CCE guide). Other topologies: train.mesh.topologies.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from train.mesh.origin import Origin, check_positive

NO_SOURCE = "assumed: no source given"


class LinkClass:
    """Links that are alike: bytes per second each way, and the fixed cost of one message.

    Messages below `small_kib` cost `small_latency_us` (a copy engine's short path). A `switched` hop takes the
    sender's and the receiver's port, and costs its latency once; any other takes the wire between the two.
    """

    def __init__(
        self,
        name: str,
        gbytes_per_s: float,
        latency_us: float,
        small_latency_us: float | None = None,
        small_kib: float = 0.0,
        switched: bool = False,
        source: str = NO_SOURCE,
    ):
        check_positive(f"link {name}", gbytes_per_s=gbytes_per_s, latency_us=latency_us)
        if small_latency_us is not None:
            check_positive(f"link {name}", small_latency_us=small_latency_us, small_kib=small_kib)
        self.name = name
        self.bytes_per_s = gbytes_per_s * 1e9
        self.latency_s = latency_us * 1e-6
        self.small_latency_s = self.latency_s if small_latency_us is None else small_latency_us * 1e-6
        self.small_bytes = small_kib * 1024
        self.switched = switched
        self.shared = False  # by many chips: see trunk
        self.source = source

    def message_s(self, nbytes: np.ndarray) -> np.ndarray:
        """Fixed cost of messages of `nbytes`, in seconds."""
        return np.where(nbytes < self.small_bytes, self.small_latency_s, self.latency_s)

    def with_switch(self, switched: bool = True) -> "LinkClass":
        """The same as a port on a switch, or as a wire."""
        return self._changed(switched=switched)

    def bundle(self, links: int, name: str | None = None) -> "LinkClass":
        """`links` of these side by side, over which a message is striped."""
        return self._changed(name=name or self.name, bytes_per_s=links * self.bytes_per_s)

    def trunk(self, name: str, links: float, source: str) -> "LinkClass":
        """What `links` of these carry, without a latency of its own (the ends of the way have paid it)."""
        free = dict(latency_s=0.0, small_latency_s=0.0, small_bytes=0.0, switched=False, shared=True)
        return self._changed(name=name, bytes_per_s=links * self.bytes_per_s, source=source, **free)

    def slowed(self, factor: float) -> "LinkClass":
        """The same at a `factor`-th of its rate."""
        return self._changed(bytes_per_s=self.bytes_per_s / factor)

    def _changed(self, **changes) -> "LinkClass":
        link = copy.copy(self)
        vars(link).update(changes)
        return link

    def origins(self) -> list[Origin]:
        lines = [Origin(f"link.{self.name}", self.bytes_per_s / 1e9, "GB/s each way", self.source)]
        if self.latency_s:
            lines.append(Origin(f"link.{self.name}.latency", self.latency_s * 1e6, "us a message", self.source))
        return lines


class Paths(NamedTuple):
    """The directed links of many ways at once: three arrays of one length, sorted by pair, in order along each way.

    pair: index into the pairs asked for; kind: index into the topology's link classes; link: whole number, unique in
    the topology.
    """

    pair: np.ndarray
    kind: np.ndarray
    link: np.ndarray


class Step(NamedTuple):
    """The next link on the way of some of the pairs: `pair` rising, each at most once, all of one class."""

    pair: np.ndarray
    kind: int
    link: np.ndarray


class Link(NamedTuple):
    """One directed link of a route: the name of its class and its number."""

    kind: str
    link: int


class Topology:
    """What links lie between two chips. A topology gives `link_classes`, `ports` and `steps`; the rest follows.

    chips_per_host: chips of one server. num_chips: where the topology has a fixed size. library: whose collectives
    the machine runs by default ("hccl", "nccl", "torus", ...).
    A link belongs to a chip (one at its end, or the first below its switch): its number is chip x ports + port.
    """

    link_classes: tuple[LinkClass, ...]
    chips_per_host: int = 1
    num_chips: int | None = None
    ports: int
    library: str = "nccl"

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        """Links from source to destination (int arrays [pairs]), those nearer to the source first."""
        raise NotImplementedError

    def paths(self, source: np.ndarray, destination: np.ndarray) -> Paths:
        steps = [step for step in self.steps(source, destination) if len(step.pair)]
        if not steps:
            return Paths(*(np.empty(0, dtype=np.int64) for _ in Paths._fields))
        pair = np.concatenate([step.pair for step in steps])
        kind = np.concatenate([np.full(len(step.pair), step.kind) for step in steps])
        link = np.concatenate([step.link for step in steps])
        order = np.argsort(pair, kind="stable")
        return Paths(pair[order], kind[order], link[order])

    def hops(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """[classes, pairs]: how many hops of each link class lie between each pair (a switched one has two ports)."""
        hops = np.zeros((len(self.link_classes), len(source)), dtype=np.int16)
        for step in self.steps(source, destination):
            hops[step.kind, step.pair] += 1
        for kind, link in enumerate(self.link_classes):
            hops[kind] //= 1 + link.switched
        return hops

    def route(self, source: int, destination: int) -> list[Link]:
        paths = self.paths(np.array([source]), np.array([destination]))
        return [
            Link(self.link_classes[kind].name, int(link)) for kind, link in zip(paths.kind, paths.link, strict=True)
        ]

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        """Directed rings over the first `size` chips of a host that can run at once without sharing a link."""
        return (tuple(range(size)),)


def hamiltonian_rings(size: int) -> tuple[tuple[int, ...], ...]:
    """2 floor((size - 1) / 2) directed rings over a full mesh of `size` chips, no directed link in two of them.

    Walecki's cycles of the complete graph (Alspach 2008), each in both directions; one ring below 3 chips.
    """
    if size < 3:
        return (tuple(range(size)),)
    rim = size - 1  # the last chip is the hub: it closes a zigzag over the rim, which is turned by one for each ring
    zigzag = [step // 2 if step % 2 else -(step // 2) for step in range(1, size)]
    cycles = [(rim, *((turn + offset) % rim for offset in zigzag)) for turn in range((size - 1) // 2)]
    return tuple(ring for cycle in cycles for ring in (cycle, cycle[::-1]))


class Atlas900(Topology):
    """Hosts of 8 Ascend 910; see the module's docstring.

    0 --- 1        4 --- 5        each square is a full mesh (HCCS, 3 links a chip),
    |  X  |        |  X  |        0-4, 1-5, 2-6, 3-7 cross over PCIe 4.0,
    2 --- 3        6 --- 7        every chip has a RoCE port to all hosts
    """

    chips_per_host = 8
    library = "hccl"
    ports = 7  # to the four chips of its square, across, out of the host, into it
    # The four rings of HCCL's topology code: each directed HCCS and PCIe link of the host is in exactly one of them.
    RINGS = (
        (0, 1, 2, 6, 5, 4, 7, 3),
        (0, 3, 7, 4, 5, 6, 2, 1),
        (0, 2, 3, 1, 5, 7, 6, 4),
        (0, 4, 6, 7, 5, 1, 3, 2),
    )

    def __init__(self, hccs: LinkClass, pcie: LinkClass, roce: LinkClass):
        self.link_classes = (hccs, pcie, roce.with_switch())

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        meshed, crosses, away = map(np.flatnonzero, self.hops(source, destination))
        yield Step(crosses, 1, source[crosses] * 7 + 4)
        crossed = np.where(source // 4 == destination // 4, source, source ^ 4)
        yield Step(meshed, 0, crossed[meshed] * 7 + destination[meshed] % 4)
        yield Step(away, 2, source[away] * 7 + 5)
        yield Step(away, 2, destination[away] * 7 + 6)

    def hops(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        same_host = source // 8 == destination // 8
        crosses = same_host & (source // 4 != destination // 4)
        meshed = same_host & (source % 4 != destination % 4)
        return np.stack([meshed, crosses, ~same_host]).astype(np.int8)

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        return self.RINGS if size == 8 else super().rings(size)
