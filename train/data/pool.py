"""Who cuts the photos of a batch: threads of this process, or loader processes that share memory with it.

Either way a batch is split into consecutive parts; what a sample becomes depends on (seed, epoch, index) alone.
"""

import atexit
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from train.data.photos import Cutter, Part
from train.data.shared import Place, Shared

MOST = 16  # processes or threads that `auto` takes
KEPT = 8  # batches whose memory a loader process keeps open

Wait = Callable[[], tuple[np.ndarray, Part]]


class Threads:
    def __init__(self, count: int) -> None:
        self._count, self._executor = count, ThreadPoolExecutor(count, thread_name_prefix="decode")

    def start(self, cutter: Cutter, indices: np.ndarray, *, seed: int, epoch: int) -> Wait:
        pixels = np.empty((len(indices), cutter.size(epoch), cutter.size(epoch), 3), np.uint8)
        futures = [
            self._executor.submit(cutter.fill, indices[part], seed=seed, epoch=epoch, out=pixels[part])
            for part in parts(len(indices), self._count)
        ]
        return lambda: (pixels, joined([future.result() for future in futures]))


class Processes:
    """Loader processes, started with the first batch; they end with this process, however it ends.

    Each works through its tasks in order and answers through its pipe; pixels are written into shared memory, which
    is used again once a batch has been taken out of it. One process is started, which imports torch and forks the
    others: a fork of this one would inherit the locks of its threads.
    """

    def __init__(self, count: int, cutters: tuple[Cutter, ...]) -> None:
        self._count, self._cutters = count, cutters
        self._lock = threading.Lock()
        self._launcher: subprocess.Popen | None = None
        self._pipes: list[Connection] = []
        self._free: list[Shared] = []
        self._tickets = 0
        self._answers: dict[tuple[int, int], Part | Exception] = {}  # by ticket and process

    def start(self, cutter: Cutter, indices: np.ndarray, *, seed: int, epoch: int) -> Wait:
        shape = (len(indices), cutter.size(epoch), cutter.size(epoch), 3)
        with self._lock:
            if self._launcher is None:
                self._start_processes()
            memory = self._memory(max(1, math.prod(shape)))
            self._tickets += 1
            ticket, slices = self._tickets, parts(len(indices), self._count)
            for pipe, part in zip(self._pipes, slices, strict=False):
                task = (ticket, self._cutters.index(cutter), memory.place, shape, part, indices[part], seed, epoch)
                talk(pipe.send, task)

        def wait() -> tuple[np.ndarray, Part]:
            with self._lock:
                answers = [self._answer(ticket, number) for number in range(len(slices))]
                try:
                    part = joined(answers)
                    return memory.array(shape).copy(), part
                finally:
                    self._free.append(memory)

        return wait

    def _answer(self, ticket: int, number: int) -> Part | Exception:
        """Of process `number`; answers for other tickets that come before it are kept for those who wait for them."""
        while (ticket, number) not in self._answers:
            got, answer = talk(self._pipes[number].recv)
            self._answers[got, number] = answer
        return self._answers.pop((ticket, number))

    def _memory(self, nbytes: int) -> Shared:
        """Free memory of that size or more; sizes grow with the epochs, so that what is too small is given back."""
        while self._free:
            memory = self._free.pop()
            if memory.nbytes >= nbytes:
                return memory
            memory.close()
        return Shared.new(nbytes)

    def _start_processes(self) -> None:
        pairs = [multiprocessing.Pipe() for _ in range(self._count)]
        descriptors = [theirs.fileno() for _, theirs in pairs]
        self._launcher = subprocess.Popen(
            [sys.executable, "-c", f"from train.data.pool import launch; launch({descriptors})"],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        self._pipes = [ours for ours, _ in pairs]
        for ours, theirs in pairs:
            theirs.close()
            talk(ours.send, self._cutters)
        atexit.register(self.close)

    def close(self) -> None:
        """End the processes and give the shared memory back; a later batch would start them again."""
        atexit.unregister(self.close)
        with self._lock:
            for pipe in self._pipes:
                pipe.close()
            for memory in self._free:
                memory.close()
            if self._launcher is not None:
                self._launcher.wait()
            self._launcher, self._pipes, self._free, self._answers = None, [], [], {}


def talk(say: Callable, *words: object) -> Any:
    try:
        return say(*words)
    except (EOFError, OSError) as error:
        raise RuntimeError(
            "a loader process has ended (killed, or out of memory): start again; "
            "with fewer data.workers, or data.workers=0, if it happens again"
        ) from error


def launch(descriptors: list[int]) -> None:
    """Fork a loader process for each pipe, and wait for them. Each keeps its own pipe alone: its end must be seen."""
    torch.set_num_threads(1)
    for own in descriptors:
        if os.fork() == 0:
            for other in descriptors:
                if other != own:
                    with suppress(OSError):  # those before are closed already
                        os.close(other)
            serve(Connection(own))
            os._exit(0)
        os.close(own)
    for _ in descriptors:
        os.wait()


def serve(pipe: Connection) -> None:
    """What a loader process does until the other end of its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, whose end ends this one
    memory: dict[Place, Shared] = {}
    with suppress(EOFError, ConnectionError):
        cutters = pipe.recv()
        while True:
            ticket, number, place, shape, part, indices, seed, epoch = pipe.recv()
            if place not in memory:
                if len(memory) == KEPT:
                    memory.pop(next(iter(memory))).close()
                memory[place] = Shared.of(place)
            out = memory[place].array(shape)[part]
            try:
                answer: object = cutters[number].fill(indices, seed=seed, epoch=epoch, out=out)
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to who waits for the batch
                answer = error
            del out
            pipe.send((ticket, answer))


def parts(count: int, most: int) -> list[slice]:
    """At most `most` consecutive slices of range(count), sizes within one of each other."""
    number = max(1, min(count, most))
    edges = [count * i // number for i in range(number + 1)]
    return [slice(first, last) for first, last in zip(edges, edges[1:], strict=False)]


def joined(answers: list[Part | Exception]) -> Part:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return np.concatenate([labels for labels, _ in answers]), [one for _, left_out in answers for one in left_out]
