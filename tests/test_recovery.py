"""Workers that go on without one of them: the same weights and the same rows, in whatever a worker was when it died."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from torch.distributed import PrefixStore
from training_samples import tiny

from train.build import Worker, WorkerContext, run_worker
from train.checkpoint_files import list_checkpoints
from train.comm.backup import Bank, cover, keepers
from train.metrics import read_rows
from train.progress import Wish
from train.recovery import Agreement, Membership, Offer, agree

PAUSE_S = 0.2
WORDS = ("checkpoint_steps=2", "ema_decay=0.9")


class Dies(Exception):
    """Stands for kill -9: what the peers see of either is that the connections close."""


def points(folder: Path) -> list[tuple]:
    return [(row["kind"], row["step"]) for row in read_rows(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, list[tuple]]:
    folder = tmp_path_factory.mktemp("whole")
    result = run_worker(tiny(*WORDS), WorkerContext(), folder)
    return result["weights_sha256"], points(folder)


def die_at(worker: Worker, phase: str, step: int) -> None:
    """Have the worker die in a phase of the step, or beside it."""
    trainer, backup, gradients = worker.trainer, worker.trainer.backup, worker.trainer.gradients
    places = {
        "forward": (trainer, "_forward", False),
        "keeping": (backup, "exchange", False),
        "kept": (backup, "exchange", True),
        "summing": (gradients, "total", False),
        "summed": (gradients, "total", True),
        "evaluating": (trainer, "_evaluate", False),
        "saving": (worker, "_save", False),
        "saved": (worker, "_save", True),
    }
    owner, name, afterwards = places[phase]
    original = getattr(owner, name)

    def deadly(*args):
        result = original(*args) if afterwards and trainer.progress.step >= step else None
        if trainer.progress.step >= step:
            raise Dies
        return original(*args) if result is None else result

    setattr(owner, name, deadly)


def meet_at(worker: Worker, step: int, store, ranks: int) -> None:
    """Have all ranks come to the forward pass after the step before any goes on: all that lies before it is done."""
    trainer, rank = worker.trainer, worker.context.rank
    original = trainer._forward

    def together(*args):
        if trainer.progress.step == step:
            store.set(f"at {step}: {rank}", "")
            store.wait([f"at {step}: {other}" for other in range(ranks)])
        return original(*args)

    trainer._forward = together


def train_on(worker: Worker, folder: Path, store, rounds: list[list[int]], number: int, rank: int) -> dict:
    """Join the members of the round and train: `rounds` are the first ranks of those who are left."""
    members = rounds[number]
    shares = worker.blocks.shares(len(members))
    membership = Membership(members.index(rank), shares, ["here"] * len(members), PrefixStore(f"round {number}", store))
    worker.join(membership, folder)
    return worker.train(folder) | {"joined": vars(worker.joined)}


def lose_one(rank: int, world_size: int, store, folder: Path, doomed: int, phase: str, step: int) -> dict | str:
    folder = folder / f"{doomed} {phase} {step}"
    context = WorkerContext(rank=rank, world_size=world_size, store=PrefixStore("first", store))
    worker = Worker(tiny(*WORDS), context)
    if rank == doomed:
        die_at(worker, phase, step)
    try:
        result = worker.train(folder)
    except Dies:
        worker.group.abort()
        return "died"
    if result["status"] == "done":  # all was over but for the death
        return result | {"joined": {"source": "memory", "repeated": 0}}
    assert result["status"] == "lost" and f"rank {rank} of {world_size}" in result["error"], result
    time.sleep(PAUSE_S)  # what a loss takes is on the measured clock
    survivors = [r for r in range(world_size) if r != doomed]
    return train_on(worker, folder, store, [survivors], 0, rank)


CASES = [
    (2, "forward", 1),
    (0, "forward", 2),
    (1, "keeping", 2),
    (1, "kept", 1),
    (2, "summing", 3),
    (1, "summed", 1),
    (0, "summed", 3),
    (1, "evaluating", 2),
    (0, "evaluating", 4),
    (2, "saving", 2),
    (0, "saving", 2),
    (0, "saved", 2),
    (1, "saved", 4),
]


def lose_in_turn(rank: int, world_size: int, store, folder: Path) -> list:
    return [lose_one(rank, world_size, PrefixStore(str(case), store), folder, *case) for case in CASES]


@pytest.fixture(scope="module")
def lost(tmp_path_factory) -> tuple[Path, list[list]]:
    folder = tmp_path_factory.mktemp("lost")
    for doomed, phase, step in CASES:
        (folder / f"{doomed} {phase} {step}").mkdir()
    return folder, run_ranks(3, lose_in_turn, folder)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"rank {r} {phase} after {s}" for r, phase, s in CASES])
def test_the_others_finish_the_same_training(lost, whole, number):
    folder, results = lost
    doomed, phase, step = CASES[number]
    ended = [results[rank][number] for rank in range(3)]
    assert ended.pop(doomed) == "died"
    for result in ended:
        assert (result["status"], result["steps"], result["weights_sha256"]) == ("done", 4, whole[0])
        assert (result["joined"]["source"], result["joined"]["repeated"]) == ("memory", 0)
    assert points(folder / f"{doomed} {phase} {step}") == whole[1]
    at = [row["measured_s"] for row in read_rows(folder / f"{doomed} {phase} {step}")]
    assert at == sorted(set(at))
    if step < 4:
        assert max(after - before for before, after in pairwise([0, *at])) > PAUSE_S
    assert [path.name for path in list_checkpoints(folder / f"{doomed} {phase} {step}" / "checkpoints")][-1:] == [
        "step_00000004.pt"
    ]


def lose_two_then_gain_one(rank: int, world_size: int, store, folder: Path, step: int, every: int) -> list[dict]:
    """Ranks 1 and 2 vanish together, so what 1 had and 2 kept is lost; then 1 comes anew and joins at a boundary."""
    words = [*WORDS, f"checkpoint_steps={every}"]
    context = WorkerContext(rank=rank, world_size=world_size, store=PrefixStore("first", store))
    worker = Worker(tiny(*words), context)
    if rank > 0:
        die_at(worker, "forward", step)
    meet_at(worker, step, store, world_size)
    try:
        outcomes = [worker.train(folder)]
    except Dies:
        worker.group.abort()
        outcomes = ["died"]
    if rank == 0:
        worker.wishes[Wish.PAUSE].set()
        outcomes.append(train_on(worker, folder, store, [[0], [0, 1]], 0, 0))
    elif rank == 1:
        worker = Worker(tiny(*words), WorkerContext(rank=None))
    if rank < 2:
        outcomes.append(train_on(worker, folder, store, [[0], [0, 1]], 1, rank))
    return outcomes


@pytest.mark.parametrize(
    "step, every, saved, source, joins",
    [
        (3, 2, 2, "checkpoint", 3),
        (1, 2, 0, "beginning", 1),
        (2, 1, 2, "checkpoint", 3),
    ],  # the last: one has saved there
)
def test_what_nobody_kept_comes_from_the_last_checkpoint_and_a_newcomer_from_its_peers(
    whole, tmp_path, step, every, saved, source, joins
):
    old, new, gone = run_ranks(3, lose_two_then_gain_one, tmp_path, step, every)
    assert gone == ["died"]
    assert [outcome["status"] for outcome in old] == ["lost", "paused", "done"]
    alone, together = old[1]["joined"], old[2]["joined"]
    assert (alone["source"], alone["step"], alone["repeated"]) == (source, saved, step - saved)
    assert (together["source"], together["step"], together["repeated"]) == ("memory", joins, 0)
    assert new[0] == "died" and new[1]["joined"]["step"] == joins
    assert {outcome["weights_sha256"] for outcome in (old[2], new[1])} == {whole[0]}
    assert points(tmp_path) == whole[1]


def test_everyone_has_a_keeper_on_another_node_where_there_is_one():
    assert keepers(["a"]) == [0]
    assert keepers(["a", "a", "a"]) == [1, 2, 0]
    assert keepers(["a", "a", "b", "b"]) == [2, 2, 0, 0]
    assert keepers(["a", "b", "c"]) == [1, 2, 0]


def test_pieces_cover_all_rows_or_none():
    held = [[(5, 0, 4), (4, 0, 4)], [(5, 4, 2), (5, 0, 4)], [(5, 6, 2), (5, 4, 2)]]
    assert cover(held, 5, 8) == [(0, 0), (1, 4), (2, 6)]
    assert cover(held[:2], 5, 8) is None and cover(held, 4, 8) is None
    assert cover(held[1:], 5, 8) == [(0, 0), (0, 4), (1, 6)]
    assert cover([[(5, 0, 8)], [(5, 0, 4)]], 5, 8) == [(0, 0)]


def test_all_follow_whoever_has_come_farthest():
    ahead = Offer((5, 2), [(5, 0, 4), (4, 0, 4)])
    behind = Offer((4, 2), [(5, 4, 4), (4, 4, 4), (4, 0, 4)])
    assert agree([behind, ahead], 8) == Agreement((5, 2), 1, [(1, 0, 4), (0, 4, 4)])
    assert agree([Offer(None, []), behind], 8) == Agreement((4, 2), 1, [(1, 0, 4), (1, 4, 4)])
    evaluated = Offer((5, 5), [(5, 4, 4)])
    assert agree([ahead, evaluated], 8) == Agreement((5, 5), 1, [(0, 0, 4), (1, 4, 4)])
    assert agree([ahead, Offer(None, [])], 8) is None
    assert agree([Offer(None, [])], 8) is None


def test_a_bank_keeps_this_step_and_the_one_before():
    bank = Bank()
    for step in (3, 4, 5):
        bank.put(step, 0, torch.full((2, 3), float(step)))
        bank.put(step, 2, torch.zeros(1, 3))
    assert sorted(bank.offers()) == [(4, 0, 2), (4, 2, 1), (5, 0, 2), (5, 2, 1)]
    bank.forget_after(4)
    assert sorted(bank.offers()) == [(4, 0, 2), (4, 2, 1)]
    assert bank.piece(4, 0)[0, 0] == 4
