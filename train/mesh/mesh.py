"""The mesh: emulated chips with named axes, the links between them, and the map from hosts to real workers."""

import copy
import math
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from train.mesh.origin import check_positive
from train.mesh.topology import Topology


class Mesh:
    """Chips numbered row by row over `axes` (the last axis runs fastest), e.g. {host: 128, chip: 8}.

    chips: the number they should multiply to, where the file wants that checked.
    host_images_per_s: images that one host can decode and feed; null: as many as its chips take.
    """

    def __init__(
        self,
        name: str,
        axes: dict[str, int],
        topology: Topology,
        chips: int | None = None,
        host_images_per_s: float | None = None,
    ):
        if not axes:
            raise ValueError(f"mesh {name} has no axes; give at least one, e.g. axes: {{host: 8, chip: 8}}")
        for axis, size in axes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"mesh {name}: axes.{axis}={size!r} must be a whole number of at least 1")
        self.name = name
        self.axes = dict(axes)
        self.topology = topology
        self.num_chips = math.prod(axes.values())
        product = " x ".join(f"{axis} {size}" for axis, size in axes.items())
        if chips is not None and chips != self.num_chips:
            raise ValueError(f"mesh {name}: axes {product} = {self.num_chips}, not chips={chips}; change one of them")
        if topology.num_chips not in (None, self.num_chips):
            raise ValueError(
                f"mesh {name}: axes {product} = {self.num_chips}, but its {type(topology).__name__} is made of "
                f"{topology.num_chips} chips; change mesh.axes or the sizes of mesh.topology"
            )
        if host_images_per_s is not None:
            check_positive(f"mesh {name}", host_images_per_s=host_images_per_s)
        self.host_images_per_s = host_images_per_s
        self.chips_per_host = min(topology.chips_per_host, self.num_chips)
        if self.num_chips % self.chips_per_host:
            raise ValueError(
                f"mesh {name}: axes {product} = {self.num_chips} chips are no whole hosts of {self.chips_per_host}"
            )
        self.num_hosts = self.num_chips // self.chips_per_host
        if axes.get("host", self.num_hosts) != self.num_hosts:
            raise ValueError(
                f"mesh {name}: axes.host={axes['host']}, but {self.num_chips} chips are {self.num_hosts} hosts of "
                f"{self.chips_per_host}; set axes.chip={topology.chips_per_host}"
            )

    def coordinates(self, chip: int) -> dict[str, int]:
        return dict(zip(self.axes, map(int, np.unravel_index(chip, tuple(self.axes.values()))), strict=True))

    def chip(self, **coordinates: int) -> int:
        return int(np.ravel_multi_index([coordinates[axis] for axis in self.axes], tuple(self.axes.values())))

    @cached_property
    def inside_axes(self) -> tuple[str, ...]:
        """The last axes, those that make up one host. ValueError where axes cut across hosts."""
        names = tuple(self.axes)
        for first in range(len(names)):
            if self.size(names[first:]) == self.chips_per_host:
                return names[first:]
        raise ValueError(f"mesh {self.name}: no last axes of {self.axes} make a host of {self.chips_per_host} chips")

    @property
    def between_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.axes if axis not in self.inside_axes)

    def size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.axes[axis] for axis in axes)

    def groups(self, axes: tuple[str, ...]) -> np.ndarray:
        """[groups, size]: the chips that differ in `axes` alone, in the order of those axes."""
        names = list(self.axes)
        chips = np.arange(self.num_chips).reshape(tuple(self.axes.values()))
        moved = np.moveaxis(chips, [names.index(axis) for axis in axes], range(-len(axes), 0))
        return moved.reshape(-1, self.size(axes))

    def positions(self, axes: tuple[str, ...]) -> np.ndarray:
        """[chips]: each chip's position in its group along `axes` (0 without axes)."""
        positions = np.empty(self.num_chips, dtype=np.int64)
        positions[self.groups(axes)] = np.arange(self.size(axes))
        return positions

    def rings(self, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Rings (orders of positions) along `axes` that can run at once: the host's own inside it."""
        size, host = self.size(axes), self.chips_per_host
        if axes == tuple(self.axes) and size == self.topology.num_chips:
            return self.topology.rings(size)
        if axes != tuple(self.axes)[-len(axes) :] or size % host:
            return (tuple(range(size)),)
        inside = self.topology.rings(host)
        if size == host:
            return inside
        return (tuple(first + position for first in range(0, size, host) for position in inside[0]),)

    def first_hosts(self, num_hosts: int) -> "Mesh":
        """The mesh of the first `num_hosts` hosts: fewer along its first axis, or else the axes host and chip."""
        if num_hosts == self.num_hosts:
            return self
        part = copy.copy(self)
        vars(part).pop("inside_axes", None)  # the cached one is that of the whole
        part.name, part.num_hosts = f"{self.name}, {num_hosts} hosts", num_hosts
        part.num_chips = num_hosts * self.chips_per_host
        first, *others = self.axes
        slab = self.size(tuple(others))
        whole = {first: part.num_chips // slab, **{axis: self.axes[axis] for axis in others}}
        part.axes = {"host": num_hosts, "chip": self.chips_per_host} if part.num_chips % slab else whole
        return part

    def first_chips(self, num_chips: int) -> "Mesh":
        """The mesh of the first `num_chips` chips: some of the first host, or whole hosts (ValueError otherwise)."""
        if num_chips % self.chips_per_host == 0:
            return self.first_hosts(num_chips // self.chips_per_host)
        if num_chips > self.chips_per_host:
            raise ValueError(f"{num_chips} chips are no whole hosts of {self.chips_per_host} on mesh {self.name}")
        part = copy.copy(self.first_hosts(1))
        vars(part).pop("inside_axes", None)
        part.name, part.axes = f"{self.name}, {num_chips} chips", {"chip": num_chips}
        part.num_chips = part.chips_per_host = num_chips
        return part

    def shares(self, workers: int, sizes: list[int] | None = None, hosts_per_block: int = 1) -> list[range]:
        """Contiguous blocks for each worker: `sizes` of them, or else sizes that differ by at most one, larger first.

        A block is `hosts_per_block` hosts. ValueError where the blocks don't go round.
        """
        if self.num_hosts % hosts_per_block:
            raise ValueError(
                f"blocks of {hosts_per_block} hosts do not divide the {self.num_hosts} of mesh {self.name}"
            )
        blocks = self.num_hosts // hosts_per_block
        one, several = "host", f"{blocks} hosts of mesh {self.name}"
        if hosts_per_block > 1:
            one, several = (
                "block",
                f"{blocks} blocks of mesh {self.name} (bn_span makes blocks of {hosts_per_block} hosts)",
            )
        if sizes is not None and min(sizes, default=0) < 1:
            raise ValueError(f"shares={sizes}: a worker needs at least 1 {one}; leave out workers without any")
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        if sizes is not None and len(sizes) != workers:
            raise ValueError(
                f"shares={sizes} are those of {len(sizes)} workers, not of workers={workers}: set workers={len(sizes)} "
                "or workers=auto"
            )
        if workers > blocks:
            raise ValueError(
                f"workers={workers} is more than the {several}; a {one} is never split: use at most workers={blocks} "
                f"or a larger mesh{' or a smaller bn_span' if hosts_per_block > 1 else ''}"
            )
        if sizes is None:
            size, larger = divmod(blocks, workers)
            sizes = [size + 1] * larger + [size] * (workers - larger)
        elif sum(sizes) != blocks:
            raise ValueError(f"shares={sizes} sum to {sum(sizes)}, not to the {several}; change one of them")
        ends = [0, *accumulate(sizes)]
        return [range(first, last) for first, last in pairwise(ends)]
