"""Jobs of Slurm: the script, what is refused, how ends are read; with Slurm's daemons (mark slurm) the whole life."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from launch_samples import HOSTILE, fake, trained_here
from processes import ROOT, environment

from launch import jobs_slurm, nodes, slurm_node, submit
from launch.compose import compose
from launch.job_folder import Job, State
from launch.jobs_slurm import ending
from scripts.slurm_here import missing, slurm
from train.config import ConfigError

SMALL = ["model=resnet_cifar20", "data.image_size=8", "chip_batch_size=2", "mesh=atlas900_64", "workers=2"]


@cache
def composed(words: tuple[str, ...]) -> dict:
    return compose([*SMALL, "launch=slurm", *words])


def made(run_root: Path, *words: str, name: str = "one") -> Job:
    """A job's folder as submit makes it, with nothing started."""
    config = composed(words) | {"run_root": str(run_root)}
    job = Job(run_root / "jobs" / name)
    command = [sys.executable, "-m", "launch.run", *submit.words_for_run(list(words), jobs_slurm.overrides(config))]
    facts = {"kind": "slurm", "run_folder": str(run_root / name)} | jobs_slurm.prepare(config)
    assert job.create(config, command, facts)
    return job


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH but the shell's own: what is put there is Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    fake(folder, "sbatch", "echo 7")
    return folder


def test_the_script_asks_for_its_nodes_and_goes_on_when_requeued(fakes, tmp_path):
    job = made(tmp_path, "launch.nodes=3", "launch.minutes=90", "launch.sbatch={gres: 'gpu:4', exclusive: ''}")
    text = jobs_slurm.script(job)
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    fixed = ["nodes=3", "ntasks-per-node=1", "signal=B:USR1@120"]
    assert options == [*fixed, "time=90", "gres=gpu:4", "exclusive", "requeue", "open-mode=append"]
    assert """'{"ascend910": 24}'""" in text, "8 hosts of 8 chips on 3 nodes: 3 hosts at most on each"
    settled = "cluster.address=auto cluster.nodes=3 cluster.wait_s=300 resume=auto"
    assert job.facts["command"][-4:] == settled.split()
    assert "RAY_AUTH_MODE=token" in text and subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize("hostile", HOSTILE)
def test_the_script_runs_the_command_alone_whatever_is_in_it_and_passes_its_exit_code_on(
    hostile, fakes, tmp_path, monkeypatch
):
    fake(fakes, "python", f"[ $1 != -m ] || {{ printf '%s\\0' \"$@\" > '{tmp_path}/told'; exit 3; }}")
    fake(fakes, "srun", 'echo 127.0.0.1:1 > "${@: -3:1}/head-7-0.txt"; exec sleep 60')
    monkeypatch.setattr(jobs_slurm, "PYTHON", str(fakes / "python"))
    job = made(tmp_path / f"runs {hostile}", "seed=1")
    command = [str(fakes / "python"), "-m", "launch.run", hostile, f"run_root={hostile}"]
    job.add(command=command)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    script = jobs_slurm.script(job)
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "told").read_text().split("\0")[:-1] == command[1:]
    assert (job.folder / "exit_code").read_text() == "3\n"
    assert not (job.folder / "ray_token").exists() and not (job.folder / "head-7-0.txt").exists()
    assert not [path for path in tmp_path.rglob("x") if path.name == "x"]


@pytest.mark.parametrize(
    "words, says",
    [
        (["cluster.address=h:1"], "cluster.address: h:1 with launch=slurm: the job starts its own Ray"),
        (["launch.sbatch={wrap: 'touch x'}"], "launch.sbatch.wrap: 'touch x' is not handed on"),
        (["launch.sbatch={output: x}"], "launch.sbatch.output: 'x' is not handed on"),
        (["launch.sbatch={Gres: x}"], "launch.sbatch.Gres: 'x' is not handed on"),
        (['launch.sbatch={comment: "a\\nb"}'], "is not handed on"),
        (["launch.nodes=0"], "launch.nodes: 0 must be at least 1"),
        (["launch.minutes=-5"], "launch.minutes: -5 must be at least 1"),
    ],
)
def test_what_can_not_be_is_refused(words, says, fakes, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        made(tmp_path / "runs", *words)
    assert says in str(refusal.value) and not (tmp_path / "runs").exists()


def test_without_slurm_and_where_slurm_refuses_nothing_is_left(fakes, tmp_path, monkeypatch, capsys):
    words = [*SMALL, "launch=slurm", "job=one", f"run_root={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["submit", *words])
    fake(fakes, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    assert submit.main() == 2
    assert capsys.readouterr().err.endswith("launch: slurm: sbatch: error: invalid partition specified: x\n")
    assert not list((tmp_path / "runs" / "jobs").iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main() == 2 and "there is no sbatch on this machine" in capsys.readouterr().err


def test_sbatch_gets_paths_as_arguments_and_its_number_is_kept(fakes, tmp_path):
    fake(fakes, "sbatch", f"printf '%s\\n' \"$@\" > '{tmp_path}/told'; echo '42;cluster'")
    job = made(tmp_path / "a 100% b")
    jobs_slurm.start(job)
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["--parsable", "--job-name=one", f"--output={tmp_path}/a 100%% b/jobs/one/log.txt", told[-1]]
    assert told[-1] == str(job.folder / "job.sbatch") and job.facts["slurm_id"] == 42


KNOWN = "JobId=7 JobName=one JobState={state} Reason={reason} Restarts={restarts} ExitCode={code} StartTime={start} "
KNOWN += "EndTime=2026-01-01T00:01:00 Command=/x JobState=FAKE/job.sbatch"


@pytest.mark.parametrize(
    "slurm_says, left, expected",
    [
        (("PENDING", "Resources", 0, "0:0"), None, State("PENDING", None, "waits: Resources")),
        (("PENDING", "BeginTime", 2, "0:0"), "1", State("PENDING", None, "queued again 2 time(s), waits: BeginTime")),
        (("RUNNING", "None", 1, "0:0"), None, State("RUNNING", None, "queued again 1 time(s)")),
        (("COMPLETING", "None", 0, "0:0"), "0", State("RUNNING")),
        (("COMPLETED", "None", 0, "0:0"), "0", State("SUCCEEDED", 0)),
        (("FAILED", "NonZeroExitCode", 0, "2:0"), "2", State("FAILED", 2)),
        (("TIMEOUT", "TimeLimit", 0, "0:15"), None, State("FAILED", None, "Slurm: TIMEOUT")),
        (("NODE_FAIL", "NodeDown", 0, "0:0"), None, State("FAILED", None, "Slurm: NODE_FAIL")),
        (("CANCELLED", "None", 0, "0:15"), None, State("STOPPED", None, "Slurm: CANCELLED")),
        (None, "0", State("SUCCEEDED", 0)),
        (None, "137", State("FAILED", -9)),
        (None, None, State("LOST", None, "Slurm does not know it any more, and its script left no exit code")),
    ],
)
def test_how_a_job_stands(slurm_says, left, expected, fakes, tmp_path):
    job = made(tmp_path)
    job.add(slurm_id=7)
    if slurm_says is None:
        fake(fakes, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    else:
        state, reason, restarts, code = slurm_says
        start = "Unknown" if state == "PENDING" else "2026-01-01T00:00:00"
        said = KNOWN.format(state=state, reason=reason, restarts=restarts, code=code, start=start)
        fake(fakes, "scontrol", f"echo '{said}'")
    if left is not None:
        (job.folder / "exit_code").write_text(f"{left}\n")
    assert jobs_slurm.state(job) == expected
    assert ("ended_at" in job.facts) == (expected.ended and expected.status != "LOST")


def test_a_stop_that_was_asked_for_is_no_failure():
    assert ending(1, "FAILED", stop_asked=True) == State("STOPPED", 1)
    assert ending(0, "COMPLETED", stop_asked=True) == State("SUCCEEDED", 0)
    assert ending(143, "CANCELLED", stop_asked=True) == State("STOPPED", -15, "Slurm: CANCELLED")


def test_a_slurm_that_does_not_answer_is_an_error_of_ours_and_no_end_of_the_job(fakes, tmp_path):
    job = made(tmp_path)
    job.add(slurm_id=7)
    fake(fakes, "scontrol", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(RuntimeError, match="job one: slurm_load_jobs error: Unable to contact slurm controller"):
        jobs_slurm.state(job)
    assert "status" not in job.facts


def test_ray_starts_with_the_nodes_address_and_a_free_port_and_each_attempt_has_its_own_head():
    allocation = {"SLURM_JOB_ID": "123456"}
    start = slurm_node.command("10.0.0.2", '{"ascend910": 8}', "16", "--address=10.0.0.1:23456")
    assert {"--node-ip-address=10.0.0.2", "--num-cpus=16", '--resources={"ascend910": 8}'} < set(start)
    assert start[-1] == "--address=10.0.0.1:23456"
    port = slurm_node.free_port("127.0.0.1", 123456)
    with socket.create_server(("127.0.0.1", port)):
        assert slurm_node.free_port("127.0.0.1", 123456) > port >= 23456
    first, again = ({**allocation, "SLURM_RESTART_COUNT": str(n)} for n in (0, 1))
    assert slurm_node.note(Path("/j"), allocation) == slurm_node.note(Path("/j"), first)
    assert slurm_node.note(Path("/j"), first) != slurm_node.note(Path("/j"), again), "a requeued job has another head"
    assert nodes.own_address("lo") == "127.0.0.1"


@pytest.fixture
def own_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_ray_that_does_not_start_is_tried_again_and_term_ends_it(own_handler, tmp_path, monkeypatch):
    count = f"echo >> '{tmp_path}/tries'; [ $(wc -l < '{tmp_path}/tries') = 2 ] && exit 0; exit 1"
    assert slurm_node.keep(["bash", "-c", count]) == 0, "the second attempt stands"
    assert slurm_node.keep(["bash", "-c", "exit 3"]) == 3, "three attempts at most"
    monkeypatch.setattr(slurm_node, "START_S", 0.0)
    assert slurm_node.keep(["bash", "-c", f"echo >> '{tmp_path}/late'; exit 4"]) == 4
    assert (tmp_path / "late").read_text() == "\n", "what has run for long is not started again"
    code = "from launch.slurm_node import keep; import sys; sys.exit(keep(['sleep', '60']) != -15)"
    ray = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(tmp_path))
    until(lambda: Path(f"/proc/{ray.pid}/task/{ray.pid}/children").read_text().strip(), "sleep", 60.0)
    ray.terminate()
    assert ray.wait(60) == 0


needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing() or os.getuid()), reason="needs root, slurm-wlm and munge (apt-get install)"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with slurm(nodes=2) as environment:
        yield environment


def command(cluster: dict[str, str], *words: str, program: str = "launch.submit") -> subprocess.CompletedProcess:
    ours = environment(Path("/tmp")) | cluster
    ours.pop("RAY_TMPDIR")
    call = [sys.executable, "-m", program, *words] if program.startswith("launch") else [program, *words]
    return subprocess.run(call, cwd=ROOT, env=ours, capture_output=True, text=True, timeout=500)


def until(holds, what: str, patience_s: float = 400.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.3)


def rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.slurm
@needs_slurm[1]
def test_a_run_on_two_slurm_nodes_is_that_of_one_worker(cluster, tmp_path):
    here = f"run_root='{tmp_path / 'my runs'}'", "job=one"
    words = [*SMALL, "max_steps=3", "hang_timeout_s=300"]
    first = command(cluster, "launch=slurm", *words, *here)
    assert first.returncode == 0, first.stderr
    again = command(cluster, "launch=slurm", *words, *here)
    assert again.returncode == 0 and "job one exists; nothing was submitted" in again.stderr
    followed = command(cluster, "action=logs", *here)
    assert followed.returncode == 0 and "# Run one" in followed.stdout, followed.stdout + followed.stderr
    assert "exposed: workers listen on " in followed.stdout and "Ray asks for a token" in followed.stdout
    assert command(cluster, "action=status", *here).stdout.startswith("job one (slurm): SUCCEEDED after ")
    assert command(cluster, "action=fetch", *here, f"launch.fetch_to={tmp_path}").returncode == 0
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    placed = json.loads((tmp_path / "one" / "env.json").read_text())["placement"]
    assert len({worker["node"] for worker in placed}) == 2
    assert result["weights_sha256"] == trained_here([*SMALL, "max_steps=3"], tmp_path / "alone")["weights_sha256"]
    job = Job(tmp_path / "my runs" / "jobs" / "one")
    assert not (job.folder / "ray_token").exists() and not list(job.folder.glob("head-*"))


@pytest.mark.slurm
@needs_slurm[1]
def test_notice_of_the_time_limit_saves_requeues_and_goes_on_and_stop_saves(cluster, tmp_path):
    here = f"run_root={tmp_path}", "job=long"
    words = [*SMALL, "epochs=100000", "target_top1=1", "hang_timeout_s=300", "launch.minutes=30"]
    assert command(cluster, "launch=slurm", *words, *here).returncode == 0
    job, run = Job(tmp_path / "jobs" / "long"), tmp_path / "long"
    number = str(job.facts["slurm_id"])
    until(lambda: rows(run) > 2, "step")
    command(cluster, "--batch", "--signal=USR1", number, program="scancel")
    until(lambda: "PENDING" in command(cluster, "action=status", *here).stdout, "requeue")
    saved = json.loads((run / "result.json").read_text())
    assert saved["status"] == "interrupted"
    assert list(run.rglob(f"step_{saved['steps']:08d}.pt"))
    assert "queued again 1 time(s)" in command(cluster, "action=status", *here).stdout
    command(cluster, "update", f"JobId={number}", "StartTime=now", program="scontrol")  # else Slurm waits two minutes
    before = rows(run)
    until(lambda: rows(run) > before + 2, "step after the requeue")
    stopped = command(cluster, "action=stop", *here)
    assert stopped.returncode == 0 and stopped.stdout.startswith("job long (slurm): STOPPED after "), stopped.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["restarts"] == 1 and result["steps"] > saved["steps"]
    assert f"resumed  from step_{saved['steps']:08d}.pt" in job.log.read_text()
    assert command(cluster, "action=logs", *here).returncode == 1
