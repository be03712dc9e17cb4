"""What backends refuse, what conf/backend builds, and a backend from somebody else's package."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from torch.distributed import HashStore
from training_samples import composed, tiny

from launch.compose import check, compose, expand
from train import emulator
from train.build import WorkerContext, run_worker
from train.comm import algorithms, peers, segment
from train.comm.hybrid_group import HybridGroup
from train.comm.plan_group import PlanGroup, schedule, worker_mesh
from train.comm.segment import Segment
from train.comm.shm_group import ShmGroup, slices
from train.comm.torch_group import TorchGroup

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "backends.md"]
PYTHON = re.compile(r"```python\n# (yourpackage/\S+)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("backend", ["plan", "shm", "hybrid"])
def test_every_backend_of_processors_carries_one_worker(backend):
    group = emulator.make(composed(f"backend={backend}")["backend"], rank=0, world_size=1, store=None, device="cpu")
    value = torch.arange(5.0)
    group.all_reduce(value)
    group.barrier()
    assert torch.equal(value, torch.arange(5.0)) and torch.equal(group.all_gather(value)[0], value)
    group.close()


@pytest.mark.parametrize(
    "made, named",
    [
        (lambda: ShmGroup(0, 2, None, "cuda:0"), "backend=shm moves CPU memory only, and device=cuda:0; use"),
        (lambda: ShmGroup(0, 2, None, "cpu", piece_kib=8), "backend.piece_kib=8 must be at least 64"),
        (lambda: HybridGroup(0, 2, None, "cuda:0"), "backend=hybrid moves CPU memory only"),
        (lambda: TorchGroup(0, 2, None, "cpu", backend="hccl"), "backend=hccl moves NPU memory only, and device=cpu"),
        (lambda: TorchGroup(0, 2, None, "npu:0", backend="hccl"), "torch_npu is not installed; install it beside CANN"),
        (lambda: PlanGroup(0, 6, None, "cpu", axes={"host": 2, "chip": 2}), "host 2 x chip 2 = 4, not chips=6"),
        (
            lambda: PlanGroup(0, 4, None, "cpu", algorithm=algorithms.torus_2d, axes={"chip": 4}),
            "collective=torus_2d needs two axes",
        ),
        (lambda: PlanGroup(0, 4, None, "cpu", algorithm=algorithms.multi_ring, axes={"chip": 4}), "form one ring only"),
    ],
)
def test_what_a_backend_cannot_carry_is_refused(made, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        made()


def on_two_nodes(rank: int, world_size: int, store) -> str:
    peers.node_name = lambda: f"node {rank}"
    answer = peers.Peers._answer

    def late(*args) -> None:
        answer(*args)
        time.sleep(0.3)  # the other has come, seen and left

    peers.Peers._answer = late
    with pytest.raises(ValueError) as caught:
        ShmGroup(rank, world_size, store, "cpu")
    return str(caught.value)


def test_shared_memory_between_nodes_is_refused():
    for text in run_ranks(2, on_two_nodes):
        assert text == "backend=shm: the workers run on 2 nodes, without common memory; use backend=hybrid"


def bound_to_one(rank: int, world_size: int, store) -> tuple[int, float]:
    """(Processors of the machine, how long a rank spins that is bound to one of them.)"""
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[rank % len(processors)]})
    group = ShmGroup(rank, world_size, store, "cpu")
    group.close()
    return len(processors), group._spin_s


def test_ranks_that_are_bound_to_a_processor_each_do_not_share_them():
    for processors, spin_s in run_ranks(2, bound_to_one):
        assert spin_s == (segment.SPIN_S if processors >= 2 else segment.CROWDED_SPIN_S)


def with_too_little_memory(rank: int, world_size: int, store) -> list[str]:
    """Before anything is made, and for gradients that don't fit."""
    texts = []
    group = ShmGroup(rank, world_size, store, "cpu")
    room = os.statvfs(segment.FOLDER)
    too_many = (room.f_blocks * room.f_frsize) // 4 + 1
    with pytest.raises(ValueError) as caught:
        group.shared([too_many], torch.float32)
    texts.append(str(caught.value))
    group.barrier()  # it goes on
    group.close()
    return texts


def test_too_little_shared_memory_is_told_with_its_size():
    total = os.statvfs(segment.FOLDER)
    size = f"{total.f_blocks * total.f_frsize / 1e6:,.1f} MB"
    for (text,) in run_ranks(2, with_too_little_memory):
        assert "MB of shared memory, and /dev/shm has" in text and f"MB free of {size}; make it larger" in text


def test_memory_has_no_name_and_ends_with_its_last_user():
    before = set(os.listdir(segment.FOLDER))
    one = Segment(10_000)
    other = Segment(10_000, one.reference)
    one.close_file(), other.close_file()
    ours, theirs = one.tensor(64, 5, torch.float64), other.tensor(64, 5, torch.float64)
    ours.copy_(torch.arange(5.0))
    assert torch.equal(theirs, torch.arange(5.0, dtype=torch.float64))
    assert one.nbytes == 12_288 and set(os.listdir(segment.FOLDER)) <= before
    address = f"{ours.data_ptr() - 64:x}-"
    assert address in Path("/proc/self/maps").read_text()
    del one, ours
    assert address not in Path("/proc/self/maps").read_text()
    assert theirs.sum() == 10


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 25_557_032])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_slices_cover_everything_once(count, parts):
    cuts = slices(count, parts)
    assert len(cuts) == parts and cuts[0].start == 0 and cuts[-1].stop == count
    assert all(one.stop == other.start for one, other in zip(cuts[:-1], cuts[1:], strict=True))
    assert all(cut.start % 16 == 0 or cut.start == count for cut in cuts)


@pytest.mark.parametrize("name", ["ring", "halving_doubling", "nhr", "double_tree"])
@pytest.mark.parametrize("workers", [2, 3, 5, 8])
def test_what_one_sends_in_a_round_another_receives(name, workers):
    """Rounds in which a rank does nothing are left out of its schedule, so those of two ranks are matched by pairs."""
    plan = getattr(algorithms, name)(worker_mesh(workers, {"host": workers, "chip": 1}))
    turns = {rank: list(schedule(plan, rank)) for rank in range(workers)}
    for rank, of_rank in turns.items():
        for peer in set(range(workers)) - {rank}:
            sent = [part[1:] for turn in of_rank for part in turn.sends if part[0] == peer]
            received = [part[1:] for turn in turns[peer] for part in turn.receives if part[0] == rank]
            assert sent == received


def test_a_store_on_loopback_keeps_connections_on_loopback():
    assert peers._own_address(HashStore()) == "127.0.0.1"


def example() -> tuple[str, str, str]:
    """(path of the module, its source, the command) that the documentation shows."""
    (found,) = [
        (*PYTHON.search(text).groups(), re.search(r"```\n(python -m launch.run .*yourpackage.*)\n```", text)[1])
        for text in (page.read_text(encoding="utf-8") for page in PAGES)
        if PYTHON.search(text)
    ]
    return found


def train_on(rank: int, world_size: int, store, folder: Path, config: dict) -> None:
    sys.path.insert(0, str(folder))
    run_worker(config, WorkerContext(rank=rank, world_size=world_size, store=store), folder / "run")


def test_the_documented_backend_of_another_package_works(tmp_path, monkeypatch):
    path, source, command = example()
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (words,) = expand(command.split()[3:], sweep=False)
    node = compose([word.lstrip("+") if word.startswith("backend._") else word for word in words])["backend"]
    assert node == {"_target_": "yourpackage.counted.CountedGloo", "report": "summed.txt"}
    config = tiny("numerics=fast", "max_steps=2") | {"backend": node | {"report": str(tmp_path / "summed.txt")}}
    check(config)
    (tmp_path / "run").mkdir()
    run_ranks(2, train_on, tmp_path, config)
    count, unit = (tmp_path / "summed.txt").read_text().split()
    parameters = 4 * 272_474  # ResNet-20's, in fp32
    assert unit == "bytes" and int(count) > 2 * parameters


def sha_on(rank: int, world_size: int, store, config: dict, folder: Path) -> str:
    return run_worker(config, WorkerContext(rank=rank, world_size=world_size, store=store), folder)["weights_sha256"]


def test_training_has_the_same_bits_on_every_backend(tmp_path):
    found = {}
    for backend, ranks in {"single": 1, "plan": 2, "shm": 2, "hybrid": 3}.items():
        (tmp_path / backend).mkdir()
        config = tiny(f"backend={backend}", "max_steps=2", "chip.bucket_ends=[7, 30]")
        if ranks == 1:
            found[backend] = {sha_on(0, 1, None, config, tmp_path / backend)}
        else:
            found[backend] = set(run_ranks(ranks, sha_on, config, tmp_path / backend))
    assert len(set.union(*found.values())) == 1, found
