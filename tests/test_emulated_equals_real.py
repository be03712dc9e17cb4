"""Four emulated chips in one process compute what four real processes of torch's DistributedDataParallel compute.

ResNet-18 without its last stage: four copies of those 8 million parameters only take time, and over the two values per
channel that stage 4 sees of two images of 8 pixels, a batch norm can turn rounding of 1e-16 into 1e-11.
"""

import numpy as np
import torch
from rank_processes import run_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from train.comm.aggregation import TreeAggregator
from train.comm.groups import SingleGroup, TorchGroup
from train.models.chip_norm import ChipBatchNorm2d, allocate_chips, norm_layers
from train.models.resnet import ResNet, resnet

CHIPS, IMAGES = 4, 2


def model() -> ResNet:
    with torch.device("meta"):
        made = resnet(18, "small", 10)
        made.layer4, made.fc = nn.Identity(), nn.Linear(256, 10)
    made = made.double().to_empty(device="cpu").to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        deviation = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.5
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, deviation, generator)
    for name, buffer in made.named_buffers():
        buffer.fill_(name.endswith("running_var"))
    return made


def batch(chip: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(chip)
    images = torch.randn(IMAGES, 3, 8, 8, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 10, (IMAGES,), generator=generator)


def with_torchs_norm(module: nn.Module) -> nn.Module:
    """The same model with nn.BatchNorm2d instead of ours."""
    for name, child in list(module.named_modules()):
        if isinstance(child, ChipBatchNorm2d):
            plain = nn.BatchNorm2d(len(child.weight)).double()
            plain.load_state_dict(child.state_dict())
            module.set_submodule(name, plain)
    return module


def real_step(rank: int, world_size: int, store) -> dict:
    """One chip's step as torch does it; rank 0 sets the emulated gradients beside the real ones."""
    group = TorchGroup(rank, world_size, store, "cpu")
    real = DistributedDataParallel(with_torchs_norm(model()))
    images, labels = batch(rank)
    functional.cross_entropy(real(images), labels, label_smoothing=0.1).backward()
    norms = [module for module in real.modules() if isinstance(module, nn.BatchNorm2d)]
    result = {"moments": [(norm.running_mean.numpy(), norm.running_var.numpy()) for norm in norms]}
    if rank == 0:
        emulated = dict(zip((name for name, _ in model().named_parameters()), emulated_step()[0], strict=True))
        gradients = ((name.removeprefix("module."), p.grad) for name, p in real.named_parameters())
        result["errors"] = {name: ((emulated[name] - g).norm() / g.norm()).item() for name, g in gradients}
    group.barrier()
    group.close()
    return result


def emulated_step() -> tuple[list[Tensor], ResNet]:
    """The summed gradients of all chips, a pass of two chips at a time, and the model with the chips' statistics."""
    emulated = model()
    allocate_chips(emulated, CHIPS, span=1)
    aggregator = TreeAggregator(SingleGroup(), [range(2)])
    for block in range(2):
        chips = range(2 * block, 2 * block + 2)
        emulated.chip_pass.first, emulated.chip_pass.count = chips.start, len(chips)
        images, labels = (torch.cat(parts) for parts in zip(*map(batch, chips), strict=True))
        loss = functional.cross_entropy(emulated(images), labels, reduction="sum", label_smoothing=0.1)
        aggregator.add(block, list(torch.autograd.grad(loss / (CHIPS * IMAGES), list(emulated.parameters()))))
    return aggregator.total(), emulated


def test_gradients_and_statistics_are_those_of_real_data_parallel_processes():
    ranks = run_ranks(CHIPS, real_step)
    assert len(ranks[0]["errors"]) == 47
    assert max(ranks[0]["errors"].values()) < 1e-12, ranks[0]["errors"]
    for layer, norm in enumerate(norm_layers(emulated_step()[1])):
        for chip, rank in enumerate(ranks):
            for ours, theirs in zip((norm.chip_mean[chip], norm.chip_var[chip]), rank["moments"][layer], strict=True):
                np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10, atol=1e-12)
