"""What happens beside training, on rank 0: rows for the sinks, progress, the MLPerf-format log, the trace.

A callback has four hooks: on_start(run), on_step(StepRecord), on_eval(EvalRecord), on_end(result). `run` has run_dir,
config, steps_per_epoch, total_steps, num_train, num_eval, chips, global_batch_size and resumed_step.
"""

import errno
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train import emulator_trace, mlperf_log, trace
from train.checkpoint_files import check_fence
from train.emulator import Emulator
from train.metrics import Sink, eval_row, read_rows, step_row, write_aside


class Callback:
    """Hooks that do nothing; a callback overrides those it needs."""

    def on_start(self, run) -> None: ...

    def on_step(self, record) -> None: ...

    def on_eval(self, record) -> None: ...

    def on_end(self, result: dict) -> None: ...


class FirstStep(Callback):
    """Notes when the first step ended."""

    def __init__(self, marks: dict[str, float]) -> None:
        self.marks = marks

    def on_step(self, record) -> None:
        self.marks.setdefault("first step", time.time())


class FenceCallback(Callback):
    """Ends this worker with Fenced once another writer has taken the run over."""

    def __init__(self, attempt: Path) -> None:
        self._attempt = attempt

    def on_step(self, record) -> None:
        check_fence(self._attempt)


class OutlastsFullDisk(Callback):
    """Another callback, which writes: a disk that is full while the run goes on is said, and does not end it."""

    FULL = (errno.ENOSPC, errno.EDQUOT)

    def __init__(self, callback: Callback, say: Callable[[str], None]) -> None:
        self._callback, self._say = callback, say
        self._full = False
        self.on_start, self.on_end = callback.on_start, callback.on_end

    def on_step(self, record) -> None:
        self._try(self._callback.on_step, record)

    def on_eval(self, record) -> None:
        self._try(self._callback.on_eval, record)

    def _try(self, hook: Callable, record) -> None:
        try:
            hook(record)
        except OSError as error:
            if error.errno not in self.FULL:
                raise
            if not self._full:
                self._say(
                    f"step {record.step}: {error.strerror}; training goes on, and writes when there is room again"
                )
            self._full = True
        else:
            self._full = False


class MetricsCallback(Callback):
    """Turns records into rows and hands them to every sink."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def on_step(self, record) -> None:
        self._log(step_row(record))

    def on_eval(self, record) -> None:
        self._log(eval_row(record))

    def on_end(self, result: dict) -> None:
        for sink in self.sinks:
            sink.close(result["status"])

    def _log(self, row: dict) -> None:
        """Every sink gets it, whatever another one meets with."""
        failure = None
        for sink in self.sinks:
            try:
                sink.log(row)
            except OSError as error:
                failure = failure or error
        if failure:
            raise failure


@dataclass(frozen=True)
class ProgressState:
    """Where the run stands; images_per_s and eta_s include evaluations and waiting, None before the second step."""

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    top1: float | None = None  # of the last evaluation
    images_per_s: float | None = None
    eta_s: float | None = None  # to the last step; the target may come earlier
    measured_s: float = 0.0
    emulated_s: float = 0.0
    updated_at: float = 0.0  # Unix seconds of the last step or evaluation here
    ended: bool = False


class ProgressCallback(Callback):
    """Keeps the latest ProgressState in `state`, replaced as a whole: another thread may read it at any time."""

    WINDOW = 20  # steps over which the rate is taken

    def __init__(self) -> None:
        self.state = ProgressState()
        self._recent: deque[tuple[int, float]] = deque(maxlen=self.WINDOW + 1)  # (step, measured_s)

    def on_start(self, run) -> None:
        self._global_batch_size = run.global_batch_size
        self._update(step=run.resumed_step, total_steps=run.total_steps, epoch=run.resumed_step / run.steps_per_epoch)

    def on_step(self, record) -> None:
        self._recent.append((record.step, record.measured_s))
        self._update(step=record.step, epoch=record.epoch, loss=record.loss, **self._clocks(record), **self._rate())

    def on_eval(self, record) -> None:
        self._update(top1=record.top1, **self._clocks(record))

    def on_end(self, result: dict) -> None:
        self._update(ended=True)

    def _rate(self) -> dict:
        (first, since), (last, now) = self._recent[0], self._recent[-1]
        if last == first or now <= since:
            return {}
        steps_per_s = (last - first) / (now - since)
        return {
            "images_per_s": steps_per_s * self._global_batch_size,
            "eta_s": max(0, self.state.total_steps - last) / steps_per_s,
        }

    @staticmethod
    def _clocks(record) -> dict:
        return {"measured_s": record.measured_s, "emulated_s": record.emulated_s}

    def _update(self, **changes) -> None:
        self.state = ProgressState(**{**vars(self.state), **changes, "updated_at": time.time()})


class MLPerfCallback(Callback):
    """Writes mlperf.log whole at the start, after every evaluation and at the end."""

    def on_start(self, run) -> None:
        self._run = run
        self._evals = [row for row in _resumed_rows(run) if row["kind"] == "eval"]
        self._write(None)

    def on_eval(self, record) -> None:
        self._evals.append(eval_row(record))
        self._write(None)

    def on_end(self, result: dict) -> None:
        self._write(result)

    def _write(self, result: dict | None) -> None:
        lines = mlperf_log.lines(self._run, self._evals, result)
        write_aside(Path(self._run.run_dir) / "mlperf.log", "\n".join(lines) + "\n")


class TraceCallback(Callback):
    """Writes trace.json at the end, from the first and the last steps, those that recover, and every evaluation.

    `machine`: the emulated one, whose steps are then drawn with their links.
    """

    def __init__(self, machine: Emulator | None = None) -> None:
        self._machine = machine

    def on_start(self, run) -> None:
        self._run = run
        self._first: list[dict] = []
        self._last: deque[dict] = deque(maxlen=trace.NUM_STEPS)
        self._recoveries: list[dict] = []
        self._evals: list[dict] = []
        for row in _resumed_rows(run):
            self._keep(row)

    def on_step(self, record) -> None:
        self._keep(step_row(record))

    def on_eval(self, record) -> None:
        self._keep(eval_row(record))

    def on_end(self, result: dict) -> None:
        steps = [*self._first, *self._recoveries, *self._last]
        drawing = self._machine and emulator_trace.drawing(self._machine)
        text = trace.dumps(steps, self._evals, self._run.config.get("experiment", "run"), drawing)
        write_aside(Path(self._run.run_dir) / "trace.json", text)

    def _keep(self, row: dict) -> None:
        if row["kind"] == "eval":
            self._evals.append(row)
        elif len(self._first) < trace.NUM_STEPS:
            self._first.append(row)
        elif "emulated/recovery_s" in row["values"] and len(self._recoveries) < trace.MAX_RECOVERIES:
            self._recoveries.append(row)
        else:
            self._last.append(row)


def _resumed_rows(run) -> list[dict]:
    """What an earlier attempt of the run wrote up to the step it is resumed from."""
    return [row for row in read_rows(run.run_dir) if row["step"] <= run.resumed_step] if run.resumed_step else []
