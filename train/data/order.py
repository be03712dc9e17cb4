"""Which sample each chip sees at each step: a permutation by (seed, epoch), cut into steps and then into chips.

What is left over at an epoch's end is dropped, or made a last step: padded to a whole batch with the epoch's first
samples, or kept as it is, in parts for the chips that differ by one image at most (chip i of n takes the samples from
i / n to (i + 1) / n of it).
"""

from collections.abc import Collection
from itertools import pairwise
from typing import Literal

import numpy as np

from train.data.streams import permutation


class Order:
    """The training order of one mesh; every epoch draws anew."""

    def __init__(
        self,
        num_samples: int,
        chip_batch_size: int,
        num_chips: int,
        seed: int,
        last_batch: Literal["drop", "pad", "keep"] = "drop",
    ) -> None:
        for name, value in (("chip_batch_size", chip_batch_size), ("number of chips", num_chips)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.num_samples = num_samples
        self.chip_batch_size = chip_batch_size
        self.num_chips = num_chips
        self.seed = seed
        self.global_batch_size = chip_batch_size * num_chips
        self.last_batch = last_batch
        self.steps_per_epoch, self._left = divmod(num_samples, self.global_batch_size)
        if not self.steps_per_epoch:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} ({num_chips} chips x {chip_batch_size}) is larger than "
                f"the data set ({num_samples} images): lower chip_batch_size or the chips (global_batch_size where a "
                "recipe gives that), or take more data (data.repeat)"
            )
        if last_batch == "keep" and 0 < self._left < num_chips:
            raise ValueError(
                f"last_batch=keep: {self._left} images are left over for {num_chips} chips, each needs one at least: "
                "set last_batch=drop or pad"
            )
        self._left = self._left if last_batch != "drop" else 0
        self.steps_per_epoch += self._left > 0
        self._drawn: tuple[int, np.ndarray] | None = None  # the epoch at hand and its permutation

    def indices(self, epoch: int, step_in_epoch: int, first_chip: int, last_chip: int) -> np.ndarray:
        """Sample indices int64 for first_chip <= chip < last_chip: [last_chip - first_chip, chip_batch_size], or, where
        `sizes` says so, [their sum].
        """
        assert 0 <= step_in_epoch < self.steps_per_epoch, step_in_epoch
        assert 0 <= first_chip <= last_chip <= self.num_chips, (first_chip, last_chip)
        drawn = self._drawn
        if drawn is None or drawn[0] != epoch:
            drawn = self._drawn = (epoch, permutation(self.num_samples, self.seed, epoch))
        start = step_in_epoch * self.global_batch_size
        step = drawn[1][start : start + self.global_batch_size]
        if sizes := self.sizes(step_in_epoch, 0, self.num_chips):
            return step[sum(sizes[:first_chip]) : sum(sizes[:last_chip])]
        if len(step) < self.global_batch_size:
            step = np.concatenate([step, drawn[1][: self.global_batch_size - len(step)]])
        return step.reshape(self.num_chips, self.chip_batch_size)[first_chip:last_chip]

    def images(self, step_in_epoch: int, lost: Collection[int] = ()) -> int:
        """Images of all chips in a step but of those that are `lost`."""
        if kept := self.sizes(step_in_epoch, 0, self.num_chips):
            return sum(kept) - sum(kept[chip] for chip in lost)
        return self.chip_batch_size * (self.num_chips - len(lost))

    def sizes(self, step_in_epoch: int, first_chip: int, last_chip: int) -> tuple[int, ...] | None:
        """Images of each of these chips in a step that keeps a smaller batch; None: chip_batch_size for all."""
        if self.last_batch != "keep" or not self._left or step_in_epoch < self.steps_per_epoch - 1:
            return None
        ends = [self._left * chip // self.num_chips for chip in range(first_chip, last_chip + 1)]
        return tuple(last - first for first, last in pairwise(ends))


def eval_batches(num_samples: int, batch_size: int) -> list[np.ndarray]:
    """Every sample exactly once, in order; the last batch may be shorter."""
    if batch_size < 1:
        raise ValueError(f"evaluation batch size {batch_size}: must be at least 1")
    return [np.arange(first, min(first + batch_size, num_samples)) for first in range(0, num_samples, batch_size)]
