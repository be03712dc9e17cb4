"""All-reduce plans: exact sums, and as many rounds and bytes as the literature says."""

import math

import numpy as np
import pytest
import torch
from emulator_samples import atlas

from train.comm import algorithms, algorithms_tree
from train.comm.algorithms import auto, double_tree, halving_doubling, hierarchical, multi_ring, nhr, ring, torus
from train.comm.algorithms_stages import _slice_places
from train.comm.plan import Plan, run_on_arrays
from train.comm.wire import sum_on_plan
from train.mesh.mesh import Mesh
from train.mesh.topologies import FullMesh, MeshedHosts, Star, Torus
from train.mesh.topology import LinkClass

LINK = LinkClass("link", 10, 1)
OVER_ALL = "ring halving_doubling nhr double_tree".split()
BY_HOST = "hierarchical hierarchical_ring hierarchical_nhr hierarchical_tree auto torus torus_2d multi_ring".split()


def line(chips: int) -> Mesh:
    return Mesh("line", {"host": chips, "chip": 1}, Star(LINK))


def grid(*shape: int) -> Mesh:
    return Mesh("grid", dict(zip("xyz", shape, strict=False)), Torus([*shape], LINK))


def check_sums(plan: Plan, length: int | None = None) -> None:
    """Integers: any order of the sums gives the same. Every chunk by default."""
    length = length or plan.num_chunks + 1
    buffers = np.random.default_rng(0).integers(-99, 99, (plan.mesh.num_chips, length))
    result = run_on_arrays(plan, buffers)
    np.testing.assert_array_equal(result, np.broadcast_to(buffers.sum(axis=0), buffers.shape))


def rounds_of(plan: Plan) -> int:
    return sum(1 for _ in plan.rounds())


def log2(size: int) -> int:
    """Rounded up."""
    return (size - 1).bit_length()


@pytest.mark.parametrize("name", OVER_ALL)
def test_exact_sums_of_every_size(name):
    for chips in [*range(1, 41), 64, 100, 127, 128, 256, 500]:
        check_sums(getattr(algorithms, name)(line(chips)))


@pytest.mark.parametrize("name", BY_HOST)
def test_exact_sums_over_hosts(name):
    for hosts in (1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 32):
        check_sums(getattr(algorithms, name)(atlas(hosts)))


@pytest.mark.parametrize("name", [*OVER_ALL, *BY_HOST])
def test_exact_sums_of_1024_chips(name):
    check_sums(getattr(algorithms, name)(atlas(128)), 1024 if name in ("ring", "nhr", "hierarchical") else 50)


@pytest.mark.parametrize("name", [*OVER_ALL, *BY_HOST[:-1]])
def test_exact_sums_of_4096_chips(name):
    """Of the first chunks."""
    check_sums(getattr(algorithms, name)(atlas(512)), 20)


@pytest.mark.parametrize("name", [*OVER_ALL, *BY_HOST[:-1]])
def test_exact_sums_on_one_two_and_three_axes(name):
    host = MeshedHosts(4, LINK, LINK, library="hccl")
    hosts = [Mesh("hosts", {"rack": 3, "server": 2, "chip": 4}, host), Mesh("one", {"x": 2, "y": 2}, host)]
    for mesh in (grid(7), grid(4, 4), grid(2, 3), grid(1, 5), grid(5, 2, 3), grid(3, 1, 3), grid(2, 2, 2), *hosts):
        try:
            plan = getattr(algorithms, name)(mesh)
        except ValueError:
            assert name == "torus_2d" and len([size for size in mesh.axes.values() if size > 1]) != 2
            continue
        check_sums(plan)


@pytest.mark.parametrize("name", [*OVER_ALL, *BY_HOST])
def test_the_wire_sums_as_the_arrays_do(name):
    for mesh in (atlas(1), atlas(3), atlas(8)):
        plan = getattr(algorithms, name)(mesh)
        vectors = (torch.randn(mesh.num_chips, 301, generator=torch.manual_seed(0)) * 100).half()
        expected = run_on_arrays(plan, vectors.numpy())
        assert sum_on_plan(plan, vectors, torch.float16).numpy().tobytes() == expected[0].tobytes()
        assert (expected == expected[0]).all()


# name: (rounds of n chips, most bytes that one chip sends, over the buffer's, where n is any number)
LITERATURE = {
    # Patarasuk and Yuan 2009
    "ring": (lambda n: 2 * (n - 1), lambda n: 2 * (n - 1) / n),
    # Thakur, Rabenseifner and Gropp 2005; HCCL, RHD.md: p is the largest power of two, the surplus is folded
    "halving_doubling": (
        lambda n: 2 * int(math.log2(n)) + 2 * (n & (n - 1) != 0),
        lambda n: 2 * ((p := 1 << int(math.log2(n))) - 1) / p + (p != n),
    ),
    # HCCL, NHR.md
    "nhr": (lambda n: 2 * log2(n), lambda n: 2 * (n - 1) / n),
}


@pytest.mark.parametrize("name", LITERATURE)
@pytest.mark.parametrize("chips", [2, 3, 4, 5, 6, 7, 8, 12, 13, 31, 32, 33, 100, 127, 128])
def test_rounds_and_bytes_are_those_of_the_literature(name, chips):
    rounds, most = LITERATURE[name]
    plan = getattr(algorithms, name)(line(chips))
    assert rounds_of(plan) == rounds(chips)
    assert plan.bytes_sent(1).max() == pytest.approx(most(chips))


# name: rounds of h hosts of 8 chips on Ascend 910, whose rings inside take 7 + 7; n = 8 h. Each chip sends 2(n - 1)/n.
HOSTS = {
    "multi_ring": lambda h: 2 * (8 * h - 1),
    "hierarchical": lambda h: 14 + 2 * log2(h),  # HCCL: reduce-scatter, halving-doubling, all-gather
    "hierarchical_ring": lambda h: 14 + 2 * (h - 1),
    "hierarchical_nhr": lambda h: 14 + 2 * log2(h),
    "torus_2d": lambda h: 14 + 2 * (h - 1),  # Mikami et al. 2018: 2(X - 1) inside, 2(Y - 1) between
}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("hosts", [1, 2, 8, 16])
def test_rounds_and_bytes_over_hosts(name, hosts):
    plan, chips = getattr(algorithms, name)(atlas(hosts)), 8 * hosts
    assert rounds_of(plan) == HOSTS[name](hosts)
    np.testing.assert_allclose(plan.bytes_sent(1), 2 * (chips - 1) / chips)


@pytest.mark.parametrize("shape", [(9,), (4, 4), (8, 4), (3, 5), (1, 6), (4, 4, 4), (2, 3, 4)])
def test_rounds_and_bytes_on_a_torus(shape):
    """2 sum(size - 1) rounds and 2(n - 1)/n (Ying et al. 2018); on square ones every link carries the same."""
    mesh = grid(*shape)
    plan, chips = torus(mesh), math.prod(shape)
    assert rounds_of(plan) == 2 * sum(size - 1 for size in shape)
    np.testing.assert_allclose(plan.bytes_sent(1), 2 * (chips - 1) / chips)
    load = np.zeros(chips * mesh.topology.ports)
    for turn in plan.rounds():
        paths = mesh.topology.paths(turn.source, turn.destination)
        np.add.at(load, paths.link, (turn.last - turn.first)[paths.pair])
    if len(set(shape)) == 1:
        assert len(set(load)) == 1


@pytest.mark.parametrize("chips", [*range(2, 34), 47, 64, 100, 127, 128, 1000])
@pytest.mark.parametrize("chunks", [1, 7])
def test_the_double_tree_sends_and_receives_once_a_round(chips, chunks):
    """Sanders, Speck and Traeff 2009: one port each way, 2 log2(n) rounds of filling, and 2 rounds a chunk."""
    plan = double_tree(line(chips), chunks)
    for turn in plan.rounds():
        assert len(set(turn.source)) == len(turn.source) and len(set(turn.destination)) == len(turn.destination)
    assert rounds_of(plan) <= 2 * (2 * chunks + 2 * log2(chips) - 2)
    sent = plan.bytes_sent(1)
    assert sent.sum() == pytest.approx(2 * (chips - 1)) and sent.max() <= 2


@pytest.mark.parametrize("chips", [2, 3, 4, 7, 8, 14, 16, 25, 100, 1001, 1024])
def test_the_trees_are_two_and_a_parent_in_one_is_a_leaf_in_the_other(chips):
    trees = algorithms_tree.double_tree(chips)
    children = np.zeros((2, chips), int)
    for parents, number in zip(trees, children, strict=True):
        assert (parents < 0).sum() == 1
        np.add.at(number, parents[parents >= 0], 1)
        at = np.arange(chips)
        for _ in range(log2(chips)):  # no way up is longer
            at = np.where(parents[at] < 0, at, parents[at])
        assert len(set(at)) == 1
    assert children.sum(axis=0).max() <= 2 and not (children.min(axis=0) * (children.max(axis=0) > 1)).any()


def test_the_trees_of_nccl():
    """The figure in NCCL's trees.cc, 14 chips: 8 below 0; 4 and 12 below 8; 13 below 12 as 14 is not there."""
    first, second = algorithms_tree.double_tree(14).tolist()
    assert first == [-1, 2, 4, 2, 8, 6, 4, 6, 0, 10, 12, 10, 8, 12]
    assert second == [13 - first[13 - chip] if first[13 - chip] >= 0 else -1 for chip in range(14)]
    assert algorithms_tree.double_tree(5).tolist() == [[-1, 2, 4, 2, 0], [1, -1, 3, 0, 3]]


@pytest.mark.parametrize("chips", [4, 12, 20, 100, 128, 1000])
def test_the_rule_of_colours_is_a_colouring_as_the_walk_is(chips):
    trees = algorithms_tree.double_tree(chips)
    for colours in (algorithms_tree.edge_colours(chips), algorithms_tree._walked_colours(trees)):
        both = (trees >= 0).all(axis=0)
        assert (colours[0] != colours[1])[both].all()
        ends = [(parent, colour) for parent, colour in zip(trees.ravel(), colours.ravel(), strict=True) if parent >= 0]
        assert len(set(ends)) == len(ends)


def test_nhr_sends_slices_in_one_piece_at_powers_of_two():
    """HCCL's order of 4 slices in the buffer is 0, 2, 1, 3, of 6 it is 0, 2, 4, 1, 3, 5 (GetSliceMap)."""
    assert np.argsort(_slice_places(4)).tolist() == [0, 2, 1, 3]
    assert np.argsort(_slice_places(6)).tolist() == [0, 2, 4, 1, 3, 5]
    for chips, pieces in ((16, 16), (6, 6), (12, 24), (13, 39)):
        assert max(len(turn.source) for turn in nhr(line(chips)).rounds()) <= pieces


def links_of(plan: Plan) -> dict[tuple[int, int], int]:
    """Chunks that each chip sends to each other."""
    links = {}
    for turn in plan.rounds():
        edges = zip(turn.source.tolist(), turn.destination.tolist(), strict=True)
        for edge, chunks in zip(edges, turn.last - turn.first, strict=True):
            links[edge] = links.get(edge, 0) + int(chunks)
    return links


@pytest.mark.parametrize("algorithm", [hierarchical, multi_ring])
def test_four_rings_load_each_link_of_a_host_alike(algorithm):
    links = links_of(algorithm(atlas(1)))
    assert len(links) == 32 and set(links.values()) == {14}
    assert len(links_of(ring(atlas(1)))) == 8


def test_several_rings_enter_and_leave_hosts_by_chips_of_their_own():
    between = [edge for edge in links_of(multi_ring(atlas(4))) if edge[0] // 8 != edge[1] // 8]
    assert len(between) == 4 * 4
    assert len({source for source, _ in between}) == len({destination for _, destination in between}) == 16


def test_chips_with_a_link_to_each_other_exchange_directly():
    """HCCL: "Mesh" on four of Ascend 910 and on the eight of 910B: 2 rounds, 2/p of the buffer over a link."""
    for mesh in (atlas(1, 4), Mesh("910B", {"host": 1, "chip": 8}, MeshedHosts(8, LINK, LINK, library="hccl_a2"))):
        plan, chips = hierarchical(mesh), mesh.num_chips
        assert rounds_of(plan) == 2 and set(links_of(plan).values()) == {2} and plan.num_chunks == chips
    nvidia = Mesh("ABCI", {"host": 1, "chip": 4}, MeshedHosts(4, LINK, LINK))
    assert rounds_of(hierarchical(nvidia)) == 2 * 3


def algorithms_in(plan: Plan) -> list[str]:
    return [stage.algorithm for stage in plan.stages if "host" in stage.axes]


@pytest.mark.parametrize(
    "library, hosts, expected",
    [
        ("hccl", {2: "halving", 3: "ring", 4: "halving", 6: "ring", 7: "ring", 8: "halving", 12: "halving"}, "hccl"),
        ("hccl_a2", {2: "ring", 3: "ring", 4: "non-uniform", 5: "non-uniform", 64: "non-uniform"}, "910B"),
        ("hccl_a3", {2: "non-uniform", 3: "ring", 7: "ring", 9: "non-uniform", 48: "non-uniform"}, "910C"),
        ("hccl_950", {2: "non-uniform", 3: "non-uniform", 16: "non-uniform"}, "950"),
        ("nccl", {2: "halving", 3: "non-uniform", 64: "halving", 1088: "non-uniform"}, "others"),
    ],
)
def test_auto_is_the_library_s_rule(library, hosts, expected):
    for number, algorithm in hosts.items():
        mesh = Mesh(expected, {"host": number, "chip": 2}, MeshedHosts(2, LINK, LINK, library=library))
        found = algorithms_in(auto(mesh))
        assert found and all(stage.startswith(algorithm) for stage in found), (number, found)


def test_auto_on_a_torus():
    mesh = grid(4, 4, 4)
    assert auto(mesh).name == "auto: torus" and auto(mesh).num_lanes == 3
    assert [stage.axes for stage in auto(mesh).stages] == [stage.axes for stage in torus(mesh).stages]


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: multi_ring(line(8)), "collective=multi_ring: the 1 chips of a host of mesh line .Star. form one ring"),
        (lambda: multi_ring(atlas(1, 4)), "collective=multi_ring: the 4 chips .* use collective=ring"),
        (lambda: algorithms.torus_2d(grid(7)), "collective=torus_2d needs two axes, mesh grid has {x: 7}"),
        (lambda: algorithms.torus_2d(grid(2, 3, 4)), "torus_2d needs two axes, .*collective=torus"),
        (lambda: double_tree(line(8), 0), "collective.chunks=0 must be"),
        (lambda: algorithms.hierarchical_tree(line(8), 1.5), "collective.chunks=1.5 must be"),
        (lambda: hierarchical(Mesh("cut", {"x": 3, "y": 16}, atlas(1).topology)), "no last axes .* make a host of 8"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, named):
    with pytest.raises(ValueError, match=named) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_torus_takes_one_lane_where_the_axes_are_not_alike():
    assert torus(atlas(16)).num_lanes == 1  # HCCS and RoCE
    assert torus(Mesh("switch", {"x": 4, "y": 4}, Star(LINK))).num_lanes == 1
    assert torus(Mesh("boards", {"x": 4, "y": 4}, FullMesh([4, 4], [LINK, LinkClass("slow", 1, 1)]))).num_lanes == 1
    assert torus(Mesh("boards", {"x": 4, "y": 4}, Torus([4, 4], LINK))).num_lanes == 2


def test_halving_doubling_of_hosts_that_are_no_power_of_two():
    assert rounds_of(halving_doubling(atlas(3))) == 2 * math.floor(math.log2(24)) + 2
