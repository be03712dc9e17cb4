"""Epochs to 75.9 % top-1 by global batch: MLPerf's reference convergence points of ResNet-50, with their spread.

Source: mlcommons/logging, mlperf_logging/rcp_checker/training_4.0.0/rcps_resnet.json (each point is a list of runs).
The mean is the checker's, without the fastest and the slowest run; the deviation is that of all runs. Between points
both are linear in the batch, as in the checker, but over all points: those that it leaves out as too slow are closer to
what entries needed (its five points alone are 2 % lower on the 91 closed LARS entries of rounds 0.7 to 4.0).
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

TARGET_TOP1 = 0.759
SOURCE = "mlcommons/logging, rcp_checker/training_4.0.0/rcps_resnet.json"


class Point(NamedTuple):
    """Epochs that `runs` runs of the reference needed at a global batch."""

    batch: int
    mean: float
    stdev: float
    low: float
    high: float
    runs: int


POINTS = (
    Point(1_632, 35.0, 1.085, 33, 37, 17),
    Point(3_264, 35.154, 0.748, 34, 37, 15),
    Point(4_096, 39.875, 1.0, 39, 42, 10),
    Point(8_192, 41.875, 1.0, 41, 44, 10),
    Point(13_056, 45.5, 0.663, 44, 46, 10),
    Point(32_768, 56.0, 0.447, 55, 57, 10),
    Point(49_152, 68.0, 0.632, 67, 69, 10),
    Point(58_880, 80.0, 0.831, 78, 81, 10),
    Point(65_536, 84.5, 0.922, 83, 86, 10),
    Point(67_840, 85.846, 0.639, 85, 87, 28),
)
SMALLEST, LARGEST = POINTS[0].batch, POINTS[-1].batch


@dataclass(frozen=True)
class Epochs:
    """Epochs that a run at a batch will need: a normal distribution. `note` says where the table did not reach."""

    batch: int
    mean: float
    stdev: float
    note: str | None = None

    def widened(self, relative: float) -> "Epochs":
        """The same with a further relative deviation, independent of the points' own."""
        return Epochs(self.batch, self.mean, math.hypot(self.stdev, relative * self.mean), self.note)


def epochs_at(batch: int) -> Epochs:
    """Linear between the two points beside `batch`, mean and deviation alike.

    Outside the table the line through the two outermost points that differ by a factor of 1.5 or more goes on, and the
    deviation grows by as many epochs as that adds or takes. ValueError for a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"global_batch_size={batch} must be at least 1")
    if batch < SMALLEST:
        return _beyond(batch, POINTS[0], POINTS[1], "below")
    if batch > LARGEST:
        far = next(point for point in reversed(POINTS) if point.batch * 1.5 <= LARGEST)
        return _beyond(batch, POINTS[-1], far, "beyond")
    right = min(bisect_right([point.batch for point in POINTS], batch), len(POINTS) - 1)
    low, high = POINTS[right - 1], POINTS[right]
    share = (batch - low.batch) / (high.batch - low.batch)
    return Epochs(batch, _between(low.mean, high.mean, share), _between(low.stdev, high.stdev, share))


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)


def _beyond(batch: int, edge: Point, inner: Point, side: str) -> Epochs:
    added = (batch - edge.batch) * (edge.mean - inner.mean) / (edge.batch - inner.batch)
    note = (
        f"extrapolated: a global batch of {batch:,} is {side} the convergence table ({SMALLEST:,} to {LARGEST:,}); "
        f"its line goes on to {edge.mean + added:.1f} epochs"
    )
    return Epochs(batch, edge.mean + added, math.hypot(edge.stdev, added), note)
