"""Batch normalisation per emulated chip: every chip normalises its own images and keeps its own running statistics.

Ioffe and Szegedy 2015 (arXiv 1502.03167), its gradient as in section 3; statistics per accelerator as in Goyal et al.
2017 (arXiv 1706.02677, section 3). Two forms compute the same:

- loop: torch's own kernel, group after group, written into one result: no concatenation, no autograd node per group;
- rows: a pass [groups * images, C, H, W] with channels last is [groups, M, C] without a copy, where M = images * H * W;
  tensor operations over as many groups at once as stay in the cache, in buffers of float32 (or float64).

Both leave autograd's bookkeeping for every small operation aside (`inference_mode` around what fills existing tensors),
which is an eighth of the loop's time on small groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

LOOP_VALUES_CPU = 1 << 14
LOOP_VALUES_CUDA = 1 << 20
CHUNK_VALUES_CPU = 1 << 16
CHUNK_VALUES_CUDA = 1 << 24

Moments = tuple[Tensor, Tensor, Tensor]
"""A form's result: output, mean and 1 / sqrt(variance + eps) [groups, C]; or gradients of images, weight and bias."""


def loop_forward(images: Tensor, weight: Tensor, bias: Tensor, eps: float, sizes: tuple[int, ...]) -> Moments:
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
) -> Moments:
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


def rows_forward(images: Tensor, weight: Tensor, bias: Tensor, eps: float, sizes: tuple[int, ...]) -> Moments:
    """Normalise groups of equal size, many at once; the images have channels last."""
    x, groups = _rows(images, len(sizes)), _groups_at_once(images, len(sizes))
    output = torch.empty_like(images)
    mean = weight.new_empty(len(x), 1, len(weight))
    rstd = torch.empty_like(mean)
    buffers = weight.new_empty(2, groups, *x.shape[1:])
    share = _share(x, groups, weight)
    parts = (x.split(groups), _rows(output, len(x)).split(groups), mean.split(groups), rstd.split(groups))
    with torch.inference_mode():
        for part, out, m, r in zip(*parts, strict=True):
            values, work = buffers[:, : len(part)]
            _mean(share, values.copy_(part), out=m)
            _mean(share, torch.mul(values.sub_(m), values, out=work), out=r)
            r.add_(eps).rsqrt_()
            out.copy_(torch.addcmul(bias, values, r * weight, out=work))
    return output, mean.squeeze(1), rstd.squeeze(1)


def rows_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float, sizes: tuple[int, ...]
) -> Moments:
    """Gradients of `rows_forward`: of the images, the weight and the bias.

    With n the normalised images, it is weight * rstd * (g - mean(g) - n * mean(g * n)).
    """
    x, groups = _rows(images, len(sizes)), _groups_at_once(images, len(sizes))
    result = torch.empty_like(images)
    mean, rstd = mean.unsqueeze(1), rstd.unsqueeze(1)
    of_weight, of_bias, scale = torch.empty_like(mean), torch.empty_like(mean), rstd * weight
    buffers = weight.new_empty(3, groups, *x.shape[1:])
    share = _share(x, groups, weight)
    whole = (x, _rows(gradient, len(x)), _rows(result, len(x)), mean, rstd, of_weight, of_bias, scale)
    with torch.inference_mode():
        for part, g, out, m, r, mean_gn, mean_g, s in zip(*(tensor.split(groups) for tensor in whole), strict=True):
            values, grads, work = buffers[:, : len(part)]
            torch.sub(values.copy_(part), m, out=values)
            _mean(share, grads.copy_(g), out=mean_g)
            _mean(share, torch.mul(values, grads, out=work), out=mean_gn)
            mean_gn.mul_(r)
            torch.addcmul((s * mean_g).neg_(), values, (s * mean_gn).mul_(r).neg_(), out=work)
            out.copy_(work.addcmul_(grads, s))
    return result, of_weight.sum((0, 1)).mul_(x.shape[1]), of_bias.sum((0, 1)).mul_(x.shape[1])


def _rows(images: Tensor, groups: int) -> Tensor:
    """[groups * n, C, H, W] with channels last -> [groups, n * H * W, C] without a copy."""
    return images.permute(0, 2, 3, 1).view(groups, -1, images.shape[1])


def _share(x: Tensor, groups: int, like: Tensor) -> Tensor:
    return like.new_full((groups, 1, x.shape[1]), 1 / x.shape[1])


def _mean(share: Tensor, values: Tensor, out: Tensor) -> None:
    """Mean over the rows of [groups, M, C] into [groups, 1, C]; `out=` is never autocast."""
    if values.device.type == "cpu":
        # a product with a constant row takes half to a third of the time of torch.mean
        torch.bmm(share[: len(values)], values, out=out)
    else:
        # where a product may be rounded to TF32
        torch.mean(values, 1, keepdim=True, out=out)


def _groups_at_once(images: Tensor, groups: int) -> int:
    on_cpu = images.device.type == "cpu"
    values = CHUNK_VALUES_CPU * torch.get_num_threads() if on_cpu else CHUNK_VALUES_CUDA
    return min(groups, max(1, values * groups // images.numel()))


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
        gradient = gradient.contiguous(memory_format=_memory_format(images))
        gradients = ctx.form.backward(gradient, images, weight, mean, rstd, ctx.eps, ctx.sizes)
        return *gradients, None, None, None


@dataclass(frozen=True)
class Form:
    """One way to compute a pass's batch norms: its forward and backward function."""

    forward: Callable[..., Moments]
    backward: Callable[..., Moments]


LOOP = Form(loop_forward, loop_backward)
ROWS = Form(rows_forward, rows_backward)


def fastest_form(images: Tensor, sizes: tuple[int, ...]) -> Form:
    """`ROWS` for small groups, `LOOP` for large ones, for groups of different sizes and without channels last.

    A group is small with fewer than LOOP_VALUES values (images * C * H * W), on a CPU for each thread. One thread,
    bfloat16, 256 groups of 2 images, forward and backward, milliseconds (one plain batch norm; torch's loop and
    concatenation; loop; rows): 512 channels of 1 pixel 0.5, 9.8, 7.7, 3.0; 256 of 2 x 2 1.0, 9.9, 7.9, 4.2; 64 of 8 x 8
    3.2, 13, 11, 10; 512 of 4 x 4 8.4, 20, 18, 24; 256 of 8 x 8 24, 35, 24, 42 (scripts/bench_chip_norm.py). torch's
    group norm with a group for each channel is no alternative: below 1,024 values of a channel it takes 60 times as
    long as one plain batch norm. The limits for more threads and CUDA are estimates.
    """
    values = images.numel() // len(sizes)
    limit = LOOP_VALUES_CPU * torch.get_num_threads() if images.device.type == "cpu" else LOOP_VALUES_CUDA
    rows = values < limit and len(set(sizes)) == 1 and images.is_contiguous(memory_format=torch.channels_last)
    return ROWS if rows else LOOP


def normalise(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, sizes: tuple[int, ...], form: Form | None = None
) -> Moments:
    """Batch norm of consecutive groups of `sizes` images, each with its own statistics; differentiable once.

    images [sum(sizes), C, H, W] of any floating type, weight and bias [C] in float32 or float64 -> output like the
    images; each group's mean and biased variance [groups, C] like the weight. The form is the fastest unless given.
    Raises ValueError if a group has only one value for each channel.
    """
    if min(sizes) * images.shape[2] * images.shape[3] < 2:
        raise ValueError(
            f"chip_batch_size={min(sizes)}: batch norm needs more than one value for each channel, and this layer's "
            f"images are {images.shape[2]} x {images.shape[3]}; use at least 2 images a chip, or bn_span=2"
        )
    images = images.contiguous(memory_format=_memory_format(images))
    output, mean, rstd = _Normalise.apply(images, weight, bias, eps, sizes, form or fastest_form(images, sizes))
    return output, mean, rstd.pow(-2).sub_(eps).clamp_(min=0)


def _memory_format(images: Tensor) -> torch.memory_format:
    """The format the images have, or channels first."""
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@dataclass
class ChipPass:
    """Which of a worker's chips the images of a forward pass belong to; one object shared by all layers of a model.

    The images of a pass lie chip after chip: `sizes[i]` images of its i-th chip, or the same number for each (None).
    `first` counts from the worker's first chip; `span` consecutive chips share one set of statistics.
    """

    first: int = 0
    count: int = 1
    span: int = 1
    sizes: tuple[int, ...] | None = None

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

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return functional.batch_norm(images, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        groups, sizes = self.chip_pass.groups(), self.chip_pass.group_sizes(len(images))
        output, mean, var = normalise(images, self.weight, self.bias, self.eps, sizes)
        self._update(slice(groups.start, groups.stop), mean, var, images, sizes)
        return output

    @torch.no_grad()
    def _update(self, groups: slice, mean: Tensor, var: Tensor, images: Tensor, sizes: tuple[int, ...]) -> None:
        values = [size * images.shape[2] * images.shape[3] for size in sizes]
        unbiased = [count / (count - 1) for count in values]
        factor = unbiased[0] if len(set(sizes)) == 1 else var.new_tensor(unbiased).unsqueeze(1)
        self.chip_mean[groups].lerp_(mean, self.momentum)
        self.chip_var[groups].lerp_(var.mul_(factor), self.momentum)


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


def chip_moments(model: nn.Module) -> list[Tensor]:
    """The chips' running means and variances, layer after layer: tensors of [groups, channels] (not copies)."""
    return [moment for norm in norm_layers(model) for moment in (norm.chip_mean, norm.chip_var)]


def evaluation_moments(model: nn.Module) -> list[Tensor]:
    """The statistics that evaluation uses, in the order of `chip_moments`: tensors of [channels] (not copies)."""
    return [moment for norm in norm_layers(model) for moment in (norm.running_mean, norm.running_var)]
