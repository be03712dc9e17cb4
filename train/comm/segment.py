"""Memory that the processes of a machine share, and semaphores in it.

The memory is a file in /dev/shm that has no name from the first moment on (O_TMPFILE): the others reach it by way of
its maker's open file in /proc, and it ends with the last process that maps it, so that nothing can stay behind.

The semaphores are POSIX's (sem_init with pshared), which order memory by definition: what is written before sem_post
is seen after the sem_wait or sem_trywait that it ends (POSIX.1-2017, 4.12 Memory Synchronization), on Arm as on x86.
"""

import ctypes
import errno
import mmap
import os
import time
import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from train.comm.peers import SLICE_S

FOLDER = "/dev/shm"
LINE = 64
"""Bytes of a cache line."""
SEMAPHORE_BYTES = LINE
"""More than glibc's 32 and musl's 32, and a cache line of its own."""
SPIN_S, CROWDED_SPIN_S = 100e-6, 5e-6
"""How long a process waits awake, where each has a processor and where not."""


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class Segment:
    """`nbytes` of shared memory, zeros at first; the maker's `reference` lets another process of the machine map it."""

    def __init__(self, nbytes: int, reference: str | None = None) -> None:
        """ValueError where /dev/shm is too small; OSError where it is missing or another's is out of reach."""
        self.nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if reference is None:
            self._file = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
            try:
                os.posix_fallocate(self._file, 0, self.nbytes)
            except OSError as error:
                os.close(self._file)
                raise ValueError(too_small(self.nbytes)) from error
        else:
            self._file = os.open(reference, os.O_RDWR)
        self._memory = _mapped(self._file, self.nbytes)

    @property
    def reference(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def close_file(self) -> None:
        """Once everyone has mapped it: the memory alone is left."""
        os.close(self._file)

    def tensor(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements from byte `offset` on; they keep the mapping alive."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)

    def semaphores(self, offset: int, rows: int, columns: int, value: int | None) -> list[list["Semaphore"]]:
        """[row][column], from byte `offset` on; one process gives them a `value`, before others use them."""
        made = [Semaphore(self._memory, offset + SEMAPHORE_BYTES * i) for i in range(rows * columns)]
        if value is not None:
            for semaphore in made:
                semaphore.make(value)
        return [made[columns * i : columns * (i + 1)] for i in range(rows)]


class Semaphore:
    """A counting semaphore in shared memory, which it keeps mapped."""

    def __init__(self, memory: ctypes.Array, offset: int) -> None:
        self._memory, self._at = memory, ctypes.c_void_p(ctypes.addressof(memory) + offset)
        quick, slow = _libc()
        self._init, self._post, self._try = quick.sem_init, quick.sem_post, quick.sem_trywait
        self._wait = slow.sem_timedwait

    def make(self, value: int = 0) -> None:
        """One process does this, before any other uses it."""
        assert self._init(self._at, 1, value) == 0

    def post(self) -> None:
        self._post(self._at)

    def try_wait(self) -> bool:
        return self._try(self._at) == 0

    def wait(self, check: Callable[[], None], spin_s: float = SPIN_S) -> None:
        """Spins briefly while it lets others run, then sleeps; `check` is called now and then, and may raise."""
        if self.try_wait():
            return
        end = time.perf_counter() + spin_s
        while time.perf_counter() < end:
            os.sched_yield()
            if self.try_wait():
                return
        while not self._wait_a_slice():
            try:
                check()
            except RuntimeError:
                if self.try_wait():  # posted before what the check complains of
                    return
                raise

    def _wait_a_slice(self) -> bool:
        until = time.time() + SLICE_S
        whole = int(until)
        limit = _Timespec(whole, int((until - whole) * 1e9))
        return self._wait(self._at, ctypes.byref(limit)) == 0


def _mapped(file: int, nbytes: int) -> ctypes.Array:
    """The file as an array, unmapped with its last user. (Python's own mmap would keep the file open.)"""
    _, libc = _libc()
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(errno.ENOMEM, f"mmap of {nbytes:,} bytes failed")
    memory = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(memory, libc.munmap, address, nbytes).atexit = False
    return memory


@cache
def _libc() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The C library for calls that return at once, which keep the interpreter's lock (half the cost), and for others.

    None: what Python itself is linked with, which has the semaphores' library where that is a separate one.
    """
    return ctypes.PyDLL(None), ctypes.CDLL(None)


def lines(nbytes: int) -> int:
    """Bytes of the whole cache lines that hold so many."""
    return -(-nbytes // LINE) * LINE


def too_small(needed: int) -> str:
    sizes = os.statvfs(FOLDER)
    total, free = sizes.f_blocks * sizes.f_frsize, sizes.f_bavail * sizes.f_frsize
    return (
        f"backend=shm needs {needed / 1e6:,.1f} MB of shared memory, and {FOLDER} has {free / 1e6:,.1f} MB free of "
        f"{total / 1e6:,.1f} MB; make it larger (mount -o remount,size=..., docker run --shm-size), or use backend=gloo"
    )
