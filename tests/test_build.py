"""What can't be trained is refused before anything is written: one line with the key, the value and the remedy."""

import itertools
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from torch.distributed import PrefixStore
from training_samples import tiny

from train import account
from train.build import Worker, WorkerContext, chip_batch_size, run_worker
from train.checkpoint_files import list_checkpoints
from train.models.chip_norm import chip_moments, evaluation_moments
from train.models.passes import MEMORY_PER_PASS, images_per_pass, moments_of, plan_passes
from train.precision import choose_precision
from train.sim import workload

REFUSED = [
    (["chip_batch_size=2", "global_batch_size=64"], "global_batch_size=64 is not chip_batch_size=2 x 24 chips: set"),
    (["chip_batch_size=null", "global_batch_size=40"], "global_batch_size=40 does not divide among 24 chips; take a"),
    (
        ["chip_batch_size=1", "data.image_size=4"],
        "chip_batch_size=1 with data.image_size=4 leaves .* one value per channel; raise chip",
    ),
    (["bn_span=3"], "bn_span=3: must divide the 8 chips of a host, or be whole .* the 3 of .*: one of 1, 2, 4, 8, 24$"),
    (["bn_span=16"], "bn_span=16: must divide"),  # two hosts, and there are three
    (["bn_span=48"], "bn_span=48: must divide"),
    (["bn_span=24", "chips_per_pass=8"], "chips_per_pass=8: numerics=exact computes one block of 24 chips a pass"),
    (["shares=[1,2]"], r"shares=\[1, 2\] are those of 2 workers, not of workers=1: set workers=2 or workers=auto"),
    (["shares=[2]"], r"shares=\[2\] sum to 2, not to the 3 hosts of mesh Atlas 900; change one of them"),
    (["shares=[3,0]", "workers=2"], r"shares=\[3, 0\]: a worker needs at least 1 host; leave out workers without any"),
    (["shares=[]"], r"shares=\[\]: a worker needs at least 1 host"),
    (
        ["gradient_sum=plan"],
        "gradient_sum=plan: numerics=exact sums .* refuses compression; use numerics=fast, or grad",
    ),
    (["gradient_sum=plan", "numerics=fast", "workers=2"], "workers=2: with gradient_sum=plan one .* set workers=1"),
    (["chips_per_pass=4"], "chips_per_pass=4: numerics=exact computes one block of 8 chips a pass; leave it at auto"),
    (["numerics=fast", "bn_span=2", "chips_per_pass=3"], "chips_per_pass=3: must be a multiple of bn_span=2"),
    (["chip_batch_size=100"], "global_batch_size=2400 .* larger than the data set .1437 images.: lower"),
    (["model.num_classes=5"], "model.num_classes=5: the data has 10 classes; leave it at null"),
    (["model.num_classes=1"], "model.num_classes=1: "),
    (["data.image_size=0"], "data.image_size=0"),
    (["optim.momentum=1.5"], "optim.momentum=1.5: momentum lies in"),
    (["schedule.warmup_epochs=90"], "schedule.warmup_epochs=90: .* below the run's epochs=30"),
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
        (
            WorkerContext(world_size=3),
            ["mesh.axes.host=4", "bn_span=16"],
            r"workers=3 is more than the 2 blocks of mesh Atlas 900 \(bn_span makes blocks of 2 hosts\); a block is "
            "never split: use at most workers=2 or a larger mesh or a smaller bn_span",
        ),
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
    assert worker.model.bn1.chip_mean.shape == (6, 16)


def passes(chips: range, room: int = 0, **config) -> list[tuple[int, int]]:
    config = {"numerics": "exact", "chips_per_pass": "auto", "bn_span": 1} | config
    return [(chips.first, chips.count) for chips in plan_passes(config, 8, chips, room)]


def test_exact_passes_are_blocks():
    expected = [(16, 8), (24, 8), (32, 8)]
    assert (
        passes(range(16, 40)) == passes(range(16, 40), chips_per_pass=8) == passes(range(16, 40), room=24) == expected
    )


def test_fast_passes_cover_the_chips_once_in_whole_spans():
    fast = {"numerics": "fast"}
    assert passes(range(16, 40), **fast, chips_per_pass=16) == [(16, 16), (32, 8)]
    assert passes(range(16, 40), **fast, chips_per_pass=5) == [(16, 5), (21, 5), (26, 5), (31, 5), (36, 4)]
    assert passes(range(16, 40), **fast, chips_per_pass=4, bn_span=2)[:2] == [(16, 4), (20, 4)]
    assert passes(range(16, 40), 1000, **fast) == [(16, 24)]
    for span, room in itertools.product((1, 2, 4, 8), (0, 1, 3, 5, 11, 17, 100)):
        found = passes(range(16, 72), room, **fast, bn_span=span)
        ends = [first + count for first, count in found]
        assert [first for first, _ in found] == [16, *ends[:-1]] and ends[-1] == 72
        assert all(count % span == 0 and count <= max(room, span) for _, count in found)
        assert max(count for _, count in found) - min(count for _, count in found) <= span


@pytest.mark.parametrize("images", [1024, 1100, 2000, 5000, 8192, 100_000])
def test_the_memory_of_a_fast_pass_follows_its_images_whatever_the_chips(images):
    """8 x 1,024, 64 x 128 and 1,024 x 8 images a step."""
    found = [passes(range(chips), images // (8192 // chips), numerics="fast") for chips in (8, 64, 1024)]
    sizes = [{count * 8192 // chips for _, count in found} for chips, found in zip((8, 64, 1024), found, strict=True)]
    assert sizes[0] == sizes[1] == sizes[2] and len(sizes[0]) == 1


def test_chips_that_do_not_divide_make_passes_that_differ_by_a_span():
    assert [count for _, count in passes(range(0, 37), 10, numerics="fast")] == [9, 9, 9, 10]


def test_memory_counts_activations_in_the_dtype_of_the_run():
    table = workload.resnet(50, "imagenet", 224, 1000)
    images = [images_per_pass(table, choose_precision(name, "cpu"), "cpu") for name in ("fp32", "bf16")]
    assert images == [MEMORY_PER_PASS // table.activation_bytes(4), MEMORY_PER_PASS // table.activation_bytes(2)]
    assert images[0] >= 32


def test_a_worker_restores_the_statistics_of_its_own_chips():
    table = torch.arange(20.0).view(20, 1)
    chips = plan_passes({"numerics": "exact", "chips_per_pass": "auto", "bn_span": 2}, 8, range(8, 24), 0)
    assert moments_of(table, chips, 2).flatten().tolist() == list(range(4, 12))


def test_the_contract_and_the_facts_are_those_of_the_configuration():
    worker = Worker(tiny("bn_span=2"), WorkerContext())
    promised, said = account.contract(worker), account.facts(worker)
    assert {type(value) for value in promised.values()} <= {str, int}  # no type of torch, or the driver would import it
    assert (promised["numerics"], promised["block_chips"], promised["threads"]) == ("exact", 8, 1)
    assert (promised["block_reason"], promised["evaluation_statistics"]) == ("one host", "mean over all chips")
    assert (promised["chips_per_pass"], promised["bn_span_chips"], promised["precision"]) == (8, 2, "fp32")
    numbers = {"chips": 24, "global_batch_size": 48, "steps_per_epoch": 29, "total_steps": 4}
    assert said | numbers | {"num_train": 1437, "num_eval": 360} == said
    assert said["model"]["parameters"] == sum(p.numel() for p in worker.model.parameters())


FOUR_HOSTS = ("mesh.axes.host=4", "max_steps=2", "eval_every=30", "data=synthetic", "data.num_eval=8")
SPLITS = {
    "shares": ["shares=[1,3]", "bn_rule=chip_0"],
    "span of two hosts": ["bn_span=16", "shares=[1,1]"],
    "span of two hosts, fast": ["bn_span=16", "numerics=fast", "max_steps=1"],
}


def on_two(rank: int, world_size: int, store, folder: Path) -> dict[str, str]:
    return {name: trained(folder, name, rank, PrefixStore(name, store), "workers=2") for name in SPLITS}


def trained(folder: Path, name: str, rank: int, store, *overrides: str) -> str:
    context = WorkerContext(rank=rank, world_size=1 if store is None else 2, store=store)
    folder = folder / f"{name}, {context.world_size} workers"
    folder.mkdir(exist_ok=True)
    return run_worker(tiny(*FOUR_HOSTS, *SPLITS[name], *overrides), context, folder)["weights_sha256"]


def test_unequal_shares_and_spans_beyond_a_host_train_the_same_bits_as_one_worker(tmp_path):
    first, second = run_ranks(2, on_two, tmp_path)
    assert first == second
    for name in ("shares", "span of two hosts"):
        assert first[name] == trained(tmp_path, name, 0, None, "shares=null"), name
    assert first["span of two hosts, fast"] is not None


def test_a_checkpoint_of_other_arithmetic_is_refused(tmp_path):
    small = ("max_steps=1", "eval_every=30")
    run_worker(tiny(*small), WorkerContext(), tmp_path)
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    for override, named in [
        ("bn_span=24", "block_chips=8, this run 24"),
        ("clip_norm=1", "clip_norm=None, this run 1"),
        ("ema_decay=0.9", "ema_decay=None, this run 0.9"),
        ("loss_scale=8", "loss_scale=auto, this run 8"),
    ]:
        with pytest.raises(ValueError, match=named):
            Worker(tiny(*small, override), WorkerContext()).restore(saved)
    Worker(tiny(*small, "bn_rule=chip_0", "wire_dtype=fp32"), WorkerContext()).restore(saved)


def test_the_rule_chip_0_evaluates_and_saves_with_the_statistics_of_chip_0():
    worker = Worker(tiny("bn_rule=chip_0"), WorkerContext())
    for moment in chip_moments(worker.model):
        moment.copy_(torch.rand_like(moment) + 0.5)
    worker.trainer.average_statistics()
    assert all(map(torch.equal, evaluation_moments(worker.model), (moment[0] for moment in chip_moments(worker.model))))
    assert account.contract(worker)["evaluation_statistics"] == "chip 0's own"
