"""The Ray actor around one worker: it holds the process, its environment and its threads; the work is train.build's."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.nodes import interface_of

CONNECT_TIMEOUT_S = 30.0


class WorkerActor:
    """One worker process. Methods run in several threads, so that all but the long ones answer at any time.

    `group` says with whom: world_size, rank, nodes (of each rank), store (host and port, of rank 0); and for a change
    of workers shares (first and last block of each rank) and term (its number).
    """

    def __init__(self, threads: int, loopback: bool, interface: str | None = None) -> None:
        import ray

        # before torch is imported: thread pools and gloo's choice of an interface are fixed at import and at connect
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        interface = "lo" if loopback else interface or interface_of(self._host)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        self._threads = threads
        self._worker: Any = None
        self._listener: socket.socket | None = None
        self._joined: dict | None = None
        self._leaving = threading.Event()
        self._heed_sigterm()

    def address(self) -> dict:
        """Where this worker runs."""
        import ray

        return {"node": ray.get_runtime_context().get_node_id(), "address": self._host, "pid": os.getpid()}

    def offer_store(self) -> tuple[str, int]:
        """Host and port of a new group's store, which this worker will hold as its rank 0."""
        self._listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        self._listener.bind((self._host, 0))
        self._listener.listen()
        return self._host, self._listener.getsockname()[1]

    def prepare(self, config: dict, checkpoint: Path | None, device: str, marks: dict, group: dict) -> dict:
        """Build everything; returns what is to be said of the run. ValueError where the input is wrong."""
        with _plain_errors():
            from train.account import contract, facts
            from train.build import Worker, WorkerContext

            self._worker = Worker(
                config,
                WorkerContext(
                    rank=group["rank"],
                    world_size=group["world_size"],
                    device=device,
                    threads=self._threads,
                    store=self._store(group),
                    nodes=group["nodes"],
                    marks=dict(marks),
                ),
            )
            if checkpoint is not None:
                self._worker.restore(checkpoint)
            step = self._worker.trainer.progress.step
            return {"contract": contract(self._worker), "facts": facts(self._worker), "step": step}

    def stand_by(self, config: dict, device: str) -> dict:
        """Build everything beside the others, for a later `train` with a group; returns `address`."""
        with _plain_errors():
            from train.build import Worker, WorkerContext

            self._worker = Worker(config, WorkerContext(rank=None, device=device, threads=self._threads))
            return self.address()

    def _store(self, group: dict) -> Any:
        from torch.distributed import TCPStore

        (host, port), size, timeout = group["store"], group["world_size"], timedelta(seconds=CONNECT_TIMEOUT_S)
        if size == 1:
            return None
        if group["rank"] > 0:
            return TCPStore(host, port, size, is_master=False, wait_for_workers=False, timeout=timeout)
        # handing over a socket that is bound already keeps the store off the other interfaces
        listener = self._listener.detach()
        return TCPStore(host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener)

    def train(self, run_dir: Path, group: dict | None = None) -> dict:
        """Train on, after having joined a `group` if one is given: see `Worker.train` for what is returned."""
        with _plain_errors():
            if group is not None and (error := self._join(run_dir, group)):
                return {"status": "lost", "error": error}
            return self._worker.train(run_dir)

    def _join(self, run_dir: Path, group: dict) -> str | None:
        """Why it failed, where a worker was lost meanwhile."""
        from train.comm.groups import PeerLost
        from train.recovery import Membership

        shares = [range(first, last) for first, last in group["shares"]]
        try:
            store = self._store(group)
        except RuntimeError as error:  # of torch.distributed: rank 0 is gone
            return f"rank {group['rank']} of {group['world_size']}, meeting: {error}"
        try:
            joined = self._worker.join(Membership(group["rank"], shares, group["nodes"], store), run_dir)
        except PeerLost as error:
            return f"rank {group['rank']} of {group['world_size']}, joining: {error}"
        self._joined = vars(joined) | {"term": group["term"]}
        return None

    def standing(self) -> dict:
        """The heartbeat: rank 0's ProgressState, how the last group was joined, what is new to say, and SIGTERM."""
        worker, notes = self._worker, []
        while worker is not None and worker.notes:
            notes.append(worker.notes.pop(0))
        progress = worker.progress_callback.state if worker is not None and worker.writer is not None else None
        return {"progress": progress, "joined": self._joined, "notes": notes, "leaving": self._leaving.is_set()}

    def wish(self, name: str) -> None:
        """Ask something of all workers, by the name of a train.progress.Wish."""
        from train.progress import Wish

        self._worker.wishes[Wish[name]].set()

    def abandon(self) -> None:
        """Leave the step at hand: a peer is lost, and it can't be finished."""
        self._worker.trainer.abandoned.set()

    def _heed_sigterm(self) -> None:
        """SIGTERM is notice of an end: the work is handed over first.

        The main thread of a Ray worker is in Ray's own loop, where no Python runs; so the C handler wakes a thread.
        """
        woken, wakes = socket.socketpair()
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._pair = woken, wakes

        def listen() -> None:
            while number := woken.recv(1):
                if number[0] == signal.SIGTERM:
                    self._leaving.set()

        threading.Thread(target=listen, name="notice", daemon=True).start()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors reach the driver as built-in ones: others may not survive the way, or have it import torch."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        if error.filename is None:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def remote(num_cpus: int, num_gpus: int, resources: dict[str, float], **options: Any) -> Callable[..., Any]:
    """The actor class as Ray schedules it."""
    import ray

    return ray.remote(WorkerActor).options(
        num_cpus=num_cpus, num_gpus=num_gpus, resources=resources, max_concurrency=4, max_restarts=0, **options
    )
