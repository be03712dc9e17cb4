"""Batch normalisation per emulated chip: every chip normalises its own images and keeps its own running statistics.

Ioffe and Szegedy 2015 (arXiv 1502.03167); statistics per accelerator as in Goyal et al. 2017 (arXiv 1706.02677,
section 3).
Running statistics follow torch's convention: new = (1 - momentum) * old + momentum * batch, with the unbiased variance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class ChipPass:
    """Which of a worker's chips the images of a forward pass belong to; one object shared by all layers of a model.

    The images of a pass lie chip after chip, the same number for each. `first` counts from the worker's first chip;
    `span` consecutive chips share one set of statistics.
    """

    first: int = 0
    count: int = 1
    span: int = 1

    def groups(self) -> range:
        """The batch-norm groups of this pass, numbered from the worker's first chip."""
        return range(self.first // self.span, (self.first + self.count) // self.span)


class ChipBatchNorm2d(nn.Module):
    """Batch norm over [chips * images, channels, height, width] with statistics over each group's own images.

    `running_mean` and `running_var` [channels] are what evaluation uses and what is saved, under the names torchvision
    gives them; `chip_mean` and `chip_var` [groups, channels] are the chips' own: see `allocate_chips`, `chip_moments`.
    """

    def __init__(self, num_features: int, chip_pass: ChipPass, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.chip_pass = chip_pass
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("chip_mean", None, persistent=False)
        self.register_buffer("chip_var", None, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return functional.batch_norm(images, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        groups = self.chip_pass.groups()
        if len(groups) == 1:
            return self._normalise(images, groups[0])
        # chunk, not slices: a slice's gradient is a zero-filled tensor of the whole batch, chunk's one concatenation
        return torch.cat([self._normalise(part, g) for part, g in zip(images.chunk(len(groups)), groups, strict=True)])

    def _normalise(self, images: Tensor, group: int) -> Tensor:
        return functional.batch_norm(
            images, self.chip_mean[group], self.chip_var[group], self.weight, self.bias, True, self.momentum, self.eps
        )


def norm_layers(model: nn.Module) -> list[ChipBatchNorm2d]:
    """The model's batch norms in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, ChipBatchNorm2d)]


def allocate_chips(model: nn.Module, num_chips: int, span: int) -> None:
    """Give every batch norm running statistics (0 and 1) for `num_chips` chips, `span` of which share one set."""
    for norm in norm_layers(model):
        norm.chip_pass.span = span
        shape = (num_chips // span, len(norm.running_mean))
        norm.chip_mean = norm.running_mean.new_zeros(shape)
        norm.chip_var = norm.running_var.new_ones(shape)


def chip_moments(model: nn.Module) -> list[Tensor]:
    """The chips' running means and variances, layer after layer: tensors of [groups, channels] (not copies)."""
    return [moment for norm in norm_layers(model) for moment in (norm.chip_mean, norm.chip_var)]


def evaluation_moments(model: nn.Module) -> list[Tensor]:
    """The statistics that evaluation uses, in the order of `chip_moments`: tensors of [channels] (not copies)."""
    return [moment for norm in norm_layers(model) for moment in (norm.running_mean, norm.running_var)]
