import itertools

import numpy as np
import pytest
from emulator_samples import atlas

from train.mesh.topology import Atlas900, LinkClass


def test_hops_count_the_routes():
    topology = atlas(3).topology
    pairs = np.array(list(itertools.product(range(24), repeat=2)))
    names = [link.name for link in topology.link_classes]
    expected = [[sum(link.kind == name for link in topology.route(a, b)) for a, b in pairs.tolist()] for name in names]
    np.testing.assert_array_equal(topology.hops(pairs[:, 0], pairs[:, 1]), expected)


def test_routes_join_their_ends():
    topology = atlas(2).topology
    for a, b in itertools.permutations(range(16), 2):
        route = topology.route(a, b)
        assert (route[0].source, route[-1].destination) == (a, b)
        assert all(one.destination == two.source for one, two in itertools.pairwise(route))


def test_the_four_rings_use_every_directed_link_once():
    """Two full meshes of four (24 directed HCCS links) and four cross links (8 directed PCIe links)."""
    edges = [edge for ring in Atlas900.RINGS for edge in zip(ring, ring[1:] + ring[:1], strict=True)]
    hccs = {edge for four in (range(4), range(4, 8)) for edge in itertools.permutations(four, 2)}
    pcie = {(chip, chip ^ 4) for chip in range(8)}
    assert len(edges) == len(set(edges)) == 32
    assert set(edges) == hccs | pcie
    assert all(sorted(ring) == list(range(8)) for ring in Atlas900.RINGS)


def test_small_messages_take_the_short_path():
    link = atlas(1).topology.link_classes[0]
    assert link.message_s(np.array([512 * 1024 - 1, 512 * 1024])).tolist() == pytest.approx([0.6e-6, 1.5e-6])


@pytest.mark.parametrize("figures", [{"gbytes_per_s": 0, "latency_us": 1}, {"gbytes_per_s": 1, "latency_us": -1}])
def test_a_link_needs_positive_figures(figures):
    with pytest.raises(ValueError, match="link roce: .* must be a positive number"):
        LinkClass("roce", **figures)
