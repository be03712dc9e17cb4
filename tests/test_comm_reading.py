"""Reading another process's memory, and sums of ranks that do: one process here stands for all ranks."""

import os
import subprocess
import sys

import pytest
import torch

from train.comm import reading
from train.comm.reading import Neighbours, Readable, may_read, read
from train.comm.shm_group import slices


def test_a_process_reads_what_lies_at_an_address():
    there, here = torch.arange(100_000), torch.zeros(70_000, dtype=torch.int64)
    read(os.getpid(), there.data_ptr() + 8 * 1000, here.data_ptr(), here.nbytes)
    assert torch.equal(here, there[1000:71_000])
    read(os.getpid(), 0, here.data_ptr(), 0)  # nothing


def test_memory_that_is_not_there_is_an_error_and_no_permission():
    with pytest.raises(OSError, match=f"process {os.getpid()}'s memory can't be read: Bad address"):
        read(os.getpid(), 8, torch.zeros(1).data_ptr(), 4)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    readable, other = Readable(), torch.zeros(1, dtype=torch.int64)
    assert may_read(readable.words)
    assert not may_read(readable.words.replace(str(os.getpid()), str(gone.pid)))
    assert not may_read(f"{os.getpid()} {other.data_ptr()}")  # something else lies there


def test_where_there_is_no_such_function_nobody_reads(monkeypatch):
    def none():
        raise AttributeError("process_vm_readv")

    monkeypatch.setattr(reading, "_libc", none)
    assert not may_read(Readable().words)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_rank_adds_its_slice_in_the_order_of_ranks(ranks):
    """Four blocks and a bit each; what other ranks will read of a vector stays as it was."""
    count = ranks * (4 * reading.BLOCK_BYTES // 4 + 100)
    vectors = torch.randn(ranks, count, generator=torch.manual_seed(0)) * 10.0 ** torch.arange(ranks)[:, None]
    expected = vectors[0].clone()
    for vector in vectors[1:]:
        expected += vector
    cuts, starts = slices(count, ranks), [vector.data_ptr() for vector in vectors]
    neighbours = [Neighbours(rank, [os.getpid()] * ranks) for rank in range(ranks)]
    before = vectors.clone()
    for rank, neighbour in enumerate(neighbours):
        neighbour.add_up(vectors[rank], cuts, starts)
        others = torch.ones(count, dtype=torch.bool)
        others[cuts[rank]] = False
        assert torch.equal(vectors[rank][others], before[rank][others])
    for rank, neighbour in enumerate(neighbours):
        neighbour.fetch(vectors[rank], cuts, starts)
    assert all(torch.equal(vector, expected) for vector in vectors)


def test_a_rank_that_is_gone_is_named():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    vector = torch.zeros(1000)
    with pytest.raises(RuntimeError, match=rf"rank 1: .*process {gone.pid}'s memory can't be read: No such process"):
        Neighbours(0, [os.getpid(), gone.pid]).fetch(vector, slices(1000, 2), [vector.data_ptr()] * 2)


class Advised:
    """What of the C library asks for huge pages."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def madvise(self, *call: int) -> int:
        self.calls.append(call)
        return -1  # as a kernel that does not know it


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A kernel's settings: huge pages of 1 MiB; and the calls."""
    (tmp_path / "hpage_pmd_size").write_text("1048576\n")
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    advised = Advised()
    monkeypatch.setattr(reading, "PAGES", tmp_path)
    monkeypatch.setattr(reading, "_libc", lambda: advised)
    return tmp_path, advised.calls


def test_a_buffer_that_comes_again_is_put_into_huge_pages_once(pages):
    _, calls = pages
    neighbours = Neighbours(0, [os.getpid()] * 2)
    buffer, other = torch.zeros(1 << 20), torch.zeros(1 << 20)
    neighbours.prepare(buffer)
    neighbours.prepare(other)
    assert not calls
    for _ in range(3):
        neighbours.prepare(buffer)
    ((first, nbytes, advice),) = calls
    assert first % (1 << 20) == 0 and nbytes in (3 << 20, 4 << 20) and advice == 25
    assert buffer.data_ptr() <= first and first + nbytes <= buffer.data_ptr() + buffer.nbytes


def test_small_buffers_and_systems_without_huge_pages_are_left_alone(pages):
    folder, calls = pages
    reading.enlarge_pages((5 << 20) + 64, 1 << 20)  # fills none
    (folder / "enabled").write_text("always madvise [never]\n")
    reading.enlarge_pages(5 << 20, 1 << 20)
    (folder / "enabled").unlink()
    reading.enlarge_pages(5 << 20, 1 << 20)
    assert not calls


def test_what_lies_in_huge_pages_is_what_lay_there():
    buffer = torch.arange(3 << 20)
    reading.enlarge_pages(buffer.data_ptr(), buffer.nbytes)
    assert torch.equal(buffer, torch.arange(3 << 20))
