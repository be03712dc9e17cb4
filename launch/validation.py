"""Emulated against published: predictions of all rows of a records file, and their scores.

A record is emulated by the same Emulator as launch.emulate's. Rows that gave an anchor or a shared constant are marked
and count in no score. Errors are predicted / published - 1.
"""

import copy
import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median

import numpy as np

from launch.compose import CONF
from train import emulator
from train.emulator import Emulator
from train.mesh.chip import Chip
from train.mesh.mesh import Mesh
from train.records import EpochTime, Record
from train.sim.network import AlphaBeta
from train.sim.prediction import NUM_TRAIN, NotModelled, Prediction, chip_of, predict, reference_epochs
from train.sim.prediction_mesh import NEEDED
from train.sim.run import RunTime

VARIANT_ERROR = 0.1
"""Joins the model's error for a chip whose nearest variant was taken: variants of A100 and V100 differ by as much."""
FAMILIES = ("V100", "A100", "A30", "H100", "H200", "TPU", "Ascend", "Gaudi", "IPU", "Xeon", "P100")


@dataclass(frozen=True)
class Catalog:
    """The chips of conf/chip, the machines that predictions take links from, and a fitted network."""

    chips: dict[str, Chip]
    meshes: dict[str, Mesh]
    network: AlphaBeta

    @cached_property
    def anchors(self) -> set[str]:
        """Ids of the records that are some chip's anchor."""
        return {a["record"] for chip in self.chips.values() for a in chip.anchors if "record" in a}

    @property
    def fitted_on(self) -> set[str]:
        return self.anchors | set(self.network.calibration.fitted_on)


@dataclass(frozen=True)
class Row:
    """A record with its prediction, or the reason why there is none. Times are seconds."""

    record: Record
    prediction: Prediction | None
    emulator: Emulator | None
    fitted_on: bool
    reason: str | None

    @cached_property
    def predicted_s(self) -> float:
        return self.run.time_to_train_s

    @cached_property
    def run(self) -> RunTime:
        return self.emulator.run_time()

    @cached_property
    def epoch_s(self) -> float:
        """A steady epoch: its steps and its share of the evaluations."""
        made = self.emulator
        steps = made.steps_per_epoch * made.step(made.global_batch_size).step_s
        return steps + made.eval_s(made.num_eval) / made.eval_every

    @property
    def linear_epoch_s(self) -> float:
        """Perfect scaling: an epoch at the anchor's rate times the chips."""
        chip = self.prediction.chip
        rates = [a["images_per_s"] for a in chip.anchors_of(chip.precision)]
        return NUM_TRAIN / self.record.chips / max(rates) * self.emulator.software_factor

    @property
    def linear_s(self) -> float:
        return self.linear_epoch_s * self.run.epochs


def load_catalog(network: AlphaBeta | None = None) -> Catalog:
    chips = {path.stem: emulator.make(node("chip", path.stem)) for path in sorted((CONF / "chip").glob("*.yaml"))}
    meshes = {name: emulator.make(node("mesh", name)) for name in NEEDED}
    return Catalog(chips, meshes, network or emulator.make(node("network", "fitted")))


def node(group: str, name: str) -> dict:
    """A file of conf/ over those that it starts from."""
    from omegaconf import OmegaConf

    own = OmegaConf.load(CONF / group / f"{name}.yaml")
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    own.pop("brings", None)
    return OmegaConf.to_container(OmegaConf.merge(*(node(group, base) for base in bases), own))


def rows_of(published: list[Record], catalog: Catalog, reference: bool = False) -> list[Row]:
    """reference: epochs from the reference points in place of the published ones."""
    return [_row(record, catalog, reference) for record in published]


def _row(record: Record, catalog: Catalog, reference: bool) -> Row:
    fitted_on = record.id in catalog.fitted_on
    try:
        made = predict(record, catalog.chips, catalog.meshes, reference_epochs(record) if reference else None)
        return Row(record, made, emulate(made, catalog.network), fitted_on, None)
    except ValueError as error:
        return Row(record, None, None, fitted_on, str(error))


def emulate(made: Prediction, network: AlphaBeta) -> Emulator:
    """The emulator of a prediction; a chip's variant has a wider interval."""
    if made.variant:
        error = math.hypot(network.calibration.model_error or network.model_error, VARIANT_ERROR)
        network = copy.copy(network)
        network.calibration = dataclasses.replace(network.calibration, model_error=error)
    return Emulator(made.mesh, made.chip, network=network, **made.arguments)


def published_epoch_s(row: Row, epochs: dict[str, EpochTime]) -> tuple[float, float] | None:
    """(published, predicted) seconds of an epoch: the log's steady ones, or of the whole clock where it has none."""
    found = epochs.get(row.record.id)
    if found is None:
        return None
    if found.s_per_epoch_steady is None:
        return found.s_per_epoch, row.predicted_s / row.run.epochs
    return found.s_per_epoch_steady, row.epoch_s


def step_scores(rows: list[Row], epochs: dict[str, EpochTime]) -> list[tuple[Row, float, float, float]]:
    """(a): (row, published, predicted, perfectly scaled seconds of an epoch) of closed rows outside the fit."""
    found = []
    for row in rows:
        if row.reason is None and not row.fitted_on and row.prediction.division == "closed":
            pair = published_epoch_s(row, epochs)
            if pair:
                found.append((row, *pair, row.linear_epoch_s))
    return found


def time_scores(rows: list[Row]) -> list[tuple[Row, float, float, float]]:
    """(b) and (c): as step_scores, of whole times and all rows outside the fit."""
    kept = [row for row in rows if row.reason is None and not row.fitted_on and row.record.seconds is not None]
    return [(row, row.record.seconds, row.predicted_s, row.linear_s) for row in kept]


def summary(scored: list[tuple[Row, float, float, float]]) -> dict[str, float | int | None]:
    """Errors of predicted / published - 1, and the interval's coverage."""
    if not scored:
        keys = "median_abs_error p90_abs_error bias coverage mean_width baseline_median baseline_p90"
        return dict.fromkeys(keys.split()) | {"scored": 0}
    errors = [predicted / published - 1 for _, published, predicted, _ in scored]
    linear = np.abs([perfect / published - 1 for _, published, _, perfect in scored])
    inside = [low <= row.record.seconds <= high for row, *_ in scored for low, high in [row.run.interval_s]]
    width = [(high - low) / row.predicted_s for row, *_ in scored for low, high in [row.run.interval_s]]
    return {
        "median_abs_error": median(map(abs, errors)),
        "p90_abs_error": float(np.quantile(np.abs(errors), 0.9)),
        "bias": mean(errors),
        "coverage": mean(inside),
        "mean_width": mean(width),
        "baseline_median": float(np.median(linear)),
        "baseline_p90": float(np.quantile(linear, 0.9)),
        "scored": len(scored),
    }


def family(chip_name: str) -> str:
    """Chips that leave-one-family-out leaves out together."""
    return next((name for name in FAMILIES if name in chip_name), "other GPUs")


def twins(published: list[Record], epochs: dict[str, EpochTime], chips: dict[str, Chip]) -> list[tuple[str, float]]:
    """(id, error of the mean of its twins): closed rows of the same chip, count and batch, in seconds of an epoch."""
    groups = defaultdict(list)
    for record in published:
        if record.id in epochs and "closed" in record.system:
            try:
                name = chip_of(record, chips)[0].name
            except NotModelled:
                name = record.chip
            found = epochs[record.id]
            groups[name, record.chips, record.global_batch].append(
                (record.id, found.s_per_epoch_steady or found.s_per_epoch)
            )
    return [
        (each, math.exp(mean(math.log(s) for other, s in group if other != each)) / seconds - 1)
        for group in groups.values()
        if len(group) > 1
        for each, seconds in group
    ]
