"""SGD with momentum, as torch computes it: v = m v + g + d w, w = w - lr v; batch norm and biases do not decay."""

from collections.abc import Iterable

import torch
from torch import nn

from train.optim.parameters import Momentum, split_by_decay


class SGD(Momentum):
    """torch's fused step with the recipe's parameter groups; the trainer sets their learning rate before each step.

    Gradients must have their parameters' memory layout, as autograd makes them: the fused step ignores strides.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 5e-5,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"optim.momentum={momentum}: momentum lies in [0, 1)")
        if weight_decay < 0:
            raise ValueError(f"optim.weight_decay={weight_decay}: must not be negative")
        if nesterov and momentum == 0:
            raise ValueError("optim.nesterov=true: needs optim.momentum above 0; set it, or nesterov to false")
        matrices, vectors = split_by_decay(parameters)
        common = {"lr": 0.0, "momentum": momentum, "nesterov": nesterov}
        groups = [
            {"params": matrices, "weight_decay": weight_decay} | common,
            {"params": vectors, "weight_decay": 0.0} | common,
        ]
        super().__init__(groups, velocities=momentum > 0)

    @torch.no_grad()
    def step(self) -> None:
        for group, parameters in self._with_gradients():
            settings = {name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
            torch._fused_sgd_(
                parameters,
                [p.grad for p in parameters],
                [self._velocities[p] for p in parameters] if self._velocities else [],
                **settings,
                dampening=0.0,
                maximize=False,
                is_first_step=False,  # velocities begin as zeros
            )
