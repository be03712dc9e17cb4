"""Meetings in shared memory: threads stand for the ranks, and what the others are known to be for their connections."""

from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest
import torch

from train.comm.groups import PeerLost
from train.comm.meeting import Meeting
from train.comm.segment import LINE, Segment


class Known:
    """Peers of which `lost` are gone: who waits for one of them gets an error."""

    def __init__(self, rank: int, world_size: int, lost: tuple[int, ...] = ()) -> None:
        self.rank, self.world_size, self._lost = rank, world_size, lost

    def check_waiting(self, operation: str, peer: int, since: float) -> None:
        assert monotonic() < since + 30, f"rank {self.rank} waits for rank {peer}"
        if peer in self._lost:
            raise PeerLost(f"{operation}: {peer}", peer)


def meetings(world_size: int, lost: tuple[int, ...] = ()) -> list[Meeting]:
    segment = Segment(LINE + Meeting.nbytes(world_size))
    segment.close_file()
    return [Meeting(segment, LINE, Known(rank, world_size, lost), 0.0) for rank in range(world_size)]


def at_once(functions: list[Any]) -> list[Any]:
    """What each returns, or the error that it raises."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_one_does_what_is_to_be_done_when_all_have_come_and_before_anyone_goes_on(ranks):
    done: list[int] = []

    def rounds(meeting: Meeting) -> None:
        for turn in range(100):
            meeting.sign("barrier")
            meeting.meet("barrier", signed=True, last=lambda turn=turn: done.append(turn))
            assert done == list(range(turn + 1))
            meeting.meet("barrier")

    assert at_once([lambda meeting=meeting: rounds(meeting) for meeting in meetings(ranks)]) == [None] * ranks


def test_ranks_that_come_for_different_things_all_hear_of_it_and_can_meet_again():
    all_meetings, done = meetings(3), []

    def come(meeting: Meeting, size: int) -> None:
        meeting.sign("all_reduce", torch.zeros(size, dtype=torch.int16), address=size)
        meeting.meet("all_reduce", signed=True, last=lambda: done.append(size))

    errors = at_once([lambda m=m, size=size: come(m, size) for m, size in zip(all_meetings, (4, 5, 4), strict=True)])
    calls = "rank 0: all_reduce of 4 int16, rank 1: all_reduce of 5 int16, rank 2: all_reduce of 4 int16"
    assert [str(error) for error in errors] == [f"backend=shm: the ranks call different operations ({calls})"] * 3
    assert not done
    assert at_once([lambda m=m: come(m, 7) for m in all_meetings]) == [None] * 3
    assert done == [7] and all(meeting.addresses() == [7, 7, 7] for meeting in all_meetings)


def test_addresses_are_each_ranks_own():
    def come(meeting: Meeting, address: int) -> list[int]:
        meeting.sign("all_reduce", torch.zeros(1), address=address)
        meeting.meet("all_reduce", signed=True)
        return meeting.addresses()

    two = meetings(2)
    assert at_once([lambda: come(two[0], 1 << 47), lambda: come(two[1], 3)]) == [[1 << 47, 3]] * 2


def test_who_has_not_come_is_named():
    first, _, third = meetings(3, lost=(1,))
    errors = at_once([lambda: first.meet("barrier"), lambda: third.meet("barrier")])
    assert [error.peer for error in errors] == [1, 1]


def test_one_that_was_killed_with_the_lock_in_its_hands_keeps_nobody():
    first, second = meetings(2, lost=(1,))
    second._lock.wait(lambda: None)
    with pytest.raises(PeerLost, match="barrier: 1"):
        first.meet("barrier")
