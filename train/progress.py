"""Where a run stands: finished steps and evaluations as records, the limits it runs to, what may be asked of all.

Records are the same on all workers, but for this machine's seconds.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from threading import get_native_id

from train.sim.step import StepTime


@dataclass(frozen=True)
class StepRecord:
    """One finished training step, over all chips. Both clocks in seconds, as they stand after the step."""

    step: int
    epoch: float
    loss: float
    top1: float
    learning_rate: float
    grad_norm: float
    images: int
    step_s: float
    data_wait_s: float
    comm_s: float
    measured_s: float
    emulated_s: float
    emulated: StepTime
    loss_scale: float | None = None  # of this step; None where none is applied
    skipped_steps: int | None = None  # so far, this one included
    faults: dict[str, float] = field(default_factory=dict)  # tag -> number so far, of an emulated machine with faults
    update_s: float = 0.0  # of step_s
    checkpoint_s: float = 0.0  # how long the checkpoint before this step held the training up


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation over the held-out images. Both clocks in seconds, as they stand after it."""

    step: int
    epoch: float
    top1: float
    loss: float
    images: int
    seconds: float
    emulated_eval_s: float
    measured_s: float
    emulated_s: float
    chips: dict[str, float] = field(default_factory=dict)
    """Tag -> number: how far the chips are apart."""


@dataclass(frozen=True)
class Limits:
    """When the run evaluates, saves and stops. Epochs are counted in steps / steps per epoch.

    A checkpoint every so many steps, and when the last one is so many seconds old (as rank 0 sees it); None: not so.
    """

    epochs: float
    target_top1: float
    eval_every: float
    eval_offset: float
    max_steps: int | None
    checkpoint_steps: int | None = None
    checkpoint_s: float | None = None


@dataclass
class Progress:
    """Where the run stands; the part of a checkpoint that is neither weights nor statistics."""

    step: int = 0
    measured_s: float = 0.0
    top1: float | None = None
    eval_loss: float | None = None
    reached: bool = False
    evaluated_at: int = -1


def doing(what: str) -> None:
    """Name this thread after what it does: `top -H` and /proc/<pid>/task/<tid>/comm show it. Linux; else nothing.

    At most 15 characters are kept.
    """
    with suppress(OSError), open(f"/proc/self/task/{get_native_id()}/comm", "w") as file:
        file.write(what)


class Wish(IntEnum):
    """What any worker may ask of all: it travels with the sums of a step, so that all agree after the same one."""

    STOP = 0
    """End here, with a checkpoint."""
    PAUSE = 1
    """Leave the loop, as it is, for a change of workers."""
    SAVE = 2


def due(step: int, last_step: int, steps_per_epoch: int, every: float, offset: float) -> bool:
    """Whether what happens every so many epochs, first at `offset`, falls on this step; always at the last one."""
    if step == 0:
        return False
    if step >= last_step:
        return True
    if every <= 0:
        return False
    count = math.floor((step / steps_per_epoch - offset) / every + 1e-9)
    return count >= 0 and step == math.ceil((offset + count * every) * steps_per_epoch - 1e-9)


def as_record(values: dict) -> StepRecord | EvalRecord:
    """A record from its `asdict`."""
    if "emulated" in values:
        return StepRecord(**values | {"emulated": StepTime(**values["emulated"])})
    return EvalRecord(**values)
