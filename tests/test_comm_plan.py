import math

import numpy as np
import pytest
from emulator_samples import atlas

from train.comm.algorithms import halving_doubling, hierarchical, hierarchical_ring, ring
from train.comm.plan import run_on_arrays
from train.mesh.mesh import Mesh

ALGORITHMS = [ring, halving_doubling, hierarchical, hierarchical_ring]
MESHES = [atlas(hosts) for hosts in (1, 2, 3, 4, 5, 7, 8, 16)] + [atlas(1, chips) for chips in (1, 2, 3, 4, 5, 7)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.num_hosts}x{mesh.chips_per_host}")
def test_every_chip_ends_with_the_exact_sum(algorithm, mesh):
    buffers = np.random.default_rng(0).integers(-99, 99, (mesh.num_chips, 301))
    result = run_on_arrays(algorithm(mesh), buffers)
    np.testing.assert_array_equal(result, np.broadcast_to(buffers.sum(axis=0), buffers.shape))


def test_the_record_s_plan_sums_exactly_on_1024_chips():
    buffers = np.arange(1024 * 1024, dtype=np.int64).reshape(1024, 1024)
    result = run_on_arrays(hierarchical(atlas(128)), buffers)
    assert (result == buffers.sum(axis=0)).all()


@pytest.mark.parametrize("hosts", [1, 2, 4, 16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bytes_per_chip_are_the_least_possible(algorithm, hosts):
    """2(n - 1)/n of the buffer: Patarasuk and Yuan 2009; halving-doubling at powers of two: Thakur et al. 2005."""
    chips = 8 * hosts
    assert algorithm(atlas(hosts)).bytes_sent(1e6) == pytest.approx(2 * (chips - 1) / chips * 1e6)


def test_number_of_rounds():
    def rounds(plan):
        return sum(1 for _ in plan.rounds(all_groups=False))

    assert rounds(ring(atlas(4))) == 2 * 31
    assert rounds(halving_doubling(atlas(4))) == 2 * 5
    assert rounds(halving_doubling(atlas(3))) == 2 * math.floor(math.log2(24)) + 2
    assert rounds(hierarchical(atlas(128))) == 7 + 2 * 7 + 7
    assert rounds(hierarchical_ring(atlas(4))) == 7 + 2 * 3 + 7


def test_a_host_s_reduce_scatter_loads_each_of_its_links_alike():
    plan = hierarchical(atlas(1))
    links = {}
    for turn in plan.rounds():
        edges = zip(turn.source.tolist(), turn.destination.tolist(), strict=True)
        for edge, chunks in zip(edges, turn.last - turn.first, strict=True):
            links[edge] = links.get(edge, 0) + int(chunks)
    assert len(links) == 32 and set(links.values()) == {14}


@pytest.mark.parametrize("algorithm", [hierarchical, hierarchical_ring])
def test_axes_that_cut_across_hosts_are_refused(algorithm):
    mesh = Mesh("cut", {"x": 3, "y": 16}, atlas(1).topology)
    with pytest.raises(ValueError, match="no last axes .* make a host of 8"):
        algorithm(mesh)
