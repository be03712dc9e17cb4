"""The parameter groups that large-batch recipes tell apart: matrices decay, batch norm and biases do not.

MLPerf's ResNet reference leaves batch norm and bias out of both weight decay and LARS scaling; You et al. 2017
(arXiv 1708.03888).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def split_by_decay(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(convolution kernels and matrices, vectors): the first decay and are scaled by LARS, the second are not."""
    parameters = list(parameters)
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]


class Momentum:
    """What optimizers with a velocity for each parameter share: groups, state, and whose turn it is in a step.

    Not a `torch.optim.Optimizer`, whose first use imports torch's compiler: half of what importing torch itself takes.
    """

    def __init__(self, param_groups: list[dict], velocities: bool = True) -> None:
        """`param_groups`: each with its `params`; `velocities`: whether there are any."""
        self.param_groups = param_groups
        parameters = [p for group in param_groups for p in group["params"]] if velocities else []
        self._velocities: dict[nn.Parameter, Tensor] = {p: torch.zeros_like(p) for p in parameters}

    def state_dict(self) -> dict:
        """The velocities in the parameters' order; the settings are the configuration's."""
        return {"velocities": list(self._velocities.values())}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for velocity, saved in zip(self._velocities.values(), state["velocities"], strict=True):
            velocity.copy_(saved)

    def _with_gradients(self) -> Iterator[tuple[dict, list[nn.Parameter]]]:
        """Each group and those of its parameters that have a gradient, if any."""
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                yield group, parameters
