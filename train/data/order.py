"""Which sample each chip sees at each step: a permutation by (seed, epoch), cut into steps and then into chips."""

import numpy as np

from train.data.streams import permutation


class Order:
    """The training order of one mesh. Samples left over at an epoch's end are dropped; the next epoch draws anew."""

    def __init__(self, num_samples: int, chip_batch_size: int, num_chips: int, seed: int) -> None:
        for name, value in (("chip_batch_size", chip_batch_size), ("number of chips", num_chips)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.num_samples = num_samples
        self.chip_batch_size = chip_batch_size
        self.num_chips = num_chips
        self.seed = seed
        self.global_batch_size = chip_batch_size * num_chips
        self.steps_per_epoch = num_samples // self.global_batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} ({num_chips} chips x {chip_batch_size}) is larger than "
                f"the data set ({num_samples} images): lower chip_batch_size or the chips (global_batch_size where a "
                "recipe gives that), or take more data (data.repeat)"
            )
        self._drawn: tuple[int, np.ndarray] | None = None  # the epoch at hand and its permutation

    def indices(self, epoch: int, step_in_epoch: int, first_chip: int, last_chip: int) -> np.ndarray:
        """Sample indices int64 [last_chip - first_chip, chip_batch_size] for first_chip <= chip < last_chip."""
        assert 0 <= step_in_epoch < self.steps_per_epoch, step_in_epoch
        assert 0 <= first_chip <= last_chip <= self.num_chips, (first_chip, last_chip)
        drawn = self._drawn
        if drawn is None or drawn[0] != epoch:
            drawn = self._drawn = (epoch, permutation(self.num_samples, self.seed, epoch))
        start = step_in_epoch * self.global_batch_size
        step = drawn[1][start : start + self.global_batch_size]
        return step.reshape(self.num_chips, self.chip_batch_size)[first_chip:last_chip]


def eval_batches(num_samples: int, batch_size: int) -> list[np.ndarray]:
    """Every sample exactly once, in order; the last batch may be shorter."""
    if batch_size < 1:
        raise ValueError(f"evaluation batch size {batch_size}: must be at least 1")
    return [np.arange(first, min(first + batch_size, num_samples)) for first in range(0, num_samples, batch_size)]
