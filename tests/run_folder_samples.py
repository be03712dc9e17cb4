"""A finished run folder made by the real sinks and callbacks from made-up records, for tests of what reads run
folders.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import yaml

from train import records
from train.callbacks import Callback, MetricsCallback, MLPerfCallback, ProgressCallback, TraceCallback
from train.metrics import open_sinks
from train.progress import EvalRecord, StepRecord
from train.sim.step import StepTime

STEPS_PER_EPOCH, NUM_STEPS, EVAL_STEPS = 3, 12, (6, 12)
STARTED_AT = 1_750_000_000.0
STARTUP_S, EVAL_S = 0.25, 0.02  # emulated
CHIPS = {
    f"chips/{name}_{which}": value
    for name in ("bn_mean_shift", "bn_var_off")
    for which, value in (("min", 0.01), ("median", 0.02), ("max", 0.05))
}
STEP = StepTime(compute_s=0.0125, exposed_comm_s=0.0031, straggler_s=0.0011, input_s=0.0, other_s=0.0004)
CLAIM_ID = "huawei-2019-atlas900"
NEIGHBOUR_IDS = ["mlperf-v1.0-PCL-CloudBrainII_1024_mindspore_close", "mlperf-v0.6-Fujitsu-abci_2048xV100_mxnet"]
RECORDS = records.load()
CLAIM = records.find(RECORDS, CLAIM_ID)
NEIGHBOURS = [records.find(RECORDS, id) for id in NEIGHBOUR_IDS]


def config(**changes) -> dict:
    """A resolved configuration like the default experiment's."""
    return {
        "experiment": "digits_atlas",
        "workers": 2,
        "threads": 1,
        "device": "cpu",
        "precision": "bf16",
        "wire_dtype": "fp32",
        "numerics": "exact",
        "bn_span": 1,
        "chip_batch_size": 8,
        "global_batch_size": 512,
        "epochs": 4.0,
        "target_top1": 0.97,
        "seed": 0,
        "run_root": "runs",
        "label_smoothing": 0.1,
        "mesh": {"_target_": "train.mesh.mesh.Mesh", "name": "Atlas 900", "axes": {"host": 8, "chip": 8}},
        "chip": {"_target_": "train.mesh.chip.Chip", "name": "Ascend 910"},
        "model": {"_target_": "train.models.resnet.resnet", "depth": 50, "stem": "small"},
        "data": {"_target_": "train.data.digits.Digits", "image_size": 32},
        "optim": {"_target_": "train.optim.sgd.SGD", "momentum": 0.9, "nesterov": True, "weight_decay": 5e-5},
        "schedule": {"_target_": "train.optim.schedule.Cosine", "base_lr": 0.4, "end_lr": 0.0, "warmup_epochs": 1.0},
        "claim": {"record": CLAIM_ID, "neighbours": NEIGHBOUR_IDS},
        **changes,
    }


def run_info(run_dir: Path, config: dict, **changes) -> SimpleNamespace:
    facts = {
        "steps_per_epoch": STEPS_PER_EPOCH,
        "total_steps": NUM_STEPS,
        "num_train": 1437,
        "num_eval": 360,
        "chips": 64,
        "global_batch_size": 512,
        "resumed_step": 0,
    }
    return SimpleNamespace(run_dir=run_dir, config=config, **{**facts, **changes})


def result(**changes) -> dict:
    """result.json of the finished run."""
    emulated_s = STARTUP_S + NUM_STEPS * STEP.step_s + len(EVAL_STEPS) * EVAL_S
    return {
        "status": "done",
        "error": None,
        "experiment": "digits_atlas",
        "top1": 0.9861,
        "target_top1": 0.97,
        "reached": True,
        "epochs": 4.0,
        "steps": NUM_STEPS,
        "measured_s": 26.0,
        "wall_s": 31.5,
        "emulated_s": emulated_s,
        "emulated_interval_s": [0.8 * emulated_s, 1.25 * emulated_s],
        "peak_memory_bytes": 2_000_000_000,
        "images_per_s": 250.0,
        "chips": 64,
        "workers": 2,
        "chip_batch_size": 8,
        "global_batch_size": 512,
        "weights_sha256": "ab" * 32,
        "restarts": 0,
        "claim_s": 59.8,
        "precision": "bf16",
        "numerics": "exact",
        "device": "cpu",
        "threads": 1,
        "seed": 0,
        "num_train": 1437,
        "num_eval": 360,
        "time_to_first_step_s": 7.5,
        "first_step": {"imports": 1.5, "ray": 2.5, "model": 1.0, "step": 2.5},
        "model": {"parameters": 23_528_522, "_target_": "train.models.resnet.resnet", "depth": 50, "stem": "small"},
        "data": {"name": "digits", "num_classes": 10, "image_size": 32, "num_train": 1437, "num_eval": 360},
        "notes": ["links between hosts: assumed 100 Gbit/s", "32 px images: chip rate extrapolated"],
        **changes,
    }


@dataclass
class Clocked:
    """The two clocks of the made-up run, advanced as a trainer does."""

    measured_s: float = 1.0
    emulated_s: float = STARTUP_S

    def step(self, step: int) -> StepRecord:
        self.measured_s += 2.0
        self.emulated_s += STEP.step_s
        return StepRecord(
            step=step,
            epoch=step / STEPS_PER_EPOCH,
            loss=2.3 / step,
            top1=1 - 0.9 / step,
            learning_rate=0.1 * step,
            grad_norm=1.5,
            images=512,
            measured_s=self.measured_s,
            step_s=1.9,
            data_wait_s=0.05,
            comm_s=0.3,
            emulated_s=self.emulated_s,
            emulated=STEP,
        )

    def evaluation(self, step: int, top1: float) -> EvalRecord:
        self.measured_s += 0.5
        self.emulated_s += EVAL_S
        return EvalRecord(
            step=step,
            epoch=step / STEPS_PER_EPOCH,
            top1=top1,
            loss=0.1,
            images=360,
            seconds=0.5,
            emulated_eval_s=EVAL_S,
            measured_s=self.measured_s,
            emulated_s=self.emulated_s,
            chips=CHIPS,
        )


def drive(
    callbacks: list[Callback], run: SimpleNamespace, *, steps: range = range(1, NUM_STEPS + 1), last_top1=0.9861
) -> Clocked:
    """Call the hooks as a trainer does; the clocks run from the first step on, the hooks are called in `steps` only."""
    clock = Clocked()
    for callback in callbacks:
        callback.on_start(run)
    for step in range(1, steps.stop):
        record = clock.step(step)
        evaluation = clock.evaluation(step, last_top1 if step == NUM_STEPS else 0.4) if step in EVAL_STEPS else None
        for callback in callbacks if step >= steps.start else []:
            callback.on_step(record)
            if evaluation:
                callback.on_eval(evaluation)
    return clock


def make_run(
    run_dir: Path, *, result_changes: dict | None = None, run_changes: dict | None = None, **config_changes
) -> Path:
    """Write a finished run folder and return it."""
    run_dir.mkdir(parents=True)
    resolved = config(**config_changes)
    outcome = result(**(result_changes or {}))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    (run_dir / "env.json").write_text(json.dumps({"contract": {"block": 8, "threads": 1, "precision": "bf16"}}))
    sinks = open_sinks(run_dir, resolved, started_at_wall=STARTED_AT, claim=CLAIM)
    callbacks = [MetricsCallback(sinks), ProgressCallback(), MLPerfCallback(), TraceCallback()]
    drive(callbacks, run_info(run_dir, resolved, **(run_changes or {})), last_top1=outcome["top1"])
    for callback in callbacks:
        callback.on_end(outcome)
    (run_dir / "result.json").write_text(json.dumps(outcome))
    return run_dir
