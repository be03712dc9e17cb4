"""Our backends under torch.distributed: a stock DDP script under torchrun, and whose operations they are."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from torch import distributed

ROOT = Path(__file__).parents[1]


def torchrun(backend: str, processes: int) -> list[list[str]]:
    """[rank]: backend, digest of the weights, first loss, last loss."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "tests/ddp_script.py", backend],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    said = [words[at + 1 : at + 6] for at, word in enumerate(words) if word == "rank"]
    return [words for _, *words in sorted(said)]


def losses(row: list[str]) -> list[float]:
    return [float(loss) for loss in row[-2:]]


def mean_loss_falls(rows: list[list[str]]) -> bool:
    """Over the ranks: each has other random images at every step, so one rank's own may rise, on gloo as well."""
    return sum(losses(row)[1] for row in rows) < sum(losses(row)[0] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("backend", ["cpu:plan", "cpu:shm"])
def test_a_stock_script_trains_as_on_gloo(backend, processes):
    ours, theirs = torchrun(backend, processes), torchrun("gloo", processes)
    digests = {digest for _, digest, _, _ in ours}
    assert len(ours) == processes and len(digests) == 1 and {name for name, *_ in ours} == {backend}
    assert mean_loss_falls(ours)
    assert [losses(row) for row in ours] == [pytest.approx(losses(row), rel=1e-4) for row in theirs]
    if processes == 2:  # a + b has one order
        assert [row[1:] for row in ours] == [row[1:] for row in theirs]


def as_under_torchrun(rank: int, world_size: int, store, backend: str, out: Path) -> list[str]:
    """The script with the environment that torchrun gives it; what it says, as in `torchrun`."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    said = out / str(rank)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)  # to which the script writes
    sys.argv = ["ddp_script.py", backend]
    runpy.run_path(str(Path(__file__).with_name("ddp_script.py")), run_name="__main__")
    return said.read_text().split()[2:]


def test_a_stock_script_trains(tmp_path):
    ours = run_ranks(2, as_under_torchrun, "cpu:shm", tmp_path)
    assert len({digest for _, digest, _, _ in ours}) == 1 and {name for name, *_ in ours} == {"cpu:shm"}
    assert mean_loss_falls(ours)


def call(rank: int, world_size: int, store, backend: str) -> dict:
    from train.comm import c10d
    from train.comm.plan_group import PlanGroup
    from train.comm.shm_group import ShmGroup

    kind, sums = {"plan": PlanGroup, "shm": ShmGroup}[backend], []
    original = kind.all_reduce
    kind.all_reduce = lambda self, tensor, *args: (sums.append(tensor.numel()), original(self, tensor, *args))[1]
    distributed.init_process_group(f"cpu:{backend}", store=store, rank=rank, world_size=world_size)
    operations = distributed.ReduceOp
    results = {}
    for name, operation in {"sum": operations.SUM, "avg": operations.AVG, "max": operations.MAX}.items():
        value = torch.tensor([1.0, 10.0]) * (rank + 1)
        distributed.all_reduce(value, operation)
        results[name] = value.tolist()
    bucket = torch.full((70_000,), float(rank + 1))
    distributed.all_reduce(bucket, async_op=True).wait()
    results["bucket"] = bucket.unique().tolist()
    value = torch.tensor([rank])
    distributed.broadcast(value, 1)
    results["broadcast"] = value.tolist()
    part = torch.zeros(1)
    distributed.reduce_scatter(part, [torch.tensor([float(rank + row)]) for row in range(world_size)])
    results["reduce_scatter"] = part.tolist()
    distributed.barrier()
    group = distributed.group.WORLD._get_backend(torch.device("cpu"))
    results["is ours"] = isinstance(group, c10d.GroupBackend)
    distributed.destroy_process_group()
    return results | {"sums": sums}


@pytest.mark.parametrize("backend", [pytest.param("plan", marks=pytest.mark.slow), "shm"])
def test_sums_are_ours_and_the_rest_is_gloo(backend):
    for rank, result in enumerate(run_ranks(2, call, backend)):
        assert result.pop("sums") == [2, 2, 70_000]  # the maximum is gloo's
        assert result == {
            "sum": [3.0, 30.0],
            "avg": [1.5, 15.0],
            "max": [2.0, 20.0],
            "bucket": [3.0],
            "broadcast": [1],
            "reduce_scatter": [1.0 + 2 * rank],
            "is ours": True,
        }
