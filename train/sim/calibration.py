"""Constants of the step and run model that published records give, not physics: fitted by scripts/fit_records.py.

Every default is neutral: without a calibration a chip's own anchors, links and recipe are all that moves the clock.
"""

from dataclasses import dataclass, field, fields

from train.mesh.origin import Origin
from train.sim.straggler import check_distribution

UNITS = {
    "half_batch": "images a chip",
    "launch_floor_s": "s a step",
    "jitter": "of compute",
    "straggler": "",
    "comm_efficiency": "of a link's rate",
    "overlap": "of the backward pass",
    "eval_s": "s an evaluation",
    "startup_s": "s a run",
    "first_epoch_s": "s x hosts",
    "model_error": "sigma of ln(time)",
    "epochs_error": "sigma of ln(epochs)",
}


@dataclass(frozen=True)
class Calibration:
    """A network node carries it; launch.emulate and scripts/validate.py use it through the same Emulator.

    half_batch: images a chip at which it reaches half its rate; for chips whose anchors are all at one batch.
    launch_floor_s: no step's compute is shorter, whatever the batch.
    jitter: deviation of a chip's step time as a share of its compute, where the chip states none.
    straggler: distribution of that deviation (train/sim/straggler).
    comm_efficiency: share of a link's rate that a collective reaches (used by the network).
    overlap: share of the backward pass behind which communication can hide.
    eval_s: fixed cost of an evaluation. startup_s: of a run; first_epoch_s: what one host's first pass over the data
    takes longer (its hosts share it). Both where the chip states no start-up.
    software: time of a step's compute, by framework and year, relative to each other: {"mxnet 2019": 1.1, ...}; those
    not in it are not scaled.
    model_error: sigma of ln(published / predicted time); null: the network's. epochs_error: of the epochs, where
    they come from the reference points. source: where each value comes from. fitted_on: ids of the records that gave
    the shared constants; they count in no score.
    """

    half_batch: float = 0.0
    launch_floor_s: float = 0.0
    jitter: float = 0.0
    straggler: str = "normal"
    comm_efficiency: float = 1.0
    overlap: float = 1.0
    eval_s: float = 0.0
    startup_s: float = 0.0
    first_epoch_s: float = 0.0
    software: dict[str, float] = field(default_factory=dict)
    model_error: float | None = None
    epochs_error: float = 0.0
    source: dict[str, str] = field(default_factory=dict)
    fitted_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_distribution(self.straggler)
        for name in ("half_batch", "launch_floor_s", "jitter", "eval_s", "startup_s", "first_epoch_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"calibration.{name}={getattr(self, name)} must not be negative")
        for name in ("comm_efficiency", "overlap"):
            lowest_allowed = getattr(self, name) > 0 or name == "overlap"
            if not (0 <= getattr(self, name) <= 1 and lowest_allowed):
                raise ValueError(f"calibration.{name}={getattr(self, name)} is a share: above 0 and at most 1")
        for name in ("model_error", "epochs_error"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2:
                raise ValueError(f"calibration.{name}={value} must be at least 0 and below 2 (0.1 is about 10 %)")
        for name, factor in self.software.items():
            if not 0 < factor < float("inf"):
                raise ValueError(f"calibration.software.{name}={factor} must be a positive factor")

    def software_factor(self, wanted: str | None, measured: str | None) -> float:
        """Time of a step's compute in the software `wanted` over that in `measured`; 1 if one of them is unknown."""
        if wanted not in self.software or measured not in self.software:
            return 1.0
        return self.software[wanted] / self.software[measured]

    def in_use(self) -> dict[str, float | str]:
        """Every constant that is not neutral, the software's factors apart."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name in UNITS}
        neutral = {item.name: item.default for item in fields(self)}
        return {name: value for name, value in values.items() if value != neutral[name]}

    def origins(self) -> dict[str, Origin]:
        """Every constant that is not neutral, with its source; software factors as software[name]."""
        units = {name: (value, UNITS[name], self._source(name)) for name, value in self.in_use().items()}
        source = self._source("software")
        units |= {f"software[{name}]": (factor, "x time", source) for name, factor in self.software.items()}
        return {name: Origin(f"calibration.{name}", *figures) for name, figures in units.items()}

    def _source(self, name: str) -> str:
        return self.source.get(name, "assumed: no source given")
