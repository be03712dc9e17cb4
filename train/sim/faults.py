"""What is broken on the emulated machine, as far as it moves the clock: `faults=`.

A fault changes the mesh's links, or the wait for the slowest chip; what is computed stays the same. Chips or hosts that
are lost are another mesh: `mesh.axes.host=`.
"""

import copy
from dataclasses import dataclass

from train.mesh.mesh import Mesh
from train.mesh.origin import Origin


class Fault:
    """Changes nothing; a fault overrides what it breaks."""

    def on_mesh(self, mesh: Mesh) -> Mesh:
        return mesh

    def straggler_s(self, compute_s: float, straggler_s: float) -> float:
        """The wait for the slowest chip, from what it would be without the fault."""
        return straggler_s

    def origins(self) -> list[Origin]:
        return []


@dataclass(frozen=True)
class SlowChip(Fault):
    """One chip computes `factor` times as long as the mean one, in every step; all others wait for it."""

    factor: float

    def __post_init__(self) -> None:
        _check("SlowChip", self.factor)

    def straggler_s(self, compute_s: float, straggler_s: float) -> float:
        return max(straggler_s, (self.factor - 1) * compute_s)

    def origins(self) -> list[Origin]:
        return [Origin("faults.factor", self.factor, "x compute of one chip", "the configuration, faults")]


@dataclass(frozen=True)
class SlowLink(Fault):
    """One link of class `link` (null: the mesh's slowest, the last of equals) carries a `factor`-th of its rate.

    Priced as if all of its class did: in a collective all chips do alike and a round ends with its last message, so
    the one link holds up every round in which it has a part. An upper bound where some rounds leave it out.
    """

    factor: float
    link: str | None = None

    def __post_init__(self) -> None:
        _check("SlowLink", self.factor)

    def on_mesh(self, mesh: Mesh) -> Mesh:
        classes = mesh.topology.link_classes
        names = [link.name for link in classes]
        if self.link not in (None, *names):
            raise ValueError(f"faults.link={self.link}: mesh {mesh.name} has no such links; it has {', '.join(names)}")
        name = self.link or min(reversed(classes), key=lambda link: link.bytes_per_s).name
        broken, topology = copy.copy(mesh), copy.copy(mesh.topology)
        topology.link_classes = tuple(link.slowed(self.factor) if link.name == name else link for link in classes)
        broken.topology = topology
        return broken

    def origins(self) -> list[Origin]:
        unit = f"x time on a {self.link or 'slowest'} link"
        return [Origin("faults.factor", self.factor, unit, "the configuration, faults")]


def _check(name: str, factor: float) -> None:
    if not 1 <= factor < float("inf"):
        raise ValueError(f"faults.factor={factor}: {name} is so many times slower: at least 1")
