"""What can't be trained is refused before anything is written: one line with the key, the value and the remedy."""

import pytest
import torch
from training_samples import tiny

from train.build import Worker, WorkerContext, chip_batch_size, moments_of, plan_passes, run_worker
from train.sim import workload

REFUSED = [
    (["chip_batch_size=2", "global_batch_size=64"], "global_batch_size=64 is not chip_batch_size=2 x 24 chips: set"),
    (["chip_batch_size=null", "global_batch_size=40"], "global_batch_size=40 does not divide among 24 chips; take a"),
    (["chip_batch_size=1"], "chip_batch_size=1 with data.image_size=8 leaves .* one value per channel; raise chip"),
    (["bn_span=3"], "bn_span=3: must divide the 8 chips of a block"),
    (["bn_span=16"], "bn_span=16: must divide the 8 chips of a block"),
    (["chips_per_pass=4"], "chips_per_pass=4: numerics=exact computes one block of 8 chips a pass; leave it at auto"),
    (["numerics=fast", "bn_span=2", "chips_per_pass=3"], "chips_per_pass=3: must be a multiple of bn_span=2"),
    (["chip_batch_size=100"], "global_batch_size=2400 .* larger than the data set .1437 images.: lower"),
    (["model.num_classes=5"], "model.num_classes=5: the data has 10 classes; leave it at null"),
    (["model.depth=18", "model.num_classes=1"], "model.num_classes=1: "),
    (["data.image_size=0"], "data.image_size=0"),
    (["optim.momentum=1.5"], "optim.momentum=1.5: momentum lies in"),
    (["schedule.warmup_epochs=90"], "schedule.warmup_epochs=90: .* below the run's epochs=30"),
    (["precision=fp16"], "precision=fp16: training knows fp32, bf16 and auto"),
]


@pytest.mark.parametrize("overrides, named", REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_what_cannot_be_trained_is_refused_in_one_line(overrides, named, tmp_path):
    with pytest.raises(ValueError, match=named) as refused:
        run_worker(tiny(*overrides), WorkerContext(), tmp_path)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "context, overrides, named",
    [
        (WorkerContext(world_size=4), [], "workers=4 is more than the 3 hosts"),
        (WorkerContext(world_size=2), ["backend=single"], "backend=single carries one worker, not 2; use backend=auto"),
        (WorkerContext(), ["backend=nccl"], "backend=nccl"),
    ],
)
def test_workers_and_backends_that_do_not_fit_are_refused(context, overrides, named):
    with pytest.raises(ValueError, match=named):
        Worker(tiny(*overrides), context)


@pytest.mark.parametrize("backend", ["auto", "single", "gloo"])
def test_every_backend_of_processors_carries_one_worker(backend):
    worker = Worker(tiny(f"backend={backend}"), WorkerContext())
    assert (worker.group.rank, worker.group.world_size) == (0, 1)
    worker.group.close()


def test_a_batch_is_given_by_chip_or_in_all():
    sizes = [(2, None), (None, 48), (2, 48)]
    assert [chip_batch_size({"chip_batch_size": c, "global_batch_size": g}, 24) for c, g in sizes] == [2, 2, 2]


def test_a_span_needs_fewer_images_on_each_chip():
    worker = Worker(tiny("chip_batch_size=1", "bn_span=4"), WorkerContext())
    assert worker.model.bn1.chip_mean.shape == (6, 64)


def passes(blocks: range, **config) -> list[tuple[int, int]]:
    config = {"numerics": "exact", "chips_per_pass": "auto", "bn_span": 1} | config
    table = workload.resnet(18, "small", 8, 10)
    return [(chips.first, chips.count) for chips in plan_passes(config, table, 8, blocks, chip_batch=2)]


def test_exact_passes_are_blocks():
    assert passes(range(2, 5)) == passes(range(2, 5), chips_per_pass=8) == [(16, 8), (24, 8), (32, 8)]


def test_fast_passes_cover_the_chips_once():
    assert passes(range(2, 5), numerics="fast", chips_per_pass=16) == [(16, 16), (32, 8)]
    assert passes(range(2, 5), numerics="fast", chips_per_pass=5) == [(16, 5), (21, 5), (26, 5), (31, 5), (36, 4)]
    assert passes(range(2, 5), numerics="fast") == [(16, 24)]
    automatic = passes(range(0, 1024), numerics="fast")
    ends = [first + count for first, count in automatic]
    assert [first for first, _ in automatic] == [0, *ends[:-1]] and ends[-1] == 8192 and len(ends) > 1
    assert all(count % 8 == 0 for _, count in automatic)


def test_a_worker_restores_the_statistics_of_its_own_chips():
    table = torch.arange(20.0).view(20, 1)
    chips = plan_passes({"numerics": "exact", "chips_per_pass": "auto", "bn_span": 2}, None, 8, range(1, 3), 2)
    assert moments_of(table, chips, 2).flatten().tolist() == list(range(4, 12))


def test_the_contract_and_the_facts_are_those_of_the_configuration():
    worker = Worker(tiny("bn_span=2"), WorkerContext())
    contract, facts = worker.contract(), worker.describe()
    assert {type(value) for value in contract.values()} <= {str, int}  # no type of torch, or the driver would import it
    assert (contract["numerics"], contract["block_chips"], contract["threads"]) == ("exact", 8, 1)
    assert (contract["chips_per_pass"], contract["bn_span_chips"], contract["precision"]) == (8, 2, "fp32")
    numbers = {"chips": 24, "global_batch_size": 48, "steps_per_epoch": 29, "total_steps": 4}
    assert facts | numbers | {"num_train": 1437, "num_eval": 360} == facts
    assert facts["model"]["parameters"] == sum(p.numel() for p in worker.model.parameters())
