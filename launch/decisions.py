"""What to do about the workers of a run: `decide(status, limits) -> Decision`, a pure function.

A worker's place on the mesh is its slot. Its phases, and what moves it between them:

    starting --built--> ready --regroup--> training --peer lost, pause--> waiting --regroup--> training ...
       ^                                      |                              |
       |                                      +--------- end reached --------+--> done
       +--replaced-- lost <-- died, hung, left --- any of them;   lost --given up--> absent
"""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["absent", "starting", "ready", "training", "waiting", "done", "lost"]

SILENT_S = 2.0
"""A worker that does not answer for so long, after its peers have lost a connection, is taken for dead."""


@dataclass(frozen=True)
class Limits:
    """Of the configuration."""

    max_restarts: int
    min_workers: int
    wait_s: float


@dataclass(frozen=True)
class Status:
    """What is known of the workers now. Times are in seconds."""

    phases: tuple[Phase, ...]
    silent_s: tuple[float, ...]
    """Since each one's last answer."""
    leaving: frozenset[int] = frozenset()
    """Slots that have been told to end, and still work."""
    broken: str | None = None
    """What the first worker said that lost a connection since all trained together."""
    unexplained: bool = False
    """Whether that was without any worker being lost."""
    idle_s: float = 0.0
    """For how long nobody has trained."""
    restarts: int = 0
    pausing: bool = False
    stopping: bool = False


@dataclass(frozen=True)
class Decision:
    """wait | replace, give_up, kill (slots) | pause | train (slots: the members) | finish | fail (reason)."""

    kind: Literal["wait", "replace", "give_up", "kill", "pause", "train", "finish", "fail"]
    slots: tuple[int, ...] = ()
    reason: str = ""


def decide(status: Status, limits: Limits) -> Decision:
    """What is to be done next; called several times a second."""

    def slots(*phases: Phase) -> tuple[int, ...]:
        return tuple(number for number, phase in enumerate(status.phases) if phase in phases)

    lost, training, members = slots("lost"), slots("training"), slots("training", "waiting", "done")
    if members and members == slots("done"):
        return Decision("finish")
    if lost:
        left = limits.max_restarts - status.restarts
        return Decision("replace", lost[:left]) if left > 0 and not status.stopping else Decision("give_up", lost)
    if training:
        mute = tuple(number for number in training if status.silent_s[number] > SILENT_S)
        if status.broken and mute:
            return Decision("kill", mute, f"no answer for {SILENT_S:.0f} s after its peers had lost it")
        joining = slots("ready") or status.leaving & set(training)
        if joining and training == members and not (status.broken or status.pausing or status.stopping):
            return Decision("pause")
        return Decision("wait")
    return _regroup(status, limits, slots("waiting", "done", "ready"), slots("starting"))


def _regroup(status: Status, limits: Limits, able: tuple[int, ...], starting: tuple[int, ...]) -> Decision:
    """Nobody trains."""
    if status.unexplained and status.restarts >= limits.max_restarts:
        return Decision("fail", reason=f"connections break and no worker is lost: {status.broken}")
    staying = tuple(number for number in able if number not in status.leaving)
    if len(staying) >= limits.min_workers:
        return Decision("train", staying)
    there = f"{len(staying)} of at least {limits.min_workers} worker(s) (min_workers) left"
    if not starting:
        return Decision("fail", reason=f"{there}, and all {limits.max_restarts} restarts (max_restarts) are used up")
    if status.idle_s > limits.wait_s:
        late = ", ".join(map(str, starting))
        reason = f"{there}, and the replacement of worker {late} has not started within {limits.wait_s:g} s"
        return Decision("fail", reason=f"{reason} (replacement_wait_s)")
    return Decision("wait")
