"""What faults do to tensors: bits, shares and statistics."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from train.models.chip_norm import ChipBatchNorm2d, ChipPass, allocate_chips
from train.models.damage import Damage, Flip, flipped, frozen_statistics, group_of, without
from train.sim.faults import DeadChip, FlippedBit, LostHost, StaleBatchNorm
from train.sim.timeline import Pace, Timeline

PACE = Pace(
    seed=0,
    chips=16,
    chips_per_host=8,
    steps_per_epoch=10,
    step_s=1.0,
    startup_s=0.0,
    eval_s=0.0,
    eval_every=1,
    eval_offset=0,
    checkpoint_steps=None,
)
PASSES = [ChipPass(first=8, count=4, span=2), ChipPass(first=12, count=4, span=2)]


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5, 2, 2))
        self.bias = nn.Parameter(torch.zeros(4))


def damage(*faults) -> Damage:
    return Damage(Timeline(faults, PACE, 10), Tiny(), PASSES)


@pytest.mark.parametrize(
    "value, bit, expected",
    [
        (1.0, 31, -1.0),
        (1.0, 23, 0.5),
        (1.0, 22, 1.5),
        (1.0, 0, 1 + 2**-23),
        (1.0, 30, math.inf),
        (-0.25, 30, -(2.0**126)),
        (0.0, 0, 2.0**-149),
    ],
)
def test_one_bit_of_a_float32_is_inverted(value, bit, expected):
    wrong = flipped(np.float32(value), bit)
    assert wrong == np.float32(expected) and wrong.dtype == np.float32
    assert flipped(wrong, bit) == np.float32(value)


def test_a_flip_changes_one_element_of_the_sum_by_what_it_changes_the_chips_own():
    torch.manual_seed(0)
    own, others = ([torch.randn(3, 4).t(), torch.randn(2)] for _ in range(2))
    summed = [mine + other for mine, other in zip(own, others, strict=True)]
    expected = [tensor.clone() for tensor in summed]
    Flip(chip=0, parameter=0, index=(2, 1), bit=31).apply(summed, own)
    expected[0][2, 1] = others[0][2, 1] - own[0][2, 1]
    torch.testing.assert_close(summed[0], expected[0], rtol=1e-6, atol=1e-6)
    assert ((summed[0] != own[0] + others[0]).sum(), (summed[1] != expected[1]).sum()) == (1, 0)


def test_every_element_of_every_parameter_can_be_struck():
    timeline = Timeline([FlippedBit(chip=9, per_step=1)], PACE, 4000)
    flips = [flip for step in range(1, 4001) for flip in Damage(timeline, Tiny(), PASSES).flips(step, PASSES[0])]
    struck = {(flip.parameter, flip.index) for flip in flips}
    assert len(flips) == 4000 and len(struck) == 60 + 4 and {flip.bit for flip in flips} == set(range(32))
    assert all(flip.chip == 9 for flip in flips)
    assert not list(Damage(timeline, Tiny(), PASSES).flips(1, PASSES[1]))
    (fixed,) = damage(FlippedBit(chip=12, bit=30)).flips(1, PASSES[1])
    assert fixed.bit == 30
    (event,) = Timeline([FlippedBit(chip=12, bit=30)], PACE, 1).events
    name, index = ("weight", "bias")[fixed.parameter], ", ".join(map(str, fixed.index))
    assert damage().words(event) == f"bit 30 of its gradient of {name}[{index}] is inverted before the sum"


def test_a_worker_knows_its_own_part_of_what_is_lost_and_stale():
    found = damage(
        LostHost(host=0, at_steps=2, recovery="shrink"),
        DeadChip(chip=13, at_steps=3, recovery="shrink"),
        DeadChip(chip=12, at_steps=3, recovery="shrink"),
        StaleBatchNorm(chip=11, at_steps=4, for_steps=1),
        StaleBatchNorm(chip=15, at_steps=4),
    )
    assert [len(found.lost(step)) for step in (0, 1, 2, 3, 9)] == [0, 0, 8, 10, 10]
    assert found.lost_of(2, PASSES[1]) == [] and found.lost_of(3, PASSES[1]) == [0, 1]
    assert found.lost_groups(2) == {0, 1, 2, 3} and found.lost_groups(3) == {0, 1, 2, 3, 6}
    assert [found.stale_groups(step) for step in (3, 4, 5)] == [[], [1, 3], [3]]


def test_without_a_timeline_nothing_is_damaged():
    none = Damage(None, Tiny(), PASSES)
    assert none.lost(5) == frozenset() and none.lost_of(5, PASSES[0]) == none.stale_groups(5) == []
    assert list(none.flips(5, PASSES[0])) == []


def test_images_of_lost_chips_have_no_part():
    logits, labels = torch.arange(24.0).view(12, 2), torch.arange(12)
    rest, names, chip_pass = without([1, 3], logits, labels, ChipPass(first=8, count=4, span=2))
    assert names.tolist() == [0, 1, 2, 6, 7, 8] and chip_pass.count == 2
    assert torch.equal(rest, logits[names])
    assert len(without([0, 1, 2, 3], logits, labels, ChipPass(count=4))[1]) == 0
    unequal = ChipPass(first=8, count=4, span=2, sizes=(3, 4, 2, 3))
    _, names, chip_pass = without([1], logits, labels, unequal)
    assert names.tolist() == [0, 1, 2, 7, 8, 9, 10, 11] and chip_pass.sizes == (3, 2, 3)


def test_the_group_of_a_chip_and_its_images():
    alone, rows = group_of(11, ChipPass(first=8, count=4, span=2), 12)
    assert (alone.first, alone.count, alone.span, alone.sizes, rows) == (10, 2, 2, None, slice(6, 12))
    alone, rows = group_of(9, ChipPass(first=8, count=4, span=1, sizes=(3, 4, 2, 3)), 12)
    assert (alone.first, alone.count, alone.sizes, rows) == (9, 1, (4,), slice(3, 7))


def test_statistics_that_are_frozen_are_what_they_were():
    norm = ChipBatchNorm2d(3, ChipPass(count=4))
    model = nn.Sequential(norm)
    allocate_chips(model, 4, 1)
    with frozen_statistics(model, [1, 3]):
        norm(torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    untouched = [bool((norm.chip_mean[chip] == 0).all() and (norm.chip_var[chip] == 1).all()) for chip in range(4)]
    assert untouched == [False, True, False, True]
