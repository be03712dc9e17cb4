"""LARS, layer-wise adaptive rate scaling, with MLPerf's formula.

You et al. 2017 (arXiv 1708.03888); MLPerf training rules for ResNet (epsilon 0, batch norm and biases not scaled):

    trust = coefficient * |w| / (|g| + decay * |w| + epsilon)      1 where either norm is zero
    lr_inside:    v = momentum * v + lr * trust * (g + decay * w)    w = w - v
    lr_outside:   v = momentum * v + trust * (g + decay * w)         w = w - lr * v

lr_inside is the paper's form and that of MLPerf's reference (TensorFlow's LARSOptimizer), lr_outside that of MindSpore
(nn.LARS around nn.Momentum) and timm. At a constant rate they are the same; while it changes, lr_outside lets the new
rate act on the old velocity as well.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from train.optim.parameters import Momentum, split_by_decay


class LARS(Momentum):
    """Matrices take scaled steps, vectors plain momentum steps without decay."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        momentum: float = 0.9,
        weight_decay: float = 5e-5,
        coefficient: float = 0.001,
        epsilon: float = 0.0,
        momentum_form: Literal["lr_inside", "lr_outside"] = "lr_inside",
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"optim.momentum={momentum}: momentum lies in [0, 1)")
        for name, value in (("weight_decay", weight_decay), ("coefficient", coefficient), ("epsilon", epsilon)):
            if value < 0:
                raise ValueError(f"optim.{name}={value}: must not be negative")
        if momentum_form not in ("lr_inside", "lr_outside"):
            raise ValueError(f"optim.momentum_form={momentum_form}: use lr_inside or lr_outside")
        self._lr_inside = momentum_form == "lr_inside"
        matrices, vectors = split_by_decay(parameters)
        common = {"lr": 0.0, "momentum": momentum, "coefficient": coefficient, "epsilon": epsilon}
        groups = [
            {"params": matrices, "weight_decay": weight_decay, "scaled": True} | common,
            {"params": vectors, "weight_decay": 0.0, "scaled": False} | common,
        ]
        super().__init__(groups)

    @torch.no_grad()
    def step(self) -> None:
        for group, parameters in self._with_gradients():
            gradients = [p.grad for p in parameters]
            inside, outside = (group["lr"], 1.0) if self._lr_inside else (1.0, group["lr"])
            rates = [inside] * len(parameters)
            if group["scaled"]:
                rates = [inside * t for t in self._trust(parameters, gradients, group)]
            if group["weight_decay"]:
                gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            velocities = [self._velocities[p] for p in parameters]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, torch._foreach_mul(gradients, rates))
            torch._foreach_sub_(parameters, velocities, alpha=outside)

    @staticmethod
    def _trust(parameters: list[nn.Parameter], gradients: list[Tensor], group: dict) -> list[Tensor]:
        trusts = []
        for w, g in zip(torch._foreach_norm(parameters), torch._foreach_norm(gradients), strict=True):
            denominator = g + group["weight_decay"] * w + group["epsilon"]
            usable = (w > 0) & (g > 0)
            trusts.append(torch.where(usable, group["coefficient"] * w / denominator, torch.ones_like(w)))
        return trusts
