"""What is done about the workers, by tables: what is known of them, and what follows."""

import pytest
from training_samples import tiny

from launch.decisions import SILENT_S, Decision, Limits, Status, decide
from train.emulator import build
from train.mesh.blocks import blocks

LIMITS = Limits(max_restarts=2, min_workers=2, wait_s=60.0)


def status(phases: str, **known) -> Status:
    """`phases` by their first letters; d is done, A absent."""
    names = {"s": "starting", "r": "ready", "t": "training", "w": "waiting", "d": "done", "l": "lost", "A": "absent"}
    known = {"silent_s": (0.0,) * len(phases)} | known
    return Status(phases=tuple(names[letter] for letter in phases), **known)


LATE = 2 * SILENT_S
TABLE = [
    # all is well
    ("ttt", {}, Decision("wait")),
    ("ttd", {}, Decision("wait")),
    ("ddd", {}, Decision("finish")),
    ("ddA", {}, Decision("finish")),
    ("dds", {}, Decision("finish")),
    # a worker is lost: first a new one in its place, as long as there are restarts left
    ("tlt", {}, Decision("replace", (1,))),
    ("lll", {"restarts": 0}, Decision("replace", (0, 1))),
    ("tlt", {"restarts": 2}, Decision("give_up", (1,))),
    ("tlt", {"stopping": True}, Decision("give_up", (1,))),
    # the others leave the step, then train on without it: nobody waits for the new one
    ("tsw", {"broken": "rank 2"}, Decision("wait")),
    ("wsw", {"broken": "rank 2"}, Decision("train", (0, 2))),
    ("wAw", {"broken": "rank 2"}, Decision("train", (0, 2))),
    ("wAd", {"broken": "rank 0"}, Decision("train", (0, 2))),
    # one that does not even answer after its peers have lost it is dead
    (
        "ttw",
        {"broken": "rank 2", "silent_s": (0.0, LATE, 0.0)},
        Decision("kill", (1,), f"no answer for {SILENT_S:.0f} s after its peers had lost it"),
    ),
    ("ttt", {"silent_s": (0.0, LATE, 0.0)}, Decision("wait")),
    ("ttw", {"broken": "rank 2", "silent_s": (LATE / 4, LATE / 4, 0.0)}, Decision("wait")),
    # the new one is ready: pause at a step boundary, once, then all train
    ("trt", {}, Decision("pause")),
    ("trt", {"pausing": True}, Decision("wait")),
    ("trt", {"broken": "rank 0"}, Decision("wait")),
    ("trt", {"stopping": True}, Decision("wait")),
    ("wrt", {"pausing": True}, Decision("wait")),
    ("wrw", {"pausing": True}, Decision("train", (0, 1, 2))),
    # one that has been told to end hands over at a step boundary
    ("ttt", {"leaving": frozenset({2})}, Decision("pause")),
    ("www", {"leaving": frozenset({2}), "pausing": True}, Decision("train", (0, 1))),
    # too few: wait for the new ones, but not for ever
    ("wsA", {"broken": "x", "idle_s": 59.0}, Decision("wait")),
    ("wrA", {"broken": "x", "idle_s": 59.0}, Decision("train", (0, 1))),
    (
        "wsA",
        {"broken": "x", "idle_s": 61.0},
        Decision(
            "fail",
            reason="1 of at least 2 worker(s) (min_workers) left, and the replacement of worker 1 has not started "
            "within 60 s (replacement_wait_s)",
        ),
    ),
    (
        "wAA",
        {"broken": "x"},
        Decision(
            "fail", reason="1 of at least 2 worker(s) (min_workers) left, and all 2 restarts (max_restarts) are used up"
        ),
    ),
    ("sss", {"idle_s": 1.0}, Decision("wait")),
    ("rrs", {"idle_s": 1.0}, Decision("train", (0, 1))),
    # connections that break by themselves: again together, but not for ever
    ("www", {"broken": "x", "unexplained": True, "restarts": 1}, Decision("train", (0, 1, 2))),
    (
        "www",
        {"broken": "x", "unexplained": True, "restarts": 2},
        Decision("fail", reason="connections break and no worker is lost: x"),
    ),
]


@pytest.mark.parametrize("phases, known, expected", TABLE, ids=[f"{row[0]} {' '.join(row[1])}" for row in TABLE])
def test_what_is_known_decides(phases, known, expected):
    assert decide(status(phases, **known), LIMITS) == expected


def test_shares_follow_the_survivors():
    config = tiny("mesh.axes.host=8")
    split = blocks(config, build(config).mesh)

    def sizes(*weights: float) -> list[int]:
        shares = split.shares_by_weight(list(weights))
        assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
        assert shares[-1].stop == 8
        return [len(share) for share in shares]

    assert sizes(4, 4) == [4, 4] and sizes(3, 3, 2) == [3, 3, 2] and sizes(2, 2, 2) == [3, 3, 2]
    assert sizes(5) == [8] and sizes(4, 2, 1) == [5, 2, 1] and sizes(1000, 1, 1) == [6, 1, 1]
    assert sizes(*[1] * 8) == [1] * 8
