"""Groups move exact integers between real processes over gloo; aggregators sum the same bits for every split."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from torch import Tensor, distributed

from train.comm.aggregation import SumAggregator, TreeAggregator, copied, meeting_order, one_dtype, unflatten
from train.comm.groups import SingleGroup, connect
from train.comm.shm_group import ShmGroup
from train.comm.torch_group import TorchGroup

NUM_BLOCKS = 11
SPLITS = {2: [(0, 6, 11), (0, 1, 11), (0, 8, 11)], 3: [(0, 4, 8, 11), (0, 1, 2, 11), (0, 5, 10, 11)]}


def numbers(rank: int, count: int = 5) -> Tensor:
    return torch.arange(count) * 10**rank


def call_everything(rank: int, world_size: int, store) -> dict:
    """The result of every method of a group on this rank, as plain values."""
    group = connect(rank, world_size, store, "cpu")
    assert isinstance(group, TorchGroup)
    results = {"rank": group.rank, "world_size": group.world_size}

    summed, later = numbers(rank), numbers(rank)
    group.all_reduce(summed)
    results["all_reduce"] = summed.tolist()
    group.all_reduce(later, async_op=True).wait()
    results["async"] = later.tolist()
    results["all_gather"] = group.all_gather(numbers(rank)).tolist()
    results["reduce_scatter"] = group.reduce_scatter(numbers(rank, world_size * 2).view(world_size, 2)).tolist()

    for source in range(world_size):
        value = numbers(rank)
        group.broadcast(value, source)
        results["broadcast", source] = value.tolist()

    token = numbers(rank)
    if rank == 0:
        group.send(token, 1)
        group.recv(token, world_size - 1)
    else:
        received = torch.empty_like(token)
        group.recv(received, rank - 1)
        group.send(received + token, (rank + 1) % world_size)
    results["ring"] = token.tolist()

    for peer in meeting_order(rank, world_size):
        outgoing = [numbers(rank, 1 + i) + peer for i in range(rank + 1)]
        incoming = [torch.empty(1 + i, dtype=torch.int64) for i in range(peer + 1)]
        group.exchange(outgoing, incoming, peer)
        results["exchange", peer] = [tensor.tolist() for tensor in incoming]

    part = group.subgroup([0, world_size - 1])
    results["subgroup"] = None
    if part is not None:
        value = numbers(rank)
        part.all_reduce(value)
        part.broadcast(last := numbers(rank), 1)
        results["subgroup"] = (part.rank, part.world_size, value.tolist(), last.tolist())

    store.add("arrived", 1)
    group.barrier()
    results["barrier"] = store.add("arrived", 0)
    results["aggregators"] = [aggregate(group, cuts) for cuts in SPLITS[world_size]]
    group.close()
    results["closed"] = not distributed.is_initialized()
    return results


def block_tensors(block: int, whole: bool = False) -> list[Tensor]:
    """Odd sizes, one channels last and one of a single number; `whole`: integers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(block)
    shapes = [(3, 5, 3, 3), (7,), (1, 1, 1, 1), (), (13, 3), (2, 6, 1, 1)]
    tensors = [torch.randn(shape, generator=generator) * 10 ** (block % 5) for shape in shapes]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return [tensor.round() for tensor in tensors] if whole else tensors


def reference() -> list[Tensor]:
    """The tree over NUM_BLOCKS = 11, written out."""
    b = [block_tensors(block) for block in range(NUM_BLOCKS)]
    terms = zip(*b, strict=True)
    return [
        (((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))) + ((a8 + a9) + a10)
        for a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 in terms
    ]


def aggregate(group, cuts: tuple[int, ...]) -> dict:
    """What both aggregators make of this rank's blocks, twice each (the second sum must not see the first)."""
    shares = [range(first, last) for first, last in pairwise(cuts)]
    tree, fast, results = TreeAggregator(group, shares), SumAggregator(group), {}
    for _ in range(2):
        for block in shares[group.rank]:
            tree.add(block, block_tensors(block))
            fast.add(block, block_tensors(block, whole=True))
        summed = tree.total()
        results = {
            "tree": [tensor.numpy() for tensor in summed],
            "like": all(a.stride() == b.stride() for a, b in zip(summed, block_tensors(0), strict=True)),
            "sum": [tensor.numpy() for tensor in fast.total()],
        }
    return results


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ranks(request) -> list[dict]:
    return run_ranks(request.param, call_everything)


def test_ranks_and_sizes(ranks):
    assert [(result["rank"], result["world_size"]) for result in ranks] == [(r, len(ranks)) for r in range(len(ranks))]
    assert all(result["closed"] for result in ranks)


def test_sums_and_gathers_are_exact(ranks):
    total = (numbers(0) * int("1" * len(ranks))).tolist()
    for rank, result in enumerate(ranks):
        assert result["all_reduce"] == result["async"] == total
        assert result["all_gather"] == [numbers(other).tolist() for other in range(len(ranks))]
        row = numbers(0, len(ranks) * 2).view(-1, 2)[rank] * int("1" * len(ranks))
        assert result["reduce_scatter"] == row.tolist()


def test_broadcast_send_and_exchange_bring_what_was_sent(ranks):
    for rank, result in enumerate(ranks):
        for source in range(len(ranks)):
            assert result["broadcast", source] == numbers(source).tolist()
        for peer in meeting_order(rank, len(ranks)):
            assert result["exchange", peer] == [(numbers(peer, 1 + i) + rank).tolist() for i in range(peer + 1)]
    assert ranks[0]["ring"] == (numbers(0) * int("1" * len(ranks))).tolist()


def test_a_subgroup_has_its_own_ranks(ranks):
    last = len(ranks) - 1
    total, of_last = (numbers(0) + numbers(last)).tolist(), numbers(last).tolist()
    expected = {0: (0, 2, total, of_last), last: (1, 2, total, of_last)}
    assert [result["subgroup"] for result in ranks] == [expected.get(rank) for rank in range(len(ranks))]


def test_nobody_leaves_a_barrier_before_all_have_come(ranks):
    assert [result["barrier"] for result in ranks] == [len(ranks)] * len(ranks)


def test_tree_sums_have_the_same_bits_on_every_rank_for_every_split(ranks):
    expected = [tensor.numpy() for tensor in reference()]
    for result in ranks:
        for aggregated in result["aggregators"]:
            assert aggregated["like"]
            for ours, theirs in zip(aggregated["tree"], expected, strict=True):
                np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def aggregate_in_shared_memory(rank: int, world_size: int, store) -> list[dict]:
    group = ShmGroup(rank, world_size, store, "cpu")
    return [aggregate(group, cuts) for cuts in SPLITS[world_size]]


@pytest.mark.parametrize("world_size", SPLITS)
def test_sums_in_shared_memory_have_the_same_bits(world_size):
    results = run_ranks(world_size, aggregate_in_shared_memory)
    test_tree_sums_have_the_same_bits_on_every_rank_for_every_split([{"aggregators": each} for each in results])
    test_fast_sums_are_sums([{"aggregators": each} for each in results])


def read_late(rank: int, world_size: int, store) -> None:
    """Rank 0 hands in a step's contribution while the others still read the total of the step before."""
    group = ShmGroup(rank, world_size, store, "cpu")
    shares = [range(peer, peer + 1) for peer in range(world_size)]
    for aggregator in (SumAggregator(group), TreeAggregator(group, shares)):
        for size in (5, 20_000):
            for step in range(4):
                aggregator.add(rank, [torch.full((size,), float(rank + step))])
                (total,) = aggregator.total()
                if rank:
                    time.sleep(0.02)
                assert (total == sum(range(world_size)) + world_size * step).all(), (aggregator, step, size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_total_stays_as_it_is_until_a_rank_hands_in_its_next_contribution(world_size):
    run_ranks(world_size, read_late)


def test_tensors_of_two_dtypes_are_not_summed_together():
    with pytest.raises(ValueError, match="torch.float16, torch.float32 can't be summed together"):
        one_dtype([torch.zeros(2), torch.zeros(2, dtype=torch.float16)])


def test_fast_sums_are_sums(ranks):
    blocks = [block_tensors(block, whole=True) for block in range(NUM_BLOCKS)]
    expected = [torch.stack(terms).sum(0).numpy() for terms in zip(*blocks, strict=True)]
    for result in ranks:
        for aggregated in result["aggregators"]:
            assert all(map(np.array_equal, aggregated["sum"], expected))


def test_one_process_sums_in_the_same_order():
    result = aggregate(SingleGroup(), (0, NUM_BLOCKS))
    for ours, theirs in zip(result["tree"], reference(), strict=True):
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.numpy().view(np.uint32))


def abort_and_wait(rank: int, world_size: int, store) -> bool:
    group = connect(rank, world_size, store, "cpu")
    group.barrier()
    if rank == 1:
        group.abort()
        store.wait(["noticed"])  # this process stays: it is the abort that the other one notices
        return True
    with pytest.raises(RuntimeError):
        group.all_reduce(numbers(rank))
    store.set("noticed", "")
    return True


def test_who_waits_for_a_rank_that_gave_up_gets_an_error():
    assert run_ranks(2, abort_and_wait) == [True, True]


@pytest.mark.parametrize("world_size", range(2, 10))
def test_every_two_ranks_meet_in_the_same_round(world_size):
    """Only then can no chain of ranks wait for each other."""
    orders = [meeting_order(rank, world_size) for rank in range(world_size)]
    waiting = {rank: list(order) for rank, order in enumerate(orders)}
    assert all(sorted([rank, *order]) == list(range(world_size)) for rank, order in enumerate(orders))
    while any(waiting.values()):
        pairs = {tuple(sorted((r, order[0]))) for r, order in waiting.items() if order and waiting[order[0]][:1] == [r]}
        assert pairs, f"deadlock: {waiting}"
        for one, other in pairs:
            waiting[one].pop(0), waiting[other].pop(0)


def test_flattening_keeps_shapes_strides_and_bits():
    tensors = block_tensors(3)
    flat = torch.zeros(300)
    places = copied(tensors, unflatten(flat, tensors))
    assert flat.any() and not flat[sum(t.numel() for t in tensors) :].any()
    for back, tensor in zip(places, tensors, strict=True):
        assert back.shape == tensor.shape and back.stride() == tensor.stride() and torch.equal(back, tensor)


def test_a_group_of_one_returns_what_it_was_given():
    group = connect(0, 1, None, "cpu")
    assert isinstance(group, SingleGroup) and (group.rank, group.world_size) == (0, 1)
    value = numbers(0)
    group.all_reduce(value)
    group.all_reduce(value, async_op=True).wait()
    group.broadcast(value, 0)
    group.barrier()
    assert torch.equal(value, numbers(0))
    gathered, scattered = group.all_gather(value), group.reduce_scatter(value.unsqueeze(0))
    value.zero_()  # the results are copies
    assert torch.equal(gathered[0], numbers(0)) and torch.equal(scattered, numbers(0))
    assert group.subgroup([0]) is group
    for refused in (group.send, group.recv, lambda tensor, peer: group.exchange([tensor], [tensor], peer)):
        with pytest.raises(ValueError, match="group of one"):
            refused(value, 1)


def test_gloo_carries_one_worker_too():
    group = TorchGroup(0, 1, None, "cpu")
    value = numbers(0)
    group.all_reduce(value)
    assert torch.equal(value, numbers(0)) and torch.equal(group.all_gather(value), value.unsqueeze(0))
    group.close()


@pytest.mark.parametrize(
    "made, named",
    [
        (lambda: SingleGroup(0, 2), "backend=single carries one worker, not 2"),
        (lambda: TorchGroup(0, 2, None, "cpu", backend="nccl"), "backend=nccl"),
    ],
)
def test_what_a_backend_cannot_carry_is_refused(made, named):
    with pytest.raises(ValueError, match=named):
        made()
