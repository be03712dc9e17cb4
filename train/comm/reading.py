"""Reading another process's memory: process_vm_readv of Linux (3.2) copies once, where shared memory needs two copies.

The kernel allows it to processes of one user unless it is told not to (Yama's ptrace_scope, a container's rules), so
ranks try it before they rely on it. What it costs more than a copy is by the page, so that buffers that come again are
put into huge pages (MADV_COLLAPSE of Linux 6.1), where their owner's system lets them be.
"""

import ctypes
import os
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from train.comm.arrays import BLOCK_BYTES, add, array

PAGES = Path("/sys/kernel/mm/transparent_hugepage")
COLLAPSE = 25
"""madvise's MADV_COLLAPSE."""
REMEMBERED = 1000
MAGIC = 0x5EED_2F0B_41C7_9D36
SPANS = ctypes.c_size_t * 4
"""Two of the kernel's (address, bytes): here and there."""


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
        read(process, address, found.data_ptr(), found.nbytes)
    except (OSError, AttributeError):  # refused; or a C library that has no such function
        return False
    return found.item() == MAGIC


def enlarge_pages(address: int, nbytes: int) -> None:
    """Put this memory into huge pages as far as it fills them; where the kernel can't, or may not, nothing changes."""
    try:
        huge = int((PAGES / "hpage_pmd_size").read_text())
        forbidden = "[never]" in (PAGES / "enabled").read_text()
    except OSError:  # a kernel without them
        return
    first, last = -(-address // huge) * huge, (address + nbytes) // huge * huge
    if first < last and not forbidden:
        _libc().madvise(first, last - first, COLLAPSE)


def read(process: int, there: int, here: int, nbytes: int) -> None:
    """From an address of another process to one of this process. OSError where that can't be."""
    done = 0
    while done < nbytes:
        spans = SPANS(here + done, nbytes - done, there + done, nbytes - done)
        at = ctypes.addressof(spans)
        count = _libc().process_vm_readv(process, at, 1, at + ctypes.sizeof(spans) // 2, 1, 0)
        if count <= 0:
            number = ctypes.get_errno()
            raise OSError(number, f"process {process}'s memory can't be read: {os.strerror(number)}")
        done += count


class Neighbours:
    """The ranks of a group as processes that read each other's memory, in the order of ranks."""

    def __init__(self, rank: int, processes: list[int]) -> None:
        self._rank, self._processes = rank, processes
        self._scratch = torch.empty(2, BLOCK_BYTES, dtype=torch.uint8)
        self._came: Counter[tuple[int, int]] = Counter()

    def add_up(self, elements: Tensor, cuts: list[slice], starts: list[int]) -> None:
        """This rank's slice of `elements`: the sum over all ranks, whose vectors lie at `starts`, rank after rank.

        Only its own slice is written, which no other rank reads meanwhile.
        """
        mine, size = cuts[self._rank], elements.element_size()
        own = array(elements[mine])
        scratch = self._scratch.view(elements.dtype)
        before, part = map(array, scratch)
        before_at, part_at = (row.data_ptr() for row in scratch)
        length = BLOCK_BYTES // size
        for first in range(0, len(own), length):
            block = own[first : first + length]
            count = len(block)
            total = None
            for peer, start in enumerate(starts):
                there = start + (mine.start + first) * size
                if peer == self._rank:
                    if total is not None:
                        add(total, block, block)
                    total = block
                elif total is None:
                    self._read(peer, there, before_at, count * size)
                    total = before[:count]
                else:
                    self._read(peer, there, part_at, count * size)
                    add(total, part[:count], total)

    def prepare(self, elements: Tensor) -> None:
        """To be read by others: the second time it comes, which it then may do often, it is put into huge pages."""
        if len(self._came) > REMEMBERED:
            self._came.clear()
        where = elements.data_ptr(), elements.nbytes
        self._came[where] += 1
        if self._came[where] == 2:
            enlarge_pages(*where)

    def fetch(self, elements: Tensor, cuts: list[slice], starts: list[int]) -> None:
        """The other ranks' slices, from where they lie."""
        here, size = elements.data_ptr(), elements.element_size()
        for peer, cut in enumerate(cuts):
            if peer != self._rank:
                offset = cut.start * size
                self._read(peer, starts[peer] + offset, here + offset, (cut.stop - cut.start) * size)

    def _read(self, peer: int, there: int, here: int, nbytes: int) -> None:
        try:
            read(self._processes[peer], there, here, nbytes)
        except OSError as error:
            raise RuntimeError(f"rank {peer}: {error}") from error


@cache
def _libc() -> ctypes.CDLL:
    """Its calls let other threads run meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    libc.process_vm_readv.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p, ctypes.c_ulong], ctypes.c_ulong]
    return libc
