"""All workers of a run: placed with the hosts of the mesh that they carry, prepared, watched, stopped."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

from launch import worker
from launch.placement import Request

PLACEMENT_TIMEOUT_S = 60.0
POLL_S = 0.2
LATE_S = 1.0
"""How long after a first error the workers' other errors are waited for."""


class WorkerFailed(RuntimeError):
    """A worker ended with an error; the message is the worker's own, in one line."""


class WorkerDied(WorkerFailed):
    """A worker's process is gone."""


class WorkerGroup:
    """Ray actors in one placement group, in the order of the mesh."""

    def __init__(self, requests: list[Request], loopback: bool, interface: str | None = None) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._ray = ray
        self.requests = requests
        self._placement = placement_group(
            [request.bundle() for request in requests],
            strategy="PACK",
            bundle_label_selector=[request.labels for request in requests],
        )
        self.actors: list[Any] = []
        if not self._placement.wait(PLACEMENT_TIMEOUT_S):
            self.close()
            raise ValueError(
                f"workers={len(requests)}: Ray found no room for all of them, {requests[0].bundle()} each, within "
                f"{PLACEMENT_TIMEOUT_S:.0f} s; wait until the cluster is free, or use fewer threads or other workers"
            )
        for index, request in enumerate(requests):
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
            actor = worker.remote(
                request.threads, request.gpus, {request.resource: request.chips}, scheduling_strategy=strategy
            )
            self.actors.append(actor.remote(request.threads, loopback, interface))
        self.addresses: list[dict] = self._all("address")

    def placement(self) -> list[dict]:
        """Which hosts of the mesh lie on which node: {worker, hosts, chips, node, address, pid}."""
        return [
            {
                "worker": rank,
                "hosts": [request.hosts.start, request.hosts.stop - 1],
                "chips": request.chips,
            }
            | address
            for rank, (request, address) in enumerate(zip(self.requests, self.addresses, strict=True))
        ]

    def prepare(self, config: dict, checkpoint: Path | None, device: str, marks: dict[str, float]) -> dict:
        """Build every worker, as it stood at the checkpoint; returns what rank 0 says of the run."""
        store = self._gather([self.actors[0].offer_store.remote()])[0]
        settings = len(self.actors), device, store, marks
        actors = enumerate(self.actors)
        return self._gather([actor.prepare.remote(config, checkpoint, rank, *settings) for rank, actor in actors])[0]

    def train(self, run_dir: Path, watch: Callable[[Any], None], hang_timeout_s: float) -> dict:
        """Train to the end; `watch` is called with rank 0's progress several times a second. Returns rank 0's result.

        At a KeyboardInterrupt all workers stop after the step at hand and save; a second one ends them at once. A
        worker that gives no sign of life for `hang_timeout_s` fails the run; one that computes answers in a thread.
        """
        running = [actor.train.remote(run_dir) for actor in self.actors]
        heartbeats = Heartbeats(self._ray, self.actors, hang_timeout_s)

        def listen() -> None:
            heartbeats.listen()
            watch(heartbeats.progress)

        try:
            return self._gather(running, listen)[0]
        except KeyboardInterrupt:
            print("stopping after the step at hand, with a checkpoint; again: at once, without", file=sys.stderr)
            self.actors[0].stop.remote()
            return self._gather(running, listen)[0]

    def close(self) -> None:
        """End every worker at once and give the resources back."""
        from ray.util.placement_group import remove_placement_group

        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []
        remove_placement_group(self._placement)

    def _all(self, method: str) -> list[Any]:
        return self._gather([getattr(actor, method).remote() for actor in self.actors])

    def _gather(self, references: list[Any], meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """The results of all (`references` by rank); as soon as one fails, the error that explains it best."""
        waiting = references
        while waiting:
            ready, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if any(self._failure(reference) for reference in ready):
                # a worker that dies takes its peers' connections along: give them a moment, then name the root cause
                late, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=LATE_S) if waiting else ([], [])
                ended = {*ready, *late}
                failures = [self._failure(one, rank) for rank, one in enumerate(references) if one in ended]
                raise min(filter(None, failures), key=_rank_of_cause)
            if waiting and meanwhile is not None:
                meanwhile()
        return self._ray.get(references)

    def _failure(self, reference: Any, rank: int = 0) -> Exception | None:
        """What went wrong in a finished call of a worker."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            self._ray.get(reference)
        except RayTaskError as error:
            text = " ".join(str(error.cause).split())
            return ValueError(text) if isinstance(error.cause, ValueError) else WorkerFailed(text)
        except RayActorError as error:
            hosts = self.requests[rank].hosts
            return WorkerDied(f"worker {rank} (hosts {hosts.start}-{hosts.stop - 1}) died: {_death(str(error))}")
        return None


class Heartbeats:
    """Asks every worker for its progress, again as soon as it has answered, and notes when it last did."""

    def __init__(self, ray: Any, actors: list[Any], timeout_s: float) -> None:
        self._ray, self._actors, self._timeout_s = ray, actors, timeout_s
        self._asked = {rank: actor.progress.remote() for rank, actor in enumerate(actors)}
        self._answered_at = dict.fromkeys(self._asked, monotonic())
        self.progress: Any = None
        """Rank 0's latest."""

    def listen(self) -> None:
        """Take the answers of the next POLL_S; WorkerFailed names a worker that has been silent for too long."""
        answered, _ = self._ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=POLL_S)
        for rank, reference in self._asked.items():
            if reference in answered:
                self._answered_at[rank] = monotonic()
                self._asked[rank] = self._actors[rank].progress.remote()
                if rank == 0:
                    self._take(reference)
            elif (silence := monotonic() - self._answered_at[rank]) > self._timeout_s:
                raise WorkerFailed(f"worker {rank} has given no sign of life for {silence:.0f} s (hang_timeout_s)")

    def _take(self, reference: Any) -> None:
        from ray.exceptions import RayError

        with suppress(RayError):  # a worker that failed says why through its call of `train`
            self.progress = self._ray.get(reference)


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
    return " ".join(line for line in lines if line and not line.startswith(names))[:500]


@contextmanager
def started(requests: list[Request], loopback: bool, interface: str | None = None) -> Iterator[WorkerGroup]:
    """A worker group that is ended in any case."""
    group = WorkerGroup(requests, loopback, interface)
    try:
        yield group
    finally:
        group.close()
