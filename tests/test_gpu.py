"""What a GPU computes is what the CPU computes, and a recorded pass is the eager one."""

import pytest
import torch
from training_samples import tiny

from train.build import WorkerContext, run_worker
from train.comm.torch_group import TorchGroup
from train.compute import Compute
from train.data.loader import Prefetcher
from train.data.order import Order
from train.data.synthetic import Synthetic
from train.metrics import read_rows
from train.models.chip_norm import ChipPass, allocate_chips, chip_moments
from train.models.resnet import resnet
from train.precision import choose_precision, use_arithmetic

pytestmark = pytest.mark.gpu
CHIPS, IMAGES = 4, 8


def run(path, *overrides: str, device: str = "cuda") -> dict:
    """A run's result and the losses of its steps."""
    path.mkdir()
    outcome = run_worker(tiny(*overrides), WorkerContext(device=device), path)
    losses = [row["values"]["train/loss"] for row in read_rows(path) if row["kind"] == "step"]
    return outcome | {"losses": losses}


def test_a_run_in_float32_is_the_cpus(tmp_path):
    on_gpu, on_cpu = run(tmp_path / "gpu"), run(tmp_path / "cpu", device="cpu")
    assert on_gpu["status"] == on_cpu["status"] == "done"
    assert on_gpu["losses"] == pytest.approx(on_cpu["losses"], rel=1e-4)


def test_exact_gives_the_same_bits_twice_and_another_seed_others(tmp_path):
    hashes = [run(tmp_path / str(i), f"seed={seed}")["weights_sha256"] for i, seed in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_fast_in_bfloat16_learns_as_exact_does(tmp_path):
    exact = run(tmp_path / "exact")
    fast = run(tmp_path / "fast", "numerics=fast", "precision=bf16")
    assert fast["losses"] == pytest.approx(exact["losses"], rel=0.05)


def passes(records: bool) -> list[torch.Tensor]:
    """Gradients, statistics, losses and correct answers of three passes, the last with the first's chips again."""
    torch.manual_seed(0)
    precision = choose_precision("bf16", "cuda:0")
    use_arithmetic("cuda:0", precision, exact=True)
    model = resnet(18, num_classes=10, zero_init_last_gamma=False).to("cuda", memory_format=torch.channels_last)
    allocate_chips(model, 2 * CHIPS, 1)
    compute = Compute(model, 0.1, precision, "cuda:0")
    compute.records = records
    found = []
    for number, first in enumerate((0, CHIPS, 0)):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(CHIPS * IMAGES, 3, 64, 64, generator=generator)
        labels = torch.randint(10, (len(images),), generator=generator)
        images = images.cuda().contiguous(memory_format=torch.channels_last)
        with precision.autocast("cuda:0"):
            loss, correct = compute.forward(ChipPass(first, CHIPS), images, labels.cuda(), 8.0, [])
            compute.backward(loss)
        found += [loss.detach(), correct]
        found += [parameter.grad for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = None
    return found + [moment.clone() for moment in chip_moments(model)]


def test_a_recorded_pass_is_the_eager_one_to_the_bit():
    for recorded, eager in zip(passes(True), passes(False), strict=True):
        assert torch.equal(recorded, eager)


def test_a_pass_computes_the_same_bits_again():
    for one, other in zip(passes(False), passes(False), strict=True):
        assert torch.equal(one, other)


def test_batches_arrive_as_the_cpu_makes_them():
    source = Synthetic(32, num_classes=10, num_train=64, num_eval=1)
    order = Order(64, 4, 4, seed=0)
    batches = [(0, order.indices(0, step, 0, 4).reshape(-1)) for step in range(4)]
    with Prefetcher(source.train, batches, seed=0, device="cuda:0") as there:
        with Prefetcher(source.train, batches, seed=0) as here:
            for (images, labels), (expected, own) in zip(there, here, strict=True):
                assert images.is_cuda and torch.equal(images.cpu(), expected) and torch.equal(labels.cpu(), own)


def test_nccl_with_one_rank(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    group = TorchGroup(0, 1, store, "cuda:0", backend="nccl")
    values = torch.arange(1000.0, device="cuda")
    group.all_reduce(values)
    assert torch.equal(values.cpu(), torch.arange(1000.0)) and len(group.all_gather(values)) == 1
    group.close()
