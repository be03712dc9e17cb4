import itertools

import numpy as np
import pytest
from emulator_samples import atlas

from train.comm.algorithms import halving_doubling, hierarchical, ring
from train.comm.plan import Plan, Round, Stage
from train.mesh.fabrics import FatTree
from train.mesh.mesh import Mesh
from train.mesh.topologies import FullMesh, MeshedHosts, Star, SwitchedHosts, Torus
from train.mesh.topology import LinkClass
from train.sim.calibration import Calibration
from train.sim.flow import Flow, finish_s, max_min_rates
from train.sim.network import AlphaBeta, latency_s

PORT = LinkClass("port", 1, 10)  # 1 kB takes 1 us, 1 MB 1 ms
LINE = Torus([4], PORT, wrap=False)


def ends_us(topology, *transfers: tuple[int, int, int]) -> list[float]:
    """When each (source, destination, kB) ends, without the latency of its way."""
    source, destination, kbytes = np.array(transfers).T
    wait = latency_s(topology, topology.hops(source, destination), kbytes * 1e3)
    return ((finish_s(topology, source, destination, kbytes * 1e3) - wait) * 1e6).tolist()


def one_round(topology, chips: int, *transfers: tuple[int, int]) -> Plan:
    """A plan of one round in which every transfer carries the whole buffer."""
    source, destination = np.array(transfers).T
    whole = np.zeros_like(source), np.ones_like(source)
    stage = Stage("one", ("chip",), 1, lambda: iter([Round(source, destination, *whole, True)]))
    return Plan("one", Mesh("one", {"chip": chips}, topology), (stage,))


# Cases by hand.


def test_two_flows_on_one_link_take_twice_as_long():
    assert ends_us(Star(PORT), (0, 1, 100), (0, 2, 100)) == pytest.approx([200, 200])


def test_an_incast_shares_the_receiver_s_port():
    assert ends_us(Star(PORT), *((chip, 0, 100) for chip in range(1, 6))) == pytest.approx([500] * 5)


def test_a_flow_that_ends_leaves_its_share():
    """100 kB and 300 kB: halves until 200 us, then the second has 200 kB left at full rate."""
    assert ends_us(Star(PORT), (0, 1, 100), (0, 2, 300)) == pytest.approx([200, 400])
    assert ends_us(Star(PORT), (0, 1, 100), (0, 2, 200), (0, 3, 600)) == pytest.approx([300, 500, 900])


def test_parking_lot():
    """0 -> 2 goes over both links of 0 -> 1 and 1 -> 2: all get half; equal sizes end together."""
    assert ends_us(LINE, (0, 2, 100), (0, 1, 100), (1, 2, 100)) == pytest.approx([200, 200, 200], rel=0.06)
    rates = max_min_rates(np.array([0, 0, 1, 2]), np.array([0, 1, 0, 1]), np.array([1.0, 1.0]), 3)
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.5])


def test_parking_lot_of_unequal_links():
    """Links of 1 and 3: the long flow and the one beside it get 1/2 each, the other all the rest, 5/2."""
    rates = max_min_rates(np.array([0, 0, 1, 2]), np.array([0, 1, 0, 1]), np.array([1.0, 3.0]), 3)
    np.testing.assert_allclose(rates, [0.5, 0.5, 2.5])


def test_a_later_start_waits_for_its_latency():
    """On a line, 0 -> 2 waits 20 us and 1 -> 2 10 us: 100 kB alone for 10 us, then halves of 90 and 100 kB."""
    finish = finish_s(LINE, np.array([1, 0]), np.array([2, 2]), np.array([100e3, 100e3]))
    assert (finish * 1e6).tolist() == pytest.approx([10 + 10 + 180, 10 + 10 + 180 + 10])


def test_an_oversubscribed_rack():
    """Two hosts of two chips a rack, taper 1/2: four flows out of the rack share 2 of its 4 ports' worth."""
    racks = SwitchedHosts(2, LinkClass("inside", 4, 1), PORT, hosts_per_rack=2, taper=0.5)
    away = [(chip, chip + 4, 100) for chip in range(4)]
    assert ends_us(racks, *away) == pytest.approx([200] * 4)
    assert ends_us(racks, *away[:2]) == pytest.approx([100] * 2)
    near = [(0, 2, 100), (1, 3, 100)]  # in the rack: its uplinks have no part in them
    assert ends_us(racks, *near) == pytest.approx([100] * 2)
    back = [(chip + 4, chip, 100) for chip in range(4)]  # and the way down is not the way up
    assert ends_us(racks, *away, *back) == pytest.approx([200] * 8)


def test_groups_contend_with_each_other():
    """Halving-doubling between equal chips of 4 hosts in 2 racks of taper 1/4: the rounds across racks take 4 times."""
    inside = LinkClass("inside", 1000, 1)
    free, tapered = (
        Mesh("racks", {"host": 4, "chip": 4}, MeshedHosts(4, inside, PORT, hosts_per_rack=2, taper=taper))
        for taper in (1.0, 0.25)
    )
    size = 16e6  # 4 MB a chip: across racks 2 MB twice
    across = 2 * 2e-3
    one, other = (Flow().seconds(hierarchical(mesh), size) for mesh in (free, tapered))
    assert other - one == pytest.approx(3 * across, rel=1e-9)
    assert AlphaBeta().seconds(hierarchical(tapered), size) == pytest.approx(one, rel=1e-9)


def test_nothing_sent_costs_its_latency():
    assert finish_s(LINE, np.array([0, 1]), np.array([2, 2]), np.array([0.0, 0.0])).tolist() == pytest.approx(
        [20e-6, 10e-6]
    )


def test_efficiency_slows_bytes_and_leaves_latencies():
    plan = one_round(LINE, 4, (0, 1), (2, 3))
    for network in (AlphaBeta, Flow):
        whole, half = (network(calibration=Calibration(comm_efficiency=share)) for share in (1.0, 0.5))
        assert whole.seconds(plan, 1e6) == pytest.approx(10e-6 + 1e-3, rel=1e-12)
        assert half.seconds(plan, 1e6) == pytest.approx(10e-6 + 2e-3, rel=1e-12)


# The law: where no two transfers of a round share a link, both networks say the same; elsewhere flow never says less.


def machines() -> list[Mesh]:
    inside = LinkClass("inside", 20, 1.5, 0.6, 512)
    return [
        atlas(1),
        atlas(4),
        Mesh("switched", {"host": 4, "chip": 8}, SwitchedHosts(8, inside, PORT)),
        Mesh("torus", {"y": 4, "x": 4}, Torus([4, 4], PORT, 4)),
        Mesh("large torus", {"y": 8, "x": 8}, Torus([8, 8], PORT, 8)),
        Mesh("grid", {"y": 4, "x": 4}, Torus([4, 4], PORT, 4, wrap=False)),
        Mesh("racks", {"host": 8, "chip": 8}, SwitchedHosts(8, inside, PORT, hosts_per_rack=2, taper=0.25)),
        Mesh("full", {"y": 4, "x": 8}, FullMesh([4, 8], [PORT, inside], 8)),
        Mesh("tree", {"host": 16, "chip": 4}, FatTree(4, 3, PORT, chips_per_host=4)),
        Mesh("thin tree", {"host": 16, "chip": 4}, FatTree(4, 3, PORT, taper=0.5, chips_per_host=4)),
    ]


@pytest.mark.parametrize("algorithm", [ring, halving_doubling, hierarchical])
@pytest.mark.parametrize("mesh", machines(), ids=lambda mesh: mesh.name)
def test_equal_without_contention_and_never_less_with_it(algorithm, mesh):
    plan = algorithm(mesh)
    shared = [links_shared(mesh, turn) for turn in plan.rounds()]
    for nbytes in (0, 1e4, 5e7):
        flow, closed = Flow().seconds(plan, nbytes), AlphaBeta().seconds(plan, nbytes, all_groups=True)
        if any(shared) and nbytes:
            assert flow > closed * (1 - 1e-12)
        else:
            assert flow == pytest.approx(closed, rel=1e-12)


def links_shared(mesh: Mesh, turn: Round) -> bool:
    links = mesh.topology.paths(turn.source, turn.destination).link
    return len(np.unique(links)) < len(links)


def test_the_law_has_cases_on_both_sides():
    shared = [
        any(links_shared(mesh, turn) for turn in algorithm(mesh).rounds())
        for mesh, algorithm in itertools.product(machines(), (ring, halving_doubling, hierarchical))
    ]
    assert 5 <= sum(shared) <= len(shared) - 5


def test_the_record_s_all_reduce():
    plan = hierarchical(atlas(128))
    assert Flow().seconds(plan, 51e6) == pytest.approx(AlphaBeta().seconds(plan, 51e6), rel=1e-12)


# Max-min fairness on random cases.


@pytest.mark.parametrize("seed", range(20))
def test_rates_fit_and_every_flow_has_a_bottleneck(seed):
    """Bertsekas and Gallager: feasible, and on some full link of its way no other flow is faster."""
    draw = np.random.default_rng(seed)
    flows, links = draw.integers(1, 60), draw.integers(1, 30)
    way = draw.random((flows, links)) < 0.2
    way[np.arange(flows), draw.integers(0, links, flows)] = True
    capacity = draw.choice([1.0, 2.0, 5.0, draw.random() + 0.1], links)
    flow, link = np.nonzero(way)
    rate = max_min_rates(flow, link, capacity, flows)
    load = rate @ way
    assert (load <= capacity * (1 + 1e-9)).all()
    full = load >= capacity * (1 - 1e-9)
    fastest = (way * rate[:, None]).max(axis=0)
    has_bottleneck = (way & full & (rate[:, None] >= fastest * (1 - 1e-9))).any(axis=1)
    assert has_bottleneck.all()


@pytest.mark.parametrize("seed", range(6))
def test_no_link_carries_more_than_it_can_and_doubling_doubles(seed):
    """All bytes over a link need at least bytes / bandwidth; without latency, time is linear in bytes."""
    draw = np.random.default_rng(seed)
    topology = Torus([4, 4], PORT.trunk("free", 1, ""))
    source = draw.integers(0, 16, 60)
    destination = (source + draw.integers(1, 16, 60)) % 16
    nbytes = draw.integers(1, 50, 60) * 1e3
    finish = finish_s(topology, source, destination, nbytes)
    pair, _, link = topology.paths(source, destination)
    for each in np.unique(link):
        on = pair[link == each]
        assert finish[on].max() >= nbytes[on].sum() / 1e9 * (1 - 1e-9)
    np.testing.assert_allclose(finish_s(topology, source, destination, 2 * nbytes), 2 * finish, rtol=1e-8)
    np.testing.assert_allclose(finish_s(topology, source, destination, nbytes, efficiency=0.5), 2 * finish, rtol=1e-8)


def test_order_of_transfers_does_not_matter():
    draw = np.random.default_rng(0)
    source, destination, order = draw.integers(0, 8, 30), draw.integers(8, 16, 30), draw.permutation(30)
    nbytes = draw.integers(1, 9, 30) * 1e5
    tree = FatTree(4, 2, PORT, taper=0.5)
    finish = finish_s(tree, source, destination, nbytes)
    again = finish_s(tree, source[order], destination[order], nbytes[order])
    np.testing.assert_allclose(again, finish[order], rtol=1e-9)


def test_model_error_is_checked():
    with pytest.raises(ValueError, match="network.model_error=2"):
        Flow(model_error=2)
