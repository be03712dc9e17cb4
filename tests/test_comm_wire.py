"""Sums on the emulated wire: the plan's order and the wire's dtype, bit by bit, and what training makes of them."""

import numpy as np
import pytest
import torch
from emulator_samples import atlas
from training_samples import tiny

from scripts.wire_dtype_study import growth, reach, sums_in_a_row
from train.account import contract
from train.build import Worker, WorkerContext, run_worker
from train.comm import wire
from train.comm.aggregation import SumAggregator
from train.comm.algorithms import halving_doubling, hierarchical, hierarchical_ring, ring
from train.comm.groups import SingleGroup
from train.comm.plan import Plan, Round, Stage, run_on_arrays
from train.comm.wire import PlanAggregator, run_on_tensors, sum_on_plan
from train.models import chip_norm

ALGORITHMS = [ring, halving_doubling, hierarchical, hierarchical_ring]
MESHES = [atlas(1, chips) for chips in (1, 2, 4, 5)] + [atlas(hosts) for hosts in (1, 2, 3, 8)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def named(mesh):
    return f"{mesh.num_hosts}x{mesh.chips_per_host}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mesh", MESHES, ids=named)
@pytest.mark.parametrize("length", [1, 301])
def test_same_bits_as_the_plan_on_arrays(algorithm, mesh, length, monkeypatch):
    monkeypatch.setattr(wire, "BLOCK_ELEMENTS", 3 * mesh.num_chips**2)  # several columns at a time, not all
    vectors = torch.randn(mesh.num_chips, length, generator=torch.manual_seed(0)) * 100
    for dtype in (torch.float16, torch.float32):
        sent = vectors.to(dtype)
        expected = run_on_arrays(algorithm(mesh), sent.numpy())
        summed = sum_on_plan(algorithm(mesh), vectors, dtype)
        assert summed.dtype == dtype and summed.shape == (length,)
        assert summed.numpy().tobytes() == expected[0].tobytes()
        assert torch.equal(sent, vectors.to(dtype)), "the vectors were changed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mesh", [atlas(1), atlas(3), atlas(1, 5)], ids=named)
def test_every_chip_ends_with_the_same_bits(algorithm, mesh, dtype):
    plan = algorithm(mesh)
    chunks = torch.randn(mesh.num_chips, plan.num_chunks, 3, generator=torch.manual_seed(0)).to(dtype)
    expected = sum_on_plan(plan, chunks.view(mesh.num_chips, -1), dtype)
    run_on_tensors(plan, chunks)
    assert (chunks.view(mesh.num_chips, -1) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_small_integers_are_summed_exactly(algorithm, dtype):
    vectors = torch.randint(-1, 2, (64, 500), generator=torch.manual_seed(0))
    assert torch.equal(sum_on_plan(algorithm(atlas(8)), vectors.float(), dtype), vectors.sum(0).to(dtype))


def test_sums_of_16_bits_are_rounded_to_nearest_even():
    """Against their sum in float64, where it is exact, rounded by hand to 11 and 8 binary digits."""
    pairs = torch.randn(2, 20_000, generator=torch.manual_seed(0)) * torch.tensor([[1.0], [40.0]])
    for dtype, digits in ((torch.float16, 11), (torch.bfloat16, 8)):
        sent = pairs.to(dtype)
        exact = sent.double().sum(0).numpy()
        fraction, exponent = np.frexp(exact)
        expected = np.ldexp(np.rint(fraction * 2**digits), exponent - digits)
        normal = np.abs(exact) > 2.0**-14
        summed = sum_on_plan(ring(atlas(1, 2)), sent, dtype).double().numpy()
        assert normal.mean() > 0.99 and (summed[normal] == expected[normal]).all()


def test_a_chain_stagnates_where_a_tree_does_not():
    """2048 + 1 + 1 + 1 in fp16, where numbers above 2048 are two apart and halves go to the even one.

    Ring: chunk k's sum starts on chip k + 1. ((1 + 1) + 1) + 2048 = 2051 -> 2052; ((1 + 1) + 2048) + 1 -> 2052;
    ((1 + 2048) + 1) + 1 -> 2048 three times; ((2048 + 1) + 1) + 1 -> 2048. Tree: (2048 + 1) + (1 + 1) -> 2048 + 2.
    """
    vectors = torch.tensor([2048.0, 1, 1, 1])[:, None].expand(4, 4)
    assert sum_on_plan(ring(atlas(1, 4)), vectors, torch.float16).tolist() == [2052, 2052, 2048, 2048]
    assert sum_on_plan(halving_doubling(atlas(1, 4)), vectors, torch.float16).tolist() == [2050] * 4
    assert sum_on_plan(ring(atlas(1, 4)), vectors, torch.float32).tolist() == [2051] * 4


def test_a_thousand_equal_gradients_stagnate_at_256_in_bf16():
    """256 + 1 = 257 lies halfway to the next number of bf16, 258, and goes back to 256."""
    ones = torch.ones(512, 1)
    assert sum_on_plan(ring(atlas(64)), ones, torch.bfloat16).item() == 256
    assert sum_on_plan(ring(atlas(64)), ones, torch.float16).item() == 512
    assert sum_on_plan(hierarchical(atlas(64)), ones, torch.bfloat16).item() == 512


def test_what_is_beyond_the_range_overflows():
    vectors = torch.full((8, 3), 2.0**13)
    assert sum_on_plan(hierarchical(atlas(1)), vectors, torch.float16).tolist() == [torch.inf] * 3
    assert sum_on_plan(hierarchical(atlas(1)), vectors, torch.bfloat16).tolist() == [2.0**16] * 3


def test_what_arrives_twice_in_a_round_is_added_in_order():
    """A plan from elsewhere: chips 0, 1, 2 send to chip 3 at once."""

    def rounds():
        yield Round(np.array([0, 1, 2]), np.array([3, 3, 3]), np.zeros(3, int), np.ones(3, int), True)
        yield Round(np.array([3]), np.array([0]), np.zeros(1, int), np.ones(1, int), False)

    mesh = atlas(1, 4)
    plan = Plan("gather", mesh, (Stage("gather", tuple(mesh.axes), 1, rounds),))
    vectors = torch.randn(4, 50, generator=torch.manual_seed(0)).half()
    assert torch.equal(sum_on_plan(plan, vectors, torch.float16), ((vectors[3] + vectors[0]) + vectors[1]) + vectors[2])
    assert (
        sum_on_plan(plan, vectors, torch.float16).numpy().tobytes() == run_on_arrays(plan, vectors.numpy())[0].tobytes()
    )


def contribution(chip: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(chip)
    weight = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return [weight, torch.randn(5, generator=generator), torch.tensor([1000.1 + chip, 1.0, 0.0])]


def test_the_aggregator_is_the_plan_for_gradients_and_a_plain_sum_for_the_rest():
    plan = hierarchical(atlas(3))
    aggregator, plain = PlanAggregator(plan, "fp16", 113), SumAggregator(SingleGroup())
    for _ in range(2):  # nothing is left over from a step
        for chip in range(24):
            *gradients, outcome = contribution(chip)
            aggregator.add(chip, gradients)
            plain.add(chip, [outcome])
        weight, bias = aggregator.total()
        rows = torch.stack([torch.cat([part.permute(0, 2, 3, 1).flatten() if part.dim() == 4 else part
                                       for part in contribution(chip)[:2]]) for chip in range(24)])  # fmt: skip
        expected = sum_on_plan(plan, rows, torch.float16).float()
        assert weight.stride() == contribution(0)[0].stride() and weight.dtype == torch.float32
        assert torch.equal(torch.cat([weight.permute(0, 2, 3, 1).flatten(), bias]), expected)
        assert plain.total()[0][0] > 24_000


def test_too_large_a_network_is_refused_before_memory_is_taken():
    with pytest.raises(
        ValueError, match=r"1,024 chips x 25,557,032 x 2 bytes = 48.7 GiB, more than 4; .*smaller model"
    ):
        PlanAggregator(hierarchical(atlas(128)), "fp16", 25_557_032)
    assert PlanAggregator(hierarchical(atlas(8)), "fp16", 25_557_032, "meta")  # 3.05 GiB


PLAN = ["numerics=fast", "gradient_sum=plan"]
REFUSED = [
    ([*PLAN, "numerics=exact"], "gradient_sum=plan: numerics=exact .* refuses compression; use numerics=fast"),
    ([*PLAN, "workers=2"], "workers=2: with gradient_sum=plan one worker adds up all chips; set workers=1"),
    ([*PLAN, "bn_span=2"], "bn_span=2: with gradient_sum=plan every chip is computed by itself; set bn_span=1"),
    ([*PLAN, "chips_per_pass=8"], "chips_per_pass=8: with gradient_sum=plan .* set chips_per_pass=auto"),
    ([*PLAN, "wire_dtype=fp8"], "wire_dtype=fp8: use one of fp32, bf16, fp16"),
]


@pytest.mark.parametrize("overrides, named", REFUSED, ids=[" ".join(overrides[2:]) for overrides, _ in REFUSED])
def test_what_it_cannot_do_is_refused_in_one_line(overrides, named, tmp_path):
    with pytest.raises(ValueError, match=named) as refused:
        run_worker(tiny(*overrides), WorkerContext(), tmp_path)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "MAX_BUFFER_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="the network is too large for it: take fewer chips, a smaller model or"):
        run_worker(tiny(*PLAN), WorkerContext(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_with_it(tmp_path, monkeypatch):
    """One and the same training but for the sums' rounding; the emulated clock does not see them."""
    monkeypatch.setattr(chip_norm, "MAX_PIXELS_INTERLEAVED", 0)  # the plan's passes of one chip never are
    wires = {"fp32": PLAN, "fp16": [*PLAN, "loss_scale=1"], "fast": ["numerics=fast"]}
    weights, results, contracts = {}, {}, {}
    for name, overrides in wires.items():
        dtype = "fp32" if name == "fast" else name
        worker = Worker(tiny(*overrides, f"wire_dtype={dtype}", "max_steps=1"), WorkerContext())
        contracts[name] = contract(worker)
        results[name] = worker.train(tmp_path / name)
        weights[name] = torch.cat([p.detach().flatten().double() for p in worker.model.parameters()])
    apart = {name: ((weights[name] - weights["fast"]).norm() / weights["fast"].norm()).item() for name in wires}
    assert 0 < apart["fp32"] < 1e-8 and 1e-7 < apart["fp16"] < 1e-4
    assert results["fp32"]["emulated_s"] == results["fast"]["emulated_s"] > 0
    assert contracts["fp16"]["chips_per_pass"] == 1
    assert contracts["fp16"]["order"] == "that of auto: hierarchical_ring over 24 chips"
    assert contracts["fp16"]["wire_dtype"].startswith("fp16, to which every chip's gradients")


def test_how_many_sums_an_addend_goes_through():
    assert [sums_in_a_row(ring(atlas(hosts))) for hosts in (1, 2, 8)] == [7, 15, 63]
    assert [sums_in_a_row(halving_doubling(atlas(hosts))) for hosts in (1, 2, 8)] == [3, 4, 6]
    assert [sums_in_a_row(hierarchical(atlas(hosts))) for hosts in (1, 2, 8)] == [7, 8, 10]
    assert sums_in_a_row(halving_doubling(atlas(1, 5))) == 3  # the surplus is folded in before the halving


def test_the_study_measures_errors_within_their_bounds():
    gradients = torch.randn(64, 600, generator=torch.manual_seed(0)) * 1e-3
    for dtype in ("fp32", "bf16", "fp16"):
        rows = {name: growth(gradients, [100, 500], 64, name, dtype) for name in ("ring", "hierarchical")}
        assert all(0 < row["worst_measured"] < row["worst_bound"] for row in rows.values())
        assert all(row["error"] < row["worst_layer"] < row["random_bound"] for row in rows.values())
        assert rows["ring"]["error"] > 1.5 * rows["hierarchical"]["error"]


def test_the_study_counts_what_leaves_the_range():
    """fp16 begins at 2^-24 (half of it goes to 0, as the even neighbour) and ends below 2^16."""
    gradients = torch.tensor([2.0**-25, 2.0**-24, 1.0, 2.0**6]).expand(64, 4)

    def lost_and_overflowed(loss_scale, divide_first):
        row = reach(gradients, 64, loss_scale, divide_first)
        return row["lost"], row["overflowed"]

    assert lost_and_overflowed(1, False) == (1 / 4, 0)
    assert lost_and_overflowed(1, True) == (2 / 4, 0)
    assert lost_and_overflowed(1024, False) == (0, 2 / 4)
    assert lost_and_overflowed(1024, True) == (0, 1 / 4)
