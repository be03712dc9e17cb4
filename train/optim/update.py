"""From the mean gradients of a step to new weights: overflow, clipping, the optimizer, averaging."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from train.optim.averaging import AveragedWeights
from train.precision import LossScale, Precision


class Optimizer(Protocol):
    """torch's optimizers, and train.optim's; each group of parameters is a dictionary with its learning rate `lr`."""

    param_groups: list[dict]

    def step(self) -> None: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


class WeightUpdate:
    """What happens to the weights in a step; every worker does the same with the same gradients."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        loss_scale: LossScale,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
    ) -> None:
        """`clip_norm`: the largest norm of the whole gradient. `ema_decay`: average weights, see AveragedWeights."""
        self.optimizer, self.precision, self.loss_scale, self.clip_norm = optimizer, precision, loss_scale, clip_norm
        self.averages = None if ema_decay is None else AveragedWeights(model, ema_decay)
        self._parameters = list(model.parameters())

    def apply(
        self, gradients: list[Tensor], loss: float, learning_rate: float, step: int, norm: Tensor | None = None
    ) -> float:
        """Make step number `step` with the mean gradients (overwritten); returns their norm before clipping.

        `norm`: `norm_of` the gradients, from whoever had a GPU begin with it before waiting for the loss.

        A step that overflowed under a loss scale is skipped: weights, optimizer and averages stay; its images are used
        up, and the running statistics have seen them, as on a real machine. DivergedError where that can't help.
        """
        norm = norm_of(gradients) if norm is None else norm
        grad_norm = norm.item()
        overflowed = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if overflowed and not self._may_skip(loss):
            what, skip = f"loss is {loss}", ""
            if math.isfinite(loss):
                what, skip = f"gradient's norm is {grad_norm}", ", or have such steps skipped by loss_scale=dynamic"
            raise DivergedError(
                f"the {what} at step {step} (learning rate {learning_rate:.4g}); "
                f"lower schedule.base_lr or lengthen schedule.warmup_epochs{skip}"
            )
        self.loss_scale.update(overflowed)
        if failure := self.loss_scale.failure(step):
            raise DivergedError(failure)
        if not overflowed:
            if self.clip_norm is not None:
                clip(gradients, norm, self.clip_norm)
            self._step(gradients, learning_rate)
        return grad_norm

    def _may_skip(self, loss: float) -> bool:
        """A loss that is no number is no matter of scale, except in float16, whose forward pass overflows as well."""
        return not self.loss_scale.off and (math.isfinite(loss) or self.precision.dtype == torch.float16)

    def _step(self, gradients: list[Tensor], learning_rate: float) -> None:
        for p, gradient in zip(self._parameters, gradients, strict=True):
            p.grad = gradient
        for settings in self.optimizer.param_groups:
            settings["lr"] = learning_rate
        self.optimizer.step()
        for p in self._parameters:
            p.grad = None
        if self.averages:
            self.averages.update()

    def follow_chips(self) -> None:
        """After the model's room for chips' statistics has changed; they are set from outside afterwards."""
        if self.averages:
            self.averages.follow_chips()

    def state_dict(self) -> dict:
        """What a checkpoint holds beside the model (its own weights, not the averages) and the optimizer."""
        averages = self.averages.state_dict() if self.averages else None
        return {"loss_scale": self.loss_scale.state_dict(), "averages": averages}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict` that has averages if this run does; further entries are left alone."""
        self.loss_scale.load_state_dict(state["loss_scale"])
        if self.averages:
            self.averages.load_state_dict(state["averages"])


def norm_of(gradients: list[Tensor]) -> Tensor:
    """That of the whole gradient."""
    return torch.stack(torch._foreach_norm(gradients)).norm()


def clip(gradients: list[Tensor], norm: Tensor, largest: float) -> None:
    """Scale gradients of the norm `norm` to `largest` where that is less, as torch.nn.utils.clip_grad_norm_."""
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
