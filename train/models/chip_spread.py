"""How far the chips' own batch-norm statistics lie from those that evaluation uses: the spread over all chips.

A chip sees few images a step, so that its running mean and variance of a channel wander about the mesh's. Two distances
of each chip (of each group that shares statistics), the mean over all batch norms: of its means, in the standard
deviations that evaluation uses (root mean square over channels); of its variances, as a share of the mesh's (norm of
the difference over the norm).
"""

import torch
from torch import Tensor, nn

from train.models.chip_norm import norm_layers

DISTANCES = ("bn_mean_shift", "bn_var_off")


@torch.no_grad()
def apart(model: nn.Module) -> Tensor:
    """[groups held, 2]: the two distances of each, float32, on the CPU."""
    shifts, offs = [], []
    for norm in norm_layers(model):
        shift = (norm.chip_mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        shifts.append(shift.square().mean(1).sqrt())
        offs.append((norm.chip_var - norm.running_var).norm(dim=1) / (norm.running_var.norm() + norm.eps))
    return torch.stack([torch.stack(shifts).mean(0), torch.stack(offs).mean(0)], dim=1).cpu()


def spread(distances: Tensor, lost: set[int] = frozenset()) -> dict[str, float]:
    """Tag -> minimum, median and maximum over the rows of [groups, 2] but the lost ones."""
    distances = distances[[row for row in range(len(distances)) if row not in lost]]
    found = {}
    for name, column in zip(DISTANCES, distances.unbind(1), strict=True):
        low, median, high = column.quantile(column.new_tensor([0.0, 0.5, 1.0])).tolist()
        found |= {f"chips/{name}_min": low, f"chips/{name}_median": median, f"chips/{name}_max": high}
    return found
