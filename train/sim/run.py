"""A whole run: start-up, steps and evaluations, with an interval from the epochs' spread and the model's own error."""

import math
from dataclasses import dataclass

import numpy as np

from train.sim.step import StepTime

INTERVAL = (0.05, 0.95)
"""The quantiles between which an emulated time is said to lie."""


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

    @property
    def time_to_train_s(self) -> float:
        step_parts = self.compute_s + self.exposed_comm_s + self.straggler_s + self.input_s + self.other_s
        return step_parts + self.eval_s + self.startup_s


def num_evaluations(epochs: float, every: float, offset: float = 0.0) -> int:
    """Evaluations of a run that ends with one: at `offset` (or `every`), then each `every`, the last at the end."""
    first = offset if offset > 0 else every
    return max(0, math.ceil((epochs - first) / every - 1e-9)) + 1


def run_time(
    step: StepTime,
    eval_s: float,
    startup_s: float,
    steps_per_epoch: int,
    epochs: float | list[float],
    eval_every: float,
    eval_offset: float = 0.0,
    model_error: float = 0.0,
) -> RunTime:
    """epochs: a number, or [low, high] of a uniform distribution. model_error: sigma of a log-normal factor, median 1.

    Quantiles are of the product of the two, by the midpoint rule over the epochs; nothing is sampled.
    """
    low, high = epochs if isinstance(epochs, (list, tuple)) else (epochs, epochs)
    if not 0 < low <= high:
        raise ValueError(f"epochs={epochs} must be one number above 0, or [low, high] with low <= high")
    if eval_every <= 0:
        raise ValueError(f"eval_every={eval_every} must be above 0")

    def parts(at: float) -> tuple[int, int, float]:
        steps, evals = math.ceil(at * steps_per_epoch - 1e-9), num_evaluations(at, eval_every, eval_offset)
        return steps, evals, startup_s + steps * step.step_s + evals * eval_s

    median = (low + high) / 2
    steps, evals, _ = parts(median)
    grid = [low + (high - low) * (i + 0.5) / 400 for i in range(400)] if high > low else [median]
    times = np.array([parts(at)[2] for at in grid])
    return RunTime(
        epochs=median,
        steps=steps,
        evaluations=evals,
        compute_s=steps * step.compute_s,
        exposed_comm_s=steps * step.exposed_comm_s,
        straggler_s=steps * step.straggler_s,
        input_s=steps * step.input_s,
        other_s=steps * step.other_s,
        eval_s=evals * eval_s,
        startup_s=startup_s,
        interval_s=tuple(quantile(times, model_error, q) for q in INTERVAL),
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
