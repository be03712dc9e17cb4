"""All workers of a run: placed with the hosts of the mesh that they carry, prepared, watched, stopped."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

from launch import worker

PLACEMENT_TIMEOUT_S = 60.0
STOP_GRACE_S = 20.0
POLL_S = 0.2


class WorkerFailed(RuntimeError):
    """A worker ended with an error; the message is the worker's own."""


@dataclass(frozen=True)
class Request:
    """What each worker asks of Ray: one bundle. `hosts` are the hosts of the mesh that it carries."""

    hosts: range
    chips: int
    resource: str
    threads: int
    gpus: int

    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.threads, self.resource: self.chips}
        return bundle | {"GPU": self.gpus} if self.gpus else bundle


class WorkerGroup:
    """Ray actors in one placement group, in the order of the mesh."""

    def __init__(self, requests: list[Request], loopback: bool) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._ray = ray
        self.requests = requests
        self._placement = placement_group([request.bundle() for request in requests], strategy="PACK")
        self.actors: list[Any] = []
        if not self._placement.wait(PLACEMENT_TIMEOUT_S):
            self.close()
            raise ValueError(
                f"Ray could not place {len(requests)} workers of {requests[0].bundle()} within {PLACEMENT_TIMEOUT_S:.0f} s: no "
                "node has room for one of them; use fewer threads, or nodes that offer whole hosts of the mesh"
            )
        for index, request in enumerate(requests):
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
            actor = worker.remote(
                request.threads, request.gpus, {request.resource: request.chips}, scheduling_strategy=strategy
            )
            self.actors.append(actor.remote(request.threads, loopback))
        self.addresses: list[dict] = self._all("address")

    def placement(self) -> list[dict]:
        """Which hosts of the mesh lie on which node: {worker, hosts, chips, node, pid}."""
        return [
            {
                "worker": rank,
                "hosts": [request.hosts.start, request.hosts.stop - 1],
                "chips": request.chips,
                "node": address["node"],
                "pid": address["pid"],
            }
            for rank, (request, address) in enumerate(zip(self.requests, self.addresses, strict=True))
        ]

    def prepare(self, config: dict, device: str, marks: dict[str, float]) -> list[dict]:
        """Build every worker; the answers of WorkerActor.prepare, by rank."""
        store = self.addresses[0]["host"], self.addresses[0]["port"]
        world_size = len(self.actors)
        return self._gather(
            [actor.prepare.remote(config, rank, world_size, device, store, marks) for rank, actor in enumerate(self.actors)]
        )

    def train(self, run_dir: str, resume_from: str | None, watch: Callable[[Any], None]) -> dict:
        """Train to the end; `watch` is called with rank 0's progress several times a second. Returns rank 0's result.

        At a KeyboardInterrupt all workers stop after the step at hand and save; a second one ends them at once.
        """
        running = [actor.train.remote(run_dir, resume_from) for actor in self.actors]
        try:
            return self._gather(running, watch)[0]
        except KeyboardInterrupt:
            self.actors[0].stop.remote()
            return self._gather(running, watch, deadline=monotonic() + STOP_GRACE_S)[0]

    def close(self) -> None:
        """End every worker at once and give the resources back."""
        from ray.util.placement_group import remove_placement_group

        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []
        remove_placement_group(self._placement)

    def _all(self, method: str) -> list[Any]:
        return self._gather([getattr(actor, method).remote() for actor in self.actors])

    def _gather(
        self, references: list[Any], watch: Callable[[Any], None] | None = None, deadline: float = math.inf
    ) -> list[Any]:
        """The results of all; as soon as one fails, the error that explains it best."""
        waiting = list(references)
        while waiting:
            _, waiting = self._ready(waiting)
            if waiting and monotonic() > deadline:
                raise WorkerFailed(f"the workers did not stop within {STOP_GRACE_S:.0f} s")
            if watch is not None and waiting:
                ready, _ = self._ray.wait([self.actors[0].progress.remote()], timeout=POLL_S)
                if ready and not self._failed(ready[0]):
                    watch(self._ray.get(ready[0]))
        return self._ray.get(references)

    def _ready(self, waiting: list[Any]) -> tuple[list[Any], list[Any]]:
        ready, rest = self._ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        failures = [error for reference in ready if (error := self._failed(reference))]
        if failures:
            # a worker that dies takes its peers' connections along: give the others a moment, then name the root cause
            late, _ = self._ray.wait(rest, num_returns=len(rest), timeout=1.0) if rest else ([], [])
            failures += [error for reference in late if (error := self._failed(reference))]
            raise min(failures, key=_rank_of_cause)
        return ready, rest

    def _failed(self, reference: Any) -> Exception | None:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            self._ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError):
                return cause
            return WorkerFailed(f"{type(cause).__name__}: {cause}")
        except RayActorError as error:
            return WorkerFailed(_death(str(error)))
        return None


def _rank_of_cause(error: Exception) -> int:
    """The most telling error first: wrong input, the worker's own error or its death, then a peer's lost connection."""
    if isinstance(error, ValueError):
        return 0
    lost = ("onnection", "peer", "timed out", "ncclRemoteError", "socket")
    return 2 if any(word in str(error) for word in lost) else 1


def _death(text: str) -> str:
    """Ray's account of an actor's death without its identifiers."""
    kept = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(("class_name", "actor_id"))]
    return "a worker process died: " + " ".join(kept)[:500]


@contextmanager
def started(requests: list[Request], loopback: bool) -> Iterator[WorkerGroup]:
    """A worker group that is ended in any case."""
    group = WorkerGroup(requests, loopback)
    try:
        yield group
    finally:
        group.close()
