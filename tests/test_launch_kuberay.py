"""Jobs of Kubernetes: the manifest against KubeRay's schema, what is refused, and all else with a fake kubectl."""

import copy
import json
import shlex
import sys
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml
from launch_samples import HOSTILE, fake

from launch import jobs_kuberay, submit
from launch.compose import compose
from launch.job_folder import Job, State
from launch.jobs_kuberay import kubernetes_name, manifest, standing
from train.config import ConfigError

SCHEMA = json.loads(Path(__file__).with_name("kuberay_rayjob.schema.json").read_text())
SMALL = ["mesh=atlas900_64", "chip_batch_size=4", "workers=2"]
THERE = ["launch=kuberay", "launch.image=registry:5000/resnet-record:0.1.0", "launch.volume=runs"]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all of PATH: what is put there is kubectl, which notes its words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def kubectl(folder: Path, does: str = "true") -> None:
    fake(folder, "kubectl", f"printf '%s\\n' \"$*\" >> '{folder}/told'\n{does}")


def told(folder: Path) -> list[str]:
    return (folder / "told").read_text().splitlines()


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["submit", *words])
    return submit.main()


@cache
def base() -> dict:
    return compose([*SMALL, *THERE, "run=one"])


def prepared(**launch: object) -> dict:
    config = base()
    return jobs_kuberay.prepare(config | {"launch": config["launch"] | launch, "run_root": "/runs"})


def made(*command: str, **launch: object) -> dict:
    facts = prepared(apply=False, **launch)
    return manifest("one", list(command), facts["kuberay"], facts["resources"])


def submitted(tmp_path: Path) -> Job:
    job = Job(tmp_path / "jobs" / "one")
    assert job.create(base(), ["python"], {"kind": "kuberay", "run_folder": str(tmp_path / "one")} | prepared())
    jobs_kuberay.start(job)
    return job


def test_the_schema_is_one_and_refuses_what_kuberay_would_not_take():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    right = made()
    jsonschema.validate(right, SCHEMA)

    def wrong(change) -> None:
        broken = copy.deepcopy(right)
        change(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)

    cluster = lambda it: it["spec"]["rayClusterSpec"]  # noqa: E731
    wrong(lambda it: it["spec"].update(entryPoint="python"))
    wrong(lambda it: it["spec"].update(submissionMode="HttpMode"))
    wrong(lambda it: it["spec"].update(backoffLimit="2"))
    wrong(lambda it: it["metadata"].update(name="My_job"))
    wrong(lambda it: cluster(it).pop("headGroupSpec"))
    wrong(lambda it: cluster(it)["authOptions"].update(mode="on"))
    wrong(lambda it: cluster(it)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}))
    wrong(lambda it: cluster(it)["workerGroupSpecs"][0].pop("minReplicas"))
    container = lambda it: cluster(it)["headGroupSpec"]["template"]["spec"]["containers"][0]  # noqa: E731
    wrong(lambda it: container(it)["resources"]["limits"].update(memory="8 GB"))
    wrong(lambda it: container(it)["volumeMounts"][0].pop("mountPath"))


@pytest.mark.parametrize("words", [{}, {"minutes": 30, "gpus": 2, "nodes": 4, "cpus": 16}])
def test_the_manifest_is_what_the_schema_takes_and_what_was_asked_for(words):
    job = made("python", **words)
    jsonschema.validate(job, SCHEMA)
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    nodes = 4 if words else 2
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [nodes] * 3
    offered = json.loads(shlex.split(workers["rayStartParams"]["resources"])[0])
    assert offered == {"ascend910": 64 // nodes}, "it stands on a command line as it is"
    assert (cluster["authOptions"], cluster["rayVersion"]) == ({"mode": "token"}, "2.60.0")
    assert spec.get("activeDeadlineSeconds") == (1800 if words else None)
    head = cluster["headGroupSpec"]["template"]["spec"]
    worker = workers["template"]["spec"]
    assert worker["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == ("2" if words else None)
    for pod in (head, worker):
        assert {"name": "RAY_LD_PRELOAD_ON_WORKERS", "value": "1"} in pod["containers"][0]["env"]
        assert {"name": "runs", "mountPath": "/runs"} in pod["containers"][0]["volumeMounts"]
        assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_command_is_one_string_that_a_shell_takes_apart_again(hostile):
    command = ("python", "-m", "launch.run", hostile, f"run_root={hostile}")
    job = yaml.safe_load(yaml.safe_dump(made(*command)))
    jsonschema.validate(job, SCHEMA)
    assert tuple(shlex.split(job["spec"]["entrypoint"])) == command


@pytest.mark.parametrize(
    "launch, says",
    [
        ({"image": None}, "launch.image: null: launch=kuberay needs a container image"),
        ({"volume": None}, "launch.volume: null: launch=kuberay needs a volume claim"),
        ({"image": "a b"}, "launch.image: 'a b' is no name of an image"),
        ({"image": "--privileged"}, "launch.image: '--privileged' is no name of an image"),
        ({"namespace": "../x"}, "launch.namespace: '../x' is no name that Kubernetes takes"),
        ({"namespace": "--all"}, "launch.namespace: '--all' is no name that Kubernetes takes"),
        ({"volume": "A_b"}, "launch.volume: 'A_b' is no name that Kubernetes takes"),
    ],
)
def test_what_can_not_be_is_refused(launch, says):
    with pytest.raises(ConfigError) as refusal:
        prepared(**launch)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    "words, says",
    [
        ("job=one cluster.address=h:1", "cluster.address: h:1 with launch=kuberay: the job has a cluster of its own"),
        ("job=one launch.memory_gbytes=0", "launch.memory_gbytes: 0 must be at least 1"),
        (f"job={'a' * 60}", "makes no name of a RayJob: at most 47 letters"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(words, says, fakes, tmp_path, monkeypatch, capsys):
    kubectl(fakes)
    assert call(monkeypatch, *SMALL, *THERE, f"run_root={tmp_path / 'runs'}", *words.split()) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_names_are_those_of_kubernetes():
    assert kubernetes_name("digits_atlas-20260101-120000") == "digits-atlas-20260101-120000"
    assert kubernetes_name("A.b__C-") == "a-b-c"
    with pytest.raises(ConfigError, match="makes no name"):
        kubernetes_name("x" * 48)


def test_without_kubectl_it_is_refused_and_where_only_the_manifest_is_wanted_it_is_written(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [*SMALL, *THERE, "job=one", f"run_root={tmp_path / 'runs'}"]
    assert call(monkeypatch, *words) == 2
    assert "there is no kubectl on this machine; launch.apply=false only writes the manifest" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert call(monkeypatch, *words, "launch.apply=false") == 0
    job = Job(tmp_path / "runs" / "jobs" / "one")
    path = job.folder / "rayjob.yaml"
    assert f"to do    kubectl create -f {path}\n" in capsys.readouterr().out
    written = yaml.safe_load(path.read_text())
    jsonschema.validate(written, SCHEMA)
    given = shlex.split(written["spec"]["entrypoint"])
    assert given == job.facts["command"] and given[:3] == ["python", "-m", "launch.run"]
    assert given[-4:] == "cluster.address=auto cluster.nodes=3 cluster.wait_s=600 resume=auto".split()
    assert jobs_kuberay.state(job) == State("PENDING", None, f"only written so far: kubectl create -f {path}")


def test_a_manifest_is_handed_over_once(fakes, tmp_path):
    kubectl(fakes)
    job = submitted(tmp_path)
    assert told(fakes) == [f"create -f {job.folder}/rayjob.yaml"]
    kubectl(fakes, "echo 'rayjobs.ray.io \"one\" AlreadyExists' >&2; exit 1")
    with pytest.raises(ConfigError, match="job: one: namespace default has a RayJob one already; take another id"):
        jobs_kuberay.start(job)
    kubectl(fakes, "echo 'The connection to the server was refused' >&2; exit 1")
    with pytest.raises(RuntimeError, match="kubectl: The connection to the server was refused"):
        jobs_kuberay.start(job)


@pytest.mark.parametrize(
    "known, expected",
    [
        ({}, State("PENDING")),
        ({"jobDeploymentStatus": "Initializing"}, State("PENDING")),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, State("RUNNING")),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "failed": 1}, State("PENDING", None, "attempt 2")),
        ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, State("PENDING")),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, State("SUCCEEDED", 0)),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, State("STOPPED")),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "message": "command failed with exit code 2, last",
            },
            State("FAILED", 2),
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "too long"},
            State("FAILED", None, "DeadlineExceeded, too long"),
        ),
    ],
)
def test_how_a_rayjob_stands(known, expected):
    assert standing(known, stop_asked=False) == expected


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "startTime": "2026-01-01T00:00:00Z"}
RUNNING |= {"rayClusterStatus": {"head": {"podName": "one-head"}}}


def test_logs_status_and_stop_go_through_the_heads_pod(fakes, tmp_path, monkeypatch, capsys):
    kubectl(fakes)
    job = submitted(tmp_path)
    ended = RUNNING | {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "endTime": "2026-01-01T00:01:00Z"}
    does = f"""case "$*" in
        "get "*) if [ -e '{fakes}/ended' ]; then echo '{json.dumps({"status": ended})}'
                 else echo '{json.dumps({"status": RUNNING})}'; fi ;;
        *"job logs --follow"*) echo following; touch '{fakes}/ended' ;;
        *"job logs"*) echo whole log ;;
    esac"""
    kubectl(fakes, does)
    assert jobs_kuberay.state(job) == State("RUNNING")
    here = f"run_root={tmp_path}", "job=one"
    assert call(monkeypatch, "action=logs", *here) == 0 and capsys.readouterr().out == "following\n"
    on_head = "exec one-head --namespace default --container ray-head -- ray job"
    assert f"{on_head} logs --follow one" in told(fakes) and f"{on_head} logs one" in told(fakes)
    assert job.log.read_text() == "whole log\n"
    assert call(monkeypatch, "action=status", *here) == 0
    assert capsys.readouterr().out.startswith("job one (kuberay): SUCCEEDED after 60 s")


def test_a_job_that_does_not_run_yet_is_stopped_by_deleting_it(fakes, tmp_path):
    kubectl(fakes)
    job = submitted(tmp_path)
    kubectl(fakes, """[ "$1" != get ] || echo '{"status": {}}'""")
    assert jobs_kuberay.stop(job) == State("STOPPED", None, "its RayJob was deleted")
    assert told(fakes)[-1] == "delete rayjob one --namespace default --ignore-not-found"


def test_a_rayjob_that_is_gone_is_lost_and_a_silent_cluster_is_no_end(fakes, tmp_path):
    kubectl(fakes)
    job = submitted(tmp_path)
    kubectl(fakes, "echo 'Error from server (NotFound): rayjobs.ray.io \"one\" not found' >&2; exit 1")
    assert jobs_kuberay.state(job).status == "LOST"
    kubectl(fakes, "echo 'Unable to connect to the server' >&2; exit 1")
    with pytest.raises(RuntimeError, match="job one: kubectl: Unable to connect to the server"):
        jobs_kuberay.state(job)
