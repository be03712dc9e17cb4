"""Topologies of real machines and of textbooks; every way between two chips follows from a formula.

Hybrid cube mesh of DGX-1: Foley and Danskin 2017. N-D full mesh: UB-Mesh, arXiv:2503.20377. Torus with
dimension-ordered routes: Dally and Towles 2004. Fat tree and dragonfly: train.mesh.fabrics.
"""

import math
from collections.abc import Iterator

import numpy as np

from train.mesh.origin import check_shape, check_taper, check_whole
from train.mesh.topology import NO_SOURCE, Atlas900, LinkClass, Step, Topology, hamiltonian_rings


class _Hosts(Topology):
    """Hosts on one fabric. Ports of a chip: out, in, its rack's way up and down, then those inside the host.

    Where racks are given, all traffic of a rack with others shares a way up and a way down of `taper` times what its
    chips can send.
    """

    def __init__(
        self,
        chips_per_host: int,
        inside: list[LinkClass],
        between: LinkClass,
        hosts_per_rack: int | None,
        taper: float,
        taper_source: str,
        library: str,
    ):
        owner = type(self).__name__
        check_whole(owner, chips_per_host=chips_per_host, hosts_per_rack=hosts_per_rack)
        check_taper(owner, taper)
        if hosts_per_rack is None and taper != 1:
            raise ValueError(f"{owner}: taper={taper} needs hosts_per_rack, the hosts that share the tapered uplinks")
        self.chips_per_host, self.library = chips_per_host, library
        self.chips_per_rack = hosts_per_rack and hosts_per_rack * chips_per_host
        classes = [*inside, between.with_switch()]
        if self.chips_per_rack:
            classes.append(between.trunk(f"{between.name} rack", taper * self.chips_per_rack, taper_source))
        self.link_classes = tuple(classes)
        self._between = len(inside)
        self.ports = 4

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        same = source // self.chips_per_host == destination // self.chips_per_host
        pair = np.flatnonzero(same & (source != destination))
        yield from self._inside(pair, source[pair], destination[pair])
        away = np.flatnonzero(~same)
        yield Step(away, self._between, source[away] * self.ports)
        if self.chips_per_rack:
            racks = source // self.chips_per_rack, destination // self.chips_per_rack
            far = np.flatnonzero(racks[0] != racks[1])
            for port, rack in enumerate(racks, start=2):
                yield Step(far, self._between + 1, rack[far] * self.chips_per_rack * self.ports + port)
        yield Step(away, self._between, destination[away] * self.ports + 1)

    def _inside(self, pair: np.ndarray, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        raise NotImplementedError


class SwitchedHosts(_Hosts):
    """Chips of a host on switches (NVSwitch, UB), each with a share of the host's network cards to a fabric.

    inside: one link of a chip to one of the `planes` switches, over which its messages are striped.
    between: a chip's share of the cards. taper: uplinks of a rack over what its chips can send (1/3 on ABCI).
    """

    def __init__(
        self,
        chips_per_host: int,
        inside: LinkClass,
        between: LinkClass,
        planes: int = 1,
        hosts_per_rack: int | None = None,
        taper: float = 1.0,
        taper_source: str = NO_SOURCE,
        library: str = "nccl",
    ):
        check_whole("SwitchedHosts", planes=planes)
        inside = [inside.bundle(planes).with_switch()]
        super().__init__(chips_per_host, inside, between, hosts_per_rack, taper, taper_source, library)
        self.ports = 6

    def _inside(self, pair: np.ndarray, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        yield Step(pair, 0, source * self.ports + 4)
        yield Step(pair, 0, destination * self.ports + 5)


class MeshedHosts(_Hosts):
    """A full mesh of direct links inside the host (Ascend 910B, four V100 of ABCI, Gaudi); `inside` is one of them."""

    def __init__(
        self,
        chips_per_host: int,
        inside: LinkClass,
        between: LinkClass,
        hosts_per_rack: int | None = None,
        taper: float = 1.0,
        taper_source: str = NO_SOURCE,
        library: str = "nccl",
    ):
        super().__init__(chips_per_host, [inside], between, hosts_per_rack, taper, taper_source, library)
        self.ports = 4 + chips_per_host

    def _inside(self, pair: np.ndarray, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        yield Step(pair, 0, source * self.ports + 4 + destination % self.chips_per_host)

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        return hamiltonian_rings(size) if size == self.chips_per_host else super().rings(size)


class CubeMesh(_Hosts):
    """DGX-1: hosts of 8, two full squares joined by i - i + 4; pairs without an NVLink go over PCIe.

    links_per_chip: 4 (P100: one link an edge) or 6 (V100: the edges in DOUBLED have two).
    """

    DOUBLED = ((0, 3), (0, 4), (1, 2), (1, 5), (2, 3), (4, 7), (5, 6), (6, 7))
    # V100: the doubled edges are a ring, taken twice, and the single ones another; each in both directions.
    RINGS_OF_6 = ((0, 3, 2, 1, 5, 6, 7, 4), (0, 3, 2, 1, 5, 6, 7, 4), (0, 1, 3, 7, 5, 4, 6, 2))

    def __init__(
        self,
        nvlink: LinkClass,
        between: LinkClass,
        pcie: LinkClass,
        links_per_chip: int = 4,
        hosts_per_rack: int | None = None,
        taper: float = 1.0,
        taper_source: str = NO_SOURCE,
        library: str = "nccl",
    ):
        if links_per_chip not in (4, 6):
            raise ValueError(f"CubeMesh: links_per_chip={links_per_chip!r} must be 4 (P100) or 6 (V100)")
        self.links_per_chip = links_per_chip
        chip = np.arange(8)
        linked = (chip[:, None] // 4 == chip // 4) | (chip[:, None] ^ 4 == chip)
        self._kind = np.where(linked, 0, 1)  # of a pair in the host: nvlink, pcie, two nvlinks
        inside = [nvlink, pcie.with_switch()]
        if links_per_chip == 6:
            inside.append(nvlink.bundle(2, f"{nvlink.name} x2"))
            for one, other in self.DOUBLED:
                self._kind[one, other] = self._kind[other, one] = 2
        super().__init__(8, inside, between, hosts_per_rack, taper, taper_source, library)
        self.ports = 14

    def _inside(self, pair: np.ndarray, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        kind = self._kind[source % 8, destination % 8]
        for direct in (0, 2):
            on = kind == direct
            yield Step(pair[on], direct, source[on] * 14 + 4 + destination[on] % 8)
        on = kind == 1
        yield Step(pair[on], 1, source[on] * 14 + 12)
        yield Step(pair[on], 1, destination[on] * 14 + 13)

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        if size != 8:
            return super().rings(size)
        if self.links_per_chip == 4:
            return Atlas900.RINGS  # the same graph
        return tuple(each for ring in self.RINGS_OF_6 for each in (ring, ring[::-1]))


class _Pods(Topology):
    """Pods (or racks) of another topology; `between` is each chip's port out of its pod and into it."""

    def __init__(self, pod: Topology, chips_per_pod: int, between: LinkClass, library: str | None, unit: str = "pod"):
        owner = type(self).__name__
        check_whole(owner, **{f"chips_per_{unit}": chips_per_pod})
        if pod.num_chips not in (None, chips_per_pod) or chips_per_pod % pod.chips_per_host:
            size = f"{pod.num_chips} chips" if pod.num_chips else f"hosts of {pod.chips_per_host} chips"
            raise ValueError(f"{owner}: chips_per_{unit}={chips_per_pod}, but its {type(pod).__name__} has {size}")
        self.pod, self.chips_per_pod, self.chips_per_host = pod, chips_per_pod, pod.chips_per_host
        self.library = library or pod.library
        self._between = len(pod.link_classes)
        self.link_classes = (*pod.link_classes, between.with_switch())

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        pods = source // self.chips_per_pod, destination // self.chips_per_pod
        same, away = np.flatnonzero(pods[0] == pods[1]), np.flatnonzero(pods[0] != pods[1])
        first = pods[0][same] * self.chips_per_pod
        for step in self.pod.steps(source[same] - first, destination[same] - first):
            chip, port = np.divmod(step.link, self.pod.ports)
            yield Step(same[step.pair], step.kind, (chip + first[step.pair]) * self.ports + port)
        yield Step(away, self._between, source[away] * self.ports + self.pod.ports)
        yield from self._trunks(away, pods[0][away], pods[1][away])
        yield Step(away, self._between, destination[away] * self.ports + self.pod.ports + 1)

    def _trunks(self, pair: np.ndarray, source_pod: np.ndarray, destination_pod: np.ndarray) -> Iterator[Step]:
        raise NotImplementedError

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        return self.pod.rings(size)


class SuperPods(_Pods):
    """Pods of any topology on a switched fabric (SuperClusters, NVL72 racks, CloudMatrix pods).

    taper: what all chips of a pod can send to other pods at once, over what their ports could.
    """

    def __init__(
        self,
        pod: Topology,
        chips_per_pod: int,
        between: LinkClass,
        taper: float = 1.0,
        taper_source: str = NO_SOURCE,
        library: str | None = None,
    ):
        check_taper("SuperPods", taper)
        super().__init__(pod, chips_per_pod, between, library)
        self.taper = taper
        if taper < 1:
            trunk = between.trunk(f"{between.name} pod", taper * chips_per_pod, taper_source)
            self.link_classes = (*self.link_classes, trunk)
        self.ports = pod.ports + 4

    def _trunks(self, pair: np.ndarray, source_pod: np.ndarray, destination_pod: np.ndarray) -> Iterator[Step]:
        if self.taper < 1:
            for port, pod in enumerate((source_pod, destination_pod), start=self.pod.ports + 2):
                yield Step(pair, self._between + 1, pod * self.chips_per_pod * self.ports + port)


class RackMesh(_Pods):
    """Racks of any topology in a full mesh: a trunk from the switches of each rack to those of each other rack.

    taper: all trunks of a rack together, over what its chips' ports could send (Atlas 950, UB-Mesh between racks).
    """

    def __init__(
        self,
        rack: Topology,
        chips_per_rack: int,
        racks: int,
        between: LinkClass,
        taper: float = 1.0,
        taper_source: str = NO_SOURCE,
        library: str | None = None,
    ):
        check_whole("RackMesh", racks=racks)
        check_taper("RackMesh", taper)
        super().__init__(rack, chips_per_rack, between, library, unit="rack")
        links = taper * chips_per_rack / max(racks - 1, 1)
        self.link_classes = (*self.link_classes, between.trunk(f"{between.name} trunk", links, taper_source))
        self.num_chips = racks * chips_per_rack
        self.ports = rack.ports + 2 + -(-racks // chips_per_rack)

    def _trunks(self, pair: np.ndarray, source_pod: np.ndarray, destination_pod: np.ndarray) -> Iterator[Step]:
        port, chip = np.divmod(destination_pod, self.chips_per_pod)
        owner = source_pod * self.chips_per_pod + chip
        yield Step(pair, self._between + 1, owner * self.ports + self.pod.ports + 2 + port)


class Torus(Topology):
    """A torus of any number of dimensions, or without `wrap` a grid; one dimension is travelled after another.

    `link` is one of a chip's links, of which it has two in each dimension (one in a dimension of 2). Half-way round,
    chips of even coordinate go up and those of odd coordinate down.
    """

    def __init__(
        self, shape: list[int], link: LinkClass, chips_per_host: int = 1, wrap: bool = True, library: str = "torus"
    ):
        self.shape = check_shape("Torus", shape)
        check_whole("Torus", chips_per_host=chips_per_host)
        self.link_classes, self.wrap, self.library = (link.with_switch(False),), wrap, library
        self.chips_per_host, self.num_chips = chips_per_host, math.prod(self.shape)
        self.ports = 2 * len(self.shape)

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        stride = self.num_chips
        for dim, size in enumerate(self.shape):
            stride //= size
            start = source // stride % size
            ahead = destination // stride % size - start
            if self.wrap:
                ahead %= size
                down = (2 * ahead > size) | ((2 * ahead == size) & (start % 2 == 1))
                ahead -= size * down
            else:
                down = ahead < 0
            # Earlier dimensions are done, later ones still to come.
            fixed = destination // (stride * size) * (stride * size) + source % stride
            for hop in range(int(np.abs(ahead).max(initial=0))):
                pair = np.flatnonzero(np.abs(ahead) > hop)
                here = (start[pair] + np.where(down[pair], -hop, hop)) % size
                yield Step(pair, 0, (fixed[pair] + here * stride) * self.ports + 2 * dim + down[pair])

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        """One ring, row after row in turning directions, so that all its steps but perhaps the last are single."""
        order, whole = np.zeros(1, dtype=np.int64), 1
        for length in reversed(self.shape):
            rows = min(length, size // whole)
            order = np.concatenate([row * whole + (order[::-1] if row % 2 else order) for row in range(rows)])
            whole *= rows
        return (tuple(order.tolist()),) if whole == size else super().rings(size)


class FullMesh(Topology):
    """An n-D full mesh: a direct link (links[d]) to every chip that differs in dimension d alone (UB-Mesh).

    One dimension is corrected after another.
    """

    def __init__(self, shape: list[int], links: list[LinkClass], chips_per_host: int = 1, library: str = "nccl"):
        self.shape = check_shape("FullMesh", shape)
        check_whole("FullMesh", chips_per_host=chips_per_host)
        if len(links) != len(self.shape):
            raise ValueError(f"FullMesh: {len(links)} links for shape={list(shape)}; give one link per dimension")
        self.link_classes, self.library = tuple(link.with_switch(False) for link in links), library
        self.chips_per_host, self.num_chips = chips_per_host, math.prod(self.shape)
        self.ports = sum(self.shape)

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        stride, port, here = self.num_chips, 0, source
        for dim, size in enumerate(self.shape):
            stride //= size
            target = destination // stride % size
            ahead = target - here // stride % size
            pair = np.flatnonzero(ahead)
            yield Step(pair, dim, here[pair] * self.ports + port + target[pair])
            port, here = port + size, here + ahead * stride

    def rings(self, size: int) -> tuple[tuple[int, ...], ...]:
        return hamiltonian_rings(size) if size == self.shape[-1] else super().rings(size)


class Star(Topology):
    """Every chip on one switch, by a port of class `link`."""

    ports = 2

    def __init__(self, link: LinkClass, chips_per_host: int = 1, library: str = "nccl"):
        check_whole("Star", chips_per_host=chips_per_host)
        self.link_classes, self.chips_per_host, self.library = (link.with_switch(),), chips_per_host, library

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        pair = np.flatnonzero(source != destination)
        yield Step(pair, 0, source[pair] * 2)
        yield Step(pair, 0, destination[pair] * 2 + 1)
