"""What is broken on the emulated machine, and when: `faults=`. docs/faults.md has the model of each and its source.

A fault is a value: when it strikes, whom, and what it changes. train/sim/timeline draws a run's events from it,
train/sim/toll prices them, train/models/damage does to the arithmetic what they do to it.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from train.mesh.mesh import Mesh
from train.mesh.origin import Origin

SOURCE = "the configuration, faults"


class Condition(NamedTuple):
    """What of the machine's state a step's price depends on."""

    slowdown: float = 1.0
    """How many times as long as the mean chip the slowest broken one computes."""
    links: tuple[tuple[str | None, float], ...] = ()
    """(class, factor) of each link that is slow, sorted; no class: the mesh's slowest."""
    lost: int = 0
    """Chips that are gone."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """When something breaks: on a schedule, or at a rate; with neither from the first step on.

    at_steps: numbers of steps, from 1. at_epochs: the step that begins then. at_s: the step at hand at this emulated
    second of the run as it would be without faults. per_step: probability a step. per_chip_hour: of each chip, while
    it trains. Of the five at most one is given. ValueError otherwise.
    """

    at_steps: int | list[int] | None = None
    at_epochs: float | list[float] | None = None
    at_s: float | list[float] | None = None
    per_step: float | None = None
    per_chip_hour: float | None = None

    name: ClassVar[str] = "nothing"
    flips: ClassVar[bool] = False
    """Flips a bit of a chip's gradient."""
    freezes: ClassVar[bool] = False
    """A chip's running statistics stand still."""

    def __post_init__(self) -> None:
        names = ("at_steps", "at_epochs", "at_s", "per_step", "per_chip_hour")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"faults: {self.name} has {' and '.join(given)}; give one of them, the others null")
        for name, least in (("at_steps", 1), ("at_epochs", 0), ("at_s", 0)):
            for value in _list(getattr(self, name)):
                if not least <= value < math.inf:
                    raise ValueError(f"faults.{name}={value}: {self.name} strikes at {least} or later")
        for name, most in (("per_step", 1.0), ("per_chip_hour", math.inf)):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate <= most:
                least = "at least 0" if most > 1 else "from 0 to 1"
                raise ValueError(f"faults.{name}={rate}: {self.name} needs a rate {least}")

    @property
    def random(self) -> bool:
        """Whether another seed would have it strike at other times."""
        return self.per_step is not None or self.per_chip_hour is not None

    @property
    def scheduled(self) -> bool:
        return any(value is not None for value in (self.at_steps, self.at_epochs, self.at_s))

    @property
    def lasts(self) -> int | None:
        """Steps; None: to the end of the run."""
        return 1

    @property
    def stands(self) -> bool:
        """Whether it is there from the first step to the last: a property of the machine."""
        return not self.random and not self.scheduled and self.lasts is None

    @property
    def slowdown(self) -> float:
        return 1.0

    @property
    def slow_link(self) -> tuple[str | None, float] | None:
        return None

    @property
    def shrinks(self) -> bool:
        """Whether the chips it strikes are gone for the rest of the run."""
        return False

    def strikes(self, where: float, chips: int, chips_per_host: int) -> range:
        """The chips it strikes, those of a mesh of `chips`; `where` in [0, 1) is drawn. ValueError for no such chip."""
        chosen = getattr(self, "chip", None)
        if chosen is None:
            chosen = int(where * chips)
        elif not 0 <= chosen < chips:
            raise ValueError(f"faults.chip={chosen}: the mesh's chips with work are 0 to {chips - 1}")
        return range(chosen, chosen + 1)

    def overhead_s(self) -> float:
        """What it takes to recover, beside the steps that are repeated."""
        return 0.0

    def repeats_from(self, step: int, checkpoint_steps: int | None) -> int:
        """Finished steps that the cluster goes back to when it strikes in `step`; `step`: it repeats none."""
        return step

    def words(self) -> str:
        """What happens, for a report."""
        return self.name

    def when(self) -> str:
        """When it strikes, for a note."""
        if self.per_step is not None:
            return f"with probability {self.per_step:g} a step"
        if self.per_chip_hour is not None:
            return f"{self.per_chip_hour:g} times a chip and hour"
        for words, values in (("step", self.at_steps), ("epoch", self.at_epochs), ("emulated second", self.at_s)):
            if values is not None:
                return f"at {words} " + ", ".join(f"{value:g}" for value in _list(values))
        return "from the first step on"

    def origins(self) -> list[Origin]:
        return []


@dataclass(frozen=True)
class SlowChip(Fault):
    """One chip computes `factor` times as long as the mean one; all others wait for it. chip: null: drawn."""

    factor: float
    chip: int | None = None
    for_steps: int | None = None

    name: ClassVar[str] = "slow chip"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor("SlowChip", self.factor)
        _check_lasts(self.for_steps)

    @property
    def lasts(self) -> int | None:
        return self.for_steps

    @property
    def slowdown(self) -> float:
        return self.factor

    def words(self) -> str:
        return f"computes {self.factor:g} times as long"

    def origins(self) -> list[Origin]:
        return [Origin("faults.factor", self.factor, "x compute of one chip", SOURCE)]


@dataclass(frozen=True)
class SlowLink(Fault):
    """One link of class `link` (null: the mesh's slowest, the last of equals) carries a `factor`-th of its rate.

    Priced as if all of its class did: in a collective all chips do alike and a round ends with its last message, so
    the one link holds up every round in which it has a part. An upper bound where some rounds leave it out.
    """

    factor: float
    link: str | None = None
    for_steps: int | None = None

    name: ClassVar[str] = "slow link"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor("SlowLink", self.factor)
        _check_lasts(self.for_steps)

    @property
    def lasts(self) -> int | None:
        return self.for_steps

    @property
    def slow_link(self) -> tuple[str | None, float]:
        return self.link, self.factor

    def strikes(self, where: float, chips: int, chips_per_host: int) -> range:
        return range(0)

    def words(self) -> str:
        return f"a {self.link or 'slowest'} link carries 1/{self.factor:g} of its rate"

    def origins(self) -> list[Origin]:
        unit = f"x time on a {self.link or 'slowest'} link"
        return [Origin("faults.factor", self.factor, unit, SOURCE)]


@dataclass(frozen=True, kw_only=True)
class Loss(Fault):
    """Chips stop for good. Their job stands for `detect_s` until that is noticed, and `restart_s` until it runs again.

    recovery=spare: another takes its place, all go back to the last checkpoint and repeat the steps since; what is
    computed stays the same. recovery=shrink: the others go on without it from the weights that each of them holds, and
    repeat the step at hand; its share of every batch is gone.
    checkpoint_steps: between the cluster's checkpoints; null: the run's. Without any, or 0, it begins anew.
    """

    recovery: Literal["spare", "shrink"] = "spare"
    detect_s: float = 5.0
    restart_s: float = 20.0
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recovery not in ("spare", "shrink"):
            raise ValueError(f"faults.recovery={self.recovery}: {self.name} knows spare and shrink")
        for name in ("detect_s", "restart_s", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"faults.{name}={value} must be at least 0 and finite")

    @property
    def shrinks(self) -> bool:
        return self.recovery == "shrink"

    @property
    def lasts(self) -> int | None:
        return None if self.shrinks else 1

    @property
    def stands(self) -> bool:
        return False  # it has a cost of its own when it strikes

    def overhead_s(self) -> float:
        return self.detect_s + self.restart_s

    def repeats_from(self, step: int, checkpoint_steps: int | None) -> int:
        between = checkpoint_steps if self.checkpoint_steps is None else self.checkpoint_steps
        if self.shrinks:
            return step - 1
        return (step - 1) // between * between if between else 0

    def words(self) -> str:
        return "a spare takes over" if self.recovery == "spare" else "the others go on without"

    def origins(self) -> list[Origin]:
        why = f"{SOURCE} (assumed: docs/faults.md)"
        return [
            Origin("faults.detect_s", self.detect_s, "s", why),
            Origin("faults.restart_s", self.restart_s, "s", why),
        ]


@dataclass(frozen=True, kw_only=True)
class DeadChip(Loss):
    """One chip stops for good. chip: null: drawn."""

    chip: int | None = None

    name: ClassVar[str] = "dead chip"


@dataclass(frozen=True, kw_only=True)
class LostHost(Loss):
    """All chips of one host stop for good. host: null: drawn."""

    host: int | None = None

    name: ClassVar[str] = "lost host"

    def strikes(self, where: float, chips: int, chips_per_host: int) -> range:
        hosts = math.ceil(chips / chips_per_host)
        host = int(where * hosts) if self.host is None else self.host
        if not 0 <= host < hosts:
            raise ValueError(f"faults.host={host}: the mesh's hosts with work are 0 to {hosts - 1}")
        return range(host * chips_per_host, min(chips, (host + 1) * chips_per_host))


@dataclass(frozen=True)
class FlippedBit(Fault):
    """One bit of one element of one chip's gradient (float32) is inverted before the sum; nobody notices.

    bit: 0 (the mantissa's last) to 30 (the exponent's first) and 31 (the sign). chip, bit: null: drawn, as the element.
    """

    chip: int | None = None
    bit: int | None = None

    name: ClassVar[str] = "flipped bit"
    flips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bit is not None and not 0 <= self.bit <= 31:
            raise ValueError(f"faults.bit={self.bit}: a float32 has bits 0 to 31")

    def words(self) -> str:
        return "one bit of its gradient is inverted before the sum"


@dataclass(frozen=True)
class StaleBatchNorm(Fault):
    """A chip's running statistics stand still for `for_steps` steps; it trains as ever. chip: null: drawn."""

    chip: int | None = None
    for_steps: int | None = None

    name: ClassVar[str] = "stale batch norm"
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lasts(self.for_steps)

    @property
    def lasts(self) -> int | None:
        return self.for_steps

    def words(self) -> str:
        return "its running statistics stand still"


@dataclass(frozen=True)
class Several:
    """Faults together, each under a name of its own: `faults=several faults.of.dead_chip.at_epochs=[3]`."""

    of: dict[str, Any] = field(default_factory=dict)


def each(given: Fault | Several | None) -> tuple[Fault, ...]:
    """The faults of a configuration, in its order. ValueError where something else stands among them."""
    if isinstance(given, Several):
        return tuple(fault for one in given.of.values() for fault in each(one))
    if given is None:
        return ()
    if not isinstance(given, Fault):
        raise ValueError(f"faults: {given!r} is no fault; each is a node with a _target_ of train.sim.faults")
    return (given,)


def condition(faults: Sequence[Fault], lost: int = 0) -> Condition:
    """The machine while `faults` are at work."""
    links = sorted({fault.slow_link for fault in faults if fault.slow_link}, key=str)
    return Condition(max((fault.slowdown for fault in faults), default=1.0), tuple(links), lost)


def slowed(mesh: Mesh, links: Sequence[tuple[str | None, float]]) -> Mesh:
    """The mesh with slow links, see SlowLink; of several on one class the slowest counts. ValueError: no such class."""
    classes = mesh.topology.link_classes
    names = [link.name for link in classes]
    slowest = min(reversed(classes), key=lambda link: link.bytes_per_s).name
    factors: dict[str, float] = {}
    for name, factor in links:
        if name not in (None, *names):
            raise ValueError(f"faults.link={name}: mesh {mesh.name} has no such links; it has {', '.join(names)}")
        factors[name or slowest] = max(factor, factors.get(name or slowest, 1.0))
    if not factors:
        return mesh
    broken, topology = copy.copy(mesh), copy.copy(mesh.topology)
    topology.link_classes = tuple(link.slowed(factors.get(link.name, 1.0)) for link in classes)
    broken.topology = topology
    return broken


def every(values: float | Sequence[float] | None) -> Iterator[float]:
    """A schedule's entries, which may be one number."""
    yield from _list(values)


def _list(values: float | Sequence[float] | None) -> Sequence[float]:
    if values is None:
        return []
    return values if isinstance(values, (list, tuple)) else [values]


def _check_factor(name: str, factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ValueError(f"faults.factor={factor}: {name} is so many times slower: at least 1")


def _check_lasts(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise ValueError(f"faults.for_steps={steps} must be at least 1; null: to the end of the run")
