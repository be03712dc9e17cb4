import numpy as np
import pytest
from emulator_samples import atlas

from train.mesh.mesh import Mesh


def test_sizes():
    mesh = atlas(128)
    assert (mesh.num_chips, mesh.chips_per_host, mesh.num_hosts) == (1024, 8, 128)
    assert (mesh.inside_axes, mesh.between_axes) == (("chip",), ("host",))


def test_chips_and_coordinates_are_inverse():
    mesh = atlas(3)
    assert mesh.coordinates(17) == {"host": 2, "chip": 1}
    assert [mesh.chip(**mesh.coordinates(chip)) for chip in range(24)] == list(range(24))


def test_groups_differ_in_their_axis_alone():
    mesh = atlas(2)
    np.testing.assert_array_equal(mesh.groups(("chip",)), np.arange(16).reshape(2, 8))
    np.testing.assert_array_equal(mesh.groups(("host",)), np.arange(16).reshape(2, 8).T)
    np.testing.assert_array_equal(mesh.positions(("chip",)), np.tile(np.arange(8), 2))


def test_a_host_may_have_several_axes():
    mesh = Mesh("boards", {"host": 4, "board": 2, "chip": 4}, atlas(1).topology)
    assert (mesh.inside_axes, mesh.between_axes) == (("board", "chip"), ("host",))


@pytest.mark.parametrize("hosts, workers, sizes", [(8, 1, [8]), (8, 2, [4, 4]), (8, 3, [3, 3, 2]), (5, 5, [1] * 5)])
def test_shares_are_contiguous_larger_first(hosts, workers, sizes):
    shares = atlas(hosts).shares(workers)
    assert [len(share) for share in shares] == sizes
    assert [host for share in shares for host in share] == list(range(hosts))


@pytest.mark.parametrize("workers, named", [(9, "workers=9 is more than the 8 hosts"), (0, "workers=0")])
def test_more_workers_than_hosts_are_refused(workers, named):
    with pytest.raises(ValueError, match=named):
        atlas(8).shares(workers)


@pytest.mark.parametrize(
    "axes, chips, named",
    [
        ({"host": 8, "chip": 8}, 100, "host 8 x chip 8 = 64, not chips=100"),
        ({"host": -8, "chip": 8}, None, "axes.host=-8"),
        ({"host": 2.5, "chip": 8}, None, "axes.host=2.5"),
        ({}, None, "no axes"),
        ({"x": 3, "y": 3}, None, "no whole hosts of 8"),
        ({"host": 4, "chip": 4}, None, "axes.host=4, but 16 chips are 2 hosts"),
    ],
)
def test_wrong_axes_are_refused_in_one_line(axes, chips, named):
    with pytest.raises(ValueError, match=named):
        Mesh("m", axes, atlas(1).topology, chips)
