"""The loss of data parallelism over chips: each chip's own mean, summed."""

import torch
from torch import Tensor
from torch.nn import functional

from train.models.chip_norm import ChipPass


def chip_losses(logits: Tensor, labels: Tensor, chip_pass: ChipPass, label_smoothing: float) -> Tensor:
    """The sum over a pass's chips of each chip's own mean cross-entropy, a scalar in the dtype of the logits.

    `logits` [images, classes] in float32 or float64 and `labels` [images] lie chip after chip.
    """
    if not chip_pass.count:
        return logits.sum()  # of none: 0, and so are its gradients
    if chip_pass.sizes is None:
        total = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return total / (len(labels) // chip_pass.count)
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    sizes = torch.tensor(chip_pass.sizes, device=losses.device)
    return (losses / sizes.repeat_interleave(sizes)).sum()
