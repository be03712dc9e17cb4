"""A configuration becomes a worker: dictionary in, trainer out; what a worker does from its first to its last step.

Nothing here knows of Ray: `run_worker` also runs in a plain process. Whoever launches the workers gives each one a
`WorkerContext`; everything else is in the configuration. A worker outlives its peers: after a loss, or for a newcomer,
it joins another group with what it has (`Worker.join`) and trains on.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from time import perf_counter, time
from typing import Any

import torch

from train import checkpoint, emulator, emulator_faults, emulator_recipe
from train.account import RunInfo, identity, result
from train.callbacks import (
    Callback,
    FenceCallback,
    FirstStep,
    MetricsCallback,
    MLPerfCallback,
    OutlastsFullDisk,
    ProgressCallback,
    TraceCallback,
)
from train.checkpoint_files import Fenced, newest_sound, take_over
from train.comm.backup import Backup, Bank, assemble, keepers
from train.comm.groups import Group, PeerLost
from train.comm.messages import broadcast_state, gather
from train.comm.summation import aggregator, gradient_sums
from train.data.order import Order
from train.memory import keep_freed_memory
from train.mesh.blocks import blocks
from train.metrics import Sink, open_sinks, read_rows
from train.models.chip_norm import allocate_chips
from train.models.passes import check_batch_norm, images_per_pass, largest, moments_of, plan_passes
from train.optim.update import WeightUpdate
from train.precision import choose_device, choose_loss_scale, choose_precision, gradient_dtypes, use_arithmetic
from train.progress import Limits, Progress, StepRecord, Wish
from train.records import find, load
from train.recovery import Agreement, Joined, Membership, Offer, agree, farthest
from train.sim.clock import EmulatedClock
from train.trainer import Part, Trainer


@dataclass
class WorkerContext:
    """What a worker is told beside the configuration; `device` is auto, cpu or cuda."""

    rank: int | None = 0
    """None: the worker stands by and joins the others later."""
    world_size: int = 1
    device: str = "cpu"
    threads: int = 1
    store: Any = None
    """A c10d store that all ranks reach."""
    nodes: list[str] = field(default_factory=list)
    """Where each rank runs; empty: all in one place."""
    marks: dict[str, float] = field(default_factory=dict)
    """Unix times at which phases of the start ended, in order; the first is the command's own start."""


class Worker:
    """One worker, ready to train. ValueError where that can't be; nothing is written before `train`."""

    def __init__(self, config: dict, context: WorkerContext) -> None:
        self.config, self.context = config, context
        context.marks["import"] = time()
        torch.set_num_threads(context.threads)
        keep_freed_memory()
        self.device = choose_device(context.device)
        self.precision = choose_precision(config["precision"], self.device)
        use_arithmetic(self.device, self.precision, config["numerics"] == "exact")
        self.source = emulator.make(config["data"])
        emulator_recipe.check_training(config)
        self.emulator = emulator.build(
            config,
            num_train=len(self.source.train),
            num_eval=len(self.source.eval),
            num_classes=self.source.num_classes,
        )
        mesh = self.emulator.mesh
        self.blocks = blocks(config, mesh)
        self.chip_batch_size = chip_batch_size(config, mesh.num_chips)
        share = self.chip_batch_size
        self.order = Order(len(self.source.train), share, mesh.num_chips, config["seed"], config["last_batch"])
        check_batch_norm(config, self.emulator.sizes, self.chip_batch_size)
        shares = None if context.rank is None else self.blocks.shares(context.world_size)
        self.bank = Bank()
        self.joined: Joined | None = None
        """The last `join`, None before any."""
        self.notes: list[str] = []
        """What happened beside training that a person should know, in order."""
        self.wishes = {wish: Event() for wish in Wish}
        """What is asked of all workers through this one."""
        self._first_step = FirstStep(context.marks)
        self._callbacks: list[Callback] = []
        self._sinks: list[Sink] = []
        self._written: tuple[int, int] | None = None  # what the callbacks know of, as in recovery.Offer
        self.writer: checkpoint.Writer | None = None
        """Of rank 0."""
        self.trainer: Trainer | None = None
        self._build()
        context.marks["model and data"] = time()
        if shares is not None:
            self._take(Membership(context.rank, shares, context.nodes or [""] * context.world_size, context.store))
            self._has_state = True
        context.marks["group"] = time()

    def _build(self) -> None:
        """All that is the same on every worker, as it stands before the first step."""
        config, started_at = self.config, self.trainer and self.trainer.started_at
        torch.manual_seed(config["seed"])
        model = emulator.make(config["model"], num_classes=num_classes(config, self.source.num_classes))
        self.model = model.to(self.device, memory_format=torch.channels_last)
        allocate_chips(self.model, config["bn_span"], config["bn_span"])  # one set; `_take` makes room for this rank's
        self.optimizer = emulator.make(config["optim"], self.model.parameters())
        epochs = config["epochs"][-1] if isinstance(config["epochs"], list) else config["epochs"]
        toll = emulator_faults.of_training(self.emulator, config)
        self.trainer = Trainer(
            model=self.model,
            source=self.source,
            order=self.order,
            update=WeightUpdate(
                self.model,
                self.optimizer,
                self.precision,
                choose_loss_scale(config["loss_scale"], *gradient_dtypes(config, self.precision)),
                config["clip_norm"],
                config["ema_decay"],
            ),
            schedule=emulator.make(config["schedule"], epochs=epochs),
            bn_rule=config["bn_rule"],
            chips_per_block=self.blocks.chips,
            clock=EmulatedClock(
                self.emulator.course(),
                self.emulator.eval_s(len(self.source.eval)),
                self.emulator.startup_s,
                toll,
            ),
            limits=Limits(
                epochs=epochs,
                target_top1=config["target_top1"],
                eval_every=config["eval_every"],
                eval_offset=config["eval_offset"],
                max_steps=config["max_steps"],
                checkpoint_steps=config["checkpoint_steps"],
                checkpoint_s=config["checkpoint_s"],
            ),
            precision=self.precision,
            label_smoothing=config["label_smoothing"],
            device=self.device,
            wishes=self.wishes,
            timeline=toll and toll.timeline,
        )
        self.trainer.started_at = started_at
        self.progress_callback = ProgressCallback()
        self._has_state = False

    # ---- with whom ----

    def _take(self, membership: Membership, group: Group | None = None) -> None:
        """Hold the chips of this rank, with fresh statistics, and sum with the others."""
        config, shares = self.config, membership.shares
        self.membership, self.group = membership, group or self._connect(membership)
        mine = self._chips(membership.rank)
        images = images_per_pass(largest(self.emulator.sizes), self.precision, self.device)
        in_passes = config | ({"chips_per_pass": 1} if config["gradient_sum"] == "plan" else {})
        self.passes = plan_passes(in_passes, self.blocks.chips, mine, images // self.chip_batch_size)
        allocate_chips(self.model, len(mine), config["bn_span"])
        self.trainer.update.follow_chips()
        parameters, sizes = list(self.model.parameters()), [bucket.tensors for bucket in self.emulator.buckets]
        where = self.group, shares
        gradients = gradient_sums(config, parameters, sizes, self.emulator.plan, *where, self.device)
        statistics = aggregator(config["numerics"], *where)
        several = membership.world_size > 1
        rows = [self._rows(rank) for rank in range(membership.world_size)]
        backup = Backup(self.group, self.bank, rows, keepers(membership.nodes)) if several else None
        self.trainer.take(Part(self.group, gradients, statistics, backup, self.passes))

    def _connect(self, membership: Membership) -> Group:
        ranks = {"rank": membership.rank, "world_size": membership.world_size}
        return emulator.make(self.config["backend"], **ranks, store=membership.store, device=self.device)

    def join(self, membership: Membership, run_dir: Path) -> Joined:
        """Go on in another group; all its members call it. PeerLost leaves what this one could bring to the next."""
        try:
            group = self._connect(membership)
        except RuntimeError as error:
            raise PeerLost(f"connecting to {membership.world_size} workers: {error}") from error
        try:
            self.joined = self._align(membership, group, run_dir / "checkpoints")
        except PeerLost:
            group.abort()
            raise
        return self.joined

    def _align(self, membership: Membership, group: Group, checkpoints: Path) -> Joined:
        """Come to the state that all agree on (train/recovery)."""
        told = gather(group, [self._reached() if self._has_state else None, self.bank.offers()], self.device)
        offers = [Offer(its and tuple(its), [tuple(piece) for piece in pieces]) for its, pieces in told]
        agreed = agree(offers, self.order.num_chips // self.config["bn_span"])
        if agreed is not None:
            self._copy_state(agreed, offers, group)
            rows = self._rows(membership.rank, membership.shares)
            features = sum(moment.shape[1] for moment in self.trainer.chip_statistics())
            step = agreed.reached[0]
            held = assemble(group, self.bank, step, agreed.pieces, rows, features, self.device)
            group.barrier()
            self._take(membership, group)
            self.trainer.set_statistics(held)
            self.bank.forget_after(step)
            source, repeated, path, defects = "memory", 0, None, []
        else:
            self._build()
            self.bank.clear()
            defects: list[str] = []
            if self.writer:
                self.writer.settle()  # the one under way may be the newest
            found = newest_sound(checkpoints, defects.append) if group.rank == 0 else None
            (path, *_) = gather(group, None if found is None else str(found), self.device)
            self._take(membership, group)
            if path is not None:
                self.restore(Path(path))
            source, step = "beginning" if path is None else "checkpoint", self.trainer.progress.step
            repeated = max((farthest(offers) or (step,))[0] - step, 0)
        self._has_state = True
        self._put_away()
        return Joined(self.trainer.progress.step, source, repeated, time(), path, tuple(defects))

    def _reached(self) -> tuple[int, int]:
        return self.trainer.progress.step, self.trainer.progress.evaluated_at

    def _copy_state(self, agreed: Agreement, offers: list[Offer], group: Group) -> None:
        """Weights, optimizer and all else that is the same everywhere, from one who has come that far."""
        if all(offer.reached == agreed.reached for offer in offers):
            return
        state = None
        if group.rank == agreed.leader:
            state = self._replicated() | {"elapsed_s": self.trainer.elapsed_s()}
        state = broadcast_state(group, state, agreed.leader, self.device)
        if offers[group.rank].reached != agreed.reached:
            self._load(state)
            self._has_state = True
            if self.trainer.started_at is None:
                self.trainer.started_at = perf_counter() - state["elapsed_s"]

    def _put_away(self) -> None:
        """The chips' statistics as they stand, for this worker's own bank and its keeper's."""
        statistics = self.trainer.gathered_statistics()
        if self.trainer.backup:
            self.trainer.backup.exchange(self.trainer.progress.step, statistics)
        else:
            self.bank.put(self.trainer.progress.step, self._rows(self.membership.rank).start, statistics)

    def _chips(self, rank: int, shares: list[range] | None = None) -> range:
        """The chips of the mesh that a rank carries."""
        share, size = (shares or self.membership.shares)[rank], self.blocks.chips
        return range(share.start * size, share.stop * size)

    def _rows(self, rank: int, shares: list[range] | None = None) -> range:
        """Of all chips' statistics, those that a rank holds."""
        chips, span = self._chips(rank, shares), self.config["bn_span"]
        return range(chips.start // span, chips.stop // span)

    def train(self, run_dir: Path) -> dict:
        """Train on; rank 0 writes metrics and checkpoints into `run_dir`. Returns what result.json needs.

        `status` is done, interrupted, paused (others shall join), or lost: a peer is gone, and nothing else is known.
        """
        torch.set_num_threads(self.context.threads)  # again: the count is the thread's, and this may be another one
        try:
            self._open(run_dir)
            self.context.marks.setdefault("run folder", time())
            granted = self.trainer.train(self._callbacks, self._save)
            status = "done" if self.trainer.finished else "interrupted" if Wish.STOP in granted else "paused"
            if status == "paused":
                self._put_away()
            elif self.writer:
                self.writer.close()
        except PeerLost as error:
            self.group.abort()
            return {"status": "lost", "error": str(error)}
        except Fenced:  # the run's folder is somebody else's by now
            raise
        except BaseException:
            self._end(result(self, "failed"))
            raise
        finally:
            self._written = self._reached()
        self.group.close()
        outcome = result(self, status)
        if status != "paused":
            self._end(outcome)
        return outcome

    def _open(self, run_dir: Path) -> None:
        """Rank 0 writes the run's files from now on; what its predecessor wrote and did not write is made good."""
        step = self.trainer.progress.step
        if self.group.rank == 0 and self.writer and self._written == self._reached():
            return
        for left in (*self._sinks, self.writer):
            with suppress(OSError, RuntimeError):
                if left:
                    left.close()
        self._callbacks, self._sinks, self.writer = [self._first_step], [], None
        if self.group.rank > 0:
            return
        attempt = take_over(run_dir / "checkpoints")
        self.writer = checkpoint.Writer(attempt, self.config["checkpoints_kept"], self.notes.append)
        claim = find(load(), self.config["claim"]["record"])
        self._sinks = open_sinks(run_dir, self.config, resumed_step=step, claim=claim)
        written = {(row["kind"], row["step"]) for row in read_rows(run_dir)}
        self._callbacks += [FenceCallback(attempt), self.progress_callback]
        for writes in (MetricsCallback(self._sinks), MLPerfCallback(), TraceCallback(self.emulator)):
            self._callbacks.append(OutlastsFullDisk(writes, self.notes.append))
        run = RunInfo(self, run_dir, step)
        for callback in self._callbacks:
            callback.on_start(run)
        for record in self.trainer.recent:
            kind = "step" if isinstance(record, StepRecord) else "eval"
            if (kind, record.step) not in written:
                for callback in self._callbacks:
                    getattr(callback, f"on_{kind}")(record)

    def _end(self, outcome: dict) -> None:
        """The run's files are complete; should this worker train on all the same, it opens them again."""
        for callback in self._callbacks:
            callback.on_end(outcome)
        self.writer, self._sinks = None, []

    def _save(self, progress: Progress) -> None:
        """Gather the chips' statistics on rank 0, whose thread writes the checkpoint while training goes on."""
        self.trainer.average_statistics()  # so that the saved weights are complete: what evaluation would use
        moments = self.trainer.gathered_statistics()
        if self.group.rank > 0:
            self.group.send(moments, 0)
            return
        parts = [moments]
        for rank in range(1, self.group.world_size):
            parts.append(moments.new_empty((len(self._rows(rank)), moments.shape[1])))
            self.group.recv(parts[-1], rank)
        state = {"run": identity(self), **self._replicated(), "chip_moments": torch.cat(parts)}
        self.writer.write(progress.step, checkpoint.copied(state))

    def _replicated(self) -> dict:
        """What is the same on every worker."""
        state = self.trainer.state_dict()
        return {**state, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _load(self, state: dict) -> None:
        """From `_replicated`; further entries are left alone."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.trainer.load_state_dict(state)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. ValueError where it is another training's; nothing is written."""
        state = checkpoint.load(path)
        for key, value in identity(self).items():
            saved = state.get("run", {}).get(key)
            if saved != value:
                raise ValueError(f"{path}: the checkpoint has {key}={saved}, this run {value}; start a new run")
        self._load(state)
        self.trainer.set_statistics(moments_of(state["chip_moments"], self.passes, self.config["bn_span"]))


def run_worker(config: dict, context: WorkerContext, run_dir: Path, resume_from: Path | None = None) -> dict:
    """What one worker does: prepare, train, leave."""
    worker = Worker(config, context)
    if resume_from is not None:
        worker.restore(resume_from)
    return worker.train(run_dir)


def num_classes(config: dict, of_data: int) -> int:
    """The model's classes: those of the data, or more."""
    given = config["model"]["num_classes"]
    if given is not None and given < of_data:
        raise ValueError(f"model.num_classes={given}: the data has {of_data} classes; leave it at null")
    return given or of_data


def chip_batch_size(config: dict, num_chips: int) -> int:
    """Images per chip and step; training needs whole and equal chip batches."""
    given, total = config["chip_batch_size"], config["global_batch_size"]
    if given is not None:
        return given  # the emulator has held it against the global batch
    if total % num_chips:
        remedy = f"take a multiple of {num_chips}"
        raise ValueError(f"global_batch_size={total} does not divide among {num_chips} chips; {remedy}")
    return total // num_chips
