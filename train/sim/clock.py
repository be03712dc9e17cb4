"""The emulated wall clock of a training run: it advances by what the modelled machine needs."""

from train.sim.course import Course
from train.sim.step import StepTime
from train.sim.toll import Toll


class EmulatedClock:
    """Starts at the start-up time, on MLPerf's clock (first touch of the data)."""

    def __init__(self, step: StepTime | Course, eval_s: float, startup_s: float, toll: Toll | None = None):
        """`step`: each of them, or their course, where no fault makes some take longer, as `toll` says."""
        self.course = Course.of(step)
        self.eval_s = eval_s
        self.startup_s = startup_s
        self.toll = toll
        self._steps = 0
        self._evals = 0

    @property
    def step(self) -> StepTime:
        """The last step; before it, what the first will take without faults."""
        return self.toll.step(self._steps) if self.toll and self._steps else self.course.at(max(1, self._steps))

    @property
    def seconds(self) -> float:
        train_s = self.toll.train_s(self._steps) if self.toll else self.course.seconds(self._steps)
        return self.startup_s + train_s + self._evals * self.eval_s

    def advance_step(self) -> None:
        self._steps += 1

    def advance_eval(self) -> None:
        self._evals += 1

    def fault_values(self) -> dict[str, float]:
        """Tag -> number of a run's rows, where it has faults."""
        return self.toll.values(self._steps) if self.toll else {}

    def state_dict(self) -> dict[str, int]:
        return {"steps": self._steps, "evals": self._evals}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._steps, self._evals = state["steps"], state["evals"]
