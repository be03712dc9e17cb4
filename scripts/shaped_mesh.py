"""The mesh of a network of scripts/shaped_network, as the emulator prices it, from what ping-pong has measured."""

from dataclasses import dataclass

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
    """The line through the smallest message, which gives alpha, and the largest, which gives the rate; sizes rise.

    Those between show how straight it is. ValueError where nothing like a link comes out.
    """
    if len(nbytes) < 2 or list(nbytes) != sorted(set(nbytes)):
        raise ValueError(f"ping-pong of {nbytes} bytes: alpha and beta need two sizes or more that rise")
    bytes_per_s = (nbytes[-1] - nbytes[0]) / (seconds[-1] - seconds[0]) if seconds[-1] > seconds[0] else 0.0
    alpha_s = seconds[0] - nbytes[0] / bytes_per_s if bytes_per_s else 0.0
    if alpha_s <= 0:
        raise ValueError(f"ping-pong of {nbytes} bytes took {seconds} s: no link is like that; is the machine busy?")
    return Line(alpha_s, bytes_per_s)


def link(name: str, line: Line) -> LinkClass:
    return LinkClass(name, line.bytes_per_s / 1e9, line.alpha_s * 1e6, source="measured: ping-pong")


def mesh(layout: Layout, lines: dict[str, Line]) -> Mesh:
    """lines: of a ping-pong `between` two hosts and, where hosts have several chips, `inside` one."""
    if layout.chips_per_host == 1:
        return Mesh(layout.name, layout.axes, Star(link("card", lines["between"])))
    inside, between = lines["inside"], lines["between"]
    if not layout.shared:
        topology = SwitchedHosts(layout.chips_per_host, link("port", inside), link("card", between))
        return Mesh(layout.name, layout.axes, topology)
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
    return Mesh(layout.name, layout.axes, topology)
