"""The training loop of one worker: evaluate, save, stop?, step, log.

A worker holds consecutive chips of the mesh. It goes through them in passes; every pass hands the gradients of its
share of the global batch's mean loss to the aggregator, and their sum over all chips of all workers is what the
optimizer steps with. Chips have equal batches, so that is the mean over chips of each chip's mean gradient, as data
parallelism computes it.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.comm.aggregation import Aggregator
from train.comm.groups import Group
from train.data.loader import Prefetcher
from train.data.order import Order, eval_batches
from train.data.source import Source
from train.models.chip_norm import ChipPass, chip_moments, evaluation_moments
from train.precision import Precision
from train.sim.clock import EmulatedClock
from train.sim.step import StepTime

EVAL_BATCH_SIZE = 64  # fixed, so that the images of an evaluation are computed alike on any number of workers


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


class Callback(Protocol):
    """What rank 0 tells the outside; see train.callbacks."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_eval(self, record: EvalRecord) -> None: ...


class Optimizer(Protocol):
    """torch's optimizers, and train.optim's; each group of parameters is a dictionary with its learning rate `lr`."""

    param_groups: list[dict]

    def step(self) -> None: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class Limits:
    """When the run evaluates, saves and stops. Epochs are counted in steps / steps per epoch."""

    epochs: float
    target_top1: float
    eval_every: float
    eval_offset: float
    checkpoint_every: float
    max_steps: int | None


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Progress:
    """Where the run stands; the part of a checkpoint that is neither weights nor statistics."""

    step: int = 0
    measured_s: float = 0.0
    top1: float | None = None
    eval_loss: float | None = None
    reached: bool = False
    evaluated_at: int = -1


class Trainer:
    """One worker's part of a run; every worker makes one and calls `train`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        source: Source,
        order: Order,
        optimizer: Optimizer,
        schedule: Callable[[float], float],
        gradients: Aggregator,
        statistics: Aggregator,
        group: Group,
        passes: list[ChipPass],
        chips_per_block: int,
        clock: EmulatedClock,
        limits: Limits,
        precision: Precision,
        label_smoothing: float,
        device: str,
    ) -> None:
        """`passes`: this worker's chips, counted from its first one, whose number is `passes[0].first` of the mesh."""
        self.model, self.source, self.order = model, source, order
        self.optimizer, self.schedule = optimizer, schedule
        self.gradients, self.statistics, self.group = gradients, statistics, group
        self.passes, self.chips_per_block = passes, chips_per_block
        self.first_chip = passes[0].first
        self.clock, self.limits, self.precision = clock, limits, precision
        self.label_smoothing, self.device = label_smoothing, device
        self.parameters = list(model.parameters())
        self.progress = Progress()
        self.stop_requested = threading.Event()
        self._agreed_to_stop = False
        self._started_at = 0.0

    @property
    def total_steps(self) -> int:
        steps = math.ceil(self.limits.epochs * self.order.steps_per_epoch - 1e-9)
        return steps if self.limits.max_steps is None else min(steps, self.limits.max_steps)

    def train(self, callbacks: list[Callback], save: Callable[[Progress], None]) -> Progress:
        """Train to the target, the last epoch or a requested stop; every worker calls `save` at the same steps."""
        progress = self.progress
        self._started_at = time.perf_counter() - progress.measured_s
        with Prefetcher(self.source.train, self._batches(), seed=self.order.seed, depth=2) as loader:
            while True:
                due = self._due(self.limits.eval_every, self.limits.eval_offset)
                if due and progress.evaluated_at != progress.step:
                    record = self.evaluate()
                    for callback in callbacks:
                        callback.on_eval(record)
                if progress.step and self._due(self.limits.checkpoint_every, 0.0):
                    save(progress)
                if progress.reached or self._agreed_to_stop or progress.step >= self.total_steps:
                    break
                record = self._step(loader)
                for callback in callbacks:
                    callback.on_step(record)
        if not self._due(self.limits.checkpoint_every, 0.0):
            save(progress)
        return progress

    def evaluate(self) -> EvalRecord:
        """Top-1 accuracy and loss over the held-out images, each counted once, with the chips' mean statistics."""
        started = time.perf_counter()
        self.average_statistics()
        dataset, batches = self.source.eval, eval_batches(len(self.source.eval), EVAL_BATCH_SIZE)
        sums = torch.zeros(len(batches), 2, dtype=torch.float64)
        mine = range(self.group.rank, len(batches), self.group.world_size)
        self.model.eval()
        with torch.inference_mode(), self.precision.autocast(self.device), _loader(dataset, batches, mine) as loader:
            for number, (images, labels) in zip(mine, loader, strict=True):
                logits = self.model(images.to(self.device)).float()
                labels = labels.to(self.device)
                loss = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
                sums[number] = torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()]).cpu()
        self.model.train()
        sums = sums.to(self.device)
        self.group.all_reduce(sums)  # every row has one owner: adding zeros is exact in any order
        loss, correct = sums.sum(0).tolist()
        self.clock.advance_eval()
        progress = self.progress
        progress.top1, progress.eval_loss = correct / len(dataset), loss / len(dataset)
        progress.reached = progress.top1 >= self.limits.target_top1
        progress.evaluated_at = progress.step
        if not math.isfinite(progress.eval_loss):
            raise DivergedError(f"the loss over the held-out images is {progress.eval_loss} after step {progress.step}")
        now = time.perf_counter()
        progress.measured_s = now - self._started_at
        return EvalRecord(
            step=progress.step,
            epoch=progress.step / self.order.steps_per_epoch,
            top1=progress.top1,
            loss=progress.eval_loss,
            images=len(dataset),
            seconds=now - started,
            emulated_eval_s=self.clock.eval_s,
            measured_s=progress.measured_s,
            emulated_s=self.clock.seconds,
        )

    def average_statistics(self) -> None:
        """Set the statistics that evaluation uses to the mean over all chips of their running means and variances."""
        moments = chip_moments(self.model)
        rows_per_block = self.chips_per_block // self.passes[0].span
        for i in range(len(moments[0]) // rows_per_block):
            rows = slice(i * rows_per_block, (i + 1) * rows_per_block)
            block = self.first_chip // self.chips_per_block + i
            self.statistics.add(block, [moment[rows].sum(0) for moment in moments])
        num_rows = self.order.num_chips // self.passes[0].span
        for mean, total in zip(evaluation_moments(self.model), self.statistics.total(), strict=True):
            mean.copy_(total / num_rows)

    def _step(self, loader: Prefetcher) -> StepRecord:
        started, waited = time.perf_counter(), loader.wait_s
        progress, order = self.progress, self.order
        learning_rate = self.schedule((progress.step + 1) / order.steps_per_epoch)
        stop = float(self.stop_requested.is_set())
        with self.precision.autocast(self.device):  # around all passes, so that the weights are cast once
            for chip_pass in self.passes:
                images, labels = next(loader)
                loss, correct = self._forward_backward(chip_pass, images.to(self.device), labels.to(self.device))
                contribution = [p.grad for p in self.parameters]
                contribution.append(torch.stack([loss, correct, torch.full_like(loss, stop)]))
                for p in self.parameters:
                    p.grad = None
                self.gradients.add(chip_pass.first // self.chips_per_block, contribution)
        *sums, outcome = self.gradients.total()
        loss, correct, stop = outcome.tolist()
        self._agreed_to_stop = stop > 0
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {progress.step + 1} (learning rate {learning_rate:.4g}); "
                "lower schedule.base_lr or lengthen schedule.warmup_epochs"
            )
        for p, gradient in zip(self.parameters, sums, strict=True):
            p.grad = gradient
        grad_norm = torch.stack(torch._foreach_norm(sums)).norm().item()
        for settings in self.optimizer.param_groups:
            settings["lr"] = learning_rate
        self.optimizer.step()
        for p in self.parameters:
            p.grad = None
        progress.step += 1
        self.clock.advance_step()
        now = time.perf_counter()
        progress.measured_s = now - self._started_at
        return StepRecord(
            step=progress.step,
            epoch=progress.step / order.steps_per_epoch,
            loss=loss,
            top1=correct / order.global_batch_size,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            images=order.global_batch_size,
            step_s=now - started,
            data_wait_s=loader.wait_s - waited,
            comm_s=self.gradients.comm_s,
            measured_s=progress.measured_s,
            emulated_s=self.clock.seconds,
            emulated=self.clock.step,
        )

    def _forward_backward(self, chip_pass: ChipPass, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(This pass's share of the global batch's mean loss, correct answers); leaves gradients in the parameters."""
        self.model.chip_pass.first = chip_pass.first - self.first_chip
        self.model.chip_pass.count = chip_pass.count
        logits = self.model(images).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        loss = loss / self.order.global_batch_size
        loss.backward()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum().to(loss.dtype)

    def _batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, sample indices) of every pass still to come."""
        for step in range(self.progress.step, self.total_steps):
            epoch, in_epoch = divmod(step, self.order.steps_per_epoch)
            for chip_pass in self.passes:
                indices = self.order.indices(epoch, in_epoch, chip_pass.first, chip_pass.first + chip_pass.count)
                yield epoch, indices.reshape(-1)

    def _due(self, every: float, offset: float) -> bool:
        """Whether what happens every so many epochs, first at `offset`, falls on this step; always at the end."""
        step, per_epoch = self.progress.step, self.order.steps_per_epoch
        if step == 0:
            return False
        if step >= self.total_steps:
            return True
        if every <= 0:
            return False
        count = math.floor((step / per_epoch - offset) / every + 1e-9)
        return count >= 0 and step == math.ceil((offset + count * every) * per_epoch - 1e-9)


def _loader(dataset: Any, batches: list[np.ndarray], mine: range) -> Prefetcher:
    return Prefetcher(dataset, ((0, batches[number]) for number in mine), seed=0, depth=2)
