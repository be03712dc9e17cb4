from itertools import pairwise

import pytest

from train.records import load
from train.sim.convergence import LARGEST, POINTS, SMALLEST, Epochs, epochs_at


def test_the_points_are_themselves():
    for point in POINTS:
        found = epochs_at(point.batch)
        assert (found.mean, found.stdev, found.note) == (point.mean, point.stdev, None)
        assert point.low <= point.mean <= point.high and point.stdev < point.high - point.low


def test_linear_between_two_points():
    """32,768: 56.0 and 49,152: 68.0 epochs; the checker's deviations 0.447 and 0.632."""
    middle = epochs_at(40_960)
    assert middle.mean == pytest.approx(62.0)
    assert middle.stdev == pytest.approx((0.447 + 0.632) / 2)
    assert epochs_at(36_864).mean == pytest.approx(59.0)


def test_a_larger_batch_never_needs_fewer_epochs():
    means = [epochs_at(batch).mean for batch in (1, 256, *range(1632, 200_000, 1111))]
    assert all(low <= high for low, high in pairwise(means))


@pytest.mark.parametrize("batch, side", [(256, "below"), (SMALLEST - 1, "below"), (LARGEST + 1, "beyond")])
def test_outside_the_table_is_said(batch, side):
    assert f"is {side} the convergence table (1,632 to 67,840)" in epochs_at(batch).note


def test_extrapolation_by_hand():
    """Above: the line of 67,840 and the nearest point a factor 1.5 below, 32,768. Below: that of the first two."""
    slope = (85.846 - 56.0) / (67_840 - 32_768)
    far = epochs_at(86_016)
    assert far.mean == pytest.approx(85.846 + (86_016 - 67_840) * slope)
    assert far.stdev == pytest.approx((0.639**2 + (far.mean - 85.846) ** 2) ** 0.5)
    near = epochs_at(256)
    assert near.mean == pytest.approx(35 - (1632 - 256) * 0.154 / 1632)


def test_a_batch_below_one_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=0"):
        epochs_at(0)


def test_widening_adds_in_quadrature():
    assert Epochs(1, 50.0, 3.0).widened(0.08).stdev == pytest.approx(5.0)
    assert Epochs(1, 50.0, 3.0).widened(0.0).stdev == 3.0


def test_closed_lars_entries_needed_what_the_points_say():
    """Published epochs are no part of the table; half of the closed entries since v1.0 lie within 1 % of it."""
    ratios = []
    for row in load():
        closed = "closed" in row.system and any(f"MLPerf v{n}" in row.system for n in (1, 2, 3, 4))
        if closed and row.epochs and isinstance(row.global_batch, int) and SMALLEST <= row.global_batch <= LARGEST:
            ratios.append(abs(epochs_at(row.global_batch).mean / row.epochs - 1))
    ratios.sort()
    assert len(ratios) > 40 and ratios[len(ratios) // 2] < 0.01 and ratios[int(0.9 * len(ratios))] < 0.12
