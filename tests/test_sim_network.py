import pytest
from emulator_samples import atlas

from train.comm.algorithms import halving_doubling, hierarchical, hierarchical_ring, ring
from train.sim.network import AlphaBeta

GRADIENTS = 25_557_032


@pytest.mark.parametrize(
    "hosts, fp16_ms, fp32_ms", [(1, 1.18, 2.34), (16, 2.23, 4.39), (64, 2.31, 4.52), (128, 2.33, 4.55)]
)
def test_hierarchical_all_reduce_of_resnet50_with_hccl_s_constants(hosts, fp16_ms, fp32_ms):
    """By hand: twice (7/8 G / (4 x 19.3 GB/s) + 7 x 1.5 us), plus 2(h - 1)/h x G/8 / 12 GB/s + 2 log2(h) x 7 us.

    HCCL's other constants (notify 1 us, vector reduce 10 GB/s) are not in this model.
    """
    seconds = [AlphaBeta().seconds(hierarchical(atlas(hosts)), GRADIENTS * size) for size in (2, 4)]
    assert [1e3 * each for each in seconds] == pytest.approx([fp16_ms, fp32_ms], abs=0.006)


def test_closed_form_to_the_last_digit():
    size, hosts = GRADIENTS * 2, 128
    inside = 7 / 8 * size / 4 / 19.3e9 + 7 * 1.5e-6
    between = 2 * (hosts - 1) / hosts * size / 8 / 12e9 + 14 * 7e-6
    assert AlphaBeta().seconds(hierarchical(atlas(hosts)), size) == pytest.approx(2 * inside + between, rel=1e-12)


@pytest.mark.parametrize("hosts, milliseconds", [(16, 2.39), (64, 3.11)])
def test_a_ring_between_hosts_costs_more(hosts, milliseconds):
    seconds = AlphaBeta().seconds(hierarchical_ring(atlas(hosts)), GRADIENTS * 2)
    assert seconds * 1e3 == pytest.approx(milliseconds, abs=0.006)


@pytest.mark.parametrize("algorithm", [ring, halving_doubling, hierarchical, hierarchical_ring])
@pytest.mark.parametrize("hosts", [1, 2, 5, 16])
def test_one_group_costs_what_all_cost(algorithm, hosts):
    plan = algorithm(atlas(hosts))
    for nbytes in (8, 1e6, 1e9):
        assert AlphaBeta().seconds(plan, nbytes) == AlphaBeta().seconds(plan, nbytes, all_groups=True)


def test_one_group_costs_what_all_cost_on_4096_chips():
    plan = hierarchical(atlas(512))
    assert AlphaBeta().seconds(plan, 51e6) == AlphaBeta().seconds(plan, 51e6, all_groups=True)


def test_more_bytes_never_take_less():
    plan = hierarchical(atlas(16))
    costs = [AlphaBeta().seconds(plan, nbytes) for nbytes in (0, 1e3, 1e6, 2e6, 1e8, 1e9)]
    assert costs == sorted(costs)


def test_model_error_is_checked():
    with pytest.raises(ValueError, match="network.model_error=-1"):
        AlphaBeta(model_error=-1)
