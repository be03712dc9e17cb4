import numpy as np
import pytest
from emulator_samples import atlas

from train.mesh.blocks import blocks
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


def test_shares_may_be_given_and_are_of_blocks():
    assert atlas(8).shares(3, [5, 1, 2]) == [range(0, 5), range(5, 6), range(6, 8)]
    assert atlas(8).shares(2, [1, 3], hosts_per_block=2) == [range(0, 1), range(1, 4)]
    assert atlas(6).shares(2, hosts_per_block=2) == [range(0, 2), range(2, 3)]


@pytest.mark.parametrize(
    "span, block",
    [(1, 8), (8, 8), (16, 16), (24, 24), (32, 32), (48, 48), (96, 96), (9, None), (40, None), (192, None)],
)
def test_a_block_is_a_host_or_a_span_that_divides_the_mesh(span, block):
    config = {"bn_span": span, "shares": None, "workers": "auto"}
    if block is None:
        with pytest.raises(ValueError, match=f"bn_span={span}: .* one of 1, 2, 4, 8, 16, 24, 32, 48, 96$"):
            blocks(config, atlas(12))
        return
    found = blocks(config, atlas(12))
    assert (found.chips, found.count * block) == (block, 96)
    assert found.shares(1) == [range(96 // block)]


def test_wrong_shares_are_seen_before_anything_starts():
    blocks({"bn_span": 16, "shares": [3, 1, 2], "workers": "auto"}, atlas(12))
    with pytest.raises(ValueError, match=r"shares=\[3, 1\] are those of 2 workers, not of workers=3"):
        blocks({"bn_span": 1, "shares": [3, 1], "workers": 3}, atlas(4))
    with pytest.raises(ValueError, match=r"shares=\[3, 2\] sum to 5, not to the 6 blocks of .*blocks of 2 hosts"):
        blocks({"bn_span": 16, "shares": [3, 2], "workers": "auto"}, atlas(12))


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
