"""What changes in the course of a run: the size of its training images by epoch, and with it what a step takes."""

from collections.abc import Iterator
from dataclasses import dataclass

from train.sim.step import StepTime


def checked_sizes(train_sizes: list[list[int]]) -> tuple[tuple[int, int], ...]:
    """(first epoch, pixels) of data.train_sizes. ValueError where that is not a rising list from epoch 0 on."""
    epochs = [pair[0] for pair in train_sizes if len(pair) == 2 and pair[1] >= 1]
    if len(epochs) < len(train_sizes) or epochs != sorted(set(epochs)) or epochs[0] != 0:
        raise ValueError(
            f"data.train_sizes={train_sizes}: must be [[first epoch, pixels], ...] from epoch 0 on, epochs rising"
        )
    return tuple((first, size) for first, size in train_sizes)


@dataclass(frozen=True)
class Course:
    """The time of every step: `spans` hold the first step (from 1) of each kind, in order, and its time."""

    spans: tuple[tuple[int, StepTime], ...]

    @classmethod
    def of(cls, step: "StepTime | Course") -> "Course":
        """One kind of step is a course too."""
        return step if isinstance(step, Course) else cls(((1, step),))

    def at(self, number: int) -> StepTime:
        """Of step `number`, from 1."""
        return next(step for first, step in reversed(self.spans) if number >= first)

    def seconds(self, last: int, first: int = 1) -> float:
        """Of the steps from `first` to `last`, both included."""
        return sum((count * step.step_s for count, step in self._counted(first, last)), 0.0)

    def parts(self, last: int, first: int = 1) -> StepTime:
        """The parts of `seconds`, each summed."""
        sums = dict.fromkeys(vars(self.spans[0][1]), 0.0)
        for count, step in self._counted(first, last):
            for name, seconds in vars(step).items():
                sums[name] += count * seconds
        return StepTime(**sums)

    def mean(self, steps: int) -> StepTime:
        """Over the first `steps` steps."""
        if len(self.spans) == 1:
            return self.spans[0][1]  # to the last bit
        return StepTime(**{name: seconds / steps for name, seconds in vars(self.parts(steps)).items()})

    def _counted(self, first: int, last: int) -> Iterator[tuple[int, StepTime]]:
        ends = [*(begin for begin, _ in self.spans[1:]), last + 1]
        for (begin, step), end in zip(self.spans, ends, strict=True):
            count = min(end, last + 1) - max(begin, first)
            if count > 0:
                yield count, step
