"""A finished run on another mesh: the same clock on its own machine, the same accuracy everywhere."""

import json

import pytest
import yaml

from launch.compose import compose
from launch.emulate import answer
from train import emulator, retime
from train.metrics import JsonlSink
from train.sim.clock import EmulatedClock

STEPS, STEPS_PER_EPOCH, TOP1 = 12, 3, {3: 0.2, 6: 0.6, 9: 0.99, 12: 0.97}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the rows that a trainer's clock gives; its configuration lacks newer keys."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    folder.mkdir()
    config = compose(["experiment=digits_atlas", "network=alpha_beta", "chip.jitter=0.02"])
    old = {key: value for key, value in config.items() if key not in ("out", "trace")}
    (folder / "config.yaml").write_text(yaml.safe_dump(old))
    (folder / "result.json").write_text(json.dumps({"num_train": 1437, "num_eval": 360, "data": {"num_classes": 10}}))
    made = emulator.build(config, num_train=1437, num_eval=360, num_classes=10)
    step, sink = made.step(256), JsonlSink(folder)
    clock = EmulatedClock(step, made.eval_s(360), made.startup_s)
    for number in range(1, STEPS + 1):
        clock.advance_step()
        values = {"train/loss": 1 / number, "emulated/step_s": step.step_s, "measured/step_s": 1.0}
        sink.log(row("step", number, clock, values))
        if number in TOP1:
            clock.advance_eval()
            sink.log(row("eval", number, clock, {"eval/top1": TOP1[number], "emulated/eval_s": clock.eval_s}))
    sink.close()
    return folder


def row(kind, step, clock, values) -> dict:
    times = {"measured_s": 2.0 * step, "emulated_s": clock.seconds}
    return {"kind": kind, "step": step, "epoch": step / STEPS_PER_EPOCH, **times, "values": values}


def priced(capsys, *words: str) -> dict:
    assert answer(["format=json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_on_its_own_machine_the_clock_is_its_own(run, capsys):
    result = priced(capsys, f"run={run}")
    for point in result["curve"]:
        assert point["emulated_s"] == pytest.approx(point["before_s"], rel=1e-12)
    assert result["time_to_target_s"] == result["curve"][2]["emulated_s"] < result["time_to_train_s"]
    assert (result["network"], result["straggler"]["jitter"]) == ("alpha_beta", 0.02)


def test_another_mesh_brings_its_chip_and_moves_time_alone(run, capsys):
    result = priced(capsys, f"run={run.name}", f"run_root={run.parent}", "mesh=dgx_a100")
    assert (result["chip"], result["chips"], result["global_batch_size"]) == ("NVIDIA A100-SXM4-80GB", 8, 256)
    assert [point["top1"] for point in result["curve"]] == list(TOP1.values())
    assert [point["epoch"] for point in result["curve"]] == [1, 2, 3, 4]
    assert result["curve"][0]["emulated_s"] == pytest.approx(3 * result["step_s"] + result["eval_s"] / 4)
    assert result["reached"] and result["startup_s"] == 0  # network=alpha_beta knows none for this chip


def test_one_value_of_its_machine_can_change(run, capsys):
    slow = priced(capsys, f"run={run}", "chip.jitter=0.5", "mesh.topology.roce.gbytes_per_s=1")
    assert slow["straggler"]["jitter"] == 0.5 and slow["network"] == "alpha_beta"
    assert slow["time_to_train_s"] > slow["before"]["seconds"]


def test_a_sweep_leaves_a_folder_a_machine_for_tensorboard(run, tmp_path, capsys):
    assert answer(["-m", f"run={run}", "mesh=atlas900_64,dgx_a100", f"out={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    head, first = shown[shown.index("what if") :].splitlines()[1:3]
    assert head.endswith("target s") and first.split()[1] == "atlas900_64"
    for mesh in ("atlas900_64", "dgx_a100"):
        folder = tmp_path / "out" / f"mesh.{mesh}"
        assert [path.name for path in (folder / "tb").iterdir()] == ["emulated"]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == STEPS + len(TOP1) and not any("measured_s" in row for row in rows)
        assert not [tag for row in rows for tag in row["values"] if tag.startswith("measured/")]
        assert rows[0]["values"]["train/loss"] == 1
    assert answer([f"run={tmp_path / 'out' / 'mesh.dgx_a100'}"]) == 2
    assert f"give the run that it comes from, {run}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        (["seed=1"], "seed: is the run's own; with run= change mesh, chip, collective"),
        (["run=nowhere"], "run: nowhere: no run folder"),
        (["chip.jiter=1"], "chip.jiter: no such key; did you mean chip.jitter?"),
        (["faults=slow_link", "faults.link=nvlink"], "faults.link=nvlink"),
    ],
)
def test_what_a_run_cannot_be_asked_is_one_line(run, words, says, capsys):
    assert answer([f"run={run}", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and says in printed.err and len(printed.err.splitlines()) == 1


def test_a_trained_run_is_never_written_over(run, capsys):
    before = (run / "metrics.jsonl").read_text()
    assert answer([f"run={run}", "format=json", f"out={run}"]) == 2
    assert "holds a run; name another folder" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before and not (run / "tb").exists()


def test_a_run_without_rows_is_refused(run):
    made = emulator.build(compose(["experiment=digits_atlas"]))
    with pytest.raises(ValueError, match="nothing to re-time"):
        retime.result([], [], made, 0.9)
    with pytest.raises(ValueError, match="no time"):
        retime.own_clock({"step": 3})


def test_a_run_is_re_timed_on_a_machine_that_breaks(run, capsys):
    sound = priced(capsys, f"run={run}")
    spare = {"at_steps": 7, "at_epochs": "null", "detect_s": 3, "restart_s": 4, "checkpoint_steps": 5}
    broken = priced(
        capsys, f"run={run}", "faults=dead_chip", *(f"faults.{key}={value}" for key, value in spare.items())
    )
    assert broken["faults"]["cost_s"] == pytest.approx(7 + 2 * sound["step_s"])
    assert broken["time_to_train_s"] == pytest.approx(sound["time_to_train_s"] + 7 + 2 * sound["step_s"])
    assert sum(broken[part] for part in PARTS) == pytest.approx(broken["time_to_train_s"])
    assert [point["top1"] for point in broken["curve"]] == [point["top1"] for point in sound["curve"]]


PARTS = "compute_s exposed_comm_s straggler_s input_s other_s eval_s startup_s".split()
