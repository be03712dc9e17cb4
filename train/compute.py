"""What a pass computes: its chips' losses, correct answers and gradients; on a GPU as one CUDA graph.

A graph is recorded once for each shape of a pass, and the CPU starts it with one call in place of a thousand. It works
on memory of its own: images, labels and loss scale are copied in, gradients and the batch norms' moments copied out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.models.chip_norm import ChipPass, Moments, update_statistics
from train.models.damage import without
from train.precision import Precision

WARM_UPS = 3
"""Eager passes before a recording: kernels are compiled, cuDNN's chosen, and workspaces made."""

Outcome = tuple[Tensor, Tensor]
"""The sum of the chips' mean losses and the number of correct answers."""


@dataclass
class Recorded:
    """A graph and the memory that it works on."""

    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, Tensor, Tensor]
    outcome: Outcome
    gradients: list[Tensor]
    moments: Moments


class Compute:
    """Forward and backward of a worker's passes through its model."""

    def __init__(self, model: nn.Module, label_smoothing: float, precision: Precision, device: str) -> None:
        self._model, self._label_smoothing, self._precision = model, label_smoothing, precision
        self._device, self._parameters = device, list(model.parameters())
        self.records = device.startswith("cuda")
        """Whether a pass may be a graph, whose gradients are there all at once."""
        self._recorded: dict[tuple, Recorded] = {}
        self._replayed: Recorded | None = None
        self._scale = 1.0

    def forward(self, chip_pass: ChipPass, images: Tensor, labels: Tensor, scale: float, lost: list[int]) -> Outcome:
        """`chip_pass` counts from the worker's first chip; `scale` is the loss scale of the backward pass to come.

        `lost`: the chips of the pass, counted from its first, that have no part in it.
        """
        own, self._scale, self._replayed = self._model.chip_pass, scale, None
        own.first, own.count, own.sizes = chip_pass.first, chip_pass.count, chip_pass.sizes
        if not self.records or lost or chip_pass.sizes is not None:
            return self._forward(images, labels, lost)
        key = tuple(images.shape[1:]), len(images), own.count, own.span
        if key not in self._recorded:
            # only graphs of one image size are kept: each holds a pass's activations
            self._recorded = {other: graph for other, graph in self._recorded.items() if other[0] == key[0]}
            self._recorded[key] = self._record(images, labels, scale)
        self._replayed = self._recorded[key]
        return self._replay(self._replayed, images, labels, scale)

    def backward(self, loss: Tensor) -> None:
        """Leave the loss scale times the gradients of the last `forward`'s loss in the parameters."""
        if self._replayed is None:
            (loss * self._scale).backward()
            return
        gradients = torch._foreach_mul(self._replayed.gradients, 1.0)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _forward(self, images: Tensor, labels: Tensor, lost: list[int]) -> Outcome:
        logits, chip_pass = self._model(images).float(), self._model.chip_pass
        if lost:
            logits, labels, chip_pass = without(lost, logits, labels, chip_pass)
        loss = chip_losses(logits, labels, chip_pass, self._label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum().to(loss.dtype)

    def _replay(self, recorded: Recorded, *given: Tensor | float) -> Outcome:
        for own, value in zip(recorded.given, given, strict=True):
            own.copy_(value) if isinstance(value, Tensor) else own.fill_(value)
        recorded.graph.replay()
        update_statistics(recorded.moments, self._model.chip_pass.groups())
        loss, correct = recorded.outcome
        return loss.clone(), correct.clone()

    def _record(self, images: Tensor, labels: Tensor, scale: float) -> Recorded:
        given = images.clone(), labels.clone(), torch.tensor(scale, dtype=torch.float32, device=self._device)
        chip_pass, graph = self._model.chip_pass, torch.cuda.CUDAGraph()
        here, stream = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        stream.wait_stream(here)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    chip_pass.moments = []
                    self._with_own_casts(*given)
                    self._forget_gradients()
            here.wait_stream(stream)
            chip_pass.moments = moments = []
            # the thread that loads data may allocate meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outcome = self._with_own_casts(*given)
        finally:
            chip_pass.moments = None
        gradients = [parameter.grad for parameter in self._parameters]
        self._forget_gradients()
        return Recorded(graph, given, outcome, gradients, moments)

    def _with_own_casts(self, images: Tensor, labels: Tensor, scale: Tensor) -> Outcome:
        """Weights cast within, since autocast's cache of them is memory of which a replay knows nothing."""
        kind, dtype = self._device.split(":")[0], self._precision.dtype
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss, correct = self._forward(images, labels, [])
            (loss * scale).backward()
        return loss.detach(), correct

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


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
