"""The Ray actor around one worker: it holds the process, its environment and its threads; the work is train.build's."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.nodes import interface_of


class WorkerActor:
    """One worker process. Methods run in several threads, so that `progress` and `stop` answer during `train`."""

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

    def address(self) -> dict:
        """Where this worker runs."""
        import ray

        return {"node": ray.get_runtime_context().get_node_id(), "address": self._host, "pid": os.getpid()}

    def offer_store(self) -> tuple[str, int]:
        """Host and port of the group's store, which this worker will hold; only rank 0 is asked."""
        self._listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        self._listener.bind((self._host, 0))
        self._listener.listen()
        return self._host, self._listener.getsockname()[1]

    def prepare(
        self,
        config: dict,
        checkpoint: Path | None,
        rank: int,
        world_size: int,
        device: str,
        store: tuple[str, int],
        marks: dict,
    ) -> dict:
        """Build everything; rank 0 returns what is to be said of the run. ValueError where the input is wrong."""
        with _plain_errors():
            from train.build import Worker, WorkerContext

            context = WorkerContext(
                rank=rank,
                world_size=world_size,
                device=device,
                threads=self._threads,
                store=self._store(store, rank, world_size) if world_size > 1 else None,
                marks=dict(marks),
            )
            self._worker = Worker(config, context)
            if checkpoint is not None:
                self._worker.restore(checkpoint)
            return {"contract": self._worker.contract(), "facts": self._worker.describe()} if rank == 0 else {}

    def _store(self, address: tuple[str, int], rank: int, world_size: int) -> Any:
        from torch.distributed import TCPStore

        host, port = address
        if rank > 0:
            return TCPStore(host, port, world_size, is_master=False, wait_for_workers=False)
        # handing over a socket that is bound already keeps the store off the other interfaces
        return TCPStore(
            host, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=self._listener.detach()
        )

    def train(self, run_dir: Path) -> dict:
        with _plain_errors():
            return self._worker.train(run_dir)

    def progress(self) -> Any:
        return self._worker.progress_callback.state

    def stop(self) -> None:
        """Ask all workers to stop together after a step (one asking is enough)."""
        self._worker.trainer.stop_requested.set()


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
