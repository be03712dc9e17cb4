"""Jobs without training: overrides handed on, ids, refusals, supervised processes, fetching, what is uploaded."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import job_folder, jobs_local, submit
from launch.compose import compose
from launch.job_folder import ROOT, Job, State, check_run_root, new_id
from launch.jobs_ray import UPLOADED, copy_package
from launch.supervise import ending, identity
from train.config import ConfigError

SMALL = ["mesh=atlas800", "chip_batch_size=4", "workers=1"]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["submit", *words])
    return submit.main()


def made(run_root: Path, name: str, code: str) -> Job:
    """A job that runs Python code in the place of launch.run."""
    job = Job(run_root / "jobs" / name)
    facts = {"kind": "local", "run_folder": str(run_root / name)}
    assert job.create(compose(), [sys.executable, "-c", code], facts)
    return job


def until(holds, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "text",
    ["/tmp/a-b_c.d", "/a b", "/it's", "/a\\", "/a\\'b", "/a\\\\'", "/a,b", "/a=b", "20240101", "1e5", "null", "NaN"]
    + ["/é", "[a]", "/~", "/#x", "a:b", "-a", "/'\\'\\ '", "$(x)", '/a"b'],
)
def test_a_quoted_string_comes_through_hydra_unchanged(text: str) -> None:
    assert compose([f"run_root={submit._quoted(text)}"])["run_root"] == text


def test_overrides_are_handed_on_as_given_but_for_those_settled_here() -> None:
    given = "+seed=1 launch=ray_job ++launch.address=x run_root=a data=cifar10 ~faults job=a action=submit".split()
    assert submit.words_for_run(given, ["run_root=/b"]) == ["seed=1", "data=cifar10", "~faults", "run_root=/b"]


@pytest.mark.parametrize(
    "words, says",
    [
        ("job=../x", "job: '../x': an id is"),
        ("job=.x", "job: '.x': an id is"),
        ("job='a b'", "job: 'a b': an id is"),
        ("job='\"$(touch x)\"'", "an id is"),
        ("job=jobs", "job: 'jobs': an id is"),
        ("run=verdict", "run: 'verdict': an id is"),
        (f"job={'a' * 101}", "up to 100 letters"),
        ("job=a run=b", "run: b with job=a: a job's run has its id"),
        ("job=there", "run=there: "),
        ("workers=9", "workers=9 "),
        ("action=status", "job: action=status needs the id of a job; in "),
        ("action=logs job=nope", "job: no job nope; in "),
        ("action=begin", "action: 'begin' is not one of submit, status, logs, stop, fetch"),
        ("launch=ray_job launch.address=127.0.0.1:8265", "no address of a job server, such as http://127.0.0.1:8265"),
        ("launch=ray_job launch.address=http://127.0.0.1:1", "http://127.0.0.1:1: no job server answers"),
        ("launch=ray_job cluster.address=127.0.0.1:6379", "cluster.address: 127.0.0.1:6379 with launch=ray_job"),
        (f"launch=ray_job run_root={ROOT}/conf/runs", "is uploaded; take a folder outside of it"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "there").mkdir()
    assert call(monkeypatch, f"run_root={tmp_path}", *SMALL, *shlex.split(words)) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and says in err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_unknown_id_names_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made(tmp_path, "one", "pass")
    assert call(monkeypatch, f"run_root={tmp_path}", "action=stop", "job=two") == 2
    assert capsys.readouterr().err == f"launch.submit: job: no job two; in {tmp_path}/jobs there is one\n"


def test_an_id_is_given_once(tmp_path: Path) -> None:
    job = made(tmp_path, "one", "pass")
    before = {path.name: path.read_bytes() for path in job.folder.iterdir()}
    assert sorted(before) == ["command.txt", "config.yaml", "job.json", "log.txt"]
    assert not job.create({}, ["other"], {})
    assert {path.name: path.read_bytes() for path in job.folder.iterdir()} == before
    assert [path.name for path in job.folder.parent.iterdir()] == ["one"], "something was left aside"

    first = new_id(tmp_path, "digits")
    (tmp_path / first).mkdir()
    assert new_id(tmp_path, "digits") != first


def test_a_submitted_job_gets_absolute_paths_and_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(jobs_local, "start", lambda job: None)
    (tmp_path / "here").mkdir()
    (tmp_path / "images").mkdir()
    tmp_path /= "here"
    monkeypatch.chdir(tmp_path)
    given = [*SMALL, "run_root=my runs", "data=cifar10", "data.root=../images", "seed=3", "job=one"]
    assert call(monkeypatch, *given) == 0
    follow = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert follow == ["follow", "python", "-m", "launch.submit", "action=logs", "job=one", "run_root='my runs'"]
    job = Job(tmp_path / "my runs" / "jobs" / "one")
    own = [*SMALL, "data=cifar10", "seed=3", f"data.root={tmp_path}/../images"]
    own += [f"run_root='{tmp_path}/my runs'", "run=one"]
    assert job.facts["command"] == [sys.executable, "-m", "launch.run", *own]
    assert yaml.safe_load((job.folder / "config.yaml").read_text()) == compose(own)
    assert job.facts["run_folder"] == f"{tmp_path}/my runs/one"


def test_a_sweep_is_one_job_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_local, "start", lambda job: None)
    assert call(monkeypatch, "-m", *SMALL, f"run_root={tmp_path}", "seed=1,2") == 0
    commands = [path.read_text() for path in sorted(tmp_path.glob("jobs/*/command.txt"))]
    assert [f"seed={seed}" in command for seed, command in zip((1, 2), commands, strict=True)] == [True, True]


def test_a_job_that_can_not_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Job) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(jobs_local, "start", broken)
    assert call(monkeypatch, *SMALL, f"run_root={tmp_path}", "job=one") == 1
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.parametrize(
    "exit_code, stop_asked, status, note",
    [
        (0, False, "SUCCEEDED", ""),
        (0, True, "SUCCEEDED", ""),
        (1, True, "STOPPED", ""),
        (2, False, "FAILED", ""),
        (-9, False, "FAILED", "killed by SIGKILL"),
        (-15, True, "STOPPED", "killed by SIGTERM"),
    ],
)
def test_how_a_process_ended(exit_code: int, stop_asked: bool, status: str, note: str) -> None:
    assert ending(exit_code, stop_asked) == State(status, exit_code, note)


def test_a_supervised_process_leaves_its_log_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    code = "import sys, os; print('grüße', os.getsid(0) == os.getpid(), sys.stdin.read()); sys.exit(2)"
    job = made(tmp_path, "one", code)
    jobs_local.start(job)
    assert "".join(jobs_local.follow(job)) == "grüße True \n"
    assert jobs_local.state(job) == State("FAILED", 2)
    assert jobs_local.stop(job) == State("FAILED", 2), "stopping what has ended changes nothing"
    assert call(monkeypatch, f"run_root={tmp_path}", "action=logs", "job=one") == 2, "the job's own exit status"
    out, err = capfd.readouterr()
    assert out == "grüße True \n" and "exit code 2" in err
    facts = job.facts
    assert facts["submitted_at"] <= facts["started_at"] <= facts["ended_at"]


def test_stop_is_handed_on_and_lets_the_run_leave_by_itself(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(1)); print('ready'); time.sleep(60)"
    job = made(tmp_path, "one", code)
    jobs_local.start(job)
    assert jobs_local.state(job).status == "RUNNING"
    until(lambda: job.log.read_text() == "ready\n")
    assert jobs_local.stop(job) == State("STOPPED", 1)
    assert identity(job.facts["pid"]) is None


def test_what_does_not_leave_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    child = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {deaf!r}])"
    code = f"{child}; print(child.pid, flush=True); {deaf}"
    job = made(tmp_path, "one", code)
    supervise = f"from launch.supervise import *; supervise(Job(Path({str(job.folder)!r})), grace_s=0.3)"
    supervisor = subprocess.Popen([sys.executable, "-c", supervise], cwd=ROOT)
    until(lambda: job.log.read_text().count("ready") == 2)
    grandchild = next(int(line) for line in job.log.read_text().splitlines() if line.isdigit())
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 0
    assert jobs_local.state(job) == State("STOPPED", -9, "killed by SIGKILL")
    until(lambda: identity(grandchild) is None)


def test_a_run_ends_with_its_supervisor_and_the_job_counts_as_lost(tmp_path: Path) -> None:
    job = made(tmp_path, "one", "import time; time.sleep(60)")
    jobs_local.start(job)
    os.kill(job.facts["supervisor"]["pid"], signal.SIGKILL)
    until(lambda: jobs_local.state(job).status == "LOST")
    until(lambda: identity(job.facts["pid"]) is None)


def test_another_process_of_the_same_number_is_not_taken_for_the_job(tmp_path: Path) -> None:
    job = made(tmp_path, "one", "pass")
    mine = identity(os.getpid())
    job.add(supervisor=mine)
    assert jobs_local.state(job).status == "RUNNING"
    job.add(supervisor=mine | {"started_ticks": mine["started_ticks"] - 1})
    assert jobs_local.state(job).status == "LOST"
    job.add(supervisor=mine | {"boot": "an earlier one"})
    assert jobs_local.state(job).status == "LOST"


def test_fetch_copies_all_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job = made(tmp_path, "one", "pass")
    words = f"run_root={tmp_path}", "action=fetch", "job=one", f"launch.fetch_to={tmp_path}/to"
    job.add(supervisor=identity(os.getpid()))
    assert call(monkeypatch, *words) == 2 and "is RUNNING: fetch it when it has ended" in capsys.readouterr().err
    job.end(State("SUCCEEDED", 0), "2026-01-01T00:00:00+00:00")
    assert call(monkeypatch, *words) == 2 and "there is no run folder" in capsys.readouterr().err

    run = tmp_path / "one" / "checkpoints"
    run.mkdir(parents=True)
    (run / "step.pt").write_bytes(b"weights")
    assert call(monkeypatch, *words) == 0
    assert (tmp_path / "to" / "one" / "checkpoints" / "step.pt").read_bytes() == b"weights"
    assert capsys.readouterr().out == f"{tmp_path}/to/one (copied from {tmp_path}/one)\n"
    assert call(monkeypatch, *words) == 2 and f"{tmp_path}/to/one exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["one"]


def test_status_is_one_line_or_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job = made(tmp_path, "one", "pass")
    job.add(started_at="2026-01-01T00:00:00+00:00")
    job.end(State("FAILED", 2), "2026-01-01T00:01:30+00:00")
    assert call(monkeypatch, f"run_root={tmp_path}", "action=status", "job=one") == 0
    assert capsys.readouterr().out == f"job one (local): FAILED after 90 s, exit code 2, run folder {tmp_path}/one\n"
    assert call(monkeypatch, f"run_root={tmp_path}", "action=status", "job=one", "format=json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["job"], told["status"], told["exit_code"], told["log"]) == ("one", "FAILED", 2, str(job.log))


def test_only_the_program_is_uploaded(tmp_path: Path) -> None:
    copy_package(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(UPLOADED)
    assert (tmp_path / "launch" / "submit.py").exists() and (tmp_path / "conf" / "config.yaml").exists()
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_run_looks_for_its_job_in_run_root_and_never_writes_into_what_was_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, "one", "pass")
    config = {"run_root": str(tmp_path), "job": "one"}
    check_run_root(config)
    check_run_root(config | {"job": None})
    with pytest.raises(ConfigError, match="run_root: .*: holds no job two on this machine, .* both machines share"):
        check_run_root(config | {"job": "two"})
    uploaded = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    monkeypatch.setattr(job_folder, "ROOT", uploaded)
    with pytest.raises(ConfigError, match="lies inside the uploaded program, which Ray deletes"):
        check_run_root({"run_root": str(uploaded / "runs"), "job": None})
    check_run_root(config)
