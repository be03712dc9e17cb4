"""Topologies: link classes, and the route between two chips by formula (no list of links is ever built).

An Atlas 900 host is two full meshes of four chips (HCCS), joined by cross links i <-> i + 4 over PCIe; between hosts
every chip has one 100GE RoCE port on a non-blocking fabric (Huawei Connect, 18 Sep 2019; Hot Chips 31; Huawei Cloud
CCE guide).
"""

from typing import NamedTuple, Protocol

import numpy as np

from train.mesh.origin import Origin, check_positive


class LinkClass:
    """Links that are alike: bytes per second each way, and the fixed cost of one message.

    Messages below `small_kib` cost `small_latency_us` (a copy engine's short path). A `switched` hop takes the
    sender's and the receiver's port; any other takes the wire between the two.
    """

    def __init__(
        self,
        name: str,
        gbytes_per_s: float,
        latency_us: float,
        small_latency_us: float | None = None,
        small_kib: float = 0.0,
        switched: bool = False,
        source: str = "assumed: no source given",
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
        self.source = source

    def message_s(self, nbytes: np.ndarray) -> np.ndarray:
        """Fixed cost of messages of `nbytes`, in seconds."""
        return np.where(nbytes < self.small_bytes, self.small_latency_s, self.latency_s)

    def origins(self) -> list[Origin]:
        return [
            Origin(f"link.{self.name}", self.bytes_per_s / 1e9, "GB/s each way", self.source),
            Origin(f"link.{self.name}.latency", self.latency_s * 1e6, "us a message", self.source),
        ]


class Link(NamedTuple):
    """One hop of a route: the name of its class and the chips at its ends."""

    kind: str
    source: int
    destination: int


class Topology(Protocol):
    link_classes: tuple[LinkClass, ...]
    chips_per_host: int

    def route(self, source: int, destination: int) -> list[Link]: ...

    def hops(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """[classes, pairs]: how many hops of each link class lie between each pair."""

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        """Directed rings over the first `size` chips of a host that can run at once without sharing a link."""


class Atlas900:
    """Hosts of 8 Ascend 910; see the module's docstring.

    0 --- 1        4 --- 5        each square is a full mesh (HCCS, 3 links a chip),
    |  X  |        |  X  |        0-4, 1-5, 2-6, 3-7 cross over PCIe 4.0,
    2 --- 3        6 --- 7        every chip has a RoCE port to all hosts
    """

    chips_per_host = 8
    # The four rings of HCCL's topology code: each directed HCCS and PCIe link of the host is in exactly one of them.
    RINGS = (
        (0, 1, 2, 6, 5, 4, 7, 3),
        (0, 3, 7, 4, 5, 6, 2, 1),
        (0, 2, 3, 1, 5, 7, 6, 4),
        (0, 4, 6, 7, 5, 1, 3, 2),
    )

    def __init__(self, hccs: LinkClass, pcie: LinkClass, roce: LinkClass):
        self.link_classes = (hccs, pcie, roce)

    def route(self, source: int, destination: int) -> list[Link]:
        hccs, pcie, roce = (link.name for link in self.link_classes)
        if source == destination:
            return []
        if source // 8 != destination // 8:
            return [Link(roce, source, destination)]
        if source // 4 == destination // 4:
            return [Link(hccs, source, destination)]
        across = source ^ 4
        return [Link(pcie, source, across)] + ([Link(hccs, across, destination)] if across != destination else [])

    def hops(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        same_host = source // 8 == destination // 8
        crosses = same_host & (source // 4 != destination // 4)
        meshed = same_host & (source % 4 != destination % 4)
        return np.stack([meshed, crosses, ~same_host]).astype(np.int8)

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        return self.RINGS if size == 8 else (tuple(range(size)),)
