"""What the faults of a run cost on the emulated clock: slower steps, and the time until all chips work again.

A step that chips die in fails; the cluster notices, recovers, and repeats it with those since the point it went back
to. All of that is charged to the step that then succeeds. Evaluations are charged as on the sound machine.
"""

from collections.abc import Callable
from dataclasses import fields, replace

from train.sim.course import Course
from train.sim.faults import Condition
from train.sim.step import StepTime
from train.sim.timeline import Event, Timeline

MOST_EVENTS = 100
"""Events that a report lists."""


class Toll:
    """The steps of a timeline, priced. `price`: what the steps of a run take in a condition of the machine."""

    def __init__(self, timeline: Timeline, price: Callable[[Condition], Course]) -> None:
        self.timeline, self._price = timeline, price
        self._recovery_s: dict[int, float] = {}

    def step(self, number: int) -> StepTime:
        """Step `number`, from 1."""
        recovery_s = self._recoveries_s(number)
        steady = self._price(self.timeline.at(number).condition).at(number)
        return replace(steady, recovery_s=recovery_s) if recovery_s else steady

    def train_s(self, steps: int) -> float:
        """The first `steps` steps, recoveries included."""
        return self._steady_s(steps) + self.recovery_s(steps)

    def recovery_s(self, steps: int) -> float:
        """Detection, restarts and repeated steps among the first `steps`."""
        return sum(self._recoveries_s(event_step) for event_step in self._struck(steps))

    def cost_s(self, steps: int) -> float:
        """What the faults added to the first `steps` steps."""
        return self.train_s(steps) - self._price(Condition()).seconds(steps)

    def parts(self, steps: int) -> StepTime:
        """The parts of `train_s`, summed."""
        sums = dict.fromkeys((field.name for field in fields(StepTime)), 0.0)
        for first, last, state in self._spans(steps):
            for name, seconds in vars(self._price(state).parts(last, first)).items():
                sums[name] += seconds
        return StepTime(**sums | {"recovery_s": self.recovery_s(steps)})

    def values(self, steps: int) -> dict[str, float]:
        """Tag -> number after so many steps, for a run's rows; empty without faults."""
        if not self.timeline.faults:
            return {}
        struck = sum(len(self.timeline.strikes(step)) for step in self._struck(steps))
        span = self.timeline.at(steps)
        return {
            "emulated/fault_events": struck,
            "emulated/living_chips": self.timeline.pace.chips - len(span.lost),
            "emulated/faults_s": self.cost_s(steps),
        }

    def report(self, steps: int, words: Callable[[Event], str] = lambda event: event.fault.words()) -> dict:
        """What happened in the first `steps` steps and what it cost, as plain data; all seconds are emulated."""
        events = [event for event in self.timeline.events if event.step <= steps]
        recovery_s, cost_s = self.recovery_s(steps), self.cost_s(steps)
        return {
            "label": "emulated",
            "cost_s": cost_s,
            "recovery_s": recovery_s,
            "slower_steps_s": cost_s - recovery_s,
            "num_events": len(events),
            "lost_chips": len(self.timeline.at(steps).lost),
            "events": [self._told(event) | {"what": words(event)} for event in events[:MOST_EVENTS]],
        }

    def _told(self, event: Event) -> dict:
        pace, fault = self.timeline.pace, event.fault
        saved = self._saved(event)
        return {
            "fault": fault.name,
            "step": event.step,
            "epoch": (event.step - 1) / pace.steps_per_epoch,
            "until_step": event.until,
            "chips": [event.chips.start, event.chips.stop - 1] if event.chips else None,
            "repeated_steps": event.step - saved,
            "recovery_s": self._event_s(event),
        }

    def _saved(self, event: Event) -> int:
        """Finished steps that the cluster goes back to."""
        return event.fault.repeats_from(event.step, self.timeline.pace.checkpoint_steps)

    def _event_s(self, event: Event) -> float:
        saved = self._saved(event)
        repeated_s = self._steady_s(event.step) - self._steady_s(saved) if saved < event.step else 0.0
        return event.fault.overhead_s() + repeated_s

    def _recoveries_s(self, step: int) -> float:
        """Of all that strikes in one step."""
        if step not in self._recovery_s:
            self._recovery_s[step] = sum(map(self._event_s, self.timeline.strikes(step)))
        return self._recovery_s[step]

    def _struck(self, steps: int) -> list[int]:
        return sorted({event.step for event in self.timeline.events if event.step <= steps})

    def _steady_s(self, steps: int) -> float:
        return sum(self._price(state).seconds(last, first) for first, last, state in self._spans(steps))

    def _spans(self, steps: int) -> list[tuple[int, int, Condition]]:
        """First and last of those of the first `steps` steps that are in one condition, in order."""
        if steps < 1:
            return []
        spans = [span for span in self.timeline.spans if span.first <= steps]
        ends = [*(span.first for span in spans[1:]), steps + 1]
        return [(span.first, end - 1, span.condition) for span, end in zip(spans, ends, strict=True)]
