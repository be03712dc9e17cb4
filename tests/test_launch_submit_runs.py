"""Jobs as commands: a run as a process that outlives the command, and as a job of a Ray head that the test starts."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from launch import jobs_ray
from launch import submit as submitting
from launch.compose import compose
from launch.job_folder import ROOT, Job, State
from launch.jobs_ray import UPLOADED
from scripts.ray_head import ray_head

SMALL = "model=resnet_cifar20 mesh=atlas800 chip_batch_size=4 workers=1".split()
PATIENCE_S = 180.0


def submit(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.submit", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)


def submit_here(*words: str) -> subprocess.CompletedProcess:
    """The same in this process. Not for a Ray head: its token is read once in the life of a process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["submit", *words]):
        status = submitting.main()
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def until(holds, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S:.0f} s"
        time.sleep(0.1)


def stands(run_root: Path, name: str, call=submit) -> str:
    return json.loads(call(f"run_root={run_root}", "action=status", f"job={name}", "format=json").stdout)["status"]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The job server's address."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        ray_head(Path(folder), cpus=4, chips=16) as (address, environment),
        pytest.MonkeyPatch.context() as patched,
    ):
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patched.delenv(name)
        for name in [name for name in environment if name.startswith("RAY_")]:
            patched.setenv(name, environment[name])
        yield address


def test_a_run_outlives_the_command(head: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    here = f"run_root={runs}", "job=one"
    first = submit(*SMALL, *here, "max_steps=1", "cluster.address=auto")  # the head: saves a start of Ray
    assert first.returncode == 0, first.stderr
    assert f"job      one (local), in {runs}/jobs/one\n" in first.stdout
    assert stands(runs, "one", submit_here) == "RUNNING"

    again = submit_here(*SMALL, *here, "max_steps=2")
    assert again.returncode == 0 and again.stdout.startswith("job one (local): RUNNING for ")
    assert again.stderr == "launch.submit: job one exists; nothing was submitted\n"

    followed = submit_here(*here, "action=logs")
    assert followed.returncode == 0 and "# Run one" in followed.stdout, followed.stdout
    assert stands(runs, "one", submit_here) == "SUCCEEDED"
    job = Job(runs / "jobs" / "one")
    assert (job.folder / "command.txt").read_text().endswith(f" cluster.address=auto run_root={runs} run=one\n")
    done = json.loads((runs / "one" / "result.json").read_text())
    assert (done["status"], done["steps"]) == ("done", 1)
    promised, kept = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (job.folder, runs / "one"))
    assert promised == kept

    assert submit_here(*SMALL, *here).stdout.startswith("job one (local): SUCCEEDED after ")
    assert submit_here(*here, "action=fetch", f"launch.fetch_to={tmp_path}").returncode == 0
    assert (tmp_path / "one" / "result.json").read_bytes() == (runs / "one" / "result.json").read_bytes()


def test_a_run_as_a_job_of_a_ray_head(head: str, tmp_path: Path) -> None:
    here = f"run_root={tmp_path}", "job=one"
    there = "launch=ray_job", f"launch.address={head}"
    first = submit(*SMALL, *here, *there, "seed=1", "epochs=1000", "target_top1=1")
    assert first.returncode == 0, first.stderr
    assert f"job      one (ray_job), in {tmp_path}/jobs/one\n" in first.stdout
    again = submit(*SMALL, *here, *there)
    assert again.returncode == 0 and again.stdout.split()[3] in ("PENDING", "PENDING,", "RUNNING"), again.stdout
    metrics = tmp_path / "one" / "metrics.jsonl"
    until(lambda: metrics.exists() and '"kind": "step"' in metrics.read_text(), "training step")
    follow = [sys.executable, "-m", "launch.submit", *here, "action=logs"]
    follower = subprocess.Popen(follow, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    while not follower.stdout.readline().startswith("mesh "):
        assert follower.poll() is None
    stopped = submit(*here, "action=stop")
    assert stopped.returncode == 0 and stopped.stdout.startswith("job one (ray_job): STOPPED after "), stopped.stderr
    rest, _ = follower.communicate(timeout=PATIENCE_S)
    assert follower.returncode == 1 and "Status: interrupted" in rest, "it saved, reported and left"

    assert json.loads((tmp_path / "one" / "result.json").read_text())["status"] == "interrupted"
    assert list((tmp_path / "one" / "checkpoints").rglob("*.pt"))
    facts = Job(tmp_path / "jobs" / "one").facts
    assert (facts["submission_id"], facts["address"], facts["status"]) == ("one", head, "STOPPED")
    settled = [f"run_root={tmp_path}", "run=one", "cluster.address=auto", "job=one"]
    assert facts["command"] == [
        "python",
        "-m",
        "launch.run",
        *SMALL,
        "seed=1",
        "epochs=1000",
        "target_top1=1",
        *settled,
    ]
    assert "# Run one" in (tmp_path / "jobs" / "one" / "log.txt").read_text(), "the log is in the job's folder now"


@pytest.mark.filterwarnings("ignore:ssl=None:DeprecationWarning")  # Ray's client
def test_a_job_of_the_head_sees_the_program_alone_and_its_exit_code_counts(head: str, tmp_path: Path) -> None:
    def started(run_root: str, code: str) -> Job:
        job = Job(tmp_path / run_root / "jobs" / "small")
        facts = {"kind": "ray_job", "address": head, "run_folder": str(tmp_path / "small")}
        assert job.create(compose(), ["python", "-c", code], facts)
        jobs_ray.start(job)
        return job

    code = "import os, sys; print(sorted(os.listdir()), '$HOME', sys.prefix); sys.exit(2)"
    job = started("a", code)
    log = "".join(jobs_ray.follow(job))
    assert f"{sorted(UPLOADED)} $HOME {sys.prefix}\n" in log, "no shell has touched the command"
    assert jobs_ray.state(job) == State("FAILED", 2)
    assert job.log.read_text() == log
    assert submit(f"run_root={tmp_path}/a", "action=logs", "job=small").returncode == 2

    again = started("b", code)
    assert jobs_ray.state(again) == State("FAILED", 2), "submitted from elsewhere: the same job, not another one"
    with pytest.raises(ValueError, match="has another job of that id"):
        started("c", "pass")


def test_a_head_that_forgets_a_job_or_wants_another_token(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path / "jobs" / "gone")
    facts = {"kind": "ray_job", "address": head, "run_folder": str(tmp_path / "gone")}
    assert job.create(compose(), ["python"], facts)
    assert stands(tmp_path, "gone") == "LOST"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    refused = submit(*SMALL, f"run_root={tmp_path}/new", "launch=ray_job", f"launch.address={head}")
    assert refused.returncode == 2 and "no token, or not the one" in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
