import math

import numpy as np
import pytest

from train.sim.straggler import expected_max, table


@pytest.mark.parametrize(
    "count, mean", [(1, 0), (2, 0.5641896), (3, 0.8462844), (8, 1.4236003), (16, 1.7659914), (1000, 3.2414358)]
)
def test_expected_maximum_of_normals(count, mean):
    """Tabulated values of the largest normal order statistic (Harter 1961)."""
    assert expected_max("normal", count) == pytest.approx(mean, abs=2e-6)


def test_the_largest_of_exponentials_is_a_harmonic_number():
    assert expected_max("exponential", 2) == pytest.approx(0.5)
    assert expected_max("exponential", 8) == pytest.approx(sum(1 / k for k in range(1, 9)) - 1)
    exact = sum(1 / k for k in range(2, 5001))
    assert expected_max("exponential", 5000) == pytest.approx(exact, rel=1e-13)


def test_the_largest_of_gumbels_is_a_shifted_gumbel():
    assert expected_max("gumbel", 1024) == pytest.approx(10 * math.log(2) * math.sqrt(6) / math.pi)


@pytest.mark.parametrize("name", ["normal", "exponential", "gumbel"])
def test_each_has_mean_0_and_deviation_1(name):
    """Against 200,000 draws of 16: the standard error of the mean maximum is below 0.003."""
    draw = {
        "normal": lambda rng, shape: rng.standard_normal(shape),
        "exponential": lambda rng, shape: rng.standard_exponential(shape) - 1,
        "gumbel": lambda rng, shape: (rng.gumbel(size=shape) - 0.5772156649) * math.sqrt(6) / math.pi,
    }[name](np.random.default_rng(0), (200_000, 16))
    assert draw.std() == pytest.approx(1, abs=0.01)
    assert expected_max(name, 16) == pytest.approx(draw.max(axis=1).mean(), abs=0.012)


def test_the_wait_grows_with_the_chips_and_with_the_tail():
    shown = table([1, 8, 1024, 2**20])
    assert all(values[0] == 0 and values == sorted(values) for values in shown.values())
    assert shown["normal"][-1] < shown["gumbel"][-1] < shown["exponential"][-1]
    assert shown["normal"][-1] == pytest.approx(4.8723, abs=1e-3)


def test_an_unknown_distribution_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="straggler=cauchy: .* normal, exponential, gumbel"):
        expected_max("cauchy", 8)
