"""Batch normalisation per emulated chip: every chip normalises its own images and keeps its own running statistics.

Ioffe and Szegedy 2015 (arXiv 1502.03167), its gradient as in section 3; statistics per accelerator as in Goyal et al.
2017 (arXiv 1706.02677, section 3). Three forms compute the same:

- loop: torch's own kernel, group after group, written into one result: no concatenation, no autograd node per group;
- beside: one call of that kernel for all groups, which lie beside the channels (see train/models/layout);
- fused: on a GPU, kernels for all groups that take ReLU and the residual sum along (see train/models/chip_norm_cuda).

The loop leaves autograd's bookkeeping for every small operation aside (`inference_mode` around what fills existing
tensors), which is an eighth of its time on small groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from train.models.layout import chip_after_chip, interleaved, memory_format, pixels_first

MAX_PIXELS_INTERLEAVED = 64 * 64
"""Images up to this size are interleaved in a pass of several chips; in larger ones too few convolutions are products.

ResNet-50, bfloat16, one thread, time of one plain batch norm over that of chips, with the loop and with chips beside
channels: 32 pixels, 256 chips of 2 images 0.65 and 0.93, of 8 0.93 and 1.10; 128 pixels, 16 of 4 0.96 and 0.94;
224 pixels, 16 of 2 0.96 and 0.87, 4 of 8 0.99 and 0.93 (scripts/bench_chip_norm.py has single layers too). torch's
group norm with a group for each channel is no alternative: below 1,024 values of a channel it takes 60 times as long
as one plain batch norm. The kernels of a GPU need no interleaving.
"""

Three = tuple[Tensor, Tensor, Tensor]
"""A form's result: output, mean and 1 / sqrt(variance + eps) [groups, C]; or gradients of images, weight and bias."""
Moments = list[tuple["ChipBatchNorm2d", Tensor, Tensor]]
"""Layers with their groups' means and unbiased variances [groups, C]."""


def loop_forward(images: Tensor, weight: Tensor, bias: Tensor, eps: float, sizes: tuple[int, ...]) -> Three:
    """Normalise each group's `sizes` images [sum(sizes), C, H, W] by torch's kernel."""
    output = torch.empty_like(images)
    mean = weight.new_empty(len(sizes), len(weight))
    rstd = torch.empty_like(mean)
    with torch.inference_mode():
        for x, *out in zip(images.split(sizes), output.split(sizes), mean.unbind(), rstd.unbind(), strict=True):
            torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps, out=out)
    return output, mean, rstd


def loop_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float, sizes: tuple[int, ...]
) -> Three:
    """Gradients of `loop_forward`: of the images, the weight and the bias."""
    kernel, wanted = torch.ops.aten.native_batch_norm_backward.default, [True] * 3
    if len(sizes) == 1:
        return kernel(gradient, images, weight, None, None, mean[0], rstd[0], True, eps, wanted)
    result = torch.empty_like(images)
    d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    parts = (gradient.split(sizes), images.split(sizes), result.split(sizes), mean.unbind(), rstd.unbind())
    with torch.inference_mode():
        for g, x, out, m, r in zip(*parts, strict=True):
            inputs, of_weight, of_bias = kernel(g, x, weight, None, None, m, r, True, eps, wanted)
            out.copy_(inputs)
            d_weight += of_weight
            d_bias += of_bias
    return result, d_weight, d_bias


def beside_forward(images: Tensor, weight: Tensor, bias: Tensor, eps: float, sizes: tuple[int, ...]) -> Three:
    """Normalise interleaved groups of one size, stored pixel after pixel, as one batch norm of groups x C channels."""
    groups = len(sizes)
    parameters = weight.repeat(groups), bias.repeat(groups)
    result, mean, rstd = torch.native_batch_norm(_beside(images, groups), *parameters, None, None, True, 0.0, eps)
    return _apart(result, images), mean.view(groups, -1), rstd.view(groups, -1)


def beside_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float, sizes: tuple[int, ...]
) -> Three:
    """Gradients of `beside_forward`: of the images, the weight and the bias."""
    groups = len(sizes)
    wide = _beside(gradient, groups), _beside(images, groups), weight.repeat(groups)
    inputs, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward.default(
        *wide, None, None, mean.flatten(), rstd.flatten(), True, eps, [True] * 3
    )
    return _apart(inputs, images), of_weight.view(groups, -1).sum(0), of_bias.view(groups, -1).sum(0)


def _beside(images: Tensor, groups: int) -> Tensor:
    """[n * groups, C, H, W] pixel after pixel -> [1, groups * C, 1, H * W * n] with channels last, without a copy."""
    channels = groups * images.shape[1]
    return images.permute(2, 3, 0, 1).view(1, -1, 1, channels).permute(0, 3, 1, 2)


def _apart(wide: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_beside`."""
    number, channels, height, width = like.shape
    return wide.permute(0, 2, 3, 1).view(height, width, number, channels).permute(2, 3, 0, 1)


class _Normalise(torch.autograd.Function):
    """One form's two functions as one step of the graph; the moments it also returns are no part of the gradient."""

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, bias: Tensor, eps: float, sizes: tuple[int, ...], form: "Form"):
        output, mean, rstd = form.forward(images, weight, bias, eps, sizes)
        ctx.save_for_backward(images, weight, mean, rstd)
        ctx.eps, ctx.sizes, ctx.form = eps, sizes, form
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return output, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        if gradient is None:
            return (None,) * 6
        images, weight, mean, rstd = ctx.saved_tensors
        if ctx.form is BESIDE:
            gradient = pixels_first(gradient)
        else:
            gradient = gradient.contiguous(memory_format=memory_format(images))
        gradients = ctx.form.backward(gradient, images, weight, mean, rstd, ctx.eps, ctx.sizes)
        return *gradients, None, None, None


@dataclass(frozen=True)
class Form:
    """One way to compute a pass's batch norms: its forward and backward function."""

    forward: Callable[..., Three]
    backward: Callable[..., Three]


LOOP = Form(loop_forward, loop_backward)
BESIDE = Form(beside_forward, beside_backward)


def normalise(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, sizes: tuple[int, ...], beside: bool = False
) -> Three:
    """Batch norm of groups of `sizes` images, each with its own statistics; differentiable once.

    images [sum(sizes), C, H, W] of any floating type, group after group, or interleaved groups of one size (beside);
    weight and bias [C] in float32 or float64 -> output like the images; each group's mean and biased variance
    [groups, C] like the weight. Raises ValueError if a group has only one value for each channel.
    """
    check_values(images, sizes)
    images = pixels_first(images) if beside else images.contiguous(memory_format=memory_format(images))
    output, mean, rstd = _Normalise.apply(images, weight, bias, eps, sizes, BESIDE if beside else LOOP)
    return output, mean, rstd.pow(-2).sub_(eps).clamp_(min=0)


def check_values(images: Tensor, sizes: tuple[int, ...]) -> None:
    """ValueError if a group has only one value for each channel."""
    if min(sizes) * images.shape[2] * images.shape[3] < 2:
        raise ValueError(
            f"chip_batch_size={min(sizes)}: batch norm needs more than one value for each channel, and this layer's "
            f"images are {images.shape[2]} x {images.shape[3]}; use at least 2 images a chip, or bn_span=2"
        )


def finished(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """What follows a batch norm in a residual network, as operations of their own."""
    if residual is not None:
        output = output + residual
    return torch.relu(output) if relu else output


def fork(output: Tensor) -> tuple[Tensor, Tensor]:
    """What a residual block begins with, twice: for its branch, and for what goes past it."""
    if not has_kernels(output):
        return output, output
    from train.models import chip_norm_cuda

    return chip_norm_cuda.fork(output)


def fuses(images: Tensor, sizes: tuple[int, ...]) -> bool:
    """Whether the fused form can compute them."""
    if not has_kernels(images):
        return False
    from train.models import chip_norm_cuda

    return images.dtype in chip_norm_cuda.DTYPES and len(set(sizes)) == 1


def has_kernels(images: Tensor) -> bool:
    """Whether they lie where Triton's kernels run."""
    return images.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    """Whether Triton is installed; it comes with torch for CUDA."""
    return find_spec("triton") is not None


@dataclass
class ChipPass:
    """Which of a worker's chips the images of a forward pass belong to; one object shared by all layers of a model.

    The images of a pass lie chip after chip: `sizes[i]` images of its i-th chip, or the same number for each (None).
    `first` counts from the worker's first chip; `span` consecutive chips share one set of statistics. `interleaved` is
    true while the images of the pass's groups are (see `through`).
    """

    first: int = 0
    count: int = 1
    span: int = 1
    sizes: tuple[int, ...] | None = None
    interleaved: bool = False
    moments: Moments | None = None
    """Where the layers put their moments for `update_statistics`; None: at once into their running statistics."""

    def through(self, layers: Callable[[Tensor], Tensor], images: Tensor, training: bool) -> Tensor:
        """`layers(images)`, which in between are interleaved where that is faster; images and result [N, ...]."""
        if not training or not self.interleaves(images):
            return layers(images)
        groups = len(self.groups())
        self.interleaved = True
        try:
            return chip_after_chip(layers(interleaved(images, groups)), groups)
        finally:
            self.interleaved = False

    def interleaves(self, images: Tensor) -> bool:
        """Whether these images go through the network interleaved in training: small ones, of several equal groups."""
        pixels = images.shape[2] * images.shape[3]
        alike = self.sizes is None or len(set(self.group_sizes(len(images)))) == 1
        small = pixels <= MAX_PIXELS_INTERLEAVED and images.device.type == "cpu"
        return len(self.groups()) > 1 and small and alike

    def groups(self) -> range:
        """The batch-norm groups of this pass, numbered from the worker's first chip."""
        return range(self.first // self.span, (self.first + self.count) // self.span)

    def group_sizes(self, num_images: int) -> tuple[int, ...]:
        """Images of each group of the pass. Raises ValueError if they don't add up to `num_images`."""
        if self.sizes is None:
            groups = self.count // self.span
            if num_images % groups:
                raise ValueError(f"a pass of {num_images} images can't be {groups} equal groups; give ChipPass.sizes")
            return (num_images // groups,) * groups
        if len(self.sizes) != self.count or sum(self.sizes) != num_images:
            raise ValueError(f"ChipPass.sizes={self.sizes}: need {self.count} chips with {num_images} images in all")
        return tuple(sum(self.sizes[i : i + self.span]) for i in range(0, self.count, self.span))


class ChipBatchNorm2d(nn.Module):
    """Batch norm over [images of all chips of a pass, channels, height, width], each group of chips by itself.

    `running_mean` and `running_var` [channels] are what evaluation uses and what is saved, under the names torchvision
    gives them; `chip_mean` and `chip_var` [groups, channels] are the chips' own: see `allocate_chips`, `chip_moments`.

    `momentum` is torch's: the share of the new batch, new = (1 - momentum) * old + momentum * batch, with the unbiased
    variance (n - 1). MindSpore's `nn.BatchNorm2d` writes the share that is kept: its default 0.9 is 0.1 here (its
    documentation of the differences from torch's; it announces torch's convention for after version 2.9).
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

    def forward(self, images: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """The images normalised, plus `residual`, rectified if `relu`."""
        parameters = self.weight, self.bias
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return finished(functional.batch_norm(images, mean, var, *parameters, False, 0.0, self.eps), residual, relu)
        sizes = self.chip_pass.group_sizes(len(images))
        if fuses(images, sizes):
            from train.models import chip_norm_cuda

            check_values(images, sizes)
            output, mean, var = chip_norm_cuda.normalise(images, *parameters, self.eps, len(sizes), residual, relu)
        else:
            output, mean, var = normalise(images, *parameters, self.eps, sizes, self.chip_pass.interleaved)
            output = finished(output, residual, relu)
        self._update(mean, var, images, sizes)
        return output

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, images: Tensor, sizes: tuple[int, ...]) -> None:
        values = [size * images.shape[2] * images.shape[3] for size in sizes]
        unbiased = [count / (count - 1) for count in values]
        factor = unbiased[0] if len(set(sizes)) == 1 else var.new_tensor(unbiased).unsqueeze(1)
        moments = [(self, mean, var.mul_(factor))]
        if self.chip_pass.moments is None:
            update_statistics(moments, self.chip_pass.groups())
        else:
            self.chip_pass.moments += moments


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


@torch.no_grad()
def update_statistics(moments: Moments, groups: range) -> None:
    """Put the moments of a pass into the running statistics of its groups, numbered from the worker's first chip."""
    rows = slice(groups.start, groups.stop)
    for norm, mean, var in moments:
        norm.chip_mean[rows].lerp_(mean, norm.momentum)
        norm.chip_var[rows].lerp_(var, norm.momentum)


def chip_moments(model: nn.Module) -> list[Tensor]:
    """The chips' running means and variances, layer after layer: tensors of [groups, channels] (not copies)."""
    return [moment for norm in norm_layers(model) for moment in (norm.chip_mean, norm.chip_var)]


def evaluation_moments(model: nn.Module) -> list[Tensor]:
    """The statistics that evaluation uses, in the order of `chip_moments`: tensors of [channels] (not copies)."""
    return [moment for norm in norm_layers(model) for moment in (norm.running_mean, norm.running_var)]
