"""Fabrics of the textbooks, for comparisons and for machines that have them.

Fat tree with d-mod-k routes: Zahavi 2010. Dragonfly: Kim, Dally, Scott and Abts 2008, minimal routes.
"""

from collections.abc import Iterator

import numpy as np

from train.mesh.origin import check_taper, check_whole
from train.mesh.topology import LinkClass, Step, Topology


class FatTree(Topology):
    """A tree of switches over arity^levels chips, every link of class `link`; d-mod-k routes, up and down again.

    taper: links up over links down of a switch (1: non-blocking).
    """

    def __init__(
        self,
        arity: int,
        levels: int,
        link: LinkClass,
        taper: float = 1.0,
        chips_per_host: int = 1,
        library: str = "nccl",
    ):
        check_whole("FatTree", arity=arity, levels=levels, chips_per_host=chips_per_host)
        check_taper("FatTree", taper)
        self.link_classes, self.library = (link.with_switch(False),), library
        self.chips_per_host, self.num_chips = chips_per_host, arity**levels
        # (chips, links up) of a subtree of each level
        self._subtrees = [(arity**level, max(1, round((arity * taper) ** level))) for level in range(levels)]
        self.ports = 2 * levels

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        climbs = [np.flatnonzero(source // chips != destination // chips) for chips, _ in self._subtrees]
        ways = list(zip(climbs, self._subtrees, range(0, self.ports, 2), strict=True))
        for pair, (chips, links), port in ways:
            owner = source[pair] // chips * chips + destination[pair] % links
            yield Step(pair, 0, owner * self.ports + port)
        for pair, (chips, links), port in reversed(ways):
            owner = destination[pair] // chips * chips + destination[pair] % links
            yield Step(pair, 0, owner * self.ports + port + 1)


class Dragonfly(Topology):
    """Groups of routers, a full mesh inside each group (`local`) and one `global_link` between any two groups.

    There are routers_per_group x global_per_router + 1 groups; `terminal` joins a chip to its router.
    """

    def __init__(
        self,
        chips_per_router: int,
        routers_per_group: int,
        global_per_router: int,
        terminal: LinkClass,
        local: LinkClass,
        global_link: LinkClass,
        chips_per_host: int = 1,
        library: str = "nccl",
    ):
        sizes = dict(chips_per_router=chips_per_router, routers_per_group=routers_per_group)
        check_whole("Dragonfly", **sizes, global_per_router=global_per_router, chips_per_host=chips_per_host)
        self.link_classes = tuple(link.with_switch(False) for link in (terminal, local, global_link))
        self.chips_per_router, self.routers = chips_per_router, routers_per_group
        self.globals, self.groups = global_per_router, routers_per_group * global_per_router + 1
        self.num_chips = self.groups * routers_per_group * chips_per_router
        self.chips_per_host, self.library = chips_per_host, library
        self.ports = 2 + routers_per_group + global_per_router

    def steps(self, source: np.ndarray, destination: np.ndarray) -> Iterator[Step]:
        first, last = source // self.chips_per_router, destination // self.chips_per_router  # routers
        group, target = first // self.routers, last // self.routers
        # Link number d of a group goes to the (d + 1)-th group after it; router d // globals holds it.
        number = (target - group - 1) % self.groups
        back = (group - target - 1) % self.groups
        far = group != target
        leave = np.where(far, group * self.routers + number // self.globals, last)
        enter = np.where(far, target * self.routers + back // self.globals, last)
        pair = np.flatnonzero(source != destination)
        yield Step(pair, 0, source[pair] * self.ports)
        yield self._local(first, leave)
        pair = np.flatnonzero(far)
        owner = leave[pair] * self.chips_per_router
        yield Step(pair, 2, owner * self.ports + 2 + self.routers + number[pair] % self.globals)
        yield self._local(enter, last)
        pair = np.flatnonzero(source != destination)
        yield Step(pair, 0, destination[pair] * self.ports + 1)

    def _local(self, router: np.ndarray, target: np.ndarray) -> Step:
        pair = np.flatnonzero(router != target)
        owner = router[pair] * self.chips_per_router
        return Step(pair, 1, owner * self.ports + 2 + target[pair] % self.routers)
