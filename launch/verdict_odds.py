"""The odds of the claimed time under the emulator, and with each of its assumptions changed in turn.

Every change is one that somebody could defend, stands here whatever it does to the odds, and changes nothing else.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launch.emulate import machine
from launch.validation import node
from train.records import Record
from train.sim.region import Priced, priced

OPTIONS = ("chip", "collective", "network")
"""Groups whose option a change names."""


@dataclass(frozen=True)
class Assumption:
    """`config`: dotted key -> value, option of a group, or a function of the value there; `run`: of the priced run."""

    about: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Odds:
    """Emulated. odds: of the claimed time or less. left_out: why the change could not be made."""

    about: str
    name: str
    run: Priced | None
    odds: float | None
    left_out: str = ""

    def as_dict(self) -> dict:
        if self.run is None:
            return {"about": self.about, "assumption": self.name, "left_out": self.left_out}
        return {
            "label": "emulated",
            "about": self.about,
            "assumption": self.name,
            "time_to_train_s": self.run.median_s,
            "interval_s": list(self.run.interval_s),
            "epochs": list(self.run.epochs_interval),
            "images_per_s_per_chip": self.run.images_per_s_per_chip,
            "odds": self.odds,
        }


def rate_of(software: str) -> Callable[[list[dict]], list[dict]]:
    """The anchors whose source names a software release, alone."""

    def chosen(anchors: list[dict]) -> list[dict]:
        found = [anchor for anchor in anchors if software in anchor.get("source", "")]
        if not found:
            raise ValueError(f"the chip has no rate of {software}")
        return found

    return chosen


ASSUMPTIONS = (
    Assumption("epochs", "the reference points' epochs at this batch", {"epochs": "auto"}),
    Assumption("epochs", "60 (512 Ascend 910 in 2020, MLPerf v0.7 closed)", {"epochs": 60}),
    Assumption("epochs", "64", {"epochs": 64}),
    Assumption("epochs", "72 (1,024 TPU v3 in 2019, MLPerf v0.6)", {"epochs": 72}),
    Assumption("batch", "16,384, its reference epochs", {"global_batch_size": 16_384, "epochs": "auto"}),
    Assumption("batch", "65,536, its reference epochs", {"global_batch_size": 65_536, "epochs": "auto"}),
    Assumption("chip", "rate of MindSpore 0.2 alone (batch 32)", {"chip.anchors": rate_of("MindSpore 0.2")}),
    Assumption("chip", "rate of MindSpore 0.5 alone (batch 256)", {"chip.anchors": rate_of("MindSpore 0.5")}),
    Assumption("chip", "Ascend 910 Pro A, rate of 2021", {"chip": "ascend910_pro_a"}),
    Assumption("chip", "no waiting for the slowest chip", {"chip.jitter": 0.0}),
    Assumption("network", "no fitted constants (alpha_beta)", {"network": "alpha_beta"}),
    Assumption("network", "links at their full rate", {"network.calibration.comm_efficiency": 1.0}),
    Assumption("network", "all of the backward pass hides communication", {"network.calibration.overlap": 1.0}),
    Assumption("network", "nothing hides communication", {"network.calibration.overlap": 0.0}),
    Assumption("network", "a ring between hosts", {"collective": "hierarchical_ring"}),
    Assumption("network", "one ring over all chips", {"collective": "ring"}),
    Assumption("network", "fp32 on the wire", {"wire_dtype": "fp32"}),
    Assumption("network", "half the rate between hosts", {"mesh.topology.roce.gbytes_per_s": lambda rate: rate / 2}),
    Assumption("network", "60 us a message between hosts", {"mesh.topology.roce.latency_us": 60}),
    Assumption("clock", "no evaluation on it", run={"eval_s": 0.0}),
    Assumption("clock", "no start-up on it", run={"startup_s": 0.0}),
    Assumption("error", "none in the model", run={"sigma": lambda sigma: 0.0}),
    Assumption("error", "twice the model's", run={"sigma": lambda sigma: 2 * sigma}),
)
"""60 us: HCCL's own figure for a step between servers when it chooses an algorithm (cann-hccl, alg_configurator.cc)."""


def changed(config: dict, changes: dict[str, Any]) -> dict:
    """A configuration with some keys changed. ValueError where this machine has no such key."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = config
        for name in parents:
            if not isinstance(inner, dict) or not isinstance(inner.get(name), dict):
                raise ValueError(f"{path}: not in this configuration")
            inner = inner[name]
        if path in OPTIONS:
            inner[last] = node(path, value)
        else:
            inner[last] = value(inner.get(last)) if callable(value) else value
    return config


def price(config: dict) -> Priced:
    return priced(machine(config))


def with_each_changed(config: dict, plain: Priced, seconds: float) -> list[Odds]:
    """The odds of `seconds` or less with each assumption changed, the others as they are in `plain`, price(config)."""
    found = []
    for one in ASSUMPTIONS:
        try:
            run = price(changed(config, one.config)) if one.config else plain
            run = run.but(**{key: to(getattr(run, key)) if callable(to) else to for key, to in one.run.items()})
            found.append(Odds(one.about, one.name, run, run.odds(seconds)))
        except ValueError as error:
            found.append(Odds(one.about, one.name, None, None, str(error)))
    return found


@dataclass(frozen=True)
class PublishedRun:
    """A published run in the plane: claimed. The rate is of a steady epoch, evaluations inside, start-up outside."""

    short: str
    record: Record
    images_per_s_per_chip: float


RUNS = {
    "mlperf-v1.0-PCL-CloudBrainII_1024_mindspore_close": "1,024 Ascend 910 Pro A (2021)",
    "mlperf-v1.0-PCL-CloudBrainII_256_mindspore_close": "256 Ascend 910 Pro A (2021)",
    "mlperf-v0.7-SIAT-modelarts_512_tensorflow_close": "512 Ascend 910 (2020)",
    "mlperf-v0.7-SIAT-modelarts_1024_tensorflow_open": "1,024 Ascend 910 (2020, open)",
    "mlperf-v0.6-Google-tpu-v3-2048": "1,024 TPU v3 (2019)",
    "mlperf-v0.6-Fujitsu-abci_2048xV100_mxnet": "2,048 V100 (2019, open)",
}
"""The neighbours of the claim, by record: the same chip family, and the two that the release beats."""


def published_runs(records: dict[str, Record], epochs: dict, num_train: int) -> list[PublishedRun]:
    """num_train: images of an epoch. Records without a log of their epochs have no steady rate and are left out."""
    return [
        PublishedRun(short, records[id], num_train / epochs[id].s_per_epoch_steady / records[id].chips)
        for id, short in RUNS.items()
        if id in records and id in epochs and epochs[id].s_per_epoch_steady
    ]
