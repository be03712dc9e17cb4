"""Reading another process's memory: process_vm_readv of Linux (3.2) copies once, where shared memory needs two copies.

The kernel allows it to processes of one user unless it is told not to (Yama's ptrace_scope, a container's rules), so
ranks try it before they rely on it.
"""

import ctypes
import os
from functools import cache

import torch
from torch import Tensor

BLOCK_BYTES = 512 << 10
"""What is read and added at a time; two of them stay in a core's cache."""
MAGIC = 0x5EED_2F0B_41C7_9D36


class _Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


class Readable:
    """A number that another process can look for to see whether it may read; `words` say where (process, address)."""

    def __init__(self) -> None:
        self._number = torch.tensor([MAGIC])
        self.words = f"{os.getpid()} {self._number.data_ptr()}"


def may_read(words: str) -> bool:
    """Whether this process can read what a Readable of another one says."""
    process, address = map(int, words.split())
    found = torch.zeros(1, dtype=torch.int64)
    try:
        read(process, address, found)
    except (OSError, AttributeError):  # refused; or a C library that has no such function
        return False
    return found.item() == MAGIC


def read(process: int, address: int, into: Tensor) -> None:
    """Fill a contiguous tensor with what lies at an address of another process. OSError where that can't be."""
    done, nbytes = 0, into.nbytes
    while done < nbytes:
        here, there = (_Span(base + done, nbytes - done) for base in (into.data_ptr(), address))
        count = _libc().process_vm_readv(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            number = ctypes.get_errno()
            raise OSError(number, f"process {process}'s memory can't be read: {os.strerror(number)}")
        done += count


class Neighbours:
    """The ranks of a group as processes that read each other's memory, in the order of ranks."""

    def __init__(self, rank: int, processes: list[int]) -> None:
        self._rank, self._processes = rank, processes
        self._scratch: dict[torch.dtype, Tensor] = {}

    def add_up(self, elements: Tensor, cuts: list[slice], starts: list[int]) -> None:
        """This rank's slice of `elements`: the sum over all ranks, whose vectors lie at `starts`, rank after rank.

        Only its own slice is written, which no other rank reads meanwhile.
        """
        mine, length = cuts[self._rank], BLOCK_BYTES // elements.element_size()
        if elements.dtype not in self._scratch:
            self._scratch[elements.dtype] = torch.empty(2, length, dtype=elements.dtype)
        scratch = self._scratch[elements.dtype]
        for first in range(mine.start, mine.stop, length):
            own = elements[first : min(first + length, mine.stop)]
            sums, part = scratch[:, : len(own)].unbind()
            for peer, start in enumerate(starts):
                address = start + first * elements.element_size()
                if peer != self._rank:
                    self._read(peer, address, part if peer else sums)
                if peer == self._rank:
                    sums = torch.add(sums, own, out=own) if peer else own
                elif peer:
                    sums.add_(part)

    def fetch(self, elements: Tensor, cuts: list[slice], starts: list[int]) -> None:
        """The other ranks' slices, from where they lie."""
        for peer, cut in enumerate(cuts):
            if peer != self._rank:
                self._read(peer, starts[peer] + cut.start * elements.element_size(), elements[cut])

    def _read(self, peer: int, address: int, into: Tensor) -> None:
        try:
            read(self._processes[peer], address, into)
        except OSError as error:
            raise RuntimeError(f"rank {peer}: {error}") from error


@cache
def _libc() -> ctypes.CDLL:
    """Its calls let other threads run meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    span = ctypes.POINTER(_Span)
    libc.process_vm_readv.argtypes = [ctypes.c_int, *2 * [span, ctypes.c_ulong], ctypes.c_ulong]
    return libc
