"""Fits the constants that published records give (train/sim/calibration).

Software factors: least squares over the chips' own anchors (single-host records), chip x framework and year. The step's
constants: the most likely values for the seconds of an epoch in every third multi-host closed MLPerf row (by chip,
count, id; 1,024-chip Ascend rows are left out), with a Laplace-tailed error and log-normal priors from other sources.
Start-up: the least absolute error of the whole clock in all rows fitted on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launch.validation import Catalog, Row, emulate, load_catalog, published_epoch_s
from train import records
from train.comm.plan import Plan
from train.mesh.chip import Chip
from train.records import EpochTime
from train.sim.calibration import Calibration
from train.sim.network import AlphaBeta
from train.sim.prediction import NotModelled, predict

EVERY = 3
SCALE = 0.05  # errors below this count by their square, larger ones by their size (Huber 1964)
TWIN_ROWS, TWIN_ERROR = 8, 0.08  # model_error's prior: as many rows with this mean error; twins lie as far apart
FRAMEWORK, REFERENCE = "mxnet", 2021
SMOOTH = 0.1  # weight of "no change from one year to the next" against one anchor


@dataclass(frozen=True)
class Prior:
    """Median and deviation of the logarithm, from other sources than the records."""

    name: str
    median: float
    deviation: float
    most: float
    source: str


PRIORS = (
    Prior("half_batch", 15.0, 0.5, math.inf, "one chip at two batches: P100 9 images, Ascend 910 7 (conf/chip)"),
    Prior(
        "jitter",
        0.025,
        0.5,
        math.inf,
        "1 chip against 8 or 16 at one batch: Ascend 910 3.1 % (conf/chip), V100 1.8 % and A100 1.6 % "
        "(NVIDIA/DeepLearningExamples, MXNet)",
    ),
    Prior("comm_efficiency", 0.6, 0.4, 1.0, "assumed; 0.7 in Huawei's simulator (Ascend/msmodeling, device.py)"),
    Prior("overlap", 0.5, 0.4, 1.0, "assumed"),
)


class Priced(AlphaBeta):
    """AlphaBeta that remembers each plan's price as latency + bytes / efficiency, for many calibrations."""

    def __init__(self, prices: dict, calibration: Calibration):
        super().__init__(calibration=calibration)
        self.prices = prices

    def seconds(self, plan: Plan, nbytes: float, all_groups: bool = False) -> float:
        key = plan.mesh.name, plan.mesh.num_chips, nbytes
        if key not in self.prices:
            full, half = (
                AlphaBeta(calibration=Calibration(comm_efficiency=share)).seconds(plan, nbytes) for share in (0.8, 0.4)
            )
            transfer = (half - full) / (1 / 0.4 - 1 / 0.8)
            self.prices[key] = full - transfer / 0.8, transfer
        latency, transfer = self.prices[key]
        return latency + transfer / self.calibration.comm_efficiency


@dataclass(frozen=True)
class Data:
    """Predictions of all rows that can be predicted, their published epochs, and prices of plans met so far."""

    catalog: Catalog
    rows: dict[str, Row]
    epochs: dict[str, EpochTime]
    prices: dict

    def row(self, id: str, calibration: Calibration) -> Row:
        base = self.rows[id]
        made = emulate(base.prediction, Priced(self.prices, calibration))
        return Row(base.record, base.prediction, made, True, None)

    def error(self, id: str, calibration: Calibration) -> float:
        """ln(predicted / published) seconds of an epoch."""
        published, predicted = published_epoch_s(self.row(id, calibration), self.epochs)
        return math.log(predicted / published)

    def time_error(self, id: str, calibration: Calibration) -> float:
        row = self.row(id, calibration)
        return math.log(row.predicted_s / row.record.seconds)


def load() -> Data:
    catalog = load_catalog(AlphaBeta())
    rows = {}
    for record in records.load():
        try:
            made = predict(record, catalog.chips, catalog.meshes)
        except NotModelled:
            continue
        rows[record.id] = Row(record, made, None, True, None)
    return Data(catalog, rows, records.load_epochs(), {})


def multi_host_rows(data: Data) -> list[str]:
    """Closed rows with a logged epoch on several hosts that are no anchor, by chip, count and id."""
    found = [
        row
        for row in data.rows.values()
        if row.prediction.division == "closed"
        and row.record.id in data.epochs
        and row.record.id not in data.catalog.anchors
        and row.prediction.mesh.num_hosts > 1
        and not (row.record.chips == 1024 and "Ascend" in row.record.chip)
    ]
    found.sort(key=lambda row: (row.prediction.chip.name, row.record.chips, row.record.id))
    return [row.record.id for row in found]


def software_factors(chips: list[Chip], half_batch: float) -> dict[str, float]:
    """Time of MXNet's compute by year against 2021's: anchors' ln(seconds an image) = chip + year."""
    points = [
        (chip.name, int(a["software"][-4:]), math.log(a["batch"] / a["images_per_s"] / (a["batch"] + half_batch)))
        for chip in chips
        for a in chip.anchors
        if a.get("software", "").startswith(f"{FRAMEWORK} ") and "record" in a
    ]
    names, years = (sorted({point[k] for point in points}) for k in (0, 1))
    columns = {key: at for at, key in enumerate([*names, *years])}
    lines = [({name: 1.0, year: 1.0}, value) for name, year, value in points]
    lines += [({year: SMOOTH, before: -SMOOTH}, 0.0) for before, year in zip(years, years[1:], strict=False)]
    lines.append(({REFERENCE if REFERENCE in years else years[0]: 1.0}, 0.0))
    matrix = np.zeros((len(lines), len(columns)))
    for line, (weights, _) in zip(matrix, lines, strict=True):
        for key, weight in weights.items():
            line[columns[key]] = weight
    found = np.linalg.lstsq(matrix, np.array([value for _, value in lines]), rcond=None)[0]
    return {f"{FRAMEWORK} {year}": round(math.exp(found[columns[year]]), 3) for year in years}


def calibration(data: Data, values: dict[str, float], without: set[str] = frozenset()) -> Calibration:
    """The step's constants with the software factors that go with them; `without`: names of chips left out."""
    chips = [chip for chip in data.catalog.chips.values() if chip.name not in without]
    return Calibration(**values, software=software_factors(chips, values.get("half_batch", 0.0)))


def fit_step(data: Data, ids: list[str], neutral: dict[str, float] | None = None, without: set[str] = frozenset()):
    """The constants of PRIORS most likely for `ids`; those in `neutral` stay as given there."""
    free = [prior for prior in PRIORS if prior.name not in (neutral or {})]

    def made(z: np.ndarray) -> Calibration:
        values = {p.name: min(p.most, p.median * math.exp(p.deviation * x)) for p, x in zip(free, z, strict=True)}
        return calibration(data, {**values, **(neutral or {})}, without)

    def unlikely(z: np.ndarray) -> float:
        found = made(z)
        errors = np.abs([data.error(id, found) for id in ids]) / SCALE
        return float(np.sum(np.where(errors < 1, errors**2 / 2, errors - 0.5)) + np.sum(z**2) / 2)

    return made(search(unlikely, len(free)))


def search(loss: Callable[[np.ndarray], float], size: int, step: float = 0.8, least: float = 0.02) -> np.ndarray:
    """Patterns (Hooke and Jeeves 1961): along each axis, then on in the direction of success; halving the step."""
    best, value = np.zeros(size), loss(np.zeros(size))
    while step > least:
        start = best.copy()
        for axis in range(size):
            for sign in (step, -step):
                tried = best.copy()
                tried[axis] += sign
                found = loss(tried)
                if found < value:
                    best, value = tried, found
                    break
        if (best == start).all():
            step /= 2
            continue
        tried = 2 * best - start
        found = loss(tried)
        if found < value:
            best, value = tried, found
    return best


def fit_startup(data: Data, ids: list[str], step: Calibration) -> dict[str, float]:
    """startup_s and first_epoch_s: seconds beside the steady epochs, least absolute error as a share of the whole."""
    points = []
    for id in ids:
        row, found = data.row(id, step), data.epochs.get(id)
        if found and found.s_per_epoch_steady and row.record.epochs and row.prediction.chip.startup_s is None:
            rest = row.record.seconds - row.record.epochs * found.s_per_epoch_steady
            points.append((rest, row.emulator.plan.mesh.num_hosts, row.record.seconds))
    fixed, first = least_absolute(*np.array(points).T)
    return {"startup_s": fixed, "first_epoch_s": first}


def least_absolute(rest: np.ndarray, hosts: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """(fixed, first), neither negative, of the least sum |fixed + first / hosts - rest| / whole.

    The best line of this kind goes through two of the points, or through one with the other number 0: all are tried.
    """
    slope = 1 / hosts
    one, two = np.triu_indices(len(rest), 1)
    apart = slope[one] != slope[two]
    one, two = one[apart], two[apart]
    first = (rest[one] - rest[two]) / (slope[one] - slope[two])
    tried = np.concatenate(
        [
            np.stack([rest[one] - first * slope[one], first]),
            np.stack([rest, np.zeros_like(rest)]),
            np.stack([np.zeros_like(rest), rest / slope]),
        ],
        axis=1,
    )
    tried = tried[:, (tried >= 0).all(axis=0)]
    loss = np.sum(np.abs(tried[0][:, None] + tried[1][:, None] * slope - rest) / whole, axis=1)
    fixed, first = tried[:, int(np.argmin(loss))]
    return float(fixed), float(first)


def rounded(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


def fit(data: Data, first: int = 0) -> dict:
    """All fields of the fitted calibration. first: which third of the multi-host rows is fitted on."""
    ids = multi_host_rows(data)[first::EVERY]
    step = fit_step(data, ids)
    values = {prior.name: rounded(getattr(step, prior.name)) for prior in PRIORS}
    logged = sorted(data.catalog.anchors & set(data.rows))
    start = fit_startup(data, ids + logged, step)
    values |= {name: rounded(value, 2) for name, value in start.items()}
    whole = Calibration(**values, software=software_factors(list(data.catalog.chips.values()), values["half_batch"]))
    errors = np.abs([data.time_error(id, whole) for id in ids])
    spread = math.sqrt(math.pi / 2) * (float(np.sum(errors)) + TWIN_ROWS * TWIN_ERROR) / (len(ids) + TWIN_ROWS)
    return {**values, "software": whole.software, "model_error": rounded(spread, 2), "fitted_on": ids}
