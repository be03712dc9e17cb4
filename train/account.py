"""What a worker says of itself: what its arithmetic promises, what the run is, what makes two alike, how it ended."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.checkpoint import weights_sha256
from train.memory import allocator, peak_bytes
from train.models.chip_norm import norm_layers
from train.precision import describe_device

if TYPE_CHECKING:
    from train.build import Worker


class RunInfo:
    """What callbacks learn of a run before its first step."""

    def __init__(self, worker: "Worker", run_dir: Path, resumed_step: int) -> None:
        self.run_dir, self.config, self.resumed_step = run_dir, worker.config, resumed_step
        self.steps_per_epoch, self.total_steps = worker.order.steps_per_epoch, worker.trainer.total_steps
        self.num_train, self.num_eval = len(worker.source.train), len(worker.source.eval)
        self.chips, self.global_batch_size = worker.order.num_chips, worker.order.global_batch_size


def contract(worker: "Worker") -> dict:
    """What this run promises about its arithmetic, for env.json and the console."""
    config, emulator = worker.config, worker.emulator
    exact = config["numerics"] == "exact"
    order = f"one binary tree over {worker.blocks.count} blocks" if exact else "passes in turn, then the backend's"
    wire = f"fp32 between workers; {config['wire_dtype']} on the emulated wire"
    overlap = worker.trainer.gradients
    sizes = ", ".join(str(len(bucket)) for bucket in overlap.buckets)
    if config["gradient_sum"] == "wire":
        wire = f"{config['wire_dtype']} between workers, to which their sums are rounded, and on the emulated wire"
    if config["gradient_sum"] == "plan":
        order = f"that of {emulator.plan.name} over {worker.order.num_chips} chips"
        wire = f"{config['wire_dtype']}, to which every chip's gradients and every sum are rounded"
    loss_scale, momentum = worker.trainer.update.loss_scale, norm_layers(worker.model)[0].momentum
    return {
        "numerics": config["numerics"],
        "block_chips": worker.blocks.chips,
        "block_reason": worker.blocks.reason,
        "order": order,
        "chips_per_pass": max(chip_pass.count for chip_pass in worker.trainer.passes),
        "threads": worker.context.threads,
        "precision": worker.precision.name,
        "precision_reason": worker.precision.reason,
        "gradient_dtype": "fp32",
        "gradient_sum": config["gradient_sum"],
        "wire_dtype": wire,
        "buckets": f"{sizes} tensors, backward order; summed {overlap.when}",
        "loss_scale": "dynamic" if loss_scale.dynamic else f"{loss_scale.value:g}",
        "clip_norm": str(config["clip_norm"] or "none"),
        "ema_decay": str(config["ema_decay"] or "none"),
        "bn_span_chips": config["bn_span"],
        "bn_momentum": f"running = {1 - momentum:g} * running + {momentum:g} * batch (torch: {momentum:g})",
        "evaluation_statistics": {"mean": "mean over all chips", "chip_0": "chip 0's own"}[config["bn_rule"]],
        "device": worker.device,
        "instruction_set": describe_device(worker.device),
        "allocator": allocator(),
        "torch": str(torch.__version__),  # a subclass of str, which would have the driver import torch
        "python": platform.python_version(),
    }


def facts(worker: "Worker") -> dict:
    """The facts of this run that follow from configuration, data and machine, for result.json and the console."""
    return {
        "chips": worker.order.num_chips,
        "workers": worker.trainer.group.world_size,
        "threads": worker.context.threads,
        "device": worker.device,
        "precision": worker.precision.name,
        "numerics": worker.config["numerics"],
        "chip_batch_size": worker.chip_batch_size,
        "global_batch_size": worker.order.global_batch_size,
        "steps_per_epoch": worker.order.steps_per_epoch,
        "total_steps": worker.trainer.total_steps,
        "num_train": len(worker.source.train),
        "num_eval": len(worker.source.eval),
        "model": {"parameters": sum(p.numel() for p in worker.model.parameters())} | worker.config["model"],
        "data": worker.source.describe(),
        "notes": worker.emulator.notes,
    }


def identity(worker: "Worker") -> dict:
    """What must be equal for a checkpoint to continue the same training; the workers may change."""
    config = worker.config
    exact = {"threads": worker.context.threads, "precision": worker.precision.name, "block_chips": worker.blocks.chips}
    plan = {"wire_dtype": config["wire_dtype"], "collective": worker.emulator.plan.name}
    return (
        (exact if config["numerics"] == "exact" else {})
        | ({"faults": config["faults"]} if config["faults"] else {})
        | (plan if config["gradient_sum"] == "plan" else {})
        | ({"wire_dtype": config["wire_dtype"]} if config["gradient_sum"] == "wire" else {})
        | {
            "numerics": config["numerics"],
            "gradient_sum": config["gradient_sum"],
            **{key: config[key] for key in ("loss_scale", "clip_norm", "ema_decay", "last_batch")},
            "chips": worker.order.num_chips,
            "chip_batch_size": worker.chip_batch_size,
            "seed": config["seed"],
            "bn_span": config["bn_span"],
            "data": worker.source.fingerprint,
            "parameters": sum(p.numel() for p in worker.model.parameters()),
            "optimizer": type(worker.optimizer).__name__,
        }
    )


def result(worker: "Worker", status: str) -> dict:
    """What result.json needs of a run that ended, or broke off, so."""
    progress, toll = worker.trainer.progress, worker.trainer.clock.toll
    order, damage = worker.order, worker.trainer.damage
    images = sum(order.images(step % order.steps_per_epoch, damage.lost(step + 1)) for step in range(progress.step))
    return {
        "status": status,
        "top1": progress.top1,
        "eval_loss": progress.eval_loss,
        "target_top1": worker.config["target_top1"],
        "reached": progress.reached,
        "steps": progress.step,
        "skipped_steps": worker.trainer.update.loss_scale.skipped,
        "epochs": progress.step / worker.order.steps_per_epoch,
        "measured_s": progress.measured_s,
        "emulated_s": worker.trainer.clock.seconds,
        "emulated_interval_s": list(worker.emulator.interval_s(worker.trainer.clock.seconds)),
        **({"faults": toll.report(progress.step, damage.words)} if toll else {}),
        "images": images,
        "peak_memory_bytes": peak_bytes(worker.device),
        "images_per_s": images / progress.measured_s if progress.measured_s else None,
        "weights_sha256": weights_sha256(worker.model) if status in ("done", "interrupted") else None,
        "lost_checkpoints": worker.writer.failures if worker.writer else 0,
        "first_step_marks": worker.context.marks,
    }
