"""Buckets: those of the emulated clock, summed in their order beside the backward pass, to the bits of after it."""

import threading
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from group_contract import make
from rank_processes import run_ranks
from torch import Tensor, nn
from torch.distributed import PrefixStore
from training_samples import tiny

from train.account import contract
from train.build import Worker, WorkerContext, run_worker
from train.comm.aggregation import SumAggregator
from train.comm.buckets import Afterwards, GradientSums, InThread, taken
from train.comm.groups import SingleGroup
from train.comm.summation import gradient_sums
from train.models.resnet import resnet
from train.models.resnet_cifar import resnet_cifar
from train.precision import choose_loss_scale, choose_precision, gradient_dtypes
from train.sim import workload
from train.sim.step import WIRE_BYTES, buckets

CASES = [
    (workload.resnet(50), lambda: resnet(50), [85, 160], [85, 75, 1]),
    (workload.resnet(18, num_classes=10), lambda: resnet(18, num_classes=10), [3, 20], [4, 16, 42]),
    (workload.resnet_cifar(20), lambda: resnet_cifar(20), [2, 30], [2, 29, 34]),
    (workload.resnet_cifar(20), lambda: resnet_cifar(20), [85, 160], [65]),
]


@pytest.mark.parametrize("table, model, ends, tensors", CASES, ids=[f"{t.name[:16]} {ends}" for t, _, ends, _ in CASES])
def test_the_priced_buckets_are_the_real_ones(table, model, ends, tensors):
    """Byte by byte: what the table says of each bucket, and the model's parameters from the last to the first."""
    priced = buckets(table, ends)
    assert [bucket.tensors for bucket in priced] == tensors
    backward = list(model().parameters())[::-1]
    cuts = pairwise(accumulate(tensors, initial=0))
    real = [sum(p.nbytes for p in backward[first:last]) for first, last in cuts]
    assert [bucket.parameters * WIRE_BYTES["fp32"] for bucket in priced] == real
    assert sum(real) == 4 * table.parameters


def test_a_worker_sums_in_the_buckets_that_its_clock_prices():
    worker = Worker(tiny("chip.bucket_ends=[7, 30]"), WorkerContext())
    found = [sum(p.numel() for p in bucket) for bucket in worker.trainer.gradients.buckets]
    assert found == [bucket.parameters for bucket in worker.emulator.buckets] and len(found) == 3


class Network(nn.Module):
    """Three layers whose gradients come in the order fc, conv2, conv1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 10)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(images)))).mean((2, 3)))


SIZES = [2, 3, 1]  # conv1's bias with conv2; its weight, which is made before the bias, by itself


def made() -> tuple[Network, list[nn.Parameter]]:
    torch.manual_seed(0)
    network = Network()
    return network, list(network.parameters())


def loss_of(network: Network, block: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + block)
    return network(torch.randn(4, 3, 12, 12, generator=generator)).square().sum() * 10.0 ** (block % 3)


class Recorded(Afterwards):
    """Notes how many gradients were still to come at each `submit`."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters, self.ready, self.seen = parameters, 0, []

    def submit(self, function) -> None:
        self.seen.append(self.ready)
        super().submit(function)


def test_a_bucket_starts_with_its_last_gradient_and_not_before_the_one_before_it():
    network, parameters = made()
    beside = Recorded(parameters)
    for parameter in parameters:  # before those of the sums: a gradient counts once it is there
        parameter.register_post_accumulate_grad_hook(lambda _: setattr(beside, "ready", beside.ready + 1))
    sums = GradientSums(parameters, SIZES, lambda: SumAggregator(SingleGroup()), SumAggregator(SingleGroup()), beside)
    sums.first(lambda: None)
    with sums.as_they_come(0, torch.ones(2)):
        loss_of(network, 0, 0).backward()
    assert beside.seen == [0, 0, 2, 6, 6]  # what goes first, the outcome, and the buckets: 2 and 3 are complete at once
    assert all(parameter.grad is None for parameter in parameters)
    gradients, outcome = sums.total()
    loss_of(network, 0, 0).backward()
    assert all(map(torch.equal, gradients, taken(parameters))) and outcome.tolist() == [1, 1]


def test_buckets_that_are_not_the_models_are_refused():
    with pytest.raises(ValueError, match="the buckets hold 5 tensors, and the model has 6"):
        GradientSums(made()[1], [2, 3], lambda: SumAggregator(SingleGroup()), SumAggregator(SingleGroup()), InThread())


def test_what_fails_beside_is_raised_in_the_midst_of_the_backward_pass():
    network, parameters = made()
    failed = threading.Event()

    class Fails(SumAggregator):
        def total(self) -> list[Tensor]:
            failed.set()
            raise ConnectionError("gone")

    def wait(_: Tensor) -> None:
        assert failed.wait(10)

    parameters[4].register_post_accumulate_grad_hook(wait)  # of fc: conv's are still to come
    sums = GradientSums(parameters, SIZES, lambda: Fails(SingleGroup()), SumAggregator(SingleGroup()), InThread())
    parameters[5].register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(ConnectionError, match="gone"):
        for _ in range(100):  # the thread may not have said so yet
            failed.set()
            with sums.as_they_come(0, torch.ones(1)):
                loss_of(network, 0, 0).backward()
            sums.total()


BACKENDS = ("gloo", "plan:ring", "shm", "hybrid")
BLOCKS = 5


def sum_both_ways(rank: int, n: int, store, backend: str, numerics: str, wire: str) -> list[bool]:
    """Two steps over 5 blocks, as they come and afterwards, with an operation of the group before them."""
    group = make(backend, rank, n, PrefixStore(backend + numerics, store), "group")
    network, parameters = made()
    shares = [range(3), range(3, BLOCKS)]
    config = {"numerics": numerics, "gradient_sum": wire, "wire_dtype": "fp16"}
    beside, after = (
        gradient_sums(config, parameters, sizes, None, group, shares, device)
        for sizes, device in ((SIZES, "cpu"), (SIZES, "cpu:0"))  # any other name: afterwards
    )
    assert (beside.when == InThread.when, after.when) == (True, Afterwards.when)
    same = []
    for step in range(2):
        for sums in (beside, after):
            sums.first(group.barrier)
            for block in shares[rank]:
                outcome = torch.tensor([block + 0.125, 70_000.0])
                if sums is beside and block == shares[rank][-1]:
                    with sums.as_they_come(block, outcome):
                        loss_of(network, block, step).backward()
                else:
                    loss_of(network, block, step).backward()
                    sums.add(block, taken(parameters), outcome)
        (ours, outcome), (theirs, _) = beside.total(), after.total()
        assert outcome.tolist() == [10.625, 350_000.0]
        assert beside.busy_s > 0 and beside.comm_s >= 0
        assert all(g.stride() == p.stride() and g.dtype == p.dtype for g, p in zip(ours, parameters, strict=True))
        same.append(all(map(torch.equal, ours, theirs)))
        if numerics == "fast" and backend == "shm":
            same.append(all(map(torch.equal, ours, by_hand(network, parameters, shares, step, wire))))
    group.close()
    return same


def by_hand(network: Network, parameters: list[nn.Parameter], shares: list[range], step: int, wire: str) -> list:
    each = []
    for share in shares:
        total = None
        for block in share:
            loss_of(network, block, step).backward()
            contribution = taken(parameters)
            total = contribution if total is None else [a + b for a, b in zip(total, contribution, strict=True)]
        each.append([t.half() if wire == "wire" else t for t in total])
    return [(a + b).float() for a, b in zip(*each, strict=True)]


def sum_on_all(rank: int, n: int, store) -> dict:
    kinds = [("exact", "fp32"), ("fast", "fp32"), ("fast", "wire")]
    return {
        (backend, *kind): sum_both_ways(rank, n, PrefixStore("/".join(kind), store), backend, *kind)
        for backend in BACKENDS
        for kind in kinds
    }


def test_sums_beside_the_backward_pass_have_the_bits_of_those_after_it():
    """On every backend, in exact and in fast numerics and with 16 bits on the wire."""
    for results in run_ranks(2, sum_on_all):
        assert {key: all(same) for key, same in results.items()} == dict.fromkeys(results, True)


def in_16_bits(rank: int, world_size: int, store, folder) -> SimpleNamespace:
    found = {}
    for backend, kind in (("shm", "fp32"), ("shm", "wire"), ("gloo", "wire")):
        (where := folder / f"{backend} {kind} {rank}").mkdir()
        words = [
            "numerics=fast",
            f"gradient_sum={kind}",
            "wire_dtype=fp16",
            "max_steps=1",
            "loss_scale=1024",
            "chip.bucket_ends=[7, 30]",
        ]
        context = WorkerContext(rank=rank, world_size=world_size, store=PrefixStore(where.name[:-2], store))
        worker = Worker(tiny(f"backend={backend}", *words), context)
        found["contract", kind] = contract(worker)
        worker.train(where)
        found[backend, kind] = torch.cat([p.detach().flatten().double() for p in worker.model.parameters()]).numpy()
    return found


def test_training_with_16_bits_between_workers(tmp_path):
    one, other = run_ranks(2, in_16_bits, tmp_path)
    assert (one["shm", "wire"] == other["shm", "wire"]).all()  # all workers take the same step
    assert (one["shm", "wire"] == one["gloo", "wire"]).all()  # and of two numbers there is one rounded sum
    apart = abs(one["shm", "wire"] - one["shm", "fp32"]).max() / abs(one["shm", "fp32"]).max()
    assert 1e-7 < apart < 1e-3
    told = one["contract", "wire"]
    assert told["wire_dtype"] == "fp16 between workers, to which their sums are rounded, and on the emulated wire"
    assert told["buckets"].startswith("7, 24, 34 tensors, backward order; summed in a thread beside the backward")


def test_16_bits_between_workers_have_the_loss_scaled():
    fp32 = choose_precision("fp32", "cpu")
    dtypes = {kind: gradient_dtypes({"gradient_sum": kind, "wire_dtype": "fp16"}, fp32) for kind in ("fp32", "wire")}
    assert choose_loss_scale("auto", *dtypes["wire"]).dynamic and choose_loss_scale("auto", *dtypes["fp32"]).off


def test_16_bits_between_workers_are_not_exact(tmp_path):
    with pytest.raises(ValueError, match="gradient_sum=wire: numerics=exact .* refuses compression; use numerics=fast"):
        run_worker(tiny("gradient_sum=wire"), WorkerContext(), tmp_path)
