"""How long a step waits for the slowest of n chips: E[max of n], in standard deviations, of a named distribution.

Normal by quadrature of the order statistic's distribution (Harter 1961 tabulates it); exponential H(n) - 1 (Renyi
1953); Gumbel sqrt(6)/pi ln n (its maximum is a Gumbel shifted by the scale times ln n). All have mean 0, deviation 1.
"""

import math
from functools import cache

import numpy as np


def expected_max(distribution: str, count: int) -> float:
    """Mean of the largest of `count` independent numbers of `distribution`, in its standard deviations."""
    check_distribution(distribution)
    return MAXIMA[distribution](count) if count > 1 else 0.0


def table(counts: list[int]) -> dict[str, list[float]]:
    """Every distribution's expected maximum at each of `counts`."""
    return {name: [expected_max(name, count) for count in counts] for name in MAXIMA}


def check_distribution(distribution: str) -> None:
    if distribution not in MAXIMA:
        raise ValueError(f"straggler={distribution}: there is no such distribution; use one of {', '.join(MAXIMA)}")


@cache
def normal(count: int) -> float:
    """9 - the integral of the maximum's distribution up to 9 (below -9 it is nothing)."""
    grid = np.linspace(-9.0, 9.0, 3601)
    upper = np.minimum([0.5 * math.erfc(x / math.sqrt(2)) for x in grid], 1 - 1e-16)
    return float(9.0 - np.trapezoid(np.exp(count * np.log1p(-upper)), grid))


def exponential(count: int) -> float:
    """Harmonic number - 1, by Euler and Maclaurin above a thousand (error below 1e-14)."""
    if count <= 1000:
        return sum(1 / k for k in range(2, count + 1))
    return math.log(count) + 0.5772156649015329 + 1 / (2 * count) - 1 / (12 * count**2) - 1


def gumbel(count: int) -> float:
    return math.sqrt(6) / math.pi * math.log(count)


def draw(distribution: str, count: int, random: np.random.Generator) -> np.ndarray:
    """[count] independent numbers of `distribution`, mean 0 and deviation 1."""
    check_distribution(distribution)
    if distribution == "normal":
        return random.standard_normal(count)
    if distribution == "exponential":
        return random.standard_exponential(count) - 1
    return (random.gumbel(size=count) - 0.5772156649015329) * math.sqrt(6) / math.pi


MAXIMA = {"normal": normal, "exponential": exponential, "gumbel": gumbel}
