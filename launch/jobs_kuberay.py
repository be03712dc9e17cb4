"""Jobs of Kubernetes: a RayJob of KubeRay (v1.5.1 or newer, for tokens), handed to kubectl.

KubeRay makes the Ray cluster of the job, submits the run to it and takes it down afterwards; a failed attempt is made
again on a new cluster, where the run goes on from its checkpoint. HTTPMode: the entrypoint reaches the head as it is,
and not through the shell of a submitting pod.
Source: https://docs.ray.io/en/latest/cluster/kubernetes/: getting-started/rayjob-quick-start, user-guides/kuberay-auth
"""

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version

from launch.job_folder import Job, State, now
from launch.placement import resource_name
from launch.run import emulated_machine
from launch.supervise import STOP_GRACE_S
from train.config import ConfigError
from train.memory import RAY_WORKERS
from train.metrics import write_aside

PYTHON = "python"
SHARES_RUN_ROOT = False  # a volume of the pods, which this machine need not see
WAIT_S = 600
"""For the pods: images are pulled."""
ATTEMPTS_AFTER_THE_FIRST = 2
KEPT_S = 600
"""The Ray cluster after the job's end, so that its log can be read."""
HEAD_CPUS, HEAD_MEMORY_GBYTES = 1, 4
"""The head carries no worker, only Ray's own and the run's controller."""
POLL_S = 2.0
TIMEOUT_S = 60.0
"""Of kubectl."""

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
"""Of Kubernetes' objects (RFC 1123 label)."""
LONGEST_NAME = 47
"""Of a RayJob: KubeRay appends to it what its clusters and pods are called."""
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
EXIT_CODE = re.compile(r"exit code (-?\d+)")


def overrides(config: dict) -> list[str]:
    """What the run needs besides the user's own overrides: its own cluster, all of it, and to go on when retried."""
    if config["cluster"]["address"] is not None:
        problem = f"{config['cluster']['address']} with launch=kuberay: the job has a cluster of its own; leave it out"
        raise ConfigError("cluster.address", problem)
    nodes = config["launch"]["nodes"] + 1  # and the head
    goes_on = ["resume=auto"] if config["resume"] is None else []
    return ["cluster.address=auto", f"cluster.nodes={nodes}", f"cluster.wait_s={WAIT_S}", *goes_on]


def prepare(config: dict) -> dict:
    """Refuses what can't be, before anything is written; returns what job.json shall say besides."""
    launch = config["launch"]
    for key, what in (("image", "a container image in which this program is installed"), ("volume", "a volume claim")):
        if launch[key] is None:
            raise ConfigError(f"launch.{key}", f"null: launch=kuberay needs {what}")
    if not IMAGE.fullmatch(launch["image"]):
        raise ConfigError("launch.image", f"{launch['image']!r} is no name of an image, such as registry/name:tag")
    for key in ("volume", "namespace"):
        if not NAME.fullmatch(launch[key]):
            raise ConfigError(f"launch.{key}", f"{launch[key]!r} is no name that Kubernetes takes: a-z, 0-9 and '-'")
    if launch["apply"] and shutil.which("kubectl") is None:
        remedy = "launch.apply=false only writes the manifest, for a machine that has it"
        raise ConfigError("launch", f"kuberay: there is no kubectl on this machine; {remedy}")
    machine = emulated_machine(config)
    hosts = -(-machine.mesh.num_hosts // launch["nodes"])
    chips = {resource_name(machine.chip.name): hosts * machine.mesh.chips_per_host}
    name = kubernetes_name(config["run"])
    asked = {key: launch[key] for key in "nodes minutes image volume namespace cpus gpus memory_gbytes apply".split()}
    return {"kuberay": asked | {"name": name, "run_root": config["run_root"]}, "resources": chips}


def kubernetes_name(job: str) -> str:
    """A job's id as Kubernetes takes it: lower case, '-' for what it does not know."""
    name = re.sub(r"[^a-z0-9]+", "-", job.lower()).strip("-")
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        problem = f"{job!r} makes no name of a RayJob: at most {LONGEST_NAME} letters, digits and '-'"
        raise ConfigError("job", f"{problem}; give job= another id")
    return name


def manifest(job_id: str, command: list[str], asked: dict, resources: dict[str, int]) -> dict:
    """The RayJob. `asked`: what `prepare` returned under kuberay; `resources`: the emulated chips of each node."""
    # KubeRay puts the value on a command line as it is, hence the quotes inside (user-guides/config, rayStartParams)
    chips = json.dumps(json.dumps(resources))
    deadline = {} if asked["minutes"] is None else {"activeDeadlineSeconds": 60 * asked["minutes"]}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": asked["name"],
            "namespace": asked["namespace"],
            "annotations": {"resnet-record/job": job_id},
        },
        "spec": {
            "entrypoint": shlex.join(command),
            "jobId": job_id,
            "submissionMode": "HTTPMode",
            "backoffLimit": ATTEMPTS_AFTER_THE_FIRST,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_S,
            **deadline,
            "runtimeEnvYAML": f'env_vars: {{RAY_JOB_STOP_WAIT_TIME_S: "{STOP_GRACE_S:.0f}"}}\n',
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod("ray-head", asked, HEAD_CPUS, 0, HEAD_MEMORY_GBYTES),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": asked["nodes"],
                        "minReplicas": asked["nodes"],
                        "maxReplicas": asked["nodes"],
                        "rayStartParams": {"resources": chips},
                        "template": _pod("ray-worker", asked, asked["cpus"], asked["gpus"], asked["memory_gbytes"]),
                    }
                ],
            },
        },
    }


def _pod(name: str, asked: dict, cpus: int, gpus: int, memory_gbytes: int) -> dict:
    """A pod whose requests are its limits, so that none is evicted for another's sake; it mounts the runs."""
    amounts = {"cpu": str(cpus), "memory": f"{memory_gbytes}G"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    mounts = {"runs": asked["run_root"], "shared-memory": "/dev/shm"}
    container = {
        "name": name,
        "image": asked["image"],
        "env": [{"name": key, "value": value} for key, value in RAY_WORKERS.items()],
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
    }
    volumes = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": asked["volume"]}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    return {"spec": {"containers": [container], "volumes": volumes}}


def start(job: Job) -> None:
    """Writes rayjob.yaml into the job's folder, and hands it to kubectl where `launch.apply` says so."""
    from yaml import safe_dump

    facts, path = job.facts, job.folder / "rayjob.yaml"
    made = manifest(job.id, facts["command"], facts["kuberay"], facts["resources"])
    write_aside(path, safe_dump(made, sort_keys=False, allow_unicode=True))
    if not facts["kuberay"]["apply"]:
        job.add(to_do=f"kubectl create -f {shlex.quote(str(path))}")
        return
    said = _kubectl("create", "-f", str(path))
    if "AlreadyExists" in said.stderr:
        problem = f"namespace {facts['kuberay']['namespace']} has a RayJob {facts['kuberay']['name']} already"
        raise ConfigError("job", f"{job.id}: {problem}; take another id")
    if said.returncode:
        raise RuntimeError(f"kubectl: {_line(said.stderr)}")


def state(job: Job) -> State:
    ended = job.ended_as()
    if ended is not None:
        return ended
    if not job.facts["kuberay"]["apply"] and shutil.which("kubectl") is None:
        return State("PENDING", note=f"only written so far: {job.facts['to_do']}")
    known = _known(job)
    if known is None:
        if "to_do" in job.facts:
            return State("PENDING", note=f"only written so far: {job.facts['to_do']}")
        return State("LOST", note="Kubernetes does not know it any more")
    if known.get("startTime"):
        job.add(started_at=known["startTime"])
    stands = standing(known, "stop_asked_at" in job.facts)
    if not stands.ended:
        return stands
    if head := _head(known):
        log = _kubectl(*_on_head(job, head), "ray", "job", "logs", job.id)
        if log.returncode == 0:
            write_aside(job.log, log.stdout)
    return job.end(stands, known.get("endTime") or now())


def standing(known: dict, stop_asked: bool) -> State:
    """How a RayJob with this `status` stands. Only its deployment's status says that no attempt follows."""
    deployment, status = known.get("jobDeploymentStatus", ""), known.get("jobStatus", "")
    message = " ".join(known.get("message", "").split())
    if deployment not in ("Complete", "Failed"):
        tried = f"attempt {known['failed'] + 1}" if known.get("failed") else ""
        return State("RUNNING" if status == "RUNNING" else "PENDING", note=tried)
    if status == "SUCCEEDED":
        return State("SUCCEEDED", 0)
    code = EXIT_CODE.search(message)
    note = ", ".join(filter(None, [known.get("reason", ""), message[:200]])) if code is None else ""
    stopped = status == "STOPPED" or stop_asked
    return State("STOPPED" if stopped else "FAILED", int(code[1]) if code else None, note)


def follow(job: Job) -> Iterator[str]:
    """The log from its beginning; while the job waits or runs, to its end."""
    while (stands := state(job)).status == "PENDING":
        if "to_do" in job.facts and stands.note:
            raise RuntimeError(f"job {job.id}: {stands.note}")
        time.sleep(POLL_S)
    if stands.ended:
        yield job.log.read_text(encoding="utf-8")
        return
    head = _head(_known(job) or {})
    if head is None:
        raise RuntimeError(f"job {job.id}: its head pod is not known yet; ask again in a while")
    command = ["kubectl", *_on_head(job, head), "ray", "job", "logs", "--follow", job.id]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as logs:
        yield from logs.stdout or ()
    while not state(job).ended:
        time.sleep(POLL_S)


def stop(job: Job) -> State:
    """TERM through the head: the run saves and leaves; before it runs, and where that fails, the RayJob is deleted."""
    job.add(stop_asked_at=now())
    head = _head(_known(job) or {})
    if head is not None and state(job).status == "RUNNING":
        _kubectl(*_on_head(job, head), "ray", "job", "stop", "--no-wait", job.id)
        deadline = time.monotonic() + STOP_GRACE_S + TIMEOUT_S
        while not (stands := state(job)).ended and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if stands.ended:
            return stands
    asked = job.facts["kuberay"]
    said = _kubectl("delete", "rayjob", asked["name"], "--namespace", asked["namespace"], "--ignore-not-found")
    if said.returncode:
        raise RuntimeError(f"kubectl: {_line(said.stderr)}")
    return job.end(State("STOPPED", note="its RayJob was deleted"), now())


def _known(job: Job) -> dict | None:
    """The RayJob's status; None where there is no such RayJob. RuntimeError where Kubernetes does not answer."""
    asked = job.facts["kuberay"]
    said = _kubectl("get", "rayjob", asked["name"], "--namespace", asked["namespace"], "--output", "json")
    if "NotFound" in said.stderr:
        return None
    if said.returncode:
        raise RuntimeError(f"job {job.id}: kubectl: {_line(said.stderr)}")
    return json.loads(said.stdout).get("status", {})


def _head(known: dict) -> str | None:
    return known.get("rayClusterStatus", {}).get("head", {}).get("podName") or None


def _on_head(job: Job, pod: str) -> list[str]:
    """kubectl's words before a command that runs in the head's pod; KubeRay has put the token there."""
    return ["exec", pod, "--namespace", job.facts["kuberay"]["namespace"], "--container", "ray-head", "--"]


def _kubectl(*words: str) -> subprocess.CompletedProcess:
    command = ["kubectl", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise RuntimeError("there is no kubectl on this machine; ask from one that has it") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"kubectl gave no answer within {TIMEOUT_S:.0f} s") from error


def _line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
