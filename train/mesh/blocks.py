"""Blocks: the consecutive chips that are always computed together and never split between workers.

A block is one host, or the whole hosts of one batch-norm span where that is larger.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from train.mesh.mesh import Mesh


@dataclass(frozen=True)
class Blocks:
    """The blocks of a mesh under a configuration; the one place from which launcher and worker both take them."""

    mesh: Mesh
    hosts: int
    """Of one block."""
    sizes: list[int] | None
    """Blocks of each worker, where they are given."""

    @property
    def chips(self) -> int:
        """Of one block."""
        return self.hosts * self.mesh.chips_per_host

    @property
    def count(self) -> int:
        return self.mesh.num_hosts // self.hosts

    @property
    def reason(self) -> str:
        """Why a block is as large as it is."""
        return "one host" if self.hosts == 1 else f"one span of batch norm, {self.hosts} hosts"

    def shares_by_weight(self, weights: list[float]) -> list[range]:
        """The blocks of workers that are this able: in proportion, as near as whole blocks come, one at least each.

        The largest remainders get what is left over (Hamilton's method); of equal ones the first.
        """
        sizes = [max(int(self.count * weight / sum(weights)), 1) for weight in weights]
        while (left := self.count - sum(sizes)) != 0:
            owed = [self.count * weight / sum(weights) - size for weight, size in zip(weights, sizes, strict=True)]
            if left > 0:
                sizes[max(range(len(sizes)), key=lambda i: (owed[i], -i))] += 1
            else:
                sizes[min((i for i, size in enumerate(sizes) if size > 1), key=lambda i: (owed[i], -i))] -= 1
        ends = list(accumulate(sizes, initial=0))
        return [range(first, last) for first, last in pairwise(ends)]

    def shares(self, workers: int) -> list[range]:
        """The blocks of each worker; ValueError where they don't go round."""
        return self.mesh.shares(workers, self.sizes, self.hosts)


def blocks(config: dict, mesh: Mesh) -> Blocks:
    """The blocks of a run; ValueError for a span of batch norm that makes none, and for wrong shares."""
    found = Blocks(mesh, hosts_per_block(mesh, config["bn_span"]), config["shares"])
    if found.sizes is not None or config["workers"] != "auto":
        found.shares(len(found.sizes) if config["workers"] == "auto" else config["workers"])
    return found


def hosts_per_block(mesh: Mesh, span: int) -> int:
    """1 where spans lie inside a host, else the hosts of one span. ValueError names the spans that the mesh allows."""
    host = mesh.chips_per_host
    if host % span == 0:
        return 1
    if span % host == 0 and mesh.num_chips % span == 0:
        return span // host
    allowed = [chips for chips in range(1, host) if host % chips == 0]
    allowed += [host * hosts for hosts in range(1, mesh.num_hosts + 1) if mesh.num_hosts % hosts == 0]
    raise ValueError(
        f"bn_span={span}: must divide the {host} chips of a host, or be whole hosts that divide the {mesh.num_hosts} "
        f"of mesh {mesh.name}: one of {', '.join(map(str, allowed))}"
    )
