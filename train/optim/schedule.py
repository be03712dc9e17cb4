"""Learning rates by epoch: a linear warm-up, then a polynomial (MLPerf's), a cosine (Loshchilov and Hutter 2016) or
steps (He et al. 2015).

A schedule is f(epoch) -> learning rate, with epoch = steps done / steps per epoch: it does not depend on the batch.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence


class _Warmup:
    """The linear warm-up from 0 to `base_lr`; what follows is the subclass's."""

    def __init__(self, base_lr: float, warmup_epochs: float, epochs: float) -> None:
        if base_lr <= 0:
            raise ValueError(f"schedule.base_lr={base_lr}: the learning rate must be positive")
        if not 0 <= warmup_epochs < epochs:
            raise ValueError(
                f"schedule.warmup_epochs={warmup_epochs}: must be at least 0 and below the run's epochs={epochs}"
            )
        self.base_lr = base_lr
        self.warmup_epochs = warmup_epochs

    def __call__(self, epoch: float) -> float:
        if epoch < self.warmup_epochs:
            return self.base_lr * epoch / self.warmup_epochs
        return self._warm(epoch)

    def _warm(self, epoch: float) -> float:
        raise NotImplementedError


class _Decay(_Warmup):
    """From `base_lr` to `end_lr` within `decay_epochs` after the warm-up, and no further."""

    def __init__(
        self, base_lr: float, end_lr: float, warmup_epochs: float, epochs: float, decay_epochs: float | None
    ) -> None:
        super().__init__(base_lr, warmup_epochs, epochs)
        if end_lr < 0:
            raise ValueError(f"schedule.end_lr={end_lr}: must not be negative")
        if decay_epochs is not None and decay_epochs <= 0:
            raise ValueError(
                f"schedule.decay_epochs={decay_epochs}: must be positive; null decays to the end of the run"
            )
        self.end_lr = end_lr
        self.decay_epochs = epochs - warmup_epochs if decay_epochs is None else decay_epochs

    def _warm(self, epoch: float) -> float:
        done = min((epoch - self.warmup_epochs) / self.decay_epochs, 1.0)
        return self.end_lr + (self.base_lr - self.end_lr) * self._remaining(done)

    def _remaining(self, done: float) -> float:
        raise NotImplementedError


class Polynomial(_Decay):
    """end + (base - end) * (1 - done)^power; MLPerf: power 2, end 0.0001, `decay_epochs` counted after the warm-up."""

    def __init__(
        self,
        epochs: float,
        base_lr: float,
        end_lr: float = 0.0001,
        power: float = 2.0,
        warmup_epochs: float = 5.0,
        decay_epochs: float | None = None,
    ) -> None:
        super().__init__(base_lr, end_lr, warmup_epochs, epochs, decay_epochs)
        if power <= 0:
            raise ValueError(f"schedule.power={power}: must be positive")
        self.power = power

    def _remaining(self, done: float) -> float:
        return (1 - done) ** self.power


class Cosine(_Decay):
    """end + (base - end) * (1 + cos(pi * done)) / 2."""

    def __init__(
        self,
        epochs: float,
        base_lr: float,
        end_lr: float = 0.0,
        warmup_epochs: float = 5.0,
        decay_epochs: float | None = None,
    ) -> None:
        super().__init__(base_lr, end_lr, warmup_epochs, epochs, decay_epochs)

    def _remaining(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2


class MultiStep(_Warmup):
    """base * factor^(milestones passed); milestones are epochs from the start of the run."""

    def __init__(
        self,
        epochs: float,
        base_lr: float,
        warmup_epochs: float = 5.0,
        milestones: Sequence[float] = (30.0, 60.0, 80.0),
        factor: float = 0.1,
    ) -> None:
        super().__init__(base_lr, warmup_epochs, epochs)
        if sorted(milestones) != list(milestones) or (milestones and milestones[0] <= warmup_epochs):
            raise ValueError(
                f"schedule.milestones={list(milestones)}: must rise, from above schedule.warmup_epochs={warmup_epochs}"
            )
        if not 0 < factor < 1:
            raise ValueError(f"schedule.factor={factor}: must be above 0 and below 1")
        self.milestones = list(milestones)
        self.factor = factor

    def _warm(self, epoch: float) -> float:
        return self.base_lr * self.factor ** bisect_right(self.milestones, epoch)
