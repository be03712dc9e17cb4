"""How far the chips' statistics are from those that evaluation uses: exact numbers of a model set by hand."""

import pytest
import torch
from torch import nn

from train.models.chip_norm import ChipBatchNorm2d, ChipPass, allocate_chips
from train.models.chip_spread import apart, spread


@pytest.fixture
def model():
    """Two batch norms of two channels; three chips, the first as evaluation has it."""
    chip_pass = ChipPass(count=3, sizes=None)
    model = nn.Sequential(ChipBatchNorm2d(2, chip_pass, eps=0.0), ChipBatchNorm2d(2, chip_pass, eps=0.0))
    allocate_chips(model, 3, span=1)
    for norm in model:
        norm.running_mean.copy_(torch.tensor([1.0, -1.0]))
        norm.running_var.copy_(torch.tensor([4.0, 9.0]))
        norm.chip_mean.copy_(norm.running_mean.expand(3, 2))
        norm.chip_var.copy_(norm.running_var.expand(3, 2))
    return model


def test_a_chip_at_the_meshs_own_statistics_is_at_no_distance(model):
    assert apart(model).tolist() == [[0, 0]] * 3


def test_the_distances_are_in_deviations_and_shares(model):
    model[0].chip_mean[1] += torch.tensor([2.0, 3.0])  # one deviation in both channels, of one norm of two
    model[1].chip_var[2] *= 1.5
    assert apart(model).tolist() == [[0, 0], [0.5, 0], [0, pytest.approx(0.25)]]


def test_the_spread_leaves_lost_groups_out():
    distances = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 60.0], [9.0, 90.0]], dtype=torch.float64)
    found = spread(distances, lost={3})
    assert [found[f"chips/bn_mean_shift_{which}"] for which in ("min", "median", "max")] == [1, 2, 3]
    assert [found[f"chips/bn_var_off_{which}"] for which in ("min", "median", "max")] == [10, 20, 60]
    assert spread(distances)["chips/bn_var_off_max"] == 90
