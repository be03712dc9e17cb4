"""The kills of scripts/chaos.py: which are given, what each cost, what is said of them."""

import random
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import cycle, islice

NODES, WORKERS = 2, 4
KINDS = [f"{victim} {how}" for how in ("killed", "stopped") for victim in ("worker", "raylet", "driver")]
MOMENTS = ("backward", "all-reduce", "checkpoint", "evaluation")
LOST = {"worker": 1, "raylet": WORKERS // NODES}
"""How many workers a kill costs."""


@dataclass
class Strike:
    """One kill, and what came of it. None: it cost the training nothing.

    Seconds are counted from the kill; where a raylet is killed, from the end of its first worker: Ray's workers work on
    for `worked_on_s` until their node is given up.
    """

    kind: str
    moment: str
    step: int = 0
    worked_on_s: float = 0.0
    detected_s: float | None = None
    training_again_s: float | None = None
    steps_repeated: int = 0
    source: str = ""


def plan(kills: int, seed: int) -> list[Strike]:
    """As many of each kind as can be, each kind at all moments in turn; the order is drawn."""
    draw = random.Random(seed)
    kinds = list(islice(cycle(KINDS), kills))
    moments = {kind: cycle(draw.sample(MOMENTS, len(MOMENTS))) for kind in KINDS}
    draw.shuffle(kinds)
    return [Strike(kind, next(moments[kind])) for kind in kinds]


def unasked_losses(lost: int, strikes: list[Strike]) -> int:
    """Workers, of those that were lost in a run, that no kill explains."""
    explained = {f"{victim} {how}": each for victim, each in LOST.items() for how in ("killed", "stopped")}
    return lost - sum(explained.get(strike.kind, 0) for strike in strikes)


def summary(strikes: list[Strike], equal: list[bool], unasked: int) -> dict:
    """The object that --json prints."""
    kinds = [kind for kind in KINDS if any(strike.kind == kind for strike in strikes)]

    def largest(name: str, kind: str | None = None) -> float | None:
        values = [getattr(strike, name) for strike in strikes if kind in (None, strike.kind)]
        return max((value for value in values if value is not None), default=None)

    return {
        "kills": {kind: dict(Counter(strike.moment for strike in strikes if strike.kind == kind)) for kind in kinds},
        "hash_equal": bool(equal) and all(equal),
        "runs": len(equal),
        "max_detect_s": largest("detected_s"),
        "max_recover_s": largest("training_again_s"),
        "steps_repeated": sum(strike.steps_repeated for strike in strikes),
        "losses_nobody_asked_for": unasked,
        "by_kind": {
            kind: {
                "max_detect_s": largest("detected_s", kind),
                "max_recover_s": largest("training_again_s", kind),
                "steps_repeated": sum(strike.steps_repeated for strike in strikes if strike.kind == kind),
            }
            for kind in kinds
        },
        "strikes": [asdict(strike) for strike in strikes],
    }


def line(strike: Strike) -> str:
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} s"

    return (
        f"{strike.kind:14} in {strike.moment:10} at step {strike.step:3}: detected {seconds(strike.detected_s):>7}, "
        f"training again {seconds(strike.training_again_s):>7}, {strike.steps_repeated} step(s) repeated"
    )
