"""A group of every backend, and what goes through it: whole numbers, whose sums are exact in every dtype and order."""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed import PrefixStore

from train.comm import peers

CONF = Path(__file__).parents[1] / "conf" / "backend"
ALGORITHMS = "ring nhr halving_doubling double_tree hierarchical hierarchical_ring hierarchical_nhr torus_2d".split()
BACKENDS = ("single", "gloo", *(f"plan:{name}" for name in ALGORITHMS), "shm", "shm:copies", "hybrid", "nccl", "hccl")
WORKERS_PER_NODE = 2  # of the made-up nodes on which hybrid and the hierarchical plans run


def make(backend: str, rank: int, world_size: int, store: Any, prefix: str) -> Any:
    """The group of conf/backend/<name>.yaml; after a colon the algorithm of `plan`, or `shm` that only copies."""
    from train import emulator

    name, _, algorithm = backend.partition(":")
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    if name == "shm":
        node["read_memory"] = not algorithm
    elif algorithm:
        node["algorithm"]["_target_"] = f"train.comm.algorithms.{algorithm}"
    if algorithm in ("torus_2d", *(name for name in ALGORITHMS if name.startswith("hierarchical"))):
        chip = WORKERS_PER_NODE if world_size % WORKERS_PER_NODE == 0 else 1
        node["axes"] = {"host": world_size // chip, "chip": chip}
    if name == "hybrid":
        peers.node_name = lambda: f"node {rank // WORKERS_PER_NODE}"
    store = None if store is None else PrefixStore(prefix, store)
    return emulator.make(node, rank=rank, world_size=world_size, store=store, device="cpu")


PERIOD = 7


def numbers(rank: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers from 0 to 6: sums over up to 18 ranks are exact in int8, and over 42 in bfloat16."""
    return tiled(torch.arange(PERIOD) * (rank + 3) % PERIOD, count, dtype)


def summed(ranks: range | list[int], count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return tiled(sum(numbers(rank, PERIOD, torch.int64) for rank in ranks), count, dtype)


def tiled(period: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Many periods at a time, which takes a tenth of the time of one by one."""
    times = min(4096, -(-count // PERIOD))
    return period.to(dtype).repeat(times).repeat(-(-count // max(1, times * PERIOD)))[:count]


def equal(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == expected.dtype and ours.shape == expected.shape, (ours.dtype, ours.shape)
    wrong = (ours != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} of {ours.numel()} differ, first at {wrong[0].tolist()}"


def name_of(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
