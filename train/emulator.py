"""Configuration -> emulated machine: what a step, an evaluation and a whole run would take on the modelled chips."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train import emulator_faults, emulator_origins, emulator_recipe
from train.comm.algorithms import halving_doubling
from train.comm.plan import Plan
from train.mesh.blocks import hosts_per_block
from train.mesh.chip import Chip
from train.mesh.mesh import Mesh
from train.mesh.origin import Origin
from train.sim import workload as workloads
from train.sim.calibration import Calibration
from train.sim.convergence import Epochs
from train.sim.course import Course
from train.sim.faults import Condition, Fault, condition, each, slowed
from train.sim.network import AlphaBeta
from train.sim.run import INTERVAL, RunTime, epoch_grid, quantile, run_time
from train.sim.step import WIRE_BYTES, Bucket, StepTime, buckets, norm_messages, step_time, update_bytes
from train.sim.straggler import expected_max
from train.sim.workload import Workload

# Images for training and evaluation, and classes, of data sets that need not be opened to be priced.
DATA_SETS = {
    "imagenet": (1_281_167, 50_000, 1000),  # ImageNet-1k (Russakovsky et al. 2015)
    "cifar10": (50_000, 10_000, 10),  # Krizhevsky 2009
    "digits": (1_437, 360, 10),  # train/data/digits: 1,797 scans, 36 of each class held out
}
STATISTIC_BYTES = 4  # batch-norm statistics are summed in fp32 whatever the gradients' dtype


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
        epochs: float | list[float] | Epochs,
        eval_every: float,
        eval_offset: float,
        num_train: int,
        num_eval: int,
        data_origin: str,
        notes: list[str],
        optimizer: str = "sgd",
        bn_span: int = 1,
        faults: Sequence[Fault] = (),
        seed: int = 0,
        checkpoint_steps: int | None = None,
        last_batch: str = "drop",
        sizes: Sequence[tuple[int, Workload]] = (),
        eval_workload: Workload | None = None,
    ):
        if wire_dtype not in WIRE_BYTES:
            raise ValueError(f"wire_dtype={wire_dtype}: use one of {', '.join(WIRE_BYTES)}")
        self.faults, self.seed, self.checkpoint_steps, self.last_batch = faults, seed, checkpoint_steps, last_batch
        slowed(mesh, [fault.slow_link for fault in faults if fault.slow_link])  # links that it has not are told at once
        self.standing = condition([fault for fault in faults if fault.stands])
        self.prices: dict[Condition, Course] = {}
        self.sound_mesh = mesh
        self.mesh = mesh = slowed(mesh, self.standing.links)
        self.chip = chip
        self.workload = workload
        self.sizes = tuple(sizes) or ((0, workload),)  # from which epoch on the training images are as in which table
        self.eval_workload = eval_workload or workload
        self.network = network
        self.global_batch_size = global_batch_size
        self.wire_dtype = wire_dtype
        self.precision = precision
        self.calibration: Calibration = getattr(network, "calibration", None) or Calibration()
        self.optimizer = optimizer
        self.bn_span = bn_span
        self.epochs = epochs.widened(self.calibration.epochs_error) if isinstance(epochs, Epochs) else epochs
        self.eval_every = eval_every
        self.eval_offset = eval_offset
        self.num_train = num_train
        self.num_eval = num_eval
        self.data_origin = data_origin
        self._collective = collective
        self._reference = workloads.resnet()
        self.work = workload.training_flops / self._reference.training_flops
        self.sustained_flops = chip.sustained_flops(
            self._reference.training_flops, precision, self.calibration.half_batch
        )
        self.active_chips = min(mesh.num_chips, global_batch_size)
        hosts_per_block(mesh, bn_span)  # what training refuses has no price either
        self.put_on(mesh)
        self.jitter = self.calibration.jitter if chip.jitter is None else chip.jitter
        self.startup_s = chip.startup_s
        if self.startup_s is None:
            self.startup_s = self.calibration.startup_s + self.calibration.first_epoch_s / self.plan.mesh.num_hosts
        measured_in = chip.measured_in(precision)
        self.software_factor = self.calibration.software_factor(chip.software, measured_in)
        self.software = chip.software or measured_in
        self.model_error = self.calibration.model_error
        if self.model_error is None:
            self.model_error = network.model_error
        self.update_s = self._update_s()
        self.notes = notes + emulator_origins.notes(self)

    def put_on(self, mesh: Mesh) -> None:
        """The same machine with links of other rates."""
        self.mesh = mesh
        self._plans: dict[int, Plan] = {}
        self._reduce_s: dict[tuple[int, float], float] = {}
        self.plan = self._plan(self.active_chips)
        self.norm_s = self._norm_s(self.active_chips)

    def _plan(self, active_chips: int) -> Plan:
        """The collective on the hosts that have work."""
        hosts = math.ceil(active_chips / self.mesh.chips_per_host)
        if hosts not in self._plans:
            self._plans[hosts] = self._collective(self.mesh.first_hosts(hosts))
        return self._plans[hosts]

    def _all_reduce_s(self, active_chips: int, nbytes: float) -> float:
        plan = self._plan(active_chips)
        key = plan.mesh.num_chips, nbytes
        if key not in self._reduce_s:
            self._reduce_s[key] = self.network.seconds(plan, nbytes)
        return self._reduce_s[key]

    def _norm_s(self, active_chips: int) -> float:
        """What a step's sums of batch-norm statistics take over the chips of one span; nothing without a span."""
        span, host = min(self.bn_span, active_chips), self.mesh.chips_per_host
        if span == 1:
            return 0.0
        plan = halving_doubling(self.mesh.first_chips(span if span < host else math.ceil(span / host) * host))
        messages = norm_messages(self.workload)
        price = {size: self.network.seconds(plan, size * STATISTIC_BYTES) for size in set(messages)}
        return sum(price[size] for size in messages)

    def _update_s(self) -> float:
        """What the optimizer's update takes beyond the one inside the chip's published rates, at the memory's rate."""
        inside = self.chip.anchors_of(self.precision)[0].get("optimizer", self.optimizer)
        needed = update_bytes(self.optimizer, self.workload.parameters)
        extra = max(0, needed - update_bytes(inside, self._reference.parameters))
        return extra / self.chip.hbm_bytes_per_s if self.chip.hbm_bytes_per_s else 0.0

    def compute_s(self, images_per_chip: float, workload: Workload | None = None) -> float:
        """One chip's training step in the software of the run, without the wait that the published rate holds."""
        work = workload.training_flops / self._reference.training_flops if workload else self.work
        published = self.chip.seconds(images_per_chip, work, self.precision, self.calibration.half_batch)
        wait = self.jitter * self.expected_max(self.chip.measured_on(self.precision))
        return published * self.software_factor / (1 + wait)

    def expected_max(self, chips: int) -> float:
        """Of the chips' step times, in standard deviations above their mean."""
        return expected_max(self.calibration.straggler, chips)

    def wait_s(self, images_per_chip: float, chips: int, workload: Workload | None = None) -> float:
        """How much later than the mean chip the slowest of `chips` ends its compute, where nothing is broken."""
        return self.jitter * self.compute_s(images_per_chip, workload) * self.expected_max(chips)

    @property
    def buckets(self) -> list[Bucket]:
        """Of the gradients, as they are summed: by the emulated chips, and by the real workers."""
        return buckets(self.workload, self.chip.bucket_ends)

    def course(self, price: Callable[[Workload], StepTime] | None = None) -> Course:
        """The steps of the run, whose images may change their size; `price` of one with such images."""
        price = price or (lambda workload: self.step(self.global_batch_size, workload))
        first_steps = [first * self.steps_per_epoch + 1 for first, _ in self.sizes]
        return Course(tuple(zip(first_steps, (price(workload) for _, workload in self.sizes), strict=True)))

    def mean_step(self) -> StepTime:
        """Over the steps of the median run."""
        return self.course().mean(math.ceil(epoch_grid(self.epochs)[0] * self.steps_per_epoch - 1e-9))

    def step(self, global_batch_size: int, workload: Workload | None = None) -> StepTime:
        """One step with images as in `workload` (None: of data.image_size).

        The fullest chip sets the pace, chips without an image stand idle.
        """
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size} must be at least 1")
        active = min(self.mesh.num_chips, global_batch_size)
        images = math.ceil(global_batch_size / self.mesh.num_chips)
        return step_time(**self.step_inputs(images, active, self.standing.slowdown, workload))

    def step_inputs(
        self, images_per_chip: int, active_chips: int, slowdown: float = 1.0, workload: Workload | None = None
    ) -> dict:
        """What `train.sim.step.step_time` is given, where one chip computes `slowdown` times as long as the mean."""
        workload = workload or self.workload
        compute_s, host_rate = self.compute_s(images_per_chip, workload), self.mesh.host_images_per_s
        host_images = images_per_chip * min(self.mesh.chips_per_host, active_chips)
        inside = min(self.chip.measured_on(self.precision), active_chips)
        if self.chip.measured_hosts(self.precision) == 1:
            inside = min(inside, self.mesh.chips_per_host)
        return dict(
            compute_s=compute_s,
            workload=workload,
            bucket_ends=self.chip.bucket_ends,
            wire_bytes=WIRE_BYTES[self.wire_dtype],
            all_reduce_s=lambda nbytes: self._all_reduce_s(active_chips, nbytes),
            num_chips=active_chips,
            inside_s=(lambda nbytes: self._all_reduce_s(inside, nbytes)) if inside > 1 else None,
            straggler_s=max(self.wait_s(images_per_chip, active_chips, workload), (slowdown - 1) * compute_s),
            overlap=self.calibration.overlap,
            floor_s=self.calibration.launch_floor_s * self.software_factor,
            norm_s=self.norm_s if active_chips == self.active_chips else self._norm_s(active_chips),
            update_s=self.update_s,
            input_s=host_images / host_rate if host_rate else 0.0,
        )

    def eval_s(self, num_images: int) -> float:
        """Forward passes at the training batch, spread over the chips, one sum of the counts, and a fixed cost."""
        share = self.eval_workload.forward_flops / self.eval_workload.training_flops
        each = math.ceil(num_images / self.active_chips)
        batch = math.ceil(self.global_batch_size / self.mesh.num_chips)
        full, rest = divmod(each, batch)
        seconds = full * self.compute_s(batch, self.eval_workload)
        forward = share * (seconds + (self.compute_s(rest, self.eval_workload) if rest else 0.0))
        return forward + self._all_reduce_s(self.active_chips, 8) + self.calibration.eval_s

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches alone, as in MLPerf's Ascend entries (39 steps at batch 32,768), unless the last is kept."""
        whole, left = divmod(self.num_train, self.global_batch_size)
        return max(1, whole + (left > 0 and self.last_batch != "drop"))

    def run_time(self) -> RunTime:
        return run_time(
            self.course(),
            self.eval_s(self.num_eval),
            self.startup_s,
            self.steps_per_epoch,
            self.epochs,
            self.eval_every,
            self.eval_offset,
            self.model_error,
        )

    def interval_s(self, seconds: float) -> tuple[float, float]:
        """[5 %, 95 %] around an emulated time whose steps and evaluations are known: the model's error alone."""
        low, high = (quantile(np.array([seconds]), self.model_error, q) for q in INTERVAL)
        return low, high

    def run(self) -> dict:
        """The object that `launch.emulate format=json` prints; every time in it is emulated."""
        step, run, told = self.mean_step(), self.run_time(), {}
        if self.faults:
            run, told["faults"] = emulator_faults.disturbed(self, run)
        rate = self.global_batch_size / step.step_s
        per_chip = rate / self.mesh.num_chips
        images = math.ceil(self.global_batch_size / self.mesh.num_chips)
        of_host = min(self.mesh.chips_per_host, self.active_chips)
        of_one_host = self.course(lambda each: step_time(**self.step_inputs(images, of_host, workload=each)))
        host_per_chip = images / of_one_host.mean(run.steps).step_s
        return {
            "label": "emulated",
            "time_to_train_s": run.time_to_train_s,
            "interval_s": list(run.interval_s),
            "step_s": step.step_s,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": run.steps,
            "epochs": run.epochs,
            "epochs_interval": list(run.epochs_interval),
            "epochs_from": "reference points" if isinstance(self.epochs, Epochs) else "the recipe",
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
            "software": self.software,
            "collective": self.plan.name,
            "network": self.network.name,
            "straggler": {
                "distribution": self.calibration.straggler,
                "jitter": self.jitter,
                "expected_max": self.expected_max(self.active_chips),
            },
            "bn_span": self.bn_span,
            "bn_sync_s": self.norm_s,
            "update_s": self.update_s,
            "host_images_per_s": self.mesh.host_images_per_s,
            "calibration": {
                name: value for name, value in self.calibration.in_use().items() if emulator_origins.moves(self, name)
            },
            "model_error": self.model_error,
            **told,
            "notes": self.notes,
        }

    def origins(self) -> list[Origin]:
        """Every number that moves the clock."""
        return emulator_origins.origins(self)


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
    by_epoch, eval_workload = emulator_recipe.sized(config, sizes[2], notes)
    batch = emulator_recipe.global_batch_size(config, mesh.num_chips, notes)
    return Emulator(
        mesh,
        chip,
        workload,
        collective,
        network,
        global_batch_size=batch,
        wire_dtype=config["wire_dtype"],
        precision=precision or chip.precision,
        epochs=emulator_recipe.reference_epochs(config, workload, batch, notes)
        if config["epochs"] == "auto"
        else config["epochs"],
        eval_every=config["eval_every"],
        eval_offset=config["eval_offset"],
        num_train=sizes[0],
        num_eval=sizes[1],
        data_origin="the opened data set" if opened else "the data set as published; not opened",
        notes=notes,
        optimizer=emulator_recipe.optimizer(config),
        bn_span=config["bn_span"],
        faults=each(make(config["faults"]) if config.get("faults") else None),
        seed=config.get("seed", 0),
        checkpoint_steps=config.get("checkpoint_steps"),
        last_batch=config.get("last_batch", "drop"),
        sizes=by_epoch,
        eval_workload=eval_workload,
    )


def make(node: dict, *args: Any, **kwargs: Any) -> Any:
    """The object of a node with a `_target_`; a constructor's own ValueError or RuntimeError comes through as it is."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ValueError | RuntimeError):
            cause = cause.__cause__
        raise cause or error from None
