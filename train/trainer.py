"""The training loop of one worker: evaluate, save, stop?, step, log.

A worker holds consecutive chips of the mesh. It goes through them in passes; every pass hands the gradients of its
chips' own mean losses to the aggregator. Their sum over all chips of all workers, divided by the number of chips, is
what the optimizer steps with, as data parallelism computes it.

Which chips those are, and with whom they are summed, may change at any step boundary (`take`): the rest of a trainer's
state is the same on all workers. An operation that a dead worker breaks raises PeerLost and leaves that state as it was
after the last finished step or evaluation.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.comm.aggregation import Aggregator
from train.comm.backup import Backup
from train.comm.buckets import GradientSums, taken
from train.comm.groups import Group, PeerLost
from train.compute import Compute
from train.data.loader import Prefetcher
from train.data.order import Order, eval_batches
from train.data.source import Source
from train.models.chip_norm import ChipPass, chip_moments, evaluation_moments
from train.models.chip_spread import apart, spread
from train.models.damage import Damage, frozen_statistics, group_of
from train.optim.update import DivergedError, WeightUpdate, norm_of
from train.precision import Precision
from train.progress import EvalRecord, Limits, Progress, StepRecord, Wish, as_record, doing, due
from train.sim.clock import EmulatedClock
from train.sim.timeline import Timeline

NUM_RECENT = 4  # records that a worker keeps for whoever writes them down in place of one that died
EVAL_BATCH_SIZE = 64  # fixed, so that the images of an evaluation are computed alike on any number of workers


class Callback(Protocol):
    """What rank 0 tells the outside; see train.callbacks."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_eval(self, record: EvalRecord) -> None: ...


@dataclass(frozen=True)
class Part:
    """A worker's part of the mesh, and how what it computes meets the other workers'."""

    group: Group
    gradients: GradientSums
    statistics: Aggregator
    backup: Backup | None
    """None where nobody could keep anything twice."""
    passes: list[ChipPass]
    """Of its chips, counted from its first one, whose number is `passes[0].first` of the mesh."""


class Trainer:
    """One worker's side of a run; every worker makes one, is given its `Part`, and calls `train`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        source: Source,
        order: Order,
        update: WeightUpdate,
        schedule: Callable[[float], float],
        bn_rule: str,
        chips_per_block: int,
        clock: EmulatedClock,
        limits: Limits,
        precision: Precision,
        label_smoothing: float,
        device: str,
        wishes: dict[Wish, threading.Event] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """`wishes`: what this worker asks of all; other threads may set them at any time.

        `timeline`: of the faults of the emulated machine, as far as the arithmetic feels them.
        """
        self.model, self.source, self.order = model, source, order
        self.update, self.schedule = update, schedule
        self.bn_rule, self.chips_per_block = bn_rule, chips_per_block
        self.clock, self.limits, self.precision, self.timeline = clock, limits, precision, timeline
        self.label_smoothing, self.device = label_smoothing, device
        self.parameters = list(model.parameters())
        self.compute = Compute(model, label_smoothing, precision, device)
        self.progress = Progress()
        self.recent: deque[StepRecord | EvalRecord] = deque(maxlen=NUM_RECENT)
        self.wishes = wishes or {wish: threading.Event() for wish in Wish}
        self.abandoned = threading.Event()
        """Set from outside when a peer is known to be lost: the step at hand ends with PeerLost."""
        self._granted: set[Wish] = set()
        self._saved_at = (-1, time.monotonic())  # step, and when
        self._checkpoint_s = 0.0  # of the one since the last step
        self.started_at: float | None = None
        """Of time.perf_counter, when the measured clock stood at 0; it runs on while workers change."""

    def take(self, part: Part) -> None:
        """Compute this part from now on; the model has room for its chips' statistics."""
        self.group, self.gradients, self.statistics = part.group, part.gradients, part.statistics
        self.backup, self.passes, self.first_chip = part.backup, part.passes, part.passes[0].first
        self.damage = Damage(self.timeline, self.model, part.passes)
        taken(self.parameters)  # of a backward pass that was broken off
        self._saved_at = -1, self._saved_at[1]  # not all may have saved this step: all do, or none
        self.abandoned.clear()

    @property
    def total_steps(self) -> int:
        steps = math.ceil(self.limits.epochs * self.order.steps_per_epoch - 1e-9)
        return steps if self.limits.max_steps is None else min(steps, self.limits.max_steps)

    @property
    def finished(self) -> bool:
        return self.progress.reached or self.progress.step >= self.total_steps

    def train(self, callbacks: list[Callback], save: Callable[[Progress], None]) -> set[Wish]:
        """Train to the target, the last epoch or a granted wish; every worker calls `save` at the same steps.

        Returns the wishes granted by all after the last step; after PAUSE alone the training may be gone on with.
        """
        progress = self.progress
        self.elapsed_s()
        self._granted = set()
        with Prefetcher(self.source.train, self._batches(), seed=self.order.seed, device=self.device) as loader:
            while True:
                due = self._due(self.limits.eval_every, self.limits.eval_offset)
                if due and progress.evaluated_at != progress.step:
                    self.recent.append(record := self.evaluate())
                    for callback in callbacks:
                        callback.on_eval(record)
                ends = self.finished or Wish.STOP in self._granted
                if (ends or self._save_due()) and progress.step != self._saved_at[0]:
                    doing("checkpoint")
                    began = time.perf_counter()
                    save(progress)
                    self._checkpoint_s = time.perf_counter() - began
                    self._saved_at = progress.step, time.monotonic()
                if ends or Wish.PAUSE in self._granted:
                    return self._granted
                self.recent.append(record := self._step(loader))
                for callback in callbacks:
                    callback.on_step(record)

    def elapsed_s(self) -> float:
        """Seconds on the measured clock, which the first call sets going."""
        now = time.perf_counter()
        if self.started_at is None:
            self.started_at = now - self.progress.measured_s
        return now - self.started_at

    def _save_due(self) -> bool:
        every = self.limits.checkpoint_steps
        return Wish.SAVE in self._granted or bool(every and self.progress.step and self.progress.step % every == 0)

    def evaluate(self) -> EvalRecord:
        """Top-1 accuracy and loss over the held-out images, each counted once, of the averaged weights if there are."""
        started = time.perf_counter()
        doing("evaluation")
        self.average_statistics()
        distances = apart(self.model)  # before averaged weights, which have their own, take the model's place
        with self.update.averages.in_use() if self.update.averages else nullcontext():
            loss, correct, chips = self._evaluate(distances)
        self.clock.advance_eval()
        progress, images = self.progress, len(self.source.eval)
        progress.top1, progress.eval_loss = correct / images, loss / images
        progress.reached = progress.top1 >= self.limits.target_top1
        progress.evaluated_at = progress.step
        if not math.isfinite(progress.eval_loss):
            raise DivergedError(f"the loss over the held-out images is {progress.eval_loss} after step {progress.step}")
        now = time.perf_counter()
        progress.measured_s = self.elapsed_s()
        return EvalRecord(
            step=progress.step,
            epoch=progress.step / self.order.steps_per_epoch,
            top1=progress.top1,
            loss=progress.eval_loss,
            images=images,
            seconds=now - started,
            emulated_eval_s=self.clock.eval_s,
            measured_s=progress.measured_s,
            emulated_s=self.clock.seconds,
            chips=chips,
        )

    def _evaluate(self, distances: Tensor) -> tuple[float, float, dict[str, float]]:
        """(Loss, correct answers), summed over all held-out images by all workers, and the spread of all chips'
        `distances`, of which this worker gives its chips'.
        """
        batches, span = eval_batches(len(self.source.eval), EVAL_BATCH_SIZE), self.passes[0].span
        sums = torch.zeros(len(batches) + self.order.num_chips // span, 2, dtype=torch.float64)
        of_images, of_chips = sums.split([len(batches), len(sums) - len(batches)])
        of_chips[self.first_chip // span :][: len(distances)] = distances
        mine = range(self.group.rank, len(batches), self.group.world_size)
        self.model.eval()
        with torch.inference_mode(), self.precision.autocast(self.device), self._eval_loader(batches, mine) as loader:
            for number, (images, labels) in zip(mine, loader, strict=True):
                logits = self.model(images.to(self.device)).float()
                labels = labels.to(self.device)
                loss = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
                of_images[number] = torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()]).cpu()
        self.model.train()
        sums = sums.to(self.device)
        self.group.all_reduce(sums)  # every row has one owner: adding zeros is exact in any order
        of_images, of_chips = sums.cpu().split([len(batches), len(sums) - len(batches)])
        return *of_images.sum(0).tolist(), spread(of_chips, self.damage.lost_groups(self.progress.step))

    def _eval_loader(self, batches: list[np.ndarray], mine: range) -> Prefetcher:
        return Prefetcher(self.source.eval, ((0, batches[number]) for number in mine), seed=0, device=self.device)

    def average_statistics(self) -> None:
        """Set the statistics that evaluation uses: the mean over all chips of their running ones, or chip 0's own."""
        moments, evaluated = self.chip_statistics(), evaluation_moments(self.model)
        if self.update.averages:
            evaluated += self.update.averages.evaluation_moments
        if self.bn_rule == "chip_0":
            own = torch.cat([moment[0] for moment in moments])
            self.group.broadcast(own, 0)  # rank 0 holds chip 0
            for mean, part in zip(evaluated, own.split([len(mean) for mean in evaluated]), strict=True):
                mean.copy_(part)
            return
        span, lost = self.passes[0].span, self.damage.lost_groups(self.progress.step)
        rows_per_block, first_row = self.chips_per_block // span, self.first_chip // span
        for i in range(len(moments[0]) // rows_per_block):
            rows = slice(i * rows_per_block, (i + 1) * rows_per_block)
            if lost:
                rows = [row for row in range(rows.start, rows.stop) if first_row + row not in lost]
            block = self.first_chip // self.chips_per_block + i
            self.statistics.add(block, [moment[rows].sum(0) for moment in moments])
        num_rows = self.order.num_chips // span - len(lost)
        for mean, total in zip(evaluated, self.statistics.total(), strict=True):
            mean.copy_(total / num_rows)

    def chip_statistics(self) -> list[Tensor]:
        """The chips' running moments, then their averages if any: tensors of [groups, channels] (not copies)."""
        return chip_moments(self.model) + (self.update.averages.chip_moments if self.update.averages else [])

    def gathered_statistics(self) -> Tensor:
        """A copy of `chip_statistics`: [groups, channels of all layers]."""
        return torch.cat([moment.flatten(1) for moment in self.chip_statistics()], dim=1)

    def set_statistics(self, rows: Tensor) -> None:
        """The other way round: [groups, channels of all layers] into `chip_statistics`."""
        moments = self.chip_statistics()
        for moment, values in zip(moments, rows.split([moment.shape[1] for moment in moments], dim=1), strict=True):
            moment.copy_(values)

    def state_dict(self) -> dict:
        """What a checkpoint holds beside model, optimizer and `chip_statistics`; the same on all workers.

        The model's own weights are the raw ones whatever `ema_decay` is; the averaged ones are `averages`.
        """
        return {
            "progress": asdict(self.progress),
            "clock": self.clock.state_dict(),
            "recent": [asdict(record) for record in self.recent],
            **self.update.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict` (further entries are left alone) that has averages if this run does."""
        self.progress = Progress(**state["progress"])
        self._saved_at = -1, time.monotonic()
        self.recent = deque(map(as_record, state["recent"]), maxlen=NUM_RECENT)
        self.clock.load_state_dict(state["clock"])
        self.update.load_state_dict(state)

    def _step(self, loader: Prefetcher) -> StepRecord:
        started, waited = time.perf_counter(), loader.wait_s
        saved_s, self._checkpoint_s = self._checkpoint_s, 0.0
        progress, order = self.progress, self.order
        learning_rate = self.schedule((progress.step + 1) / order.steps_per_epoch)
        scale = None if self.update.loss_scale.off else self.update.loss_scale.value
        gradients, outcome = self._mean_gradients(loader)
        norm = norm_of(gradients) if self.compute.records else None  # a GPU begins with it before the loss is there
        loss, correct, *granted = outcome.tolist()
        self._granted = {wish for wish in Wish if granted[wish]}
        loss /= self._living(progress.step + 1)
        update_began = time.perf_counter()
        grad_norm = self.update.apply(gradients, loss, learning_rate, progress.step + 1, norm)
        progress.step += 1
        self.clock.advance_step()
        now = time.perf_counter()
        progress.measured_s = self.elapsed_s()
        images = order.images((progress.step - 1) % order.steps_per_epoch, self.damage.lost(progress.step))
        return StepRecord(
            step=progress.step,
            epoch=progress.step / order.steps_per_epoch,
            loss=loss,
            top1=correct / images,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            images=images,
            step_s=now - started,
            data_wait_s=loader.wait_s - waited,
            comm_s=self.gradients.comm_s,
            measured_s=progress.measured_s,
            emulated_s=self.clock.seconds,
            emulated=self.clock.step,
            loss_scale=scale,
            skipped_steps=None if scale is None else self.update.loss_scale.skipped,
            faults=self.clock.fault_values(),
            update_s=now - update_began,
            checkpoint_s=saved_s,
        )

    def _mean_gradients(self, loader: Prefetcher) -> tuple[list[Tensor], Tensor]:
        """(Gradients of the mean over all chips of each chip's mean loss, [sum of those losses, all chips' correct
        answers, granted wishes])."""
        doing("backward")
        wishes, step = [float(wish) for wish in self._wishes()], self.progress.step + 1
        with self.precision.autocast(self.device):  # around all passes, so that the weights are cast once
            for chip_pass in map(self._sized, self.passes):
                if self.abandoned.is_set():
                    raise PeerLost(f"rank {self.group.rank} of {self.group.world_size}, computing: told of a lost peer")
                images, labels = (part.to(self.device) for part in next(loader))
                with frozen_statistics(self.model, self.damage.stale_groups(step)):
                    loss, correct = self._forward(chip_pass, images, labels, self.damage.lost_of(step, chip_pass))
                # filled in where they are: to copy them over would wait until a GPU has finished its pass
                outcome = torch.stack([loss.detach(), correct, *(torch.full_like(correct, wish) for wish in wishes)])
                block, last = chip_pass.first // self.chips_per_block, chip_pass.first == self.passes[-1].first
                if last and self.backup:
                    self.gradients.first(partial(self.backup.exchange, step, self.gathered_statistics()))
                flips = list(self.damage.flips(step, chip_pass))
                beside = last and not flips and not self.compute.records
                with self.gradients.as_they_come(block, outcome) if beside else nullcontext():
                    self.compute.backward(loss)
                if not beside:
                    contribution = taken(self.parameters)
                    for flip in flips:
                        flip.apply(contribution, self._gradients_of(flip.chip, chip_pass, images, labels))
                    self.gradients.add(block, contribution, outcome)
        doing("all-reduce")
        gradients, outcome = self.gradients.total()
        doing("update")
        divisor = self._living(step) * self.update.loss_scale.value
        return torch._foreach_div(gradients, divisor), outcome  # the sum itself is to be read only

    def _sized(self, chip_pass: ChipPass) -> ChipPass:
        """With the number of images of each chip where the step at hand is an epoch's last and smaller one."""
        in_epoch = self.progress.step % self.order.steps_per_epoch
        sizes = self.order.sizes(in_epoch, chip_pass.first, chip_pass.first + chip_pass.count)
        return replace(chip_pass, sizes=sizes) if sizes else chip_pass

    def _living(self, step: int) -> int:
        """Chips that have a part in a step."""
        return self.order.num_chips - len(self.damage.lost(step))

    def _gradients_of(self, chip: int, chip_pass: ChipPass, images: Tensor, labels: Tensor) -> list[Tensor]:
        """One chip's own gradients, computed once more beside its pass; its running statistics have seen the images."""
        span, alone, rows = chip_pass.span, *group_of(chip, chip_pass, len(labels))
        others = [one for one in range(span) if alone.first + one != chip]
        with frozen_statistics(self.model, [(alone.first - self.first_chip) // span]):
            loss, _ = self._forward(alone, images[rows], labels[rows], others)
        self.compute.backward(loss)
        return taken(self.parameters)

    def _wishes(self) -> list[bool]:
        """This worker's, in their order."""
        every, (_, saved_at) = self.limits.checkpoint_s, self._saved_at
        if every and self.group.rank == 0 and time.monotonic() - saved_at >= every:
            self.wishes[Wish.SAVE].set()
        wanted = [self.wishes[wish].is_set() for wish in Wish]
        for wish in (Wish.PAUSE, Wish.SAVE):
            self.wishes[wish].clear()
        return wanted

    def _forward(self, chip_pass: ChipPass, images: Tensor, labels: Tensor, lost: list[int]) -> tuple[Tensor, Tensor]:
        """(Sum of the chips' mean losses, correct answers).

        `lost`: the chips of the pass, counted from its first, that have no part in it.
        """
        own = replace(chip_pass, first=chip_pass.first - self.first_chip)
        return self.compute.forward(own, images, labels, self.update.loss_scale.value, lost)

    def _batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, sample indices) of every pass still to come."""
        for step in range(self.progress.step, self.total_steps):
            epoch, in_epoch = divmod(step, self.order.steps_per_epoch)
            for chip_pass in self.passes:
                indices = self.order.indices(epoch, in_epoch, chip_pass.first, chip_pass.first + chip_pass.count)
                yield epoch, indices.reshape(-1)

    def _due(self, every: float, offset: float) -> bool:
        return due(self.progress.step, self.total_steps, self.order.steps_per_epoch, every, offset)
