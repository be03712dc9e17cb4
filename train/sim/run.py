"""A whole run: start-up, steps and evaluations, with an interval from the epochs' spread and the model's own error."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from train.sim.convergence import Epochs
from train.sim.course import Course
from train.sim.step import StepTime

INTERVAL = (0.05, 0.95)
"""The quantiles between which an emulated time is said to lie."""

GRID_POINTS = 400
"""Of the distribution of epochs: the midpoint rule's error in a quantile is below a hundredth of its spread."""


@dataclass(frozen=True)
class RunTime:
    """Seconds of the median run; the seven parts add up to `time_to_train_s`."""

    epochs: float
    steps: int
    evaluations: int
    compute_s: float
    exposed_comm_s: float
    straggler_s: float
    input_s: float
    other_s: float
    eval_s: float
    startup_s: float
    interval_s: tuple[float, float]
    epochs_interval: tuple[float, float]

    @property
    def time_to_train_s(self) -> float:
        step_parts = self.compute_s + self.exposed_comm_s + self.straggler_s + self.input_s + self.other_s
        return step_parts + self.eval_s + self.startup_s


def num_evaluations(epochs: float, every: float, offset: float = 0.0) -> int:
    """Evaluations of a run that ends with one: at `offset` (or `every`), then each `every`, the last at the end."""
    first = offset if offset > 0 else every
    return max(0, math.ceil((epochs - first) / every - 1e-9)) + 1


def epoch_grid(epochs: float | list[float] | Epochs) -> tuple[float, np.ndarray]:
    """Median, and equally likely values: of a number, [low, high] of a uniform or the normal of the reference points.

    ValueError where a number is not above 0 or the range is none. A run has at least a hundredth of an epoch.
    """
    shares = (np.arange(GRID_POINTS) + 0.5) / GRID_POINTS
    if isinstance(epochs, Epochs):
        if not epochs.stdev:
            return epochs.mean, np.array([epochs.mean])
        normal = NormalDist(epochs.mean, epochs.stdev)
        return epochs.mean, np.maximum([normal.inv_cdf(share) for share in shares], 0.01)
    low, high = epochs if isinstance(epochs, (list, tuple)) else (epochs, epochs)
    if not 0 < low <= high:
        raise ValueError(f"epochs={epochs} must be one number above 0, or [low, high] with low <= high")
    return (low + high) / 2, low + (high - low) * shares if high > low else np.array([float(low)])


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What the clock charges a run for. Seconds; `eval_s` of one evaluation. sigma: of ln(time).

    step_s: of each step; or where they differ, what gives those of the first so many together.
    epochs: a number, [low, high] of a uniform distribution, or the reference points' normal one.
    """

    step_s: float | Callable[[int], float]
    eval_s: float
    startup_s: float
    steps_per_epoch: int
    epochs: float | list[float] | Epochs
    eval_every: float
    eval_offset: float = 0.0
    sigma: float = 0.0

    def steps(self, epochs: float) -> int:
        return math.ceil(epochs * self.steps_per_epoch - 1e-9)

    def evaluations(self, epochs: float) -> int:
        return num_evaluations(epochs, self.eval_every, self.eval_offset)

    def seconds(self, epochs: float) -> float:
        """A run of so many epochs, without the model's error."""
        steps = self.steps(epochs)
        train_s = self.step_s(steps) if callable(self.step_s) else steps * self.step_s
        return self.startup_s + train_s + self.evaluations(epochs) * self.eval_s

    @cached_property
    def times(self) -> np.ndarray:
        """Equally likely times, without the model's error."""
        return np.array([self.seconds(epochs) for epochs in epoch_grid(self.epochs)[1]])

    @cached_property
    def interval_s(self) -> tuple[float, float]:
        """[5 %, 95 %] of time x error, by the midpoint rule over the epochs; nothing is sampled."""
        low, high = (quantile(self.times, self.sigma, q) for q in INTERVAL)
        return low, high


def run_time(
    step: StepTime | Course,
    eval_s: float,
    startup_s: float,
    steps_per_epoch: int,
    epochs: float | list[float] | Epochs,
    eval_every: float,
    eval_offset: float = 0.0,
    model_error: float = 0.0,
) -> RunTime:
    """Arguments as Clock's. model_error: sigma of a log-normal factor of the time, median 1."""
    median, grid = epoch_grid(epochs)
    course = Course.of(step)
    if eval_every <= 0:
        raise ValueError(f"eval_every={eval_every} must be above 0")
    clock = Clock(
        step_s=course.seconds,
        eval_s=eval_s,
        startup_s=startup_s,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        eval_every=eval_every,
        eval_offset=eval_offset,
        sigma=model_error,
    )
    steps, evals = clock.steps(median), clock.evaluations(median)
    parts = course.parts(steps)
    return RunTime(
        epochs=median,
        steps=steps,
        evaluations=evals,
        compute_s=parts.compute_s,
        exposed_comm_s=parts.exposed_comm_s,
        straggler_s=parts.straggler_s,
        input_s=parts.input_s,
        other_s=parts.other_s,
        eval_s=evals * eval_s,
        startup_s=startup_s,
        interval_s=clock.interval_s,
        epochs_interval=tuple(float(np.quantile(grid, q, method="hazen")) for q in INTERVAL),
    )


def quantile(times: np.ndarray, sigma: float, q: float) -> float:
    """Quantile of (one of `times`, all as likely) x exp(sigma x standard normal), by bisection on its distribution."""
    if sigma == 0:
        return float(np.quantile(times, q, method="hazen"))
    low, high = np.log(times.min()) - 6 * sigma, np.log(times.max()) + 6 * sigma
    logs = np.log(times)
    for _ in range(50):
        middle = (low + high) / 2
        below = np.mean([0.5 * math.erfc((log - middle) / (sigma * math.sqrt(2))) for log in logs])
        low, high = (middle, high) if below < q else (low, middle)
    return math.exp((low + high) / 2)
