"""The workers of a run as Ray has them: placed with the hosts of the mesh that they carry, prepared, asked, ended.

What is done with them is the controller's to decide; here stands how.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from launch import worker
from launch.decisions import Phase
from launch.placement import Request

PLACEMENT_TIMEOUT_S = 60.0
POLL_S = 0.2
LATE_S = 1.0
"""How long after a first error the workers' other errors are waited for."""
HEARTBEAT_S = 0.25
OWN_PAUSE_S = 1.5
"""Between two looks; a longer pause than any turn takes."""
PREPARE_TIMEOUT_S = 300.0


class WorkerFailed(RuntimeError):
    """A worker ended with an error; the message is the worker's own, in one line."""


class WorkerDied(WorkerFailed):
    """A worker's process is gone."""


@dataclass
class Slot:
    """One worker's place: what it asks of Ray, and the worker that has it now."""

    number: int
    request: Request
    hosts: list[int]
    """First and last of the mesh, which it carries now."""
    actor: Any = None
    address: dict = field(default_factory=dict)
    """node, address and pid, once it runs."""
    phase: Phase = "absent"
    call: Any = None
    """What it does: the reference of a call that has not returned."""
    outcome: dict = field(default_factory=dict)
    """What training last returned."""
    lost: tuple[str, str] = ("", "")
    """How it was lost: kind and reason."""
    progress: Any = None
    joined: dict | None = None
    leaving: bool = False
    notes: list[str] = field(default_factory=list)
    beat: Any = None
    """The heartbeat that has not been answered."""
    asked_at: float = 0.0
    heard_at: float = 0.0

    @property
    def silent_s(self) -> float:
        """How long the heartbeat asked for last has been without an answer."""
        return monotonic() - self.heard_at if self.beat is not None else 0.0


class WorkerGroup:
    """Ray actors in one placement group, in the order of the mesh."""

    def __init__(self, requests: list[Request], loopback: bool, interface: str | None = None) -> None:
        import ray
        from ray.util.placement_group import placement_group

        self._ray, self._loopback, self._interface = ray, loopback, interface
        self.slots = [
            Slot(number, request, [request.hosts.start, request.hosts.stop - 1])
            for number, request in enumerate(requests)
        ]
        self._listened_at = monotonic()
        self.term = 0
        """How often the workers have been regrouped."""
        self._placement = placement_group(
            [request.bundle() for request in requests],
            strategy="PACK",
            bundle_label_selector=[request.labels for request in requests],
        )
        if not self._placement.wait(PLACEMENT_TIMEOUT_S):
            self.close()
            raise ValueError(
                f"workers={len(requests)}: Ray found no room for all of them, {requests[0].bundle()} each, within "
                f"{PLACEMENT_TIMEOUT_S:.0f} s; wait until the cluster is free, or use fewer threads or other workers"
            )
        for slot in self.slots:
            self._start(slot)
        addresses = self._gather([slot.actor.address.remote() for slot in self.slots])
        for slot, address in zip(self.slots, addresses, strict=True):
            slot.address = address

    def _start(self, slot: Slot) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        request = slot.request
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=slot.number)
        resources = {request.resource: request.chips}
        actor = worker.remote(request.threads, request.gpus, resources, scheduling_strategy=strategy)
        slot.actor = actor.remote(request.threads, self._loopback, self._interface)

    def placement(self, members: list[int] | None = None) -> list[dict]:
        """Which hosts of the mesh lie on which node: {worker, hosts, chips, node, address, pid}."""
        return [
            {"worker": slot.number, "hosts": slot.hosts, "chips": slot.request.chips} | slot.address
            for slot in self.slots
            if members is None or slot.number in members
        ]

    def prepare(self, config: dict, checkpoint: Path | None, device: str, marks: dict[str, float]) -> dict:
        """Build every worker, as it stood at the checkpoint; returns what rank 0 says of the run."""
        self._settings = config, device
        group = self._membership(self.slots)
        calls = [
            slot.actor.prepare.remote(config, checkpoint, device, marks, group | {"rank": rank})
            for rank, slot in enumerate(self.slots)
        ]
        said = self._gather(calls)[0]
        for slot in self.slots:
            slot.phase = "waiting"
        return said

    def train(self, members: list[int], run_dir: Path, shares: list[list[int]] | None = None) -> None:
        """Have these slots train together; with `shares` (first and last block of each) as a new group."""
        slots = [self.slots[number] for number in members]
        group = None
        if shares is not None:
            try:
                group = self._membership(slots) | {"shares": shares, "term": self.term + 1}
            except WorkerDied:
                return  # the next look finds out which
            self.term += 1
        for rank, slot in enumerate(slots):
            slot.phase = "training"
            slot.call = slot.actor.train.remote(run_dir, group and group | {"rank": rank})
            if shares is not None:
                size = self._hosts_per_block(shares)
                slot.hosts = [shares[rank][0] * size, shares[rank][1] * size - 1]

    def _hosts_per_block(self, shares: list[list[int]]) -> int:
        return sum(len(slot.request.hosts) for slot in self.slots) // shares[-1][1]

    def _membership(self, slots: list[Slot]) -> dict:
        """What all of a group are told: where its store is, and each rank's node."""
        store = self._gather([slots[0].actor.offer_store.remote()])[0]
        return {"world_size": len(slots), "store": store, "nodes": [slot.address["node"] for slot in slots]}

    def replace(self, slot: Slot) -> None:
        """Start another worker in the slot, which builds everything beside the others; `ready` when it has."""
        config, device = self._settings
        self._start(slot)
        slot.phase, slot.leaving, slot.outcome, slot.address = "starting", False, {}, {}
        slot.call = slot.actor.stand_by.remote(config, device)

    def kill(self, slot: Slot) -> None:
        """End a worker that is lost, in case it is not quite dead."""
        if slot.actor is not None:
            self._ray.kill(slot.actor)
            self._end_process(slot)
        slot.actor = slot.call = slot.beat = None
        slot.phase, slot.leaving = "lost", False

    def _end_process(self, slot: Slot) -> None:
        """kill -9: Ray itself would let a stopped process live for five seconds, and its peers wait for it as long."""
        node, pid = slot.address.get("node"), slot.address.get("pid")
        if node == self._ray.get_runtime_context().get_node_id():
            _kill(pid)
        elif node is not None:
            self._ray.remote(_kill).options(num_cpus=0, label_selector={"ray.io/node-id": node}).remote(pid)

    def wish(self, members: list[int], wish: str) -> None:
        """Ask all workers through every member (one would do, if it lives)."""
        for number in members:
            if self.slots[number].actor is not None:
                self.slots[number].actor.wish.remote(wish)

    def abandon(self, members: list[int]) -> None:
        """Have members give up the step at hand: it can't be finished."""
        for number in members:
            if self.slots[number].phase == "training":
                self.slots[number].actor.abandon.remote()

    def listen(self, seconds: float) -> list[Slot]:
        """Take what the workers answer within some time; returns those that died meanwhile, with `lost` set.

        WorkerFailed, or ValueError, where one ended with an error of its own.
        """
        now = monotonic()
        if now - self._listened_at > OWN_PAUSE_S:  # this process was stopped: the silence was its own
            for slot in self.slots:
                slot.heard_at = now
        until = now + seconds
        dead = self._take(0.0)
        while not dead and (left := until - monotonic()) > 0:
            dead = self._take(min(left, HEARTBEAT_S))
        self._listened_at = monotonic()
        return dead

    def _take(self, seconds: float) -> list[Slot]:
        self._ask()
        slots = [slot for slot in self.slots if slot.actor is not None]
        references = [reference for slot in slots for reference in (slot.call, slot.beat) if reference is not None]
        if not references:
            return []
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(references, num_returns=1, timeout=seconds)
        dead, failures = [], []
        for slot in slots:
            for name in ("call", "beat"):
                reference = getattr(slot, name)
                if reference not in ready or slot in dead:
                    continue
                failure = self._failure(reference, slot)
                if isinstance(failure, WorkerDied):
                    slot.lost = self._how(slot, failure)
                    dead.append(slot)
                elif failure is not None and slot.phase == "starting":
                    slot.lost = "could not start", str(failure)
                    dead.append(slot)
                elif failure is not None:
                    failures.append(failure)
                else:
                    self._heard(slot, name, self._ray.get(reference))
        if failures:
            raise min(failures, key=_rank_of_cause)
        return dead

    def _ask(self) -> None:
        now = monotonic()
        for slot in self.slots:
            if slot.actor is not None and slot.beat is None and now - slot.asked_at >= HEARTBEAT_S:
                slot.beat, slot.asked_at = slot.actor.standing.remote(), now
                slot.heard_at = max(slot.heard_at, now)

    def _heard(self, slot: Slot, name: str, answer: Any) -> None:
        if name == "beat":
            slot.beat, slot.heard_at = None, monotonic()
            slot.progress = answer["progress"] or slot.progress
            slot.leaving = answer["leaving"]
            slot.joined = answer["joined"] or slot.joined
            slot.notes += answer["notes"]
        else:
            slot.call = None
            if slot.phase == "starting":
                slot.phase, slot.address = "ready", answer
            elif slot.phase == "training":
                slot.outcome = answer
                slot.phase = "waiting" if answer["status"] in ("lost", "paused") else "done"

    def hung(self, timeout_s: float) -> list[Slot]:
        """Those that have not answered for so long; one that is starting has as long as it takes to import torch."""
        patience = {"starting": max(timeout_s, PREPARE_TIMEOUT_S)}
        return [s for s in self.slots if s.actor is not None and s.silent_s > patience.get(s.phase, timeout_s)]

    def close(self) -> None:
        """End every worker at once and give the resources back."""
        from ray.util.placement_group import remove_placement_group

        for slot in self.slots:
            if slot.actor is not None:
                self._ray.kill(slot.actor)
                slot.actor = None
        remove_placement_group(self._placement)

    def _gather(self, references: list[Any]) -> list[Any]:
        """The results of all (`references` by slot); as soon as one fails, the error that explains it best."""
        waiting = references
        while waiting:
            ready, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if any(self._failure(reference) for reference in ready):
                # a worker that dies takes its peers' connections along: give them a moment, then name the root cause
                late, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=LATE_S) if waiting else ([], [])
                ended = {*ready, *late}
                named = zip(self.slots, references, strict=False)
                failures = [self._failure(one, slot) for slot, one in named if one in ended]
                raise min(filter(None, failures), key=_rank_of_cause)
        return self._ray.get(references)

    def _failure(self, reference: Any, slot: Slot | None = None) -> Exception | None:
        """What went wrong in a finished call of a worker."""
        from ray.exceptions import RayError, RayTaskError

        try:
            self._ray.get(reference)
        except RayTaskError as error:
            text = " ".join(str(error.cause).split())
            return ValueError(text) if isinstance(error.cause, ValueError) else WorkerFailed(text)
        except RayError as error:
            who = "worker" if slot is None else f"worker {slot.number} (hosts {slot.hosts[0]}-{slot.hosts[1]})"
            return WorkerDied(f"{who} died: {_death(str(error))}")
        return None

    def _how(self, slot: Slot, failure: WorkerDied) -> tuple[str, str]:
        text = str(failure)
        return ("node lost" if "its node" in text else "died"), text.partition(" died: ")[2]


def _kill(pid: int) -> None:
    with suppress(OSError):  # gone by itself
        if b"WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes():  # and not another one's by now
            os.kill(pid, signal.SIGKILL)


def _rank_of_cause(error: Exception) -> int:
    """The most telling error first: wrong input, a death, a worker's own error, then a peer's lost connection."""
    if isinstance(error, ValueError):
        return 0
    if isinstance(error, WorkerDied):
        return 1
    lost = ("onnection", "peer", "timed out", "ncclRemoteError", "socket")
    return 3 if any(word in str(error) for word in lost) else 2


def _death(text: str) -> str:
    """Ray's account of an actor's death without its identifiers."""
    names = ("class_name:", "actor_id:", "pid:", "namespace:", "ip:")
    lines = [line.strip() for line in text.splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(names))
    return text.partition(" Some common causes")[0][:500]


@contextmanager
def started(requests: list[Request], loopback: bool, interface: str | None = None) -> Iterator[WorkerGroup]:
    """A worker group that is ended in any case."""
    group = WorkerGroup(requests, loopback, interface)
    try:
        yield group
    finally:
        group.close()
