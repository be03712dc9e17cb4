"""Configuration -> emulated machine: what a step, an evaluation and a whole run would take on the modelled chips."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from train.comm.plan import Plan
from train.mesh.chip import Chip
from train.mesh.mesh import Mesh
from train.mesh.origin import Origin
from train.sim import workload as workloads
from train.sim.network import AlphaBeta
from train.sim.run import INTERVAL, RunTime, quantile, run_time
from train.sim.step import WIRE_BYTES, StepTime, step_time
from train.sim.workload import Workload

# Images for training and evaluation, and classes, of data sets that need not be opened to be priced.
DATA_SETS = {
    "imagenet": (1_281_167, 50_000, 1000),  # ImageNet-1k (Russakovsky et al. 2015)
    "cifar10": (50_000, 10_000, 10),  # Krizhevsky 2009
    "digits": (1_437, 360, 10),  # train/data/digits: 1,797 scans, 36 of each class held out
}
LARGEST_REFERENCE_BATCH = 67_840  # MLPerf's reference convergence points for ResNet-50 end here


class Emulator:
    """A recipe on a mesh. `global_batch_size` is the recipe's; `step` prices any other as well."""

    def __init__(
        self,
        mesh: Mesh,
        chip: Chip,
        workload: Workload,
        collective: Callable[[Mesh], Plan],
        network: AlphaBeta,
        *,
        global_batch_size: int,
        wire_dtype: str,
        precision: str,
        epochs: float | list[float],
        eval_every: float,
        eval_offset: float,
        num_train: int,
        num_eval: int,
        data_origin: str,
        notes: list[str],
    ):
        if wire_dtype not in WIRE_BYTES:
            raise ValueError(f"wire_dtype={wire_dtype}: use one of {', '.join(WIRE_BYTES)}")
        self.mesh = mesh
        self.chip = chip
        self.workload = workload
        self.network = network
        self.global_batch_size = global_batch_size
        self.wire_dtype = wire_dtype
        self.precision = precision
        self.epochs = epochs
        self.eval_every = eval_every
        self.eval_offset = eval_offset
        self.num_train = num_train
        self.num_eval = num_eval
        self.data_origin = data_origin
        self._collective = collective
        self._plans: dict[int, Plan] = {}
        reference = workloads.resnet()
        self._work = workload.training_flops / reference.training_flops
        self.sustained_flops = chip.sustained_flops(reference.training_flops, precision)
        self.startup_s = chip.startup_s
        self.active_chips = min(mesh.num_chips, global_batch_size)
        self.plan = self._plan(self.active_chips)
        self.notes = notes + self._own_notes()

    def _plan(self, active_chips: int) -> Plan:
        """The collective on the hosts that have work."""
        hosts = math.ceil(active_chips / self.mesh.chips_per_host)
        if hosts not in self._plans:
            self._plans[hosts] = self._collective(self.mesh.first_hosts(hosts))
        return self._plans[hosts]

    def step(self, global_batch_size: int) -> StepTime:
        """One step; the fullest chip sets the pace, chips without an image stand idle."""
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size} must be at least 1")
        active = min(self.mesh.num_chips, global_batch_size)
        return self._step(math.ceil(global_batch_size / self.mesh.num_chips), active)

    def _step(self, images_per_chip: int, active_chips: int) -> StepTime:
        plan = self._plan(active_chips)
        return step_time(
            compute_s=self.chip.seconds(images_per_chip, self._work, self.precision),
            workload=self.workload,
            bucket_ends=self.chip.bucket_ends,
            wire_bytes=WIRE_BYTES[self.wire_dtype],
            all_reduce_s=lambda nbytes: self.network.seconds(plan, nbytes),
            jitter=self.chip.jitter,
            num_chips=active_chips,
        )

    def eval_s(self, num_images: int) -> float:
        """Forward passes at the training batch, spread over the chips, and one sum of the counts."""
        share = self.workload.forward_flops / self.workload.training_flops
        each = math.ceil(num_images / self.active_chips)
        batch = math.ceil(self.global_batch_size / self.mesh.num_chips)
        full, rest = divmod(each, batch)
        passes = [batch] * full + [rest] * (rest > 0)
        forward = share * sum(self.chip.seconds(images, self._work, self.precision) for images in passes)
        return forward + self.network.seconds(self.plan, 8)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches alone, as in MLPerf's Ascend entries (39 steps at batch 32,768)."""
        return max(1, self.num_train // self.global_batch_size)

    def run_time(self) -> RunTime:
        return run_time(
            self.step(self.global_batch_size),
            self.eval_s(self.num_eval),
            self.startup_s,
            self.steps_per_epoch,
            self.epochs,
            self.eval_every,
            self.eval_offset,
            self.network.model_error,
        )

    def interval_s(self, seconds: float) -> tuple[float, float]:
        """[5 %, 95 %] around an emulated time whose steps and evaluations are known: the model's error alone."""
        low, high = (quantile(np.array([seconds]), self.network.model_error, q) for q in INTERVAL)
        return low, high

    def run(self) -> dict:
        """The object that `launch.emulate format=json` prints; every time in it is emulated."""
        step, run = self.step(self.global_batch_size), self.run_time()
        rate = self.global_batch_size / step.step_s
        per_chip = rate / self.mesh.num_chips
        images = math.ceil(self.global_batch_size / self.mesh.num_chips)
        host_per_chip = images / self._step(images, min(self.mesh.chips_per_host, self.active_chips)).step_s
        return {
            "label": "emulated",
            "time_to_train_s": run.time_to_train_s,
            "interval_s": list(run.interval_s),
            "step_s": step.step_s,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": run.steps,
            "epochs": run.epochs,
            "evaluations": run.evaluations,
            "compute_s": run.compute_s,
            "exposed_comm_s": run.exposed_comm_s,
            "straggler_s": run.straggler_s,
            "input_s": run.input_s,
            "other_s": run.other_s,
            "eval_s": run.eval_s,
            "startup_s": run.startup_s,
            "images_per_s": rate,
            "images_per_s_per_chip": per_chip,
            "scaling_efficiency": per_chip / host_per_chip,
            "chips": self.mesh.num_chips,
            "active_chips": self.active_chips,
            "hosts": self.mesh.num_hosts,
            "chip": self.chip.name,
            "mesh": self.mesh.name,
            "global_batch_size": self.global_batch_size,
            "model": self.workload.name,
            "wire_dtype": self.wire_dtype,
            "precision": self.precision,
            "collective": self.plan.name,
            "network": self.network.name,
            "notes": self.notes,
        }

    def origins(self) -> list[Origin]:
        """Every number that moves the clock."""
        links = [origin for link in self.mesh.topology.link_classes for origin in link.origins()]
        table = "derived: layer table, 2 x multiply-adds of convolutions and classifier"
        return self.chip.origins(self.precision) + [
            Origin("chip.sustained", self.sustained_flops / 1e12, "TFLOP/s", "derived: FLOPs / chip.per_image"),
            *links,
            Origin("model.training_flops", self.workload.training_flops / 1e9, "GFLOP an image", table),
            Origin("model.parameters", self.workload.parameters, "gradients", "derived: layer table"),
            Origin("network.model_error", self.network.model_error, "sigma of ln(time)", self.network.source),
            Origin("data.num_train", self.num_train, "images", self.data_origin),
            Origin("data.num_eval", self.num_eval, "images", self.data_origin),
            Origin("global_batch_size", self.global_batch_size, "images", "the recipe"),
            Origin("epochs", str(self.epochs), "epochs", "the recipe"),
            Origin("wire_dtype", self.wire_dtype, "", "the recipe"),
            Origin("input", 0.0, "s", "assumed: the hosts' input keeps up"),
            Origin("other", 0.0, "s", "assumed: the optimizer is inside the chip's published rate"),
        ]

    def _own_notes(self) -> list[str]:
        notes, idle = [], self.mesh.num_chips - self.active_chips
        if abs(self._work - 1) > 0.01:  # a few classes more or less are no other network
            notes.append(
                f"extrapolated: {self.workload.name} is priced from the rates of ResNet-50 at 224 px by its FLOPs "
                f"({self._work:.3g} of them an image), with the same fixed time a step"
            )
        if idle:
            notes.append(
                f"{idle:,} of {self.mesh.num_chips:,} chips get no image at a global batch of "
                f"{self.global_batch_size:,} and stand idle"
            )
        elif self.global_batch_size % self.mesh.num_chips:
            notes.append(
                f"a global batch of {self.global_batch_size:,} does not divide by {self.mesh.num_chips:,} chips: "
                "the fullest chip sets the pace"
            )
        if self.global_batch_size > LARGEST_REFERENCE_BATCH:
            notes.append(
                f"a global batch of {self.global_batch_size:,} is beyond the convergence table "
                f"(up to {LARGEST_REFERENCE_BATCH:,}): the epochs are no longer backed by it"
            )
        sources = dict.fromkeys(a.get("source", "") for a in self.chip.anchors if a["precision"] == self.precision)
        if len(sources) > 1:
            notes.append(f"rates of {self.chip.name} come from different software: " + "; ".join(sources))
        for origin in self.origins():
            if origin.origin.startswith("assumed"):
                notes.append(f"{origin.name} = {origin.value:g} {origin.unit}, {origin.origin}".replace(" ,", ","))
        return notes


def build(
    config: dict,
    *,
    num_train: int | None = None,
    num_eval: int | None = None,
    num_classes: int | None = None,
    precision: str | None = None,
) -> Emulator:
    """The emulator of a composed configuration (see train/config).

    num_train, num_eval, num_classes: of the opened data set, where there is one; else the data node's or published.
    precision: dtype of the emulated chips; None is that of their published rates, whatever this machine computes in.
    """
    mesh, chip, collective, network = (make(config[group]) for group in ("mesh", "chip", "collective", "network"))
    data, model, notes = config["data"], config["model"], []
    opened = num_train is not None and num_eval is not None
    name = str(data.get("_target_", "")).split(".")[-2:-1]
    known = DATA_SETS.get(name[0]) if name else None
    if known is None and not opened and "num_train" not in data:
        notes.append("the data set was not opened: its sizes are taken to be ImageNet's")
    sizes = [
        given or data.get(key) or published
        for key, given, published in zip(
            ("num_train", "num_eval", "num_classes"),
            (num_train, num_eval, num_classes),
            known or DATA_SETS["imagenet"],
            strict=True,
        )
    ]
    workload = workloads.of_model(model, data["image_size"], model.get("num_classes") or sizes[2])
    return Emulator(
        mesh,
        chip,
        workload,
        collective,
        network,
        global_batch_size=_global_batch_size(config, mesh.num_chips, notes),
        wire_dtype=config["wire_dtype"],
        precision=precision or chip.precision,
        epochs=config["epochs"],
        eval_every=config["eval_every"],
        eval_offset=config["eval_offset"],
        num_train=sizes[0],
        num_eval=sizes[1],
        data_origin="the opened data set" if opened else "the data set as published; not opened",
        notes=notes,
    )


def check_training(config: dict) -> None:
    """ValueError for keys that training can't have together, though a run of them can be priced."""
    if config["gradient_sum"] != "plan":
        return
    if config["numerics"] == "exact":
        raise ValueError(
            "gradient_sum=plan: numerics=exact sums in full precision and refuses compression; use numerics=fast, or "
            "gradient_sum=fp32"
        )
    needed = {
        "workers": ((1,), "one worker adds up all chips"),
        "bn_span": ((1,), "every chip is computed by itself"),
        "chips_per_pass": (("auto", 1), "every chip is computed by itself"),
    }
    for key, (possible, why) in needed.items():
        if config[key] not in possible:
            raise ValueError(f"{key}={config[key]}: with gradient_sum=plan {why}; set {key}={possible[0]}")


def make(node: dict, *args: Any, **kwargs: Any) -> Any:
    """The object of a node with a `_target_`; a constructor's own ValueError comes through as it is."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ValueError):
            cause = cause.__cause__
        raise cause or error from None


def _global_batch_size(config: dict, num_chips: int, notes: list[str]) -> int:
    chip, total = config.get("chip_batch_size"), config.get("global_batch_size")
    for key, value in {"chip_batch_size": chip, "global_batch_size": total}.items():
        if value is not None and value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    if config.get("scaling") == "weak":
        if chip is None:
            raise ValueError("scaling=weak keeps the chip batch: give chip_batch_size")
        notes.append(f"scaling=weak: {chip} images a chip, whatever the convergence table says of the global batch")
        return chip * num_chips
    if chip is None and total is None:
        raise ValueError("chip_batch_size and global_batch_size are both null: give one of the two")
    if chip is not None and total is not None and chip * num_chips != total:
        raise ValueError(
            f"global_batch_size={total} is not chip_batch_size={chip} x {num_chips} chips: set one to null"
        )
    if total is None and chip * num_chips > LARGEST_REFERENCE_BATCH:
        notes.append(
            f"global batch kept at {LARGEST_REFERENCE_BATCH:,}, the largest reference point of convergence "
            f"({chip} images on each of {num_chips:,} chips would be {chip * num_chips:,}); scaling=weak lifts this"
        )
        return LARGEST_REFERENCE_BATCH
    return total or chip * num_chips
