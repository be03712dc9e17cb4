"""The command as a user gives it: each test is a process of its own with a Ray of its own."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from launch_samples import TINY, trained_here
from processes import Command, on_loopback, wait_for

from train.checkpoint_files import list_checkpoints

FOLDER = """
config.yaml env.json metrics.jsonl tb/measured tb/emulated tb/page checkpoints mlperf.log trace.json result.json
report.md report.json
""".split()
RESULT = """
status error experiment top1 target_top1 reached epochs steps measured_s wall_s emulated_s images_per_s chips workers
chip_batch_size global_batch_size weights_sha256 restarts claim_s precision numerics device threads seed num_train
num_eval time_to_first_step_s first_step model data notes
""".split()
PHASES = ["configuration", "Ray", "worker processes", "import", "model and data", "group", "run folder", "first step"]
ENDLESS = "epochs=1000"
PATIENCE_S = 10.0  # that a busy machine may cost beside what the law allows

Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path, ray_folder: Path) -> Iterator[Start]:
    """Starts `python -m launch.run` on a tiny run below tmp_path/runs; what still runs at the end is killed."""
    commands = []

    def start(*overrides: str) -> Command:
        where = tmp_path / f"command{len(commands)}"
        where.mkdir()
        words = ["launch.run", *TINY, f"run_root={tmp_path / 'runs'}", *overrides]
        commands.append(Command(words, where, ray_folder))
        return commands[-1]

    yield start
    for command in commands:
        command.end()


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def told(run: Path, event: str) -> list[dict]:
    path = run / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [found for found in events if found["event"] == event]


def checkpoints(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def until_it_trains(command: Command, run: Path) -> None:
    assert wait_for(lambda: rows(run) or command.process.poll() is not None)
    assert command.process.poll() is None, command.stderr


def lose_worker_1(command: Command, run: Path, end: signal.Signals) -> float:
    """It is struck while it trains, and a new one joins and trains; when that was, in Unix time."""
    struck_at = time.time()
    os.kill(read(run / "env.json")["placement"][1]["pid"], end)
    assert wait_for(lambda: len(told(run, "training")) == 2 or command.process.poll() is not None)
    joined_at = told(run, "training")[-1]["step"]
    assert wait_for(lambda: rows(run)[-1]["step"] > joined_at or command.process.poll() is not None)
    return struck_at


def check_the_loss(run: Path, kind: str, struck_at: float, again_s: float = math.inf) -> None:
    """It has cost no step: within `again_s` worker 0 trained on with all hosts, until the new worker 1 had its own."""
    result = read(run / "result.json")
    assert (result["status"], result["error"], result["worker_restarts"]) == ("interrupted", None, 1)
    (loss,) = result["losses"]
    assert (loss["worker"], loss["kind"], loss["source"], loss["steps_repeated"]) == (1, kind, "memory", 0)
    assert struck_at < loss["detected_at"] < loss["training_at"] < struck_at + again_s + PATIENCE_S
    assert [event["members"] for event in told(run, "training")] == [[0], [0, 1]]
    hosts = [[worker["hosts"] for worker in event["placement"]] for event in told(run, "regrouped")]
    assert hosts == [[[0, 7]], [[0, 3], [4, 7]]]


def test_a_run_that_loses_a_worker_and_that_ctrl_c_stops_is_resumed_on_other_workers_and_reported(start, tmp_path):
    run = tmp_path / "runs/first"
    command = start("run=first", "workers=2", ENDLESS)
    until_it_trains(command, run)
    struck_at = lose_worker_1(command, run, signal.SIGKILL)
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does: the whole group, Ray's processes too
    assert command.wait() == 1
    check_the_loss(run, "died", struck_at)
    stopped, environment = read(run / "result.json"), read(run / "env.json")
    assert (stopped["status"], stopped["error"], stopped["workers"]) == ("interrupted", None, 2)
    assert checkpoints(run)[-1] == f"step_{stopped['steps']:08d}.pt"
    assert "stopping after the step at hand" in command.stderr and "Traceback" not in command.stdout + command.stderr
    assert [worker["hosts"] for worker in environment["placement"]] == [[0, 3], [4, 7]]

    assert {address for _, address in command.listening if not on_loopback(address)} == set()
    listeners = {pid for pid, _ in command.listening}
    assert {worker["pid"] for worker in environment["placement"]} <= listeners
    assert len(listeners) >= 5  # these two, the raylet, the GCS, the driver
    assert command.left_over() == []

    steps = stopped["steps"] + 2
    again = start("resume=auto", "workers=1", f"max_steps={steps}")
    assert again.wait() == 0, again.stderr
    assert f"resumed  from step_{stopped['steps']:08d}.pt" in again.stdout
    assert all((run / name).exists() for name in FOLDER), sorted(run.iterdir())
    assert list((run / "tb/measured").iterdir()) and list((run / "tb/emulated").iterdir())
    assert checkpoints(run)[-1] == f"step_{steps:08d}.pt"
    result, environment = read(run / "result.json"), read(run / "env.json")
    assert set(RESULT) <= set(result)
    assert (result["status"], result["error"], result["steps"], result["workers"]) == ("done", None, steps, 1)
    assert result["claim_s"] == 59.8 and result["restarts"] == 1
    assert list(result["first_step"]) == PHASES and min(result["first_step"].values()) >= 0
    assert sum(result["first_step"].values()) == pytest.approx(result["time_to_first_step_s"])
    assert 0 < result["measured_s"] and 0 < result["wall_s"]
    assert {"versions", "contract", "placement", "machine"} <= set(environment)
    assert environment["contract"]["allocator"] == "jemalloc"  # which Ray brings
    assert yaml.safe_load((run / "config.yaml").read_text())["run"] == "first"
    heading = next(line for line in again.stdout.splitlines() if line.count("|") == 5)
    assert [cell.strip() for cell in heading.split("|")[2:5]] == ["claimed", "emulated", "measured"]
    assert (run / "report.md").read_text().strip() in again.stdout
    points = [(row["kind"], row["step"]) for row in rows(run)]
    assert [step for kind, step in points if kind == "step"] == list(range(1, steps + 1))
    assert len(points) == len(set(points))
    whole = trained_here([*TINY, ENDLESS, f"max_steps={steps}"], tmp_path / "whole")
    assert result["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_a_run_of_its_own_ends_in_less_than_its_wall_time_and_a_named_one_is_resumed(start, tmp_path):
    run = tmp_path / "runs/first"
    command = start("run=first", "workers=2", "max_steps=2")
    assert command.wait() == 0, command.stderr
    result = read(run / "result.json")
    assert (result["status"], result["restarts"], checkpoints(run)) == ("done", 0, ["step_00000002.pt"])
    assert 0 < result["measured_s"] < result["wall_s"]
    again = start("resume=first", "workers=1", "max_steps=4")
    assert again.wait() == 0, again.stderr
    resumed = read(run / "result.json")
    assert (resumed["steps"], resumed["workers"], resumed["restarts"]) == (4, 1, 1)
    assert resumed["weights_sha256"] == trained_here([*TINY, "max_steps=4"], tmp_path / "whole")["weights_sha256"]


@pytest.mark.slow
def test_ctrl_c_to_the_command_alone_saves_too(start, tmp_path):
    run = tmp_path / "runs/stopped"
    command = start("run=stopped", "workers=1", ENDLESS)
    until_it_trains(command, run)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 1, command.stderr
    result = read(run / "result.json")
    assert result["status"] == "interrupted" and checkpoints(run)[-1] == f"step_{result['steps']:08d}.pt"
    assert "Traceback" not in command.stderr
    assert command.left_over() == []
    whole = trained_here([*TINY, ENDLESS, f"max_steps={result['steps']}"], tmp_path / "whole")
    assert result["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("end, kind, again_s", [(signal.SIGSTOP, "hung", 7.0), (signal.SIGTERM, "left", 10.0)])
def test_a_worker_that_hangs_or_gets_notice_costs_no_step_and_no_bit(start, tmp_path, end, kind, again_s):
    """As one that is killed, above."""
    run = tmp_path / "runs/lost"
    command = start("run=lost", "workers=2", "hang_timeout_s=3", ENDLESS)
    until_it_trains(command, run)
    struck_at = lose_worker_1(command, run, end)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 1, command.stderr
    check_the_loss(run, kind, struck_at, again_s)
    steps = read(run / "result.json")["steps"]
    points = [(row["kind"], row["step"]) for row in rows(run)]
    assert [step for kind, step in points if kind == "step"] == list(range(1, steps + 1))
    whole = trained_here([*TINY, ENDLESS, f"max_steps={steps}"], tmp_path / "whole")
    assert read(run / "result.json")["weights_sha256"] == whole["weights_sha256"]
    assert "Traceback" not in command.stderr
    assert command.left_over() == []


def test_without_a_worker_left_and_without_restarts_the_run_fails_and_says_so(start, tmp_path):
    run = tmp_path / "runs/failed"
    command = start("run=failed", "workers=1", "max_restarts=0", ENDLESS)
    until_it_trains(command, run)
    os.kill(read(run / "env.json")["placement"][0]["pid"], signal.SIGKILL)
    assert command.wait() == 1
    result = read(run / "result.json")
    error = "0 of at least 1 worker(s) (min_workers) left, and all 0 restarts (max_restarts) are used up"
    assert (result["status"], result["error"], result["weights_sha256"]) == ("failed", error, None)
    assert f"launch.run: the run failed: {error}" in command.stderr.splitlines()
    assert command.left_over() == []


def test_ctrl_c_while_ray_starts_leaves_nothing(start, tmp_path):
    command = start("run=early", "workers=1")
    assert wait_for(lambda: command.started)  # the first process of Ray
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.wait() == 1
    assert command.stderr == "launch.run: interrupted\n"
    assert not (tmp_path / "runs").exists()
    assert command.left_over() == []
