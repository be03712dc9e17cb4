"""The report from run folders: three columns, every condition that differs, nothing that was not reached."""

import json
import subprocess
import sys

import pytest
from run_folder_samples import CLAIM, NEIGHBOURS, RECORDS, config, make_run, result

from train.conditions import as_percent, as_seconds, conditions
from train.report import report

IMAGENET_DATA = {"name": "imagenet", "num_train": 1_281_167, "num_eval": 50_000, "num_classes": 1000, "image_size": 224}


def run_command(*arguments):
    return subprocess.run([sys.executable, "-m", "train.report", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "digits-1")


def row(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_claimed_emulated_and_measured_have_columns_of_their_own(finished):
    text = report([finished]).text
    assert row(text, "time to target") == ["59.80 s", "0.50 s", "26.00 s"]
    assert row(text, "target top-1") == ["75.90 %", "97.00 %", "97.00 %"]
    assert row(text, "top-1") == ["-", "-", "98.61 %"]
    assert row(text, "chips (workers)") == ["1,024", "64", "2 workers"]
    assert row(text, "global batch") == ["-", "512", "512"]
    assert row(text, "images/s") == ["-", f"{12 * 512 / result()['emulated_s']:,.0f}", f"{12 * 512 / 26:,.0f}"]


def test_an_emulated_time_carries_its_interval_and_memory_is_measured(finished):
    text, seconds = report([finished]).text, result()["emulated_s"]
    interval = f"{0.8 * seconds:.2f} to {1.25 * seconds:.2f} s"
    assert row(text, "5 % to 95 %, by the model's error") == ["-", interval, "-"]
    assert row(text, "peak memory of a worker") == ["-", "-", "2.0 GB"]


def test_what_is_to_be_known_of_the_data_is_said(tmp_path):
    run = make_run(tmp_path / "photos")
    changed = json.loads((run / "result.json").read_text())
    changed["data"]["notes"] = ["the same photos train and evaluate"]
    (run / "result.json").write_text(json.dumps(changed))
    assert "## About the data\n\n- the same photos train and evaluate\n" in report([run]).text


def test_text_fits_100_columns_and_is_the_markdown_file(finished):
    made = report([finished])
    assert (finished / "report.md").read_text() == made.text
    assert max(map(len, made.text.splitlines())) <= 100


def test_json_has_the_columns_as_numbers(finished):
    report([finished])
    data = json.loads((finished / "report.json").read_text())
    assert data["claimed"]["time_to_target_s"] == 59.8 and data["claimed"]["top1"] is None
    assert data["emulated"]["time_to_target_s"] == result()["emulated_s"] and "top1" not in data["emulated"]
    assert data["measured"]["time_to_target_s"] == 26.0 and data["measured"]["top1"] == 0.9861
    assert data["reached"] is True and data["weights_sha256"] == "ab" * 32


def test_every_condition_of_the_digits_run_differs_from_the_claims(finished):
    differs = {c["name"]: c["differs"] for c in report([finished]).runs[0].data["conditions"]}
    assert {name for name, value in differs.items() if value} == {
        "data set",
        "image size",
        "classes",
        "model",
        "chips",
        "computed by",
        "target",
        "accuracy",
        "clock",
    }
    assert {name for name, value in differs.items() if value is None} == {
        "global batch",
        "epochs",
        "optimizer",
        "precision",
    }


def test_a_run_like_the_record_differs_only_in_what_computed_it_and_the_clock():
    """The neighbour publishes everything: nothing may be left over when all of it is equal."""
    run = result(
        chips=1024,
        global_batch_size=32768,
        epochs=56.0,
        precision="fp16",
        top1=0.7601,
        target_top1=0.759,
        data=IMAGENET_DATA,
        model={"depth": 50, "stem": "imagenet", "parameters": 25_557_032},
    )
    equal = config(optim={"_target_": "train.optim.lars.LARS"}, chip={"name": "Ascend 910 Pro A"})
    found = {c.name: c.differs for c in conditions(equal, run, NEIGHBOURS[0])}
    assert {name for name, value in found.items() if value is not False} == {"computed by", "clock"}
    for change, name in (
        ({"chips": 512}, "chips"),
        ({"global_batch_size": 16384}, "global batch"),
        ({"epochs": 60.0}, "epochs"),
        ({"precision": "bf16"}, "precision"),
        ({"target_top1": 0.749}, "target"),
        ({"top1": 0.7589}, "accuracy"),
        ({"data": {**IMAGENET_DATA, "image_size": 192}}, "image size"),
        ({"data": {**IMAGENET_DATA, "num_train": 50}}, "data set"),
        ({"model": {"depth": 50, "stem": "small", "parameters": 25_557_032}}, "model"),
    ):
        changed = {c.name for c in conditions(equal, {**run, **change}, NEIGHBOURS[0]) if c.differs}
        assert name in changed and changed <= {name, "computed by", "clock", "accuracy"}, change


def test_neighbours_notes_contract_and_first_step_are_told(finished):
    text = report([finished]).text
    assert "38.76 s, 1,024 x Ascend 910 Pro A" in text and "70.42 s, 2,048 x NVIDIA V100" in text
    for told in (
        "32 px images: chip rate extrapolated",
        "- block: 8",
        "First training step after 7.5 s",
        "- ray: 2.50 s",
    ):
        assert told in text


def test_without_the_target_there_is_no_time_to_target(tmp_path):
    run = make_run(tmp_path / "short", result_changes={"reached": False, "top1": 0.43, "status": "done"})
    made = report([run])
    assert row(made.text, "time to target") == ["59.80 s", "not reached", "not reached"]
    assert row(made.text, "clock when the run ended")[1:] == ["0.50 s", "26.00 s"]
    assert "The target of 97.00 % was NOT reached: 43.00 % top-1" in made.text
    assert (
        made.runs[0].data["emulated"]["time_to_target_s"] is None
        and made.runs[0].data["measured"]["time_to_target_s"] is None
    )


def test_a_failed_run_says_so_with_its_error(tmp_path):
    changes = {
        "reached": False,
        "top1": None,
        "status": "failed",
        "error": "worker 1: RuntimeError: boom",
        "restarts": 2,
    }
    run = make_run(tmp_path / "failed")
    (run / "result.json").write_text(json.dumps(result(**changes)))
    text = report([run]).text
    assert "Status: failed." in text and "Error: worker 1: RuntimeError: boom" in text and "Restarts: 2." in text
    assert "no evaluation was made" in text and "98.61" not in text


def test_a_killed_run_is_told_from_its_metrics(tmp_path):
    run = make_run(tmp_path / "killed")
    for name in ("result.json", "env.json"):
        (run / name).unlink()
    text = report([run]).text
    assert "Status: unfinished." in text and "after 4 epochs (12 steps)" in text and "NOT reached: 98.61 %" in text
    (run / "metrics.jsonl").unlink()
    assert "no evaluation was made" in report([run]).text


def test_a_claim_that_is_not_in_the_records_is_refused(tmp_path):
    run = make_run(tmp_path / "other", claim={"record": "nobody-2019", "neighbours": []})
    with pytest.raises(ValueError, match="nobody-2019"):
        report([run])


def test_no_accuracy_is_rounded_up_to_one_that_was_not_reached():
    assert as_percent(0.758999) == "75.89 %" and as_percent(0.759) == "75.90 %"
    assert as_percent(0.97) == "97.00 %" and as_percent(0.57) == "57.00 %"


def test_what_rounds_to_no_seconds_has_no_sign():
    assert (as_seconds(-1e-9), as_seconds(-1234.5)) == ("0.00 s", "-1,234.50 s")


def test_command_prints_every_report(finished, tmp_path):
    other = make_run(tmp_path / "digits-2")
    done = run_command(finished, other)
    assert done.returncode == 0 and "# Run digits-1" in done.stdout and "# Run digits-2" in done.stdout
    assert done.stdout == report([finished, other], RECORDS).text


def test_command_refuses_what_is_no_run_folder(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.yaml").write_text("{[")
    for folder, problem in (
        ("missing", "there is no such folder"),
        ("foreign", "no config.yaml"),
        ("broken", "not the configuration"),
    ):
        done = run_command(tmp_path / folder)
        assert done.returncode == 2 and folder in done.stderr and problem in done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert run_command().returncode == 2


def test_nothing_is_written_if_one_folder_is_wrong(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError):
        report([run, tmp_path / "missing"])
    assert not (run / "report.md").exists()


def test_loads_neither_torch_nor_ray():
    code = "import sys, train.report; sys.exit(bool({'torch', 'ray', 'tensorboard', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_claims_record_is_the_one_of_the_59_8_seconds():
    assert (CLAIM.seconds, CLAIM.chips, CLAIM.target_top1) == (59.8, 1024, 75.9)


FAULTS = {
    "label": "emulated",
    "cost_s": 30.5,
    "recovery_s": 27.25,
    "slower_steps_s": 3.25,
    "num_events": 3,
    "lost_chips": 8,
    "events": [
        {
            "fault": "slow chip",
            "step": 4,
            "epoch": 1.0,
            "until_step": 9,
            "chips": [5, 5],
            "what": "computes 2 times as long",
        }
        | {"repeated_steps": 0, "recovery_s": 0.0},
        {
            "fault": "lost host",
            "step": 7,
            "epoch": 2.0,
            "until_step": None,
            "chips": [8, 15],
            "what": "the others go on",
        }
        | {"repeated_steps": 1, "recovery_s": 27.25},
    ],
}


def test_faults_are_told_with_their_cost_and_recovery(tmp_path):
    run = make_run(tmp_path / "broken", result_changes={"faults": FAULTS, "images": 6000})
    made = report([run]).runs[0]
    text = made.markdown
    assert "They added 30.50 s to the emulated clock: 27.25 s until all worked again, 3.25 s" in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| " in line]
    assert ["4", "1", "slow chip", "5", "computes 2 times as long, to step 8", "0", "-"] in cells
    assert ["7", "2", "lost host", "8 to 15", "the others go on", "1", "27.25 s"] in cells
    assert "\nand 1 more.\n" in text and "their share of every batch: 8." in " ".join(text.split())
    assert made.data["faults"] == FAULTS
    assert row(text, "images/s") == ["-", f"{6000 / result()['emulated_s']:,.0f}", f"{6000 / 26:,.0f}"]


def test_runs_stand_beside_each_other_and_share_no_column(finished, tmp_path):
    broken = make_run(
        tmp_path / "broken", result_changes={"faults": FAULTS, "reached": False, "weights_sha256": "cd" * 32}
    )
    assert "# Beside each other" not in report([finished]).text
    text = report([finished, broken]).text.partition("# Beside each other\n\n")[2]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    first, second = (dict(zip(head, cells, strict=True)) for cells in rows)
    assert all(word.count("emulated") + word.count("measured") == 1 for word in head if word not in NEITHER)
    assert (first["faults"], second["faults"]) == ("none", "slow chip, lost host")
    assert (first["to target, emulated"], second["to target, emulated"]) == ("0.50 s", "not reached")
    assert (first["added by faults, emulated"], second["added by faults, emulated"]) == ("-", "30.50 s")
    assert second["to recover, emulated"] == "27.25 s" and second["weights"] == "cd" * 6


NEITHER = ("run", "faults", "epochs", "weights")
