"""The log in MLPerf's format: the compliance checker's own verdict, emulated times, and no accuracy that was not
measured.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_folder_samples import EVAL_S, STARTUP_S, STEP, config, make_run, result, run_info
from training_samples import tiny

from launch import compose, emulate
from train import mlperf_log
from train.build import WorkerContext, run_worker
from train.tensorboard import EPOCH

IMAGENET = {
    "num_train": 1_281_167,
    "num_eval": 50_000,
    "chips": 1024,
    "global_batch_size": 32_768,
    "steps_per_epoch": 39,
}
CLOSED = {
    "model": {"_target_": "train.models.resnet.resnet", "depth": 50, "stem": "imagenet"},
    "target_top1": 0.759,
    "eval_every": 4,
}
SGD = {
    "optim": {"_target_": "train.optim.sgd.SGD", "momentum": 0.9, "weight_decay": 5e-5},
    "schedule": {
        "_target_": "train.optim.schedule.Polynomial",
        "base_lr": 0.128,
        "end_lr": 0.0001,
        "power": 2,
        "warmup_epochs": 16,
        "decay_epochs": None,
    },
}
RECIPES = ("claim_2019", "pcl_2021", "mlperf_4096", "sgd_256")
REACHED = {"top1": 0.7612, "target_top1": 0.759}


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
def recipes():
    """The configuration of each recipe on ImageNet."""
    return {name: compose.compose([f"recipe={name}"], experiment="imagenet_atlas900") for name in RECIPES}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, recipes):
    """Run folders by name: finished runs that are made up, by every recipe on ImageNet, and a real one on digits."""
    folder = tmp_path_factory.mktemp("mlperf")
    short = {"top1": 0.43, "reached": False}
    made = {"digits": make_run(folder / "digits")}
    for name, recipe in recipes.items():
        batch = recipe["global_batch_size"]
        run = IMAGENET | {"global_batch_size": batch, "steps_per_epoch": 1_281_167 // batch}
        made[name] = make_run(folder / name, run_changes=run, result_changes=REACHED, **recipe)
    made["closed sgd"] = make_run(
        folder / "sgd", run_changes=IMAGENET, result_changes=REACHED, epochs=90, **CLOSED, **SGD
    )
    made["short of the target"] = make_run(
        folder / "short", run_changes=IMAGENET, result_changes=short, **recipes["claim_2019"]
    )
    made["real"] = folder / "real"
    made["real"].mkdir()
    run_worker(tiny("max_steps=2", "target_top1=0.01"), WorkerContext(), made["real"])
    return made


@pytest.mark.parametrize("ruleset", ["3.1.0", "4.0.0"])
@pytest.mark.parametrize("name", ["digits", "real", "closed sgd", *RECIPES])
def test_the_compliance_checker_passes_it(runs, name, ruleset):
    status, text = check(runs[name], ruleset)
    assert status == 0 and "SUCCESS" in text, text


def test_the_compliance_checker_refuses_a_closed_run_short_of_the_target(runs):
    status, text = check(runs["short of the target"], "4.0.0")
    assert status != 0 and "eval_accuracy" in text


def test_division_and_keys_follow_data_and_optimizer(runs):
    found = {name: values(events(run)) for name, run in runs.items()}
    opened = {name for name, keys in found.items() if keys["submission_division"] == "open"}
    assert opened == {"digits", "real", "sgd_256"}
    assert {keys["submission_division"] for keys in found.values()} == {"open", "closed"}
    lars = {key: value for key, value in found["claim_2019"].items() if key.startswith("lars")}
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
    pcl = {key: value for key, value in found["pcl_2021"].items() if key.startswith("lars")}
    assert pcl == lars | {
        "lars_opt_base_learning_rate": 24.952061,
        "lars_opt_learning_rate_decay_steps": 1872,
        "lars_opt_learning_rate_warmup_epochs": 8,
        "lars_opt_momentum": 0.933205,
        "lars_opt_weight_decay": 1e-4,
    }
    sgd = found["closed sgd"]
    assert sgd["sgd_opt_learning_rate_decay_steps"] == (90 - 16) * 39 and sgd["model_bn_span"] == 32
    assert not any(key.startswith("lars") for key in sgd)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, None),
        ({"schedule": {"end_lr": 0.0}}, "schedule.end_lr is not 0.0001"),
        ({"schedule": {"power": 1}}, "the schedule is not polynomial of power 2"),
        ({"optim": {"epsilon": 1e-9}}, "optim.epsilon is not 0"),
        ({"optim": {"weight_decay": 3e-5}}, "optim.weight_decay is not 0.0001 times a power of 2"),
        ({"optim": {"weight_decay": 0}}, "optim.weight_decay is not 0.0001 times a power of 2"),
        ({"model": {"depth": 18}}, "the model is not ResNet-50"),
        ({"label_smoothing": 0.2}, "label_smoothing is neither 0 nor 0.1"),
        ({"clip_norm": 1.0}, "gradients are clipped"),
        ({"ema_decay": 0.99}, "weights are averaged"),
        ({"eval_every": 1}, "evaluations are not 4 epochs apart"),
        ({"target_top1": 0.5}, "target_top1 is below 0.759"),
    ],
)
def test_a_broken_rule_makes_it_the_open_division_and_is_named(changes, says, tmp_path, recipes):
    closed = recipes["claim_2019"]
    changed = {key: closed[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
    run = run_info(tmp_path, closed | changed, **IMAGENET)
    assert mlperf_log.broken_rules(run) == ([says] if says else [])
    lines = mlperf_log.lines(run, [], None)
    assert lines[1].startswith(":::MLLOG") if says is None else lines[1] == f"# Open division: {says}."


def test_momentum_is_free_for_lars_from_32k_on(tmp_path, recipes):
    def broken(name: str, batch: int) -> list[str]:
        given = recipes[name] | {"optim": recipes[name]["optim"] | {"momentum": 0.95}}
        return mlperf_log.broken_rules(run_info(tmp_path, given, **IMAGENET | {"global_batch_size": batch}))

    assert broken("pcl_2021", 32_768) == []
    assert broken("mlperf_4096", 4_096) == ["optim.momentum is not 0.9"]


def test_it_says_that_it_is_emulated_and_no_submission(runs):
    for run in runs.values():
        text = (run / "mlperf.log").read_text()
        assert all(line.startswith((":::MLLOG {", "# ")) for line in text.splitlines())
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


def test_an_emulated_run_writes_nothing_and_so_no_accuracy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compose.main(emulate.emulate, ["format=json"], "launch.emulate", experiment=emulate.EXPERIMENT) == 0
    assert "eval_accuracy" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rcp():
    path = Path(__file__).resolve().parent.parent / "scripts" / "rcp.py"
    spec = importlib.util.spec_from_file_location("rcp", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def five(run: Path, folder: Path) -> list[str]:
    copies = [folder / f"run{number}" for number in range(5)]
    for copy in copies:
        copy.mkdir()
        shutil.copy(run / "mlperf.log", copy)
    return [str(copy) for copy in copies]


def test_rcp_shows_the_checkers_verdicts_as_they_are(rcp, runs, tmp_path, capsys):
    names = five(runs["digits"], tmp_path)
    assert rcp.main([*names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["run"], one["passed"], one["last_line"]) for one in found["compliance"]] == [
        (name, True, "INFO - SUCCESS") for name in names
    ]
    assert not found["rcp"]["passed"] and "emulated" in found["clock"]
    assert found["rcp"]["last_line"].startswith("ERROR - Missing RCP, please submit RCP with BS = 512, RCP test FAILED")
    assert " Submission mean epochs: 4.0000" in "\n".join(found["rcp"]["lines"])
    assert rcp.table(found).count("INFO - SUCCESS") == 5 and found["rcp"]["last_line"] in rcp.table(found)


def test_rcp_needs_five_logs_and_the_checkers(rcp, runs, tmp_path, capsys, monkeypatch):
    names = five(runs["digits"], tmp_path)
    for words, says in ((names[:3], "3 runs: a result for resnet is 5"), ([*names[:4], "/no"], "/no: no mlperf.log")):
        assert rcp.main(words) == 2
        assert says in capsys.readouterr().err
    monkeypatch.setattr(rcp.importlib.util, "find_spec", lambda name: None)
    assert rcp.main(names) == 2
    assert "mlperf_logging is not installed: pip install" in capsys.readouterr().err
