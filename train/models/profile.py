"""The workload table of a module, by watching one forward pass: what train/sim/workload says by arithmetic alone.

A model built on the meta device computes nothing and takes no memory: `with torch.device("meta"): model = resnet()`.
"""

import math

import torch
from torch import Tensor, nn

from train.models.chip_norm import ChipBatchNorm2d
from train.sim.workload import Layer

KINDS = {nn.Conv2d: "conv", ChipBatchNorm2d: "batch_norm", nn.BatchNorm2d: "batch_norm", nn.Linear: "linear"}


def profile(model: nn.Module, image_size: int) -> list[Layer]:
    """A row for each convolution, batch norm and linear layer, in the model's own order of its modules.

    FLOPs are twice the multiply-adds; the backward pass has as many for the weight, and for the input where needed.
    """
    layers: list[Layer] = []

    def watch(name: str, kind: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def row(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert len(output) == 1, f"{name} saw {len(output)} images"
            taps = 0 if kind == "batch_norm" else module.weight[0].numel()  # multiply-adds for one output element
            flops = 2.0 * taps * output.numel()
            sizes = [math.prod(parameter.shape) for parameter in module.parameters()]
            gradients = 2 if inputs[0].requires_grad else 1
            layers.append(Layer(name, kind, flops, gradients * flops, sum(sizes), len(sizes), output.numel()))

        return module.register_forward_hook(row)

    watched = {name: (kind, module) for name, module in model.named_modules() if (kind := kind_of(module))}
    handles = [watch(name, *seen) for name, seen in watched.items()]
    was_training = model.training
    weight = next(model.parameters())
    try:
        with torch.enable_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return sorted(layers, key=lambda layer: list(watched).index(layer.name))


def kind_of(module: nn.Module) -> str | None:
    """The workload table's word for a layer; None for a module that the table leaves out."""
    return next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)
