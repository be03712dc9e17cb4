"""The run as a log in MLPerf's format, on the emulated clock, marked as emulated and as no submission.

Format and keys: mlcommons/logging (mlperf_logging.mllog), training rulesets 3.1.0 and 4.0.0 for resnet. What breaks a
rule of the closed division is logged for the open one, which asks for no hyperparameters. Evaluations are the measured
ones; none is ever made up.
"""

import json
import math

from train.tensorboard import EPOCH

IMAGENET_SIZES = 1_281_167, 50_000  # training and validation images of ImageNet-1k (ILSVRC 2012), the benchmark's data


def lines(run, evals: list[dict], result: dict | None) -> list[str]:
    """The log so far. `run` as in callbacks, `evals` the rows of kind eval; no `result`: the run has not stopped."""
    broken = broken_rules(run)
    return [
        "# Emulated times: run_start..run_stop is the modelled machine's clock. Not an MLPerf result, not submittable.",
        *([f"# Open division: {'; '.join(broken)}."] if broken else []),
        *(f":::MLLOG {json.dumps(event)}" for event in _events(run, evals, result, "open" if broken else "closed")),
    ]


def _events(run, evals: list[dict], result: dict | None, division: str) -> list[dict]:
    chips = f"{run.chips} x {_name(run.config.get('chip'))}, {_name(run.config.get('mesh'))}"
    found = [
        _event(0.0, key, value)
        for key, value in {
            "submission_benchmark": "resnet",
            "submission_division": division,
            "submission_org": "none: emulated by resnet-record, not a submission",
            "submission_platform": f"emulated: {chips}",
            "submission_status": "research",
            "cache_clear": True,
        }.items()
    ]
    found.append(_event(0.0, "init_start", type="INTERVAL_START"))
    found.append(_event(0.0, "init_stop", type="INTERVAL_END"))
    found.append(_event(0.0, "run_start", type="INTERVAL_START"))
    found += [_event(0.0, key, value) for key, value in _hyperparameters(run).items()]
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


def broken_rules(run) -> list[str]:
    """What of a run breaks MLPerf's closed division for resnet (training rules 4.0.0, appendix), a few words each.

    The target's accuracy itself is not among them: the compliance checker holds it against `eval_accuracy`.
    """
    config = run.config
    optim, schedule, model = (config.get(group) or {} for group in ("optim", "schedule", "model"))
    lars, momentum, decay = _name(optim) == "LARS", optim.get("momentum"), optim.get("weight_decay") or 0
    rate = schedule.get("base_lr", 0)
    warm = run.global_batch_size >= 32_768  # LARS may then choose its momentum
    rules = {
        "the data is not ImageNet": (run.num_train, run.num_eval) == IMAGENET_SIZES,
        "the model is not ResNet-50": (model.get("depth"), model.get("stem")) == (50, "imagenet"),
        "the optimizer is neither LARS nor SGD": _name(optim) in ("LARS", "SGD"),
        "the schedule is not polynomial of power 2": schedule.get("power") == 2,
        "schedule.end_lr is not 0.0001": schedule.get("end_lr") == 0.0001,
        "schedule.base_lr is no multiple of 0.001": lars or math.isclose(1000 * rate, round(1000 * rate)),
        "optim.epsilon is not 0": optim.get("epsilon", 0) == 0,
        "optim.momentum is not 0.9": momentum == 0.9 or (lars and warm),
        "optim.nesterov is set": not optim.get("nesterov"),
        "optim.weight_decay is not 0.0001 times a power of 2": decay > 0 and math.log2(decay / 0.0001).is_integer(),
        "label_smoothing is neither 0 nor 0.1": config.get("label_smoothing") in (0, 0.1),
        "gradients are clipped": config.get("clip_norm") is None,
        "weights are averaged": config.get("ema_decay") is None,
        "target_top1 is below 0.759": config["target_top1"] >= 0.759,
        "evaluations are not 4 epochs apart": config.get("eval_every") == 4 and config.get("eval_offset", 0) < 4,
    }
    return [text for text, kept in rules.items() if not kept]


def _hyperparameters(run) -> dict:
    """The ruleset's keys, from the nodes `optim` and `schedule`; in the open division they are information."""
    optim, schedule = run.config.get("optim", {}), run.config.get("schedule", {})
    lars = _name(optim) == "LARS"
    epochs, warmup = schedule.get("epochs") or _high(run.config.get("epochs")), schedule.get("warmup_epochs", 0)
    decay = schedule.get("decay_epochs")
    decay = epochs - warmup if decay is None else decay
    prefix = "lars_opt" if lars else "sgd_opt"
    steps = "milestones" in schedule
    values = {
        "global_batch_size": run.global_batch_size,
        "gradient_accumulation_steps": 1,  # every emulated chip holds its whole share of the batch
        "train_samples": run.num_train,
        "eval_samples": run.num_eval,
        "opt_name": _name(optim).lower(),
        f"{prefix}_base_learning_rate": schedule.get("base_lr"),
        f"{prefix}_end_learning_rate": schedule.get("end_lr"),
        f"{prefix}_learning_rate_decay_poly_power": schedule.get("power"),
        f"{prefix}_learning_rate_decay_steps": None if steps else round(decay * run.steps_per_epoch),
        "opt_learning_rate_decay_boundary_epochs": schedule.get("milestones"),
        "opt_learning_rate_decay_factor": schedule.get("factor"),
        f"{prefix}_momentum": optim.get("momentum"),
        f"{prefix}_weight_decay": optim.get("weight_decay"),
    }
    if lars:
        values["lars_epsilon"] = optim.get("epsilon", 0.0)
        values["lars_opt_learning_rate_warmup_epochs"] = warmup
    else:
        values["model_bn_span"] = run.global_batch_size // run.chips * run.config.get("bn_span", 1)
        values["opt_learning_rate_warmup_epochs"] = warmup
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
