"""What a training run shows while it goes: a bar on a terminal, a line every few seconds elsewhere."""

import sys
from time import monotonic
from typing import Any

LINE_EVERY_S = 10.0


class Display:
    """`update` takes train.callbacks.ProgressState; the state of rank 0, as often as it comes."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._line_at = -LINE_EVERY_S
        self._shown: Any = None
        self._bar = None
        if self._console.is_terminal:
            done = "{task.completed}/{task.total} steps"
            columns = "{task.description}", BarColumn(), done, TextColumn("{task.fields[state]}"), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console, transient=True)

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=None, state="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, state: Any) -> None:
        if state is None or state == self._shown:
            return
        self._shown = state
        if self._bar is not None:
            self._bar.update(self._task, completed=state.step, total=state.total_steps, state=_state(state))
        elif state.step and monotonic() - self._line_at > LINE_EVERY_S:
            self._line_at = monotonic()
            left = "" if state.eta_s is None else f", {state.eta_s:.0f} s left at most"
            print(f"step {state.step}/{state.total_steps}: {_state(state)}{left}", file=sys.stderr, flush=True)


def _state(state: Any) -> str:
    parts = [f"epoch {state.epoch:.1f}"]
    if state.loss is not None:
        parts.append(f"loss {state.loss:.3f}")
    if state.top1 is not None:
        parts.append(f"top-1 {state.top1:.2%}")
    if state.images_per_s is not None:
        parts.append(f"{state.images_per_s:.0f} images/s")
    parts.append(f"emulated {state.emulated_s:.2f} s")
    return ", ".join(parts)
