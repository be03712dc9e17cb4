"""Averaged weights: e = d e + (1 - d) w after every step, from the initial weights on, without correction of the start.

torchvision's reference ExponentialMovingAverage, and torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn,
whose first update (which copies) is that of the initial weights here. Every chip's running statistics are averaged
alike, each where it is held: the mean over chips of averages is the average of the means.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.models.chip_norm import chip_moments, evaluation_moments


class AveragedWeights:
    """The moving average of a model's weights and of its chips' statistics; a second copy of both."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay` a step, in (0, 1); ValueError otherwise."""
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay}: must be above 0 and below 1")
        self._model, self._decay = model, decay
        self._weights = [p.detach().clone() for p in model.parameters()]
        self.chip_moments = [moment.clone() for moment in chip_moments(model)]
        """In the order of `chip_norm.chip_moments`: tensors of [groups, channels]."""
        self.evaluation_moments = [moment.clone() for moment in evaluation_moments(model)]
        """What evaluation of the averaged weights uses; set from outside, as the model's own."""

    def follow_chips(self) -> None:
        """Begin anew with the model's chips, whose number may have changed."""
        self.chip_moments = [moment.clone() for moment in chip_moments(self._model)]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights and the chips' statistics as they stand after a step."""
        averages = [*self._weights, *self.chip_moments]
        torch._foreach_lerp_(averages, [*self._model.parameters(), *chip_moments(self._model)], 1 - self._decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model computes with the averages inside, with its own weights again afterwards (to the bit)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        own = [*self._model.parameters(), *evaluation_moments(self._model)]
        for tensor, average in zip(own, [*self._weights, *self.evaluation_moments], strict=True):
            kept = tensor.clone()
            tensor.copy_(average)  # values, not storage: whoever holds a view or a cast of a weight sees the change
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and their evaluation statistics under the model's names: they load into the model."""
        with self.in_use():
            return {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with self.in_use():
            self._model.load_state_dict(state)
