import itertools

import numpy as np
import pytest
from emulator_samples import atlas

from train.mesh.topology import Atlas900, Link, LinkClass, hamiltonian_rings


def test_hops_by_closed_form_are_those_of_the_paths():
    topology = atlas(3).topology
    source, destination = np.array(list(itertools.product(range(24), repeat=2))).T
    pair, kind, _ = topology.paths(source, destination)
    hops = np.zeros((3, len(source)))
    np.add.at(hops, (kind, pair), [[1, 1, 0.5][each] for each in kind])  # a switched hop is two ports
    np.testing.assert_array_equal(topology.hops(source, destination), hops)


def test_ways_of_atlas_900():
    """Seven numbers a chip: to the four chips of its square, across, out, in."""
    topology = atlas(2).topology
    assert topology.route(3, 3) == []
    assert topology.route(1, 2) == [Link("hccs", 7 + 2)]
    assert topology.route(1, 5) == [Link("pcie", 7 + 4)]
    assert topology.route(1, 6) == [Link("pcie", 7 + 4), Link("hccs", 5 * 7 + 2)]
    assert topology.route(1, 14) == [Link("roce", 7 + 5), Link("roce", 14 * 7 + 6)]


def test_the_four_rings_use_every_directed_link_once():
    """Two full meshes of four (24 directed HCCS links) and four cross links (8 directed PCIe links)."""
    edges = [edge for ring in Atlas900.RINGS for edge in zip(ring, ring[1:] + ring[:1], strict=True)]
    hccs = {edge for four in (range(4), range(4, 8)) for edge in itertools.permutations(four, 2)}
    pcie = {(chip, chip ^ 4) for chip in range(8)}
    assert len(edges) == len(set(edges)) == 32
    assert set(edges) == hccs | pcie
    assert all(sorted(ring) == list(range(8)) for ring in Atlas900.RINGS)


@pytest.mark.parametrize("size", range(3, 17))
def test_rings_of_a_full_mesh_share_no_directed_link(size):
    rings = hamiltonian_rings(size)
    edges = [edge for ring in rings for edge in zip(ring, ring[1:] + ring[:1], strict=True)]
    assert len(rings) == 2 * ((size - 1) // 2)
    assert len(edges) == len(set(edges))
    assert all(sorted(ring) == list(range(size)) for ring in rings)


def test_small_messages_take_the_short_path():
    link = atlas(1).topology.link_classes[0]
    assert link.message_s(np.array([512 * 1024 - 1, 512 * 1024])).tolist() == pytest.approx([0.6e-6, 1.5e-6])


def test_a_trunk_has_no_latency_of_its_own():
    trunk = LinkClass("port", 10, 2).trunk("rack", 16, "assumed: a third")
    assert (trunk.bytes_per_s, trunk.message_s(np.array([1])).tolist()) == (160e9, [0.0])
    assert [(line.name, line.origin) for line in trunk.origins()] == [("link.rack", "assumed: a third")]


@pytest.mark.parametrize("figures", [{"gbytes_per_s": 0, "latency_us": 1}, {"gbytes_per_s": 1, "latency_us": -1}])
def test_a_link_needs_positive_figures(figures):
    with pytest.raises(ValueError, match="link roce: .* must be a positive number"):
        LinkClass("roce", **figures)
