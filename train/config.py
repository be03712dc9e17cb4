"""The typed top level of a configuration: every key, its type, its meaning, and the checks that need no other part.

Nodes with a `_target_` stay dictionaries here: their constructors are their schema (launch/signature reads them).
"""

import difflib
import types
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Self, Union, get_args, get_origin


class ConfigError(ValueError):
    """Something in a configuration is wrong: `key` is the dotted key, `problem` says what, and what would be right."""

    def __init__(self, key: str, problem: str):
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key
        self.problem = problem


def key(text: str) -> Any:
    """A plain key with its help text."""
    return field(metadata={"help": text})


def node(text: str) -> Any:
    """A group whose options name a `_target_`."""
    return field(metadata={"help": text, "node": True})


@dataclass(frozen=True)
class Claim:
    record: str = key("id of the record (conf/records/) that the run is set beside")
    neighbours: list[str] = key("ids of further records shown beside it")


@dataclass(frozen=True)
class Launch:
    kind: Literal["local", "ray_job", "slurm", "kuberay"] = key("a process here, or a job of Ray, Slurm, Kubernetes")
    address: str | None = key("ray_job: the head's job server, such as http://127.0.0.1:8265")
    fetch_to: str = key("action=fetch: folder that the run folder is copied into, under the job's id")
    nodes: int = key("slurm, kuberay: machines")
    minutes: int | None = key("slurm, kuberay: time limit; null: the partition's own, or none")
    notice_s: int = key("slurm: seconds before the limit at which the run saves and is queued again to go on")
    sbatch: dict[str, str] = key("slurm: further options of sbatch, such as {partition: gpu, gres: 'gpu:4'}")
    image: str | None = key("kuberay: container image in which this program is installed")
    volume: str | None = key("kuberay: claim of the volume that all pods mount at run_root")
    namespace: str = key("kuberay: Kubernetes namespace")
    cpus: int = key("kuberay: processors of a node")
    gpus: int = key("kuberay: GPUs of a node")
    memory_gbytes: int = key("kuberay: memory of a node")
    apply: bool = key("kuberay: hand the manifest to kubectl; false: only write it")


@dataclass(frozen=True)
class Cluster:
    address: str | None = key("null: start Ray on this machine; auto or host:port: join a running cluster")
    expose: bool = key("let Ray listen beyond loopback; a cluster of several machines that is joined does anyhow")
    interface: str | None = key("network interface the nodes talk over where exposed; null: their Ray addresses'")
    nodes: int | None = key("nodes to wait for; null: as many as carry the workers")
    wait_s: float = key("seconds to wait for nodes that are missing")
    labels: dict[str, str] = key("Ray labels of the nodes to use, such as {pool: a}; {}: all")


@dataclass(frozen=True)
class Config:
    """One run. The values, with their defaults, stand in conf/config.yaml and the experiments."""

    mesh: dict = node("the emulated chips: how many, their axes and links")
    chip: dict = node("what one emulated chip computes per second")
    collective: dict = node("the all-reduce that the emulated clock prices")
    network: dict = node("who prices it on the mesh's links")
    backend: dict = node("who moves real bytes between the workers")
    data: dict = node("the images")
    model: dict = node("the network that is trained")
    optim: dict = node("the optimizer")
    schedule: dict = node("the learning rate over the run")
    claim: Claim = key("the published record that the run is set beside")
    faults: dict = key("what is broken on purpose")
    launch: Launch = key("where launch.submit starts the run")
    cluster: Cluster = key("the Ray cluster that the workers run on")

    experiment: str = key("name of the experiment: the chosen file of conf/experiment")
    recipe: str = key("model, optimizer, schedule, batch, epochs and target as published; wins over the experiment's")
    workers: int | Literal["auto"] = key("Ray workers that share the chips; auto: one per GPU, or per two CPU cores")
    shares: list[int] | None = key("blocks of each worker; null: by the nodes' labels speed, or as equal as can be")
    threads: int | Literal["auto"] = key("torch threads per worker; auto: the cores divided by the workers")
    device: Literal["auto", "cpu", "cuda"] = key("where the workers compute; auto: cuda where there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("dtype of the real computation; auto: the fastest here")
    loss_scale: float | Literal["auto", "dynamic"] = key("factor of the loss; auto: dynamic in fp16, else 1")
    wire_dtype: Literal["fp32", "bf16", "fp16"] = key("dtype of the gradients on the emulated wire")
    gradient_sum: Literal["fp32", "wire", "plan"] = key(
        "fp32: wire_dtype only moves the clock; wire: workers exchange it; plan: every emulated sum is rounded to it"
    )
    numerics: Literal["exact", "fast"] = key("exact: same bits for any split over workers; fast: the backend's order")
    bn_span: int = key("chips that share their batch-norm statistics")
    bn_rule: Literal["mean", "chip_0"] = key("whose running statistics evaluation uses and weights are saved with")
    chips_per_pass: int | Literal["auto"] = key("chips a worker computes at once; auto: as many as its memory holds")

    chip_batch_size: int | None = key("images per chip and step; null: from global_batch_size")
    global_batch_size: int | None = key("images per step of all chips together; null: from chip_batch_size")
    epochs: float | list[float] | Literal["auto"] = key("length of the run; [low, high] or auto: for the emulator")
    target_top1: float = key("the run is won at this top-1 accuracy, a fraction")
    eval_every: float = key("epochs between evaluations")
    eval_offset: float = key("epochs before the first evaluation")
    last_batch: Literal["drop", "pad", "keep"] = key(
        "images left over at an epoch's end: drop, pad with its first ones, or keep a smaller batch"
    )
    label_smoothing: float = key("share of the label that is spread over all classes")
    clip_norm: float | None = key("largest norm of the whole gradient; null: no clipping")
    ema_decay: float | None = key("decay a step of the averaged weights that are evaluated; null: no averaging")
    seed: int = key("seed of weights, order and augmentation")
    max_steps: int | None = key("stop after so many steps; null: no limit")

    run_root: str = key("folder of the run folders")
    run: str | None = key(
        "name of the run folder; null: <experiment>-<date>-<time>; launch.emulate: the folder of a run to re-time"
    )
    resume: str | None = key("auto: go on with the experiment's newest run; or the name of a run; null: start anew")
    checkpoint_steps: int | None = key("steps between checkpoints; null: no matter how many")
    checkpoint_s: float | None = key("seconds between checkpoints; null: no matter how long; the end has one anyway")
    checkpoints_kept: int = key("latest checkpoints that are kept")
    hang_timeout_s: float = key("seconds without a sign of life of a worker after which it counts as lost")
    max_restarts: int = key("workers that are started in place of lost ones, in all; then the run goes on without")
    min_workers: int = key("with fewer, the run waits for workers that are started")
    replacement_wait_s: float = key("seconds that it waits, then fails")

    format: Literal["table", "json"] = key("what launch.emulate and launch.verdict print")
    explain: bool = key("print every number that moves the emulated clock, with its origin")
    out: str | None = key(
        "launch.emulate: folder for the table, the plot and the CSV, or for the re-timed run; null: write nothing"
    )
    trace: str | None = key(
        "launch.emulate: file.json for the trace of some emulated steps, which opens in Perfetto; null: none"
    )
    scaling: Literal["strong", "weak"] = key("other mesh sizes keep the global batch (strong) or the chip batch (weak)")
    action: Literal["submit", "status", "logs", "stop", "fetch"] = key("what launch.submit does")
    job: str | None = key("launch.submit: id of the job; launch.run: the submitted job that it is")

    @classmethod
    def from_dict(cls, config: dict) -> Self:
        """Typed and checked; raises ConfigError with the key, the value and the remedy."""
        values = _typed(cls, config, "")
        for item in fields(cls):
            if item.metadata.get("node") and "_target_" not in values[item.name]:
                raise ConfigError(item.name, "has no _target_: choose one of its options")
        made = cls(**values)
        made.check()
        return made

    def check(self) -> None:
        sizes = "chip_batch_size", "global_batch_size"
        counts = "workers", "threads", "bn_span", "chips_per_pass", "max_steps", "checkpoint_steps", "checkpoints_kept"
        for name in (*counts, "min_workers", *sizes):
            _demand(self, name, lambda value: isinstance(value, str) or value >= 1, "must be at least 1")
        for name in ("eval_every", "hang_timeout_s", "checkpoint_s", "replacement_wait_s"):
            _demand(self, name, lambda value: value > 0, "must be above 0")
        for name in ("eval_offset", "max_restarts", "seed"):
            _demand(self, name, lambda value: value >= 0, "must not be negative")
        for name in ("clip_norm", "loss_scale"):
            _demand(self, name, lambda value: isinstance(value, str) or value > 0, "must be above 0")
        for name in ("nodes", "minutes", "notice_s", "cpus", "memory_gbytes"):
            _demand(self.launch, name, lambda value: value >= 1, "must be at least 1", "launch.")
        _demand(self.launch, "gpus", lambda value: value >= 0, "must not be negative", "launch.")
        _demand(self.cluster, "nodes", lambda value: value >= 1, "must be at least 1", "cluster.")
        _demand(self.cluster, "wait_s", lambda value: value >= 0, "must not be negative", "cluster.")
        _demand(self, "ema_decay", lambda value: 0 < value < 1, "must be above 0 and below 1")
        _demand(self, "label_smoothing", lambda value: 0 <= value < 1, "must be at least 0 and below 1")

        percent = f" (a fraction: {self.target_top1} % is {self.target_top1 / 100:g})" if self.target_top1 > 1 else ""
        _demand(self, "target_top1", lambda value: 0 < value <= 1, "must be above 0 and at most 1" + percent)

        low_high = self.epochs if isinstance(self.epochs, list) else [self.epochs, self.epochs]
        if self.epochs != "auto" and (len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]):
            raise ConfigError("epochs", f"{self.epochs} must be one number above 0, or [low, high] with low <= high")

        chip, total = self.chip_batch_size, self.global_batch_size
        if chip is None and total is None:
            raise ConfigError("chip_batch_size", "null, and so is global_batch_size: give one of the two")
        if chip is not None and total is not None and total % chip:
            raise ConfigError("global_batch_size", f"{total} is no multiple of chip_batch_size={chip}: set one to null")


def _demand(config: Any, name: str, holds: Any, remedy: str, prefix: str = "") -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ConfigError(prefix + name, f"{show(value)} {remedy}")


def _typed(cls: type, values: Any, prefix: str) -> dict:
    """The values of a dataclass, each of the annotated type; nested dataclasses are made."""
    if not isinstance(values, dict):
        names = ", ".join(item.name for item in fields(cls))
        raise ConfigError(prefix.rstrip("."), f"{show(values)} must be a mapping of {names}")
    known: dict[str, Field] = {item.name: item for item in fields(cls)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{prefix}{name}", "no such key" + nearest(name, known, values, prefix))
    typed = {}
    for name, item in known.items():
        if name not in values:
            raise ConfigError(f"{prefix}{name}", f"is missing ({item.metadata['help']})")
        value = values[name]
        if is_dataclass(item.type):
            value = item.type(**_typed(item.type, value, f"{prefix}{name}."))
        elif not fits(value, item.type):
            raise ConfigError(f"{prefix}{name}", f"{show(value)} is not {spell(item.type)}")
        typed[name] = value
    return typed


def nearest(name: str, names: Iterable[str], values: dict | None = None, prefix: str = "") -> str:
    """'; did you mean ...?' from the names that are right, from a key of that name in another node, or the list."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    nodes = {group: inner for group, inner in (values or {}).items() if isinstance(inner, dict)}
    elsewhere = [f"{group}.{name}" for group, inner in nodes.items() if name in inner]
    if close or elsewhere:
        return f"; did you mean {prefix + close[0] if close else elsewhere[0]}?"
    return f"; there is {', '.join(sorted(names))}" if names else "; there is none"


def fits(value: Any, hint: Any) -> bool:
    """Whether a value out of YAML is of an annotated type. int counts as float, bool as neither."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, list, tuple, dict):
        return isinstance(value, (list, tuple) if hint in (list, tuple) else hint)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return isinstance(value, list | tuple) and all(fits(inner, args[0]) for inner in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(args) and all(map(fits, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    return isinstance(value, dict) and "_target_" in value  # a class: the node that makes one


def show(value: Any) -> str:
    """A value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def spell(hint: Any) -> str:
    """The type in words, for an error line."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is None or hint is types.NoneType:
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(spell(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(arg) for arg in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list of {spell(args[0])}"
    if origin is tuple:
        return f"[{', '.join(spell(arg) for arg in args)}]"
    if hint is dict:
        return "a mapping"
    if origin is dict:
        return f"a mapping from {spell(args[0])} to {spell(args[1])}"
    plain = {int: "int", float: "float", str: "str", bool: "true or false", list: "a list", tuple: "a list"}
    return plain.get(hint) or f"a node with a _target_ that makes a {getattr(hint, '__name__', hint)}"
