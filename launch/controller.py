"""Trains to the end whatever happens to the workers: look, decide (launch/decisions), do; one turn after the other.

Survivors are not restarted: they take over the blocks of a lost worker and train on with what they have. In its place
a new one starts beside them, and joins once it is built, at a step boundary.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, time
from typing import Any

from launch.decisions import Decision, Limits, Status, decide
from launch.worker_group import Slot, WorkerFailed, WorkerGroup
from train.mesh.blocks import Blocks

TURN_S = 0.1


class Controller:
    """One run's. `events` is called with every event, a dictionary of plain data that has `time` in Unix seconds."""

    def __init__(
        self,
        group: WorkerGroup,
        blocks: Blocks,
        limits: Limits,
        hang_timeout_s: float,
        events: Callable[[dict], None],
    ) -> None:
        self.group, self.limits = group, limits
        self._blocks, self._hang_timeout_s, self._tell = blocks, hang_timeout_s, events
        self.losses: list[dict] = []
        """Each: worker, hosts, node, kind, reason, detected_at, and how it was made good: training_at, step, source."""
        self.restarts = 0
        self.members = list(range(len(group.slots)))
        self._broken: str | None = None
        self._losses_before = 0  # when all trained together last
        self._idle_since: float | None = None
        self._pausing = self._stopping = False
        self._heard_of = 0  # the last term of which it is known that all train

    def run(self, run_dir: Path, watch: Callable[[Any], None], from_step: int = 0) -> dict:
        """Train to the end; `watch` is called with rank 0's progress several times a second. Returns rank 0's result.

        At SIGINT or SIGTERM all workers stop after the step at hand and save; at a second one KeyboardInterrupt.
        WorkerFailed and ValueError with a worker's own error: a new worker would meet it too.
        """
        self._run_dir = run_dir
        with _interrupts() as asked:
            return self._run(watch, from_step, asked)

    def _run(self, watch: Callable[[Any], None], from_step: int, asked: list[int]) -> dict:
        self._event("attempt", step=from_step, placement=self.group.placement())
        self.group.train(self.members, self._run_dir)
        while not self.turn():
            watch(self.group.slots[self.members[0]].progress)
            if len(asked) > 1:
                raise KeyboardInterrupt
            if asked and not self._stopping:
                print("stopping after the step at hand, with a checkpoint; again: at once, without", file=sys.stderr)
                self._stopping = True
                self.group.wish(self.members, "STOP")
        return self.group.slots[self.members[0]].outcome

    def turn(self) -> bool:
        """Look, decide, do; whether the training has ended."""
        for slot in self.group.listen(TURN_S):
            self._mourn(slot, slot.lost)
        for slot in self.group.hung(self._hang_timeout_s):
            self._mourn(slot, ("hung", f"no sign of life for {slot.silent_s:.0f} s (hang_timeout_s)"))
        self._hear()
        decision = decide(self.status(), self.limits)
        self._carry_out(decision)
        return decision.kind == "finish"

    def status(self) -> Status:
        slots = self.group.slots
        phases = tuple(slot.phase for slot in slots)
        if "training" in phases:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = monotonic()
        return Status(
            phases=phases,
            silent_s=tuple(slot.silent_s for slot in slots),
            leaving=frozenset(slot.number for slot in slots if slot.leaving),
            broken=self._broken,
            unexplained=self._broken is not None and len(self.losses) == self._losses_before,
            idle_s=0.0 if self._idle_since is None else monotonic() - self._idle_since,
            restarts=self.restarts,
            pausing=self._pausing,
            stopping=self._stopping,
        )

    def _carry_out(self, decision: Decision) -> None:
        slots = [self.group.slots[number] for number in decision.slots]
        if decision.kind == "replace":
            for slot in slots:
                self.restarts += 1
                self.group.replace(slot)
                self._event("worker_starting", worker=slot.number)
        elif decision.kind == "give_up":
            for slot in slots:
                slot.phase = "absent"
                if not self._stopping:
                    self._event("worker_given_up", worker=slot.number)
        elif decision.kind == "kill":
            for slot in slots:
                self._mourn(slot, ("silent", decision.reason))
        elif decision.kind == "pause":
            self._pausing = True
            self.group.wish(self.members, "PAUSE")
        elif decision.kind == "train":
            self._regroup(list(decision.slots))
        elif decision.kind == "fail":
            raise WorkerFailed(decision.reason)

    def _regroup(self, members: list[int]) -> None:
        """All members train together from now on; who has been told to leave is let go."""
        for slot in self.group.slots:
            if slot.leaving and slot.phase in ("waiting", "done") and slot.number not in members:
                self._mourn(slot, ("left", "was told to end (SIGTERM), and handed over at a step boundary"))
        if self._broken and len(self.losses) == self._losses_before:
            self.restarts += 1  # a connection broke by itself: so often, too
        self.members = members
        self._broken, self._pausing, self._losses_before = None, False, len(self.losses)
        hosts = [len(self.group.slots[number].request.hosts) for number in members]
        shares = self._blocks.shares_by_weight(hosts)
        self.group.train(members, self._run_dir, [[share.start, share.stop] for share in shares])
        self._event("regrouped", placement=self.group.placement(members))
        if self._stopping:
            self.group.wish(members, "STOP")

    def _mourn(self, slot: Slot, how: tuple[str, str]) -> None:
        """A worker is lost: make sure of it, note it, and have the others stop what can't succeed."""
        kind, reason = how
        hosts, node = slot.hosts, slot.address.get("address", "")
        was_member = slot.number in self.members and slot.phase in ("training", "waiting", "done")
        self.group.kill(slot)
        loss = {"worker": slot.number, "hosts": hosts, "node": node, "kind": kind, "reason": reason}
        self.losses.append(loss | {"detected_at": time()})
        self._event("worker_lost", **loss)
        if was_member and kind != "left":
            self._broken = self._broken or f"worker {slot.number} {kind}"
            self.group.abandon([number for number in self.members if number != slot.number])

    def _hear(self) -> None:
        """What the workers have said since the last turn."""
        for number in self.members:
            slot = self.group.slots[number]
            if slot.phase == "waiting" and slot.outcome["status"] == "lost" and self._broken is None:
                self._broken = slot.outcome["error"]
                self._event("connection_lost", worker=number, reason=self._broken)
            for note in slot.notes:
                self._event("note", worker=number, text=note)
            slot.notes.clear()
        first = self.group.slots[self.members[0]]
        if first.joined and first.joined["term"] == self.group.term > self._heard_of:
            joined, self._heard_of = first.joined, self.group.term
            how = {"training_at": joined["at"], "step": joined["step"], "source": joined["source"]}
            how |= {"steps_repeated": joined["repeated"]}
            for loss in self.losses:
                if "training_at" not in loss:
                    loss |= how
            self._event("training", members=self.members, **how, defects=list(joined["defects"]))

    def _event(self, name: str, **facts: Any) -> None:
        self._tell({"time": time(), "event": name, **facts})


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """SIGINT and SIGTERM as they come; an exception in the midst of Ray's code might get lost there."""
    asked: list[int] = []
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, lambda received, _: asked.append(received)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
