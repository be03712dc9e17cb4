"""The run as a log in MLPerf's format, on the emulated clock, marked as emulated and as no submission.

Format and keys: mlcommons/logging (mlperf_logging.mllog), training rulesets 3.1.0 and 4.0.0 for resnet. Data other
than ImageNet is logged for the open division, which asks for no hyperparameters. Evaluations are the measured ones;
none is ever made up.
"""

import json

from train.tensorboard import EPOCH

IMAGENET_SIZES = 1_281_167, 50_000  # training and validation images of ImageNet-1k (ILSVRC 2012), the benchmark's data


def lines(run, evals: list[dict], result: dict | None) -> list[str]:
    """The log so far. `run` as in callbacks, `evals` the rows of kind eval; no `result`: the run has not stopped."""
    return [
        "# Emulated times: run_start..run_stop is the modelled machine's clock. Not an MLPerf result, not submittable.",
        *(f":::MLLOG {json.dumps(event)}" for event in _events(run, evals, result)),
    ]


def _events(run, evals: list[dict], result: dict | None) -> list[dict]:
    chips = f"{run.chips} x {_name(run.config.get('chip'))}, {_name(run.config.get('mesh'))}"
    imagenet = (run.num_train, run.num_eval) == IMAGENET_SIZES
    found = [
        _event(0.0, key, value)
        for key, value in {
            "submission_benchmark": "resnet",
            "submission_division": "closed" if imagenet else "open",
            "submission_org": "none: emulated by resnet-record, not a submission",
            "submission_platform": f"emulated: {chips}",
            "submission_status": "research",
            "cache_clear": True,
        }.items()
    ]
    found.append(_event(0.0, "init_start", type="INTERVAL_START"))
    found.append(_event(0.0, "init_stop", type="INTERVAL_END"))
    found.append(_event(0.0, "run_start", type="INTERVAL_START"))
    found += [_event(0.0, key, value) for key, value in _hyperparameters(run, imagenet).items()]
    epoch = begin_s = 0.0
    for row in evals:
        eval_s = row["values"]["emulated/eval_s"]
        block = {"first_epoch_num": _number(epoch + 1), "epoch_count": _number(row["epoch"] - epoch)}
        num = {"epoch_num": _number(row["epoch"])}
        if row["epoch"] > epoch:
            found.append(_event(begin_s, "block_start", type="INTERVAL_START", **block))
            found.append(_event(row["emulated_s"] - eval_s, "block_stop", type="INTERVAL_END", **block))
        found.append(_event(row["emulated_s"] - eval_s, "eval_start", type="INTERVAL_START", **num))
        found.append(_event(row["emulated_s"], "eval_accuracy", row["values"]["eval/top1"], **num))
        found.append(_event(row["emulated_s"], "eval_stop", type="INTERVAL_END", **num))
        epoch, begin_s = row["epoch"], row["emulated_s"]
    if result is not None:
        status = "success" if result.get("reached") else "aborted"
        end_s = max(begin_s, result.get("emulated_s") or 0.0)
        found.append(_event(end_s, "run_stop", type="INTERVAL_END", status=status))
    return found


def _hyperparameters(run, imagenet: bool) -> dict:
    """The ruleset's keys, from the nodes `optim` and `schedule`; in the open division they are information."""
    optim, schedule = run.config.get("optim", {}), run.config.get("schedule", {})
    lars = _name(optim) == "LARS"
    epochs, warmup = schedule.get("epochs") or _high(run.config.get("epochs")), schedule.get("warmup_epochs", 0)
    decay = schedule.get("decay_epochs")
    decay = epochs - warmup if decay is None else decay
    prefix = "lars_opt" if lars else "sgd_opt"
    values = {
        "global_batch_size": run.global_batch_size,
        "train_samples": run.num_train,
        "eval_samples": run.num_eval,
        "opt_name": "lars" if lars else "sgd",
        f"{prefix}_base_learning_rate": schedule.get("base_lr"),
        f"{prefix}_end_learning_rate": schedule.get("end_lr"),
        f"{prefix}_learning_rate_decay_poly_power": schedule.get("power"),
        f"{prefix}_learning_rate_decay_steps": round(decay * run.steps_per_epoch),
        f"{prefix}_momentum": optim.get("momentum"),
        f"{prefix}_weight_decay": optim.get("weight_decay"),
    }
    if lars:
        values["lars_epsilon"] = optim.get("epsilon", 0.0)
        values["lars_opt_learning_rate_warmup_epochs"] = warmup
    else:
        values["model_bn_span"] = run.global_batch_size // run.chips * run.config.get("bn_span", 1)
        values["opt_learning_rate_warmup_epochs"] = warmup
    if imagenet:
        values["gradient_accumulation_steps"] = 1  # every emulated chip holds its whole share of the batch
    return {key: value for key, value in values.items() if value is not None}


def _event(seconds: float, key: str, value=None, type: str = "POINT_IN_TIME", **metadata) -> dict:
    return {
        "namespace": "",
        "time_ms": round(1000 * (EPOCH + seconds)),
        "event_type": type,
        "key": key,
        "value": value,
        "metadata": {"file": "train/mlperf_log.py", "lineno": 0, "clock": "emulated", **metadata},
    }


def _name(node: dict | None) -> str:
    node = node or {}
    return node.get("name") or node.get("_target_", "unnamed").rpartition(".")[2]


def _high(epochs) -> float:
    return epochs[1] if isinstance(epochs, (list, tuple)) else epochs


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else round(value, 4)
