"""The mesh of a network of scripts/shaped_network, as the emulator prices it, from what ping-pong has measured."""

from dataclasses import dataclass

import numpy as np

from scripts.shaped_network import Layout
from train.comm.algorithms import halving_doubling, hierarchical, ring
from train.mesh.mesh import Mesh
from train.mesh.topologies import Star, SwitchedHosts
from train.mesh.topology import LinkClass

ALGORITHMS = {"ring": ring, "halving_doubling": halving_doubling, "hierarchical": hierarchical}


@dataclass(frozen=True)
class Line:
    """A message of n bytes takes alpha_s + n / bytes_per_s."""

    alpha_s: float
    bytes_per_s: float

    def seconds(self, nbytes: float) -> float:
        return self.alpha_s + nbytes / self.bytes_per_s


def fit(nbytes: list[int], seconds: list[float]) -> Line:
    """Least squares of the relative errors, so that small messages give alpha and large ones the rate.

    ValueError where no line with a positive alpha and rate comes nearest, or there are fewer than two sizes.
    """
    if len(set(nbytes)) < 2:
        raise ValueError(f"ping-pong of {nbytes} bytes: alpha and beta need two sizes or more")
    took = np.array(seconds)
    rows = np.stack([1 / took, np.array(nbytes) / took], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(rows, np.ones(len(took)), rcond=None)
    if alpha <= 0 or beta <= 0:
        raise ValueError(f"ping-pong gives alpha {alpha * 1e6:.1f} us and beta {beta * 1e9:.3f} s/GB: no link is like that")
    return Line(float(alpha), float(1 / beta))


def link(name: str, line: Line) -> LinkClass:
    return LinkClass(name, line.bytes_per_s / 1e9, line.alpha_s * 1e6, source="measured: ping-pong")


def mesh(layout: Layout, lines: dict[str, Line]) -> Mesh:
    """lines: of a ping-pong `between` two hosts and, where hosts have several chips, `inside` one."""
    if layout.chips_per_host == 1:
        return Mesh(layout.name, {"host": layout.hosts}, Star(link("card", lines["between"])))
    inside, between = lines["inside"], lines["between"]
    axes = {"host": layout.hosts, "chip": layout.chips_per_host}
    if not layout.shared:
        topology = SwitchedHosts(layout.chips_per_host, link("port", inside), link("card", between))
        return Mesh(layout.name, axes, topology)
    # A chip leaves its host by its own port, and with all others of the host by the card, which is a host's trunk: all
    # that ping-pong between two hosts shows of it is that one chip alone gets its whole rate.
    port = link("port", Line(between.alpha_s, inside.bytes_per_s))
    taper = min(1.0, between.bytes_per_s / (inside.bytes_per_s * layout.chips_per_host))
    topology = SwitchedHosts(
        layout.chips_per_host,
        link("port", inside),
        port,
        hosts_per_rack=1,
        taper=taper,
        taper_source="measured: ping-pong",
    )
    return Mesh(layout.name, axes, topology)


def shape(layout: Layout) -> Mesh:
    """The mesh with any rates: what the plans are made of."""
    return mesh(layout, {"inside": Line(1e-6, 2e9), "between": Line(1e-6, 1e9)})
