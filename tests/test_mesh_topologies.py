import itertools
from collections import Counter

import numpy as np
import pytest
from emulator_samples import atlas

from train.mesh.fabrics import Dragonfly, FatTree
from train.mesh.mesh import Mesh
from train.mesh.topologies import CubeMesh, FullMesh, MeshedHosts, RackMesh, Star, SuperPods, SwitchedHosts, Torus
from train.mesh.topology import LinkClass, Topology


def link(name: str = "wire", gbytes_per_s: float = 10.0) -> LinkClass:
    return LinkClass(name, gbytes_per_s, 1.0)


INSIDE, BETWEEN, PCIE, OUT = link("inside", 100), link("between"), link("pcie", 8), link("out", 5)
BOARDS = MeshedHosts(4, INSIDE, BETWEEN)
TOPOLOGIES = {  # and chips of it
    "atlas": (atlas(1).topology, 32),
    "switched": (SwitchedHosts(8, INSIDE, BETWEEN, planes=3), 32),
    "racks": (SwitchedHosts(4, INSIDE, BETWEEN, hosts_per_rack=2, taper=0.5), 32),
    "meshed": (BOARDS, 16),
    "P100": (CubeMesh(INSIDE, BETWEEN, PCIE), 16),
    "V100": (CubeMesh(INSIDE, BETWEEN, PCIE, links_per_chip=6), 16),
    "torus": (Torus([4, 3, 2], link(), chips_per_host=2), 24),
    "grid": (Torus([4, 4], link(), wrap=False), 16),
    "full mesh": (FullMesh([3, 4, 2], [INSIDE, BETWEEN, OUT], 2), 24),
    "star": (Star(link()), 9),
    "fat tree": (FatTree(3, 3, link()), 27),
    "tapered": (FatTree(4, 2, link(), taper=0.5), 16),
    "dragonfly": (Dragonfly(1, 3, 2, INSIDE, BETWEEN, OUT), 21),
    "rack mesh": (RackMesh(BOARDS, 8, 4, OUT, taper=0.25), 32),
    "pods of tori": (SuperPods(Torus([2, 4], link(), 4), 8, OUT), 32),
    "pods of racks": (SuperPods(RackMesh(BOARDS, 8, 2, OUT), 16, PCIE, taper=0.5), 48),
}


def all_pairs(chips: int) -> np.ndarray:
    return np.array(list(itertools.product(range(chips), repeat=2))).T


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_numbers_of_links_and_ways(name):
    """No link is of two classes, none twice on a way, none on a way to itself; classes are all in use."""
    topology, chips = TOPOLOGIES[name]
    source, destination = all_pairs(chips)
    pair, kind, number = topology.paths(source, destination)
    assert (np.diff(pair) >= 0).all()
    assert set(pair.tolist()) == set(np.flatnonzero(source != destination).tolist())
    assert len({*zip(kind.tolist(), number.tolist(), strict=True)}) == len(np.unique(number))
    assert len({*zip(pair.tolist(), number.tolist(), strict=True)}) == len(number)
    assert set(kind.tolist()) == set(range(len(topology.link_classes)))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_way_back_is_as_long_and_one_pair_is_as_all(name):
    topology, chips = TOPOLOGIES[name]
    source, destination = all_pairs(chips)
    hops = topology.hops(source, destination)
    assert hops.shape == (len(topology.link_classes), chips * chips)
    np.testing.assert_array_equal(hops, topology.hops(destination, source))
    pair, kind, number = topology.paths(source, destination)
    for one in range(0, chips * chips, 7):
        at = pair == one
        route = [(topology.link_classes[k].name, n) for k, n in zip(kind[at], number[at], strict=True)]
        assert topology.route(int(source[one]), int(destination[one])) == route


def num_links(topology: Topology, chips: int) -> Counter:
    _, kind, number = topology.paths(*all_pairs(chips))
    unique, first = np.unique(number, return_index=True)
    return Counter(topology.link_classes[k].name for k in kind[first])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("switched", {"inside": 64, "between": 64}),
        ("racks", {"inside": 64, "between": 64, "between rack": 8}),
        ("meshed", {"inside": 4 * 12, "between": 32}),
        ("P100", {"inside": 2 * 32, "pcie": 32, "between": 32}),
        ("V100", {"inside": 2 * 16, "inside x2": 2 * 16, "pcie": 32, "between": 32}),
        ("torus", {"wire": 24 * (2 + 2 + 1)}),
        ("grid", {"wire": 2 * 2 * 4 * 3}),
        ("full mesh", {"inside": 24 * 2, "between": 24 * 3, "out": 24}),
        ("star", {"wire": 18}),
        ("fat tree", {"wire": 2 * 3 * 27}),
        ("tapered", {"wire": 2 * (16 + 8)}),
        ("dragonfly", {"inside": 42, "between": 7 * 6, "out": 42}),
        ("rack mesh", {"inside": 8 * 12, "between": 64, "out": 64, "out trunk": 12}),
    ],
)
def test_every_machine_has_its_links(name, expected):
    assert num_links(*TOPOLOGIES[name]) == expected


def test_rates_of_derived_links():
    def rates(topology: Topology) -> dict[str, float]:
        return {each.name: each.bytes_per_s / 1e9 for each in topology.link_classes}

    assert rates(SwitchedHosts(8, link("nvlink", 25), BETWEEN, planes=6))["nvlink"] == 150
    assert rates(SwitchedHosts(4, INSIDE, BETWEEN, hosts_per_rack=34, taper=1 / 3))["between rack"] == pytest.approx(
        34 * 4 * 10 / 3
    )
    assert rates(TOPOLOGIES["V100"][0])["inside x2"] == 200
    assert rates(TOPOLOGIES["rack mesh"][0])["out trunk"] == pytest.approx(0.25 * 8 * 5 / 3)
    assert rates(TOPOLOGIES["pods of racks"][0])["pcie pod"] == 0.5 * 16 * 8


def test_the_shorter_way_round_a_torus_and_half_way_both():
    ring = Torus([6], link())
    assert [len(ring.route(0, chip)) for chip in range(6)] == [0, 1, 2, 3, 2, 1]
    up, down = ring.route(0, 3), ring.route(3, 0)
    assert all(each.link % 2 == 0 for each in up) and all(each.link % 2 == 1 for each in down)
    grid = Torus([6], link(), wrap=False)
    assert [len(grid.route(0, chip)) for chip in range(6)] == [0, 1, 2, 3, 4, 5]


def test_first_dimension_first():
    """From (0, 0) to (2, 1) on 4 x 4: down two rows in column 0, then along row 2."""
    torus = Torus([4, 4], link())
    assert [(each.link // 4, each.link % 4) for each in torus.route(0, 9)] == [(0, 0), (4, 0), (8, 2)]
    mesh = FullMesh([3, 4], [BETWEEN, INSIDE])
    assert [(each.kind, each.link // 7, each.link % 7) for each in mesh.route(0, 9)] == [
        ("between", 0, 2),
        ("inside", 8, 3 + 1),
    ]


@pytest.mark.parametrize("shape", [[2, 2], [4, 4], [2, 2, 2], [8], [4, 3, 2], [6, 5]])
def test_the_ring_over_a_torus_takes_single_steps(shape):
    torus = Torus(shape, link())
    (ring,) = torus.rings(torus.num_chips)
    assert sorted(ring) == list(range(torus.num_chips))
    lengths = torus.hops(np.array(ring), np.roll(ring, -1))[0]
    assert (lengths[:-1] == 1).all()
    assert shape[0] % 2 or lengths[-1] == 1


def test_a_mesh_that_is_the_whole_torus_takes_its_ring():
    mesh = Mesh("torus", {"y": 4, "x": 4}, Torus([4, 4], link(), chips_per_host=4))
    assert mesh.rings(("y", "x"))[0][4:8] == (7, 6, 5, 4)
    assert mesh.rings(("x",)) == ((0, 1, 2, 3),)


def test_rings_of_dgx_1v_use_each_link_once():
    topology = TOPOLOGIES["V100"][0]
    used = Counter(edge for ring in topology.rings(8) for edge in zip(ring, ring[1:] + ring[:1], strict=True))
    source, destination = np.array(list(used)).T
    hops = topology.hops(source, destination)
    assert dict(zip(used, (hops[0] + 2 * hops[2]).tolist(), strict=True)) == used
    assert used.total() == 8 * 6


def test_first_hosts_of_a_torus_keep_its_links():
    mesh = Mesh("torus", {"y": 8, "x": 4}, Torus([8, 4], link(), chips_per_host=2))
    assert (mesh.first_hosts(4).axes, mesh.first_hosts(4).num_chips) == ({"y": 2, "x": 4}, 8)
    assert mesh.first_hosts(3).axes == {"host": 3, "chip": 2}
    assert mesh.first_hosts(4).topology is mesh.topology


@pytest.mark.parametrize(
    "build, named",
    [
        (
            lambda: SwitchedHosts(8, INSIDE, BETWEEN, hosts_per_rack=2, taper=0),
            "SwitchedHosts: taper=0 must be above 0",
        ),
        (lambda: MeshedHosts(8, INSIDE, BETWEEN, hosts_per_rack=2, taper=1.5), "MeshedHosts: taper=1.5"),
        (lambda: SwitchedHosts(8, INSIDE, BETWEEN, taper=0.5), "taper=0.5 needs hosts_per_rack"),
        (lambda: SwitchedHosts(8, INSIDE, BETWEEN, planes=0), "planes=0 must be a whole number"),
        (lambda: SwitchedHosts(0, INSIDE, BETWEEN), "chips_per_host=0"),
        (lambda: CubeMesh(INSIDE, BETWEEN, PCIE, links_per_chip=5), "links_per_chip=5 must be 4 .* or 6"),
        (lambda: Torus([], link()), r"Torus: shape=\[\] has no dimensions"),
        (lambda: Torus([4, 0], link()), r"Torus: shape\[1\]=0"),
        (lambda: Torus([4, 2.5], link()), r"Torus: shape\[1\]=2.5"),
        (lambda: FullMesh([4, 4], [link()]), "1 links for shape=.4, 4.; give one link per dimension"),
        (lambda: FatTree(4, 2, link(), taper=-1), "FatTree: taper=-1"),
        (lambda: RackMesh(BOARDS, 8, 4, OUT, taper=2), "RackMesh: taper=2"),
        (lambda: RackMesh(BOARDS, 6, 4, OUT), "RackMesh: chips_per_rack=6, but its MeshedHosts has hosts of 4 chips"),
        (lambda: SuperPods(Torus([4], link()), 8, OUT), "chips_per_pod=8, but its Torus has 4 chips"),
        (lambda: SuperPods(BOARDS, 8, OUT, taper=True), "SuperPods: taper=True"),
        (lambda: Dragonfly(1, 0, 1, INSIDE, INSIDE, OUT), "routers_per_group=0"),
        (lambda: Star(link(), chips_per_host=-1), "chips_per_host=-1"),
        (
            lambda: Mesh("pod", {"y": 8, "x": 8}, Torus([8, 16], link())),
            "mesh pod: axes y 8 x x 8 = 64, but its Torus is made of 128 chips; change mesh.axes",
        ),
    ],
)
def test_wrong_topologies_are_refused_in_one_line(build, named):
    with pytest.raises(ValueError, match=named) as error:
        build()
    assert "\n" not in str(error.value)
