"""The region of a claimed time: which epochs and images/s of a chip end a run in it, and the odds of doing so.

The run is that of train/sim/run: start-up, whole steps and evaluations, times a log-normal model error; the epochs are
one number, uniform, or the reference points' normal distribution. Odds are exact sums over the same grid of equally
likely epochs as run's quantiles; nothing is sampled.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from train.sim.convergence import Epochs
from train.sim.run import INTERVAL, epoch_grid, num_evaluations, quantile


@dataclass(frozen=True)
class Priced:
    """What the clock charges a run for. Seconds; `eval_s` of one evaluation. sigma: of ln(time)."""

    step_s: float
    eval_s: float
    startup_s: float
    steps_per_epoch: int
    global_batch_size: int
    chips: int
    epochs: float | list[float] | Epochs
    eval_every: float
    eval_offset: float = 0.0
    sigma: float = 0.0

    @property
    def images_per_s_per_chip(self) -> float:
        """While training."""
        return self.global_batch_size / self.step_s / self.chips

    def but(self, **changes) -> "Priced":
        return replace(self, **changes)

    def steps(self, epochs: float) -> int:
        return math.ceil(epochs * self.steps_per_epoch - 1e-9)

    def besides_steps_s(self, epochs: float) -> float:
        """Start-up and evaluations of a run of so many epochs."""
        return self.startup_s + num_evaluations(epochs, self.eval_every, self.eval_offset) * self.eval_s

    def seconds(self, epochs: float) -> float:
        """A run of so many epochs, without the model's error."""
        return self.besides_steps_s(epochs) + self.steps(epochs) * self.step_s

    @property
    def median_s(self) -> float:
        return self.seconds(epoch_grid(self.epochs)[0])

    @cached_property
    def times(self) -> np.ndarray:
        """Equally likely times, without the model's error."""
        return np.array([self.seconds(epochs) for epochs in epoch_grid(self.epochs)[1]])

    @cached_property
    def interval_s(self) -> tuple[float, float]:
        """[5 %, 95 %], as launch.emulate has it."""
        times = self.times
        low, high = (quantile(times, self.sigma, q) for q in INTERVAL)
        return low, high

    @property
    def epochs_interval(self) -> tuple[float, float]:
        """The ends of a uniform distribution; 5 % and 95 % of a normal one; twice the number otherwise."""
        if isinstance(self.epochs, Epochs):
            low, high = (float(np.quantile(epoch_grid(self.epochs)[1], q, method="hazen")) for q in INTERVAL)
            return low, high
        low, high = self.epochs if isinstance(self.epochs, (list, tuple)) else (self.epochs, self.epochs)
        return low, high

    def odds(self, seconds: float) -> float:
        """Probability that the run takes at most so long."""
        return odds(self.times, self.sigma, seconds)

    def needed_rate(self, epochs: float, seconds: float) -> float:
        """Images/s of a chip while training that end a run of so many epochs at `seconds`; inf where nothing can."""
        left = seconds - self.besides_steps_s(epochs)
        return self.steps(epochs) * self.global_batch_size / left / self.chips if left > 0 else math.inf


def odds(times: np.ndarray, sigma: float, seconds: float) -> float:
    """P(one of `times`, all as likely, x exp(sigma x standard normal) <= seconds)."""
    if sigma == 0:
        return float(np.mean(times <= seconds))
    scale = sigma * math.sqrt(2)
    return float(np.mean([0.5 * math.erfc((math.log(time) - math.log(seconds)) / scale) for time in times]))


def priced(made, **changes) -> Priced:
    """Of a train.emulator.Emulator."""
    step = made.step(made.global_batch_size)
    return Priced(
        step_s=step.step_s,
        eval_s=made.eval_s(made.num_eval),
        startup_s=made.startup_s,
        steps_per_epoch=made.steps_per_epoch,
        global_batch_size=made.global_batch_size,
        chips=made.mesh.num_chips,
        epochs=made.epochs,
        eval_every=made.eval_every,
        eval_offset=made.eval_offset,
        sigma=made.model_error,
    ).but(**changes)
