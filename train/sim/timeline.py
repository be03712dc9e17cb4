"""When a run's faults strike, and whom: every event is drawn from (seed, fault, step) and never from a worker.

The events of a run of any length are the first ones of a longer run's. At a rate a fault strikes at most once a step.
Rates of a chip and hour, and schedules in seconds, count on the pace of the run as it would be without faults, so that
no event depends on another one's cost.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from train.sim.faults import Condition, Fault, condition, every

STREAM = 1 << 63
"""Of the keys of a fault's random numbers, those of the permutations of the training order are epochs below it."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The run as it would be without faults. `chips`: those with work; seconds, and epochs between evaluations."""

    seed: int
    chips: int
    chips_per_host: int
    steps_per_epoch: int
    step_s: float
    startup_s: float
    eval_s: float
    eval_every: float
    eval_offset: float
    checkpoint_steps: int | None

    def step_at(self, second: float) -> int:
        """The step at hand at that second, or the next one; it may lie beyond the run."""
        most = max(0, math.floor((second - self.startup_s) / self.step_s)) + 2  # evaluations take their time too
        return max(1, bisect_right(range(most), second, key=self._end_s))

    def _end_s(self, steps: int) -> float:
        """When so many steps, and the evaluations before the last of them, are done."""
        first = self.eval_offset if self.eval_offset > 0 else self.eval_every
        evals = math.floor(((steps - 1) / self.steps_per_epoch - first) / self.eval_every + 1e-9) + 1
        return self.startup_s + steps * self.step_s + max(0, evals) * self.eval_s


@dataclass(frozen=True)
class Event:
    """A fault that strikes `chips` in `step` (from 1) and is over before step `until` (None: never)."""

    fault: Fault
    step: int
    until: int | None
    chips: range
    draws: tuple[float, float]
    """In [0, 1): what is left to the fault to choose, such as an element and a bit."""


class Span(NamedTuple):
    """The state of the machine from step `first` on, until the next span."""

    first: int
    condition: Condition
    lost: frozenset[int]
    stale: frozenset[int]


class Timeline:
    """The events of a run of `steps` steps, in order. ValueError where they leave no chip."""

    def __init__(self, faults: Sequence[Fault], pace: Pace, steps: int) -> None:
        self.pace, self.steps = pace, steps
        self.faults = tuple(faults)
        self.events: list[Event] = []
        self.spans: list[Span] = []
        self._by_step: dict[int, list[Event]] = {}
        self._sweep([event for number, fault in enumerate(faults) for event in _events(fault, number, pace, steps)])

    def at(self, step: int) -> Span:
        """The state in a step, numbered from 1; 0: before the first."""
        return self.spans[max(0, bisect_right(self._firsts, step) - 1)] if step else SOUND

    def strikes(self, step: int) -> list[Event]:
        """The events of one step."""
        return self._by_step.get(step, [])

    @cached_property
    def _firsts(self) -> list[int]:
        return [span.first for span in self.spans]

    def _sweep(self, drawn: list[Event]) -> None:
        """Goes through the steps at which something begins or ends; a chip that is gone can't be struck again."""
        for event in drawn:
            self._by_step.setdefault(event.step, []).append(event)
        lost: frozenset[int] = frozenset()
        active: list[Event] = []
        for step in sorted({1, *self._by_step, *(event.until for event in drawn if event.until)}):
            active = [event for event in active if event.until is None or event.until > step]
            begun = [event for event in self._by_step.get(step, []) if not event.chips or set(event.chips) - lost]
            if begun:
                self._by_step[step] = begun
            else:
                self._by_step.pop(step, None)
            self.events += begun
            active += begun
            lost |= {chip for event in begun if event.fault.shrinks for chip in event.chips}
            if len(lost) >= self.pace.chips:
                raise ValueError(f"faults: no chip is left in step {step}; have fewer of them shrink the mesh")
            active = [event for event in active if not event.chips or set(event.chips) - lost or event.fault.shrinks]
            stale = frozenset(chip for event in active if event.fault.freezes for chip in event.chips)
            self.spans.append(Span(step, condition([event.fault for event in active], len(lost)), lost, stale))


SOUND = Span(0, Condition(), frozenset(), frozenset())


def _events(fault: Fault, number: int, pace: Pace, steps: int) -> list[Event]:
    """What one fault, the configuration's number `number`, does in a run, before any other has struck."""
    fault.strikes(0.0, pace.chips, pace.chips_per_host)  # a chip that isn't there is told before it is struck
    key = np.array([pace.seed & (STREAM * 2 - 1), STREAM + number], dtype=np.uint64)
    draws = np.random.Generator(np.random.Philox(key=key)).random((steps, 4))  # a step's row does not depend on `steps`
    found = []
    for step in _steps(fault, pace, draws[:, 0]):
        where, *rest = map(float, draws[step - 1, 1:])
        until = None if fault.lasts is None else step + fault.lasts
        found.append(Event(fault, step, until, fault.strikes(where, pace.chips, pace.chips_per_host), tuple(rest)))
    return found


def _steps(fault: Fault, pace: Pace, draws: np.ndarray) -> list[int]:
    """The steps in which a fault strikes; `draws` [steps] decide where it has a rate."""
    if fault.random:
        return (np.flatnonzero(draws < chance(fault, pace)) + 1).tolist()
    wanted = [int(step) for step in every(fault.at_steps)]
    wanted += [math.floor(epoch * pace.steps_per_epoch + 1e-9) + 1 for epoch in every(fault.at_epochs)]
    wanted += [pace.step_at(second) for second in every(fault.at_s)]
    return sorted(step for step in set(wanted if fault.scheduled else [1]) if step <= len(draws))


def chance(fault: Fault, pace: Pace) -> float:
    """Probability that a fault with a rate strikes in a step; 0 for one without."""
    if fault.per_chip_hour is not None:
        return -math.expm1(-fault.per_chip_hour * pace.chips * pace.step_s / 3600)
    return fault.per_step or 0.0
