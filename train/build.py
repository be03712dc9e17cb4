"""A configuration becomes a worker: dictionary in, trainer out; what a worker does from its first to its last step.

Nothing here knows of Ray: `run_worker` also runs in a plain process. Whoever launches the workers gives each one a
`WorkerContext`; everything else is in the configuration.
"""

import platform
import resource
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

import torch

from train import checkpoint, emulator, emulator_faults
from train.callbacks import Callback, MetricsCallback, MLPerfCallback, ProgressCallback, TraceCallback
from train.comm.aggregation import Aggregator, SumAggregator, TreeAggregator
from train.comm.wire import PlanAggregator
from train.data.order import Order
from train.memory import keep_freed_memory
from train.mesh.blocks import blocks
from train.metrics import open_sinks
from train.models.chip_norm import allocate_chips, norm_layers
from train.models.passes import check_batch_norm, images_per_pass, moments_of, plan_passes
from train.optim.update import WeightUpdate
from train.precision import DTYPES, choose_device, choose_loss_scale, choose_precision, describe_device
from train.records import find, load
from train.sim.clock import EmulatedClock
from train.trainer import Limits, Progress, Trainer

KEPT_CHECKPOINTS = 2


@dataclass
class WorkerContext:
    """What a worker is told beside the configuration; `device` is auto, cpu or cuda."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    threads: int = 1
    store: Any = None
    """A c10d store that all ranks reach."""
    marks: dict[str, float] = field(default_factory=dict)
    """Unix times at which phases of the start ended, in order; the first is the command's own start."""


class RunInfo:
    """What callbacks learn of a run before its first step."""

    def __init__(self, worker: "Worker", run_dir: Path, resumed_step: int) -> None:
        self.run_dir, self.config, self.resumed_step = run_dir, worker.config, resumed_step
        self.steps_per_epoch, self.total_steps = worker.order.steps_per_epoch, worker.trainer.total_steps
        self.num_train, self.num_eval = len(worker.source.train), len(worker.source.eval)
        self.chips, self.global_batch_size = worker.order.num_chips, worker.order.global_batch_size


class Worker:
    """One worker, ready to train. ValueError where that can't be; nothing is written before `train`."""

    def __init__(self, config: dict, context: WorkerContext) -> None:
        self.config, self.context = config, context
        context.marks["import"] = time()
        torch.set_num_threads(context.threads)
        keep_freed_memory()
        self.device = choose_device(context.device)
        self.precision = choose_precision(config["precision"], self.device)
        self.source = emulator.make(config["data"])
        emulator.check_training(config)
        self.emulator = emulator.build(
            config,
            num_train=len(self.source.train),
            num_eval=len(self.source.eval),
            num_classes=self.source.num_classes,
        )
        mesh = self.emulator.mesh
        self.blocks = blocks(config, mesh)
        self.shares = self.blocks.shares(context.world_size)
        self.chip_batch_size = chip_batch_size(config, mesh.num_chips)
        self.order = Order(len(self.source.train), self.chip_batch_size, mesh.num_chips, config["seed"])
        check_batch_norm(config, self.emulator.workload, self.chip_batch_size)
        mine = self._chips(context.rank)
        images = images_per_pass(self.emulator.workload, self.precision, self.device)
        in_passes = config | ({"chips_per_pass": 1} if config["gradient_sum"] == "plan" else {})
        self.passes = plan_passes(in_passes, self.blocks.chips, mine, images // self.chip_batch_size)
        torch.manual_seed(config["seed"])
        model = emulator.make(config["model"], num_classes=num_classes(config, self.source.num_classes))
        self.model = model.to(self.device, memory_format=torch.channels_last)
        allocate_chips(self.model, len(mine), config["bn_span"])
        self.optimizer = emulator.make(config["optim"], self.model.parameters())
        epochs = config["epochs"][-1] if isinstance(config["epochs"], list) else config["epochs"]
        schedule = emulator.make(config["schedule"], epochs=epochs)
        context.marks["model and data"] = time()
        self.group = emulator.make(
            config["backend"], rank=context.rank, world_size=context.world_size, store=context.store, device=self.device
        )
        context.marks["group"] = time()
        global_batch_size = self.order.global_batch_size
        toll = emulator_faults.of_training(self.emulator, config)
        self.trainer = Trainer(
            model=self.model,
            source=self.source,
            order=self.order,
            update=WeightUpdate(
                self.model,
                self.optimizer,
                self.precision,
                choose_loss_scale(config["loss_scale"], *self._gradient_dtypes()),
                config["clip_norm"],
                config["ema_decay"],
            ),
            schedule=schedule,
            gradients=self._gradient_aggregator(),
            statistics=self._aggregator(),
            bn_rule=config["bn_rule"],
            group=self.group,
            passes=self.passes,
            chips_per_block=self.blocks.chips,
            clock=EmulatedClock(
                self.emulator.step(global_batch_size),
                self.emulator.eval_s(len(self.source.eval)),
                self.emulator.startup_s,
                toll,
            ),
            limits=Limits(
                epochs=epochs,
                target_top1=config["target_top1"],
                eval_every=config["eval_every"],
                eval_offset=config["eval_offset"],
                checkpoint_every=config["checkpoint_every"],
                max_steps=config["max_steps"],
            ),
            precision=self.precision,
            label_smoothing=config["label_smoothing"],
            device=self.device,
            timeline=toll.timeline if toll else None,
        )
        self.progress_callback = ProgressCallback()

    def _gradient_dtypes(self) -> list[torch.dtype]:
        """What gradients are rounded to on their way to the optimizer."""
        wire = [DTYPES[self.config["wire_dtype"]]] if self.config["gradient_sum"] == "plan" else []
        return [self.precision.dtype, *wire]

    def _gradient_aggregator(self) -> Aggregator:
        if self.config["gradient_sum"] == "plan":
            num_gradients = sum(p.numel() for p in self.model.parameters())
            return PlanAggregator(self.emulator.plan, self.config["wire_dtype"], num_gradients, self.device)
        return self._aggregator()

    def _aggregator(self) -> Aggregator:
        if self.config["numerics"] == "exact":
            return TreeAggregator(self.group, self.shares)
        return SumAggregator(self.group)

    def _chips(self, rank: int) -> range:
        """The chips of the mesh that a rank carries."""
        share, size = self.shares[rank], self.blocks.chips
        return range(share.start * size, share.stop * size)

    def contract(self) -> dict:
        """What this run promises about its arithmetic, for env.json and the console."""
        exact = self.config["numerics"] == "exact"
        order = f"one binary tree over {self.blocks.count} blocks" if exact else "passes in turn, then the backend's"
        wire = f"fp32 between workers; {self.config['wire_dtype']} on the emulated wire"
        if self.config["gradient_sum"] == "plan":
            order = f"that of {self.emulator.plan.name} over {self.order.num_chips} chips"
            wire = f"{self.config['wire_dtype']}, to which every chip's gradients and every sum are rounded"
        loss_scale, momentum = self.trainer.update.loss_scale, norm_layers(self.model)[0].momentum
        return {
            "numerics": self.config["numerics"],
            "block_chips": self.blocks.chips,
            "block_reason": self.blocks.reason,
            "order": order,
            "chips_per_pass": max(chip_pass.count for chip_pass in self.passes),
            "threads": self.context.threads,
            "precision": self.precision.name,
            "precision_reason": self.precision.reason,
            "gradient_dtype": "fp32",
            "gradient_sum": self.config["gradient_sum"],
            "wire_dtype": wire,
            "loss_scale": "dynamic" if loss_scale.dynamic else f"{loss_scale.value:g}",
            "clip_norm": str(self.config["clip_norm"] or "none"),
            "ema_decay": str(self.config["ema_decay"] or "none"),
            "bn_span_chips": self.config["bn_span"],
            "bn_momentum": f"running = {1 - momentum:g} * running + {momentum:g} * batch (torch: {momentum:g})",
            "evaluation_statistics": {"mean": "mean over all chips", "chip_0": "chip 0's own"}[self.config["bn_rule"]],
            "device": self.device,
            "instruction_set": describe_device(self.device),
            "torch": str(torch.__version__),  # a subclass of str, which would have the driver import torch
            "python": platform.python_version(),
        }

    def describe(self) -> dict:
        """The facts of this run that follow from configuration, data and machine, for result.json and the console."""
        context = self.context
        return {
            "chips": self.order.num_chips,
            "workers": context.world_size,
            "threads": context.threads,
            "device": self.device,
            "precision": self.precision.name,
            "numerics": self.config["numerics"],
            "chip_batch_size": self.chip_batch_size,
            "global_batch_size": self.order.global_batch_size,
            "steps_per_epoch": self.order.steps_per_epoch,
            "total_steps": self.trainer.total_steps,
            "num_train": len(self.source.train),
            "num_eval": len(self.source.eval),
            "model": {"parameters": sum(p.numel() for p in self.model.parameters())} | self.config["model"],
            "data": self.source.describe(),
            "notes": self.emulator.notes,
        }

    def train(self, run_dir: Path) -> dict:
        """Train to the end; rank 0 writes metrics and checkpoints into `run_dir`. Returns what result.json needs."""
        torch.set_num_threads(self.context.threads)  # again: the count is the thread's, and this may be another one
        run = RunInfo(self, run_dir, self.trainer.progress.step)
        callbacks = self._callbacks(run_dir, run.resumed_step) if self.context.rank == 0 else []
        for callback in callbacks:
            callback.on_start(run)
        self.context.marks["run folder"] = time()
        status = "failed"
        try:
            self.trainer.train(callbacks, lambda progress: self._save(run_dir / "checkpoints", progress))
            status = "interrupted" if self.trainer.stop_requested.is_set() and not self.finished else "done"
        finally:
            result = self._result(status)
            for callback in callbacks:
                callback.on_end(result)
            if status != "failed":
                self.group.close()
        return result

    @property
    def finished(self) -> bool:
        progress = self.trainer.progress
        return progress.reached or progress.step >= self.trainer.total_steps

    def _callbacks(self, run_dir: Path, resumed_step: int) -> list[Callback]:
        claim = find(load(), self.config["claim"]["record"])
        sinks = open_sinks(run_dir, self.config, resumed_step=resumed_step, claim=claim)
        first_step = FirstStep(self.context.marks)
        return [first_step, MetricsCallback(sinks), self.progress_callback, MLPerfCallback(), TraceCallback()]

    def _result(self, status: str) -> dict:
        progress, toll = self.trainer.progress, self.trainer.clock.toll
        images = progress.step * self.order.global_batch_size
        if toll:
            images = self.chip_batch_size * toll.chip_steps(progress.step)
        return {
            "status": status,
            "top1": progress.top1,
            "eval_loss": progress.eval_loss,
            "target_top1": self.config["target_top1"],
            "reached": progress.reached,
            "steps": progress.step,
            "skipped_steps": self.trainer.update.loss_scale.skipped,
            "epochs": progress.step / self.order.steps_per_epoch,
            "measured_s": progress.measured_s,
            "emulated_s": self.trainer.clock.seconds,
            "emulated_interval_s": list(self.emulator.interval_s(self.trainer.clock.seconds)),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "images": images,
            **({"faults": toll.report(progress.step)} if toll else {}),
            "images_per_s": images / progress.measured_s if progress.measured_s else None,
            "weights_sha256": checkpoint.weights_sha256(self.model) if status != "failed" else None,
            "first_step_marks": self.context.marks,
        }

    def _save(self, folder: Path, progress: Progress) -> None:
        """Gather the chips' statistics on rank 0, which writes the checkpoint; all ranks return when it is on disk."""
        self.trainer.average_statistics()  # so that the saved weights are complete: what evaluation would use
        moments = torch.cat([moment.flatten(1) for moment in self.trainer.chip_statistics()], dim=1)
        if self.group.rank > 0:
            self.group.send(moments, 0)
        else:
            parts = [moments]
            for rank in range(1, self.group.world_size):
                rows = len(self._chips(rank)) // self.config["bn_span"]
                parts.append(moments.new_empty((rows, moments.shape[1])))
                self.group.recv(parts[-1], rank)
            state = {
                "run": self._identity(),
                **self.trainer.state_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "chip_moments": torch.cat(parts),
            }
            checkpoint.save(folder, progress.step, state)
            checkpoint.keep_last(folder, KEPT_CHECKPOINTS)
        self.group.barrier()

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. ValueError where it is another training's; nothing is written."""
        state = checkpoint.load(path)
        for key, value in self._identity().items():
            saved = state.get("run", {}).get(key)
            if saved != value:
                raise ValueError(f"{path}: the checkpoint has {key}={saved}, this run {value}; start a new run")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        mine = moments_of(state["chip_moments"], self.passes, self.config["bn_span"]).to(self.device)
        offset = 0
        for moment in self.trainer.chip_statistics():
            moment.copy_(mine[:, offset : offset + moment.shape[1]])
            offset += moment.shape[1]
        self.trainer.load_state_dict(state)

    def _identity(self) -> dict:
        """What must be equal for a checkpoint to continue the same training; the workers may change."""
        config = self.config
        exact = {"threads": self.context.threads, "precision": self.precision.name, "block_chips": self.blocks.chips}
        plan = {"wire_dtype": config["wire_dtype"], "collective": self.emulator.plan.name}
        return (
            (exact if config["numerics"] == "exact" else {})
            | ({"faults": config["faults"]} if config["faults"] else {})
            | (plan if config["gradient_sum"] == "plan" else {})
            | {
                "numerics": config["numerics"],
                "gradient_sum": config["gradient_sum"],
                **{key: config[key] for key in ("loss_scale", "clip_norm", "ema_decay")},
                "chips": self.order.num_chips,
                "chip_batch_size": self.chip_batch_size,
                "seed": config["seed"],
                "bn_span": config["bn_span"],
                "data": self.source.fingerprint,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "optimizer": type(self.optimizer).__name__,
            }
        )


class FirstStep(Callback):
    """Notes when the first step ended."""

    def __init__(self, marks: dict[str, float]) -> None:
        self.marks = marks

    def on_step(self, record: Any) -> None:
        self.marks.setdefault("first step", time())


def peak_memory_bytes(device: str) -> int:
    """The most memory that this process has held: of its GPU, or else of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
        raise ValueError(
            f"global_batch_size={total} does not divide among {num_chips} chips; take a multiple of {num_chips}"
        )
    return total // num_chips
