"""The emulated wall clock of a training run: it advances by what the modelled machine needs."""

from train.sim.step import StepTime


class EmulatedClock:
    """Starts at the start-up time, on MLPerf's clock (first touch of the data)."""

    def __init__(self, step: StepTime, eval_s: float, startup_s: float):
        self.step = step
        self.eval_s = eval_s
        self.startup_s = startup_s
        self._steps = 0
        self._evals = 0

    @property
    def seconds(self) -> float:
        return self.startup_s + self._steps * self.step.step_s + self._evals * self.eval_s

    def advance_step(self) -> None:
        self._steps += 1

    def advance_eval(self) -> None:
        self._evals += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self._steps, "evals": self._evals}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._steps, self._evals = state["steps"], state["evals"]
