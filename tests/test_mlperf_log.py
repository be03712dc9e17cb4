"""The log in MLPerf's format: the compliance checker's own verdict, emulated times, and no accuracy that was not
measured.
"""

import json
import subprocess
import sys

import pytest
from run_folder_samples import EVAL_S, STARTUP_S, STEP, config, make_run, result, run_info

from train import mlperf_log
from train.tensorboard import EPOCH

IMAGENET = {
    "num_train": 1_281_167,
    "num_eval": 50_000,
    "chips": 1024,
    "global_batch_size": 32_768,
    "steps_per_epoch": 39,
}
LARS = {
    "optim": {
        "_target_": "train.optim.lars.LARS",
        "momentum": 0.94,
        "weight_decay": 2.5e-5,
        "coefficient": 0.001,
        "epsilon": 0.0,
    },
    "schedule": {
        "_target_": "train.optim.schedule.Polynomial",
        "base_lr": 21.2,
        "end_lr": 0.0001,
        "power": 2,
        "warmup_epochs": 16,
        "decay_epochs": 58.1282,
    },
}
SGD = {
    "optim": {"_target_": "train.optim.sgd.SGD", "momentum": 0.9, "weight_decay": 5e-5},
    "schedule": {**LARS["schedule"], "base_lr": 0.128, "decay_epochs": None},
}


def events(run_dir):
    lines = (run_dir / "mlperf.log").read_text().splitlines()
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if line.startswith(":::MLLOG ")]


def values(found):
    return {event["key"]: event["value"] for event in found}


def check(run_dir, ruleset):
    arguments = [
        "--usage",
        "training",
        "--ruleset",
        ruleset,
        "--log_output",
        run_dir / "compliance.log",
        run_dir / "mlperf.log",
    ]
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", *arguments]
    done = subprocess.run(command, cwd=run_dir, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlperf")
    reached = {"top1": 0.7612, "target_top1": 0.759}
    return {
        "digits": make_run(folder / "digits"),
        "imagenet lars": make_run(folder / "lars", run_changes=IMAGENET, result_changes=reached, **LARS),
        "imagenet sgd": make_run(folder / "sgd", run_changes=IMAGENET, result_changes=reached, epochs=90, **SGD),
        "short of the target": make_run(
            folder / "short", run_changes=IMAGENET, result_changes={"top1": 0.43, "reached": False}, **LARS
        ),
    }


@pytest.mark.parametrize("ruleset", ["3.1.0", "4.0.0"])
@pytest.mark.parametrize("name", ["digits", "imagenet lars", "imagenet sgd"])
def test_the_compliance_checker_passes_it(runs, name, ruleset):
    status, text = check(runs[name], ruleset)
    assert status == 0 and "SUCCESS" in text, text


def test_the_compliance_checker_refuses_a_closed_run_short_of_the_target(runs):
    status, text = check(runs["short of the target"], "4.0.0")
    assert status != 0 and "eval_accuracy" in text


def test_division_and_keys_follow_data_and_optimizer(runs):
    found = {name: values(events(run)) for name, run in runs.items()}
    assert {name: keys["submission_division"] for name, keys in found.items()} == {
        "digits": "open",
        "imagenet lars": "closed",
        "imagenet sgd": "closed",
        "short of the target": "closed",
    }
    lars = {key: value for key, value in found["imagenet lars"].items() if key.startswith("lars")}
    assert lars == {
        "lars_opt_base_learning_rate": 21.2,
        "lars_opt_end_learning_rate": 0.0001,
        "lars_epsilon": 0.0,
        "lars_opt_learning_rate_decay_poly_power": 2,
        "lars_opt_learning_rate_decay_steps": 2267,
        "lars_opt_learning_rate_warmup_epochs": 16,
        "lars_opt_momentum": 0.94,
        "lars_opt_weight_decay": 2.5e-5,
    }
    sgd = found["imagenet sgd"]
    assert sgd["sgd_opt_learning_rate_decay_steps"] == (90 - 16) * 39 and sgd["model_bn_span"] == 32
    assert not any(key.startswith("lars") for key in sgd)


def test_it_says_that_it_is_emulated_and_no_submission(runs):
    for run in runs.values():
        assert (run / "mlperf.log").read_text().startswith("# Emulated times")
        keys = values(events(run))
        assert keys["submission_status"] == "research" and "not a submission" in keys["submission_org"]
        assert keys["submission_platform"].startswith("emulated")
        assert all(event["metadata"]["clock"] == "emulated" for event in events(run))


def test_times_are_the_emulated_clocks(runs):
    found = events(runs["digits"])
    times = {event["key"]: event["time_ms"] for event in found}
    end_s = STARTUP_S + 12 * STEP.step_s + 2 * EVAL_S
    assert times["run_start"] == 1000 * EPOCH and times["run_stop"] == round(1000 * (EPOCH + end_s))
    assert [event["time_ms"] for event in found] == sorted(event["time_ms"] for event in found)
    blocks = [event["metadata"] for event in found if event["key"] == "block_start"]
    assert [(block["first_epoch_num"], block["epoch_count"]) for block in blocks] == [(1, 2), (3, 2)]


def test_accuracies_are_the_measured_ones_and_no_others(runs):
    accuracies = [event["value"] for event in events(runs["digits"]) if event["key"] == "eval_accuracy"]
    assert accuracies == [0.4, 0.9861]
    stop = events(runs["short of the target"])[-1]
    assert (stop["key"], stop["metadata"]["status"]) == ("run_stop", "aborted")


def test_a_run_without_evaluation_has_no_accuracy(tmp_path):
    text = "\n".join(mlperf_log.lines(run_info(tmp_path, config()), [], result(reached=False, top1=None)))
    assert "eval_accuracy" not in text and '"aborted"' in text
