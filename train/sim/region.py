"""The region of a claimed time: which epochs and images/s of a chip end a run in it, and the odds of doing so.

The run is that of train/sim/run: start-up, whole steps and evaluations, times a log-normal model error; the epochs are
one number, uniform, or the reference points' normal distribution. Odds are exact sums over the same grid of equally
likely epochs as run's quantiles; nothing is sampled.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from train.sim.convergence import Epochs
from train.sim.run import INTERVAL, Clock, epoch_grid


@dataclass(frozen=True, kw_only=True)
class Priced(Clock):
    """A run's clock, with the batch and the chips that its step is of."""

    global_batch_size: int
    chips: int

    @property
    def images_per_s_per_chip(self) -> float:
        """While training."""
        return self.global_batch_size / self.step_s / self.chips

    def but(self, **changes) -> "Priced":
        return replace(self, **changes)

    @property
    def median_s(self) -> float:
        return self.seconds(epoch_grid(self.epochs)[0])

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
        left = seconds - self.startup_s - self.evaluations(epochs) * self.eval_s
        return self.steps(epochs) * self.global_batch_size / left / self.chips if left > 0 else math.inf


def odds(times: np.ndarray, sigma: float, seconds: float) -> float:
    """P(one of `times`, all as likely, x exp(sigma x standard normal) <= seconds)."""
    if sigma == 0:
        return float(np.mean(times <= seconds))
    scale = sigma * math.sqrt(2)
    return float(np.mean([0.5 * math.erfc((math.log(time) - math.log(seconds)) / scale) for time in times]))


def priced(made, **changes) -> Priced:
    """Of a train.emulator.Emulator."""
    step = made.mean_step()
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
