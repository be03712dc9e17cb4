"""Batch norm per chip on a GPU: statistics, ReLU and the residual sum in as few trips through memory as they need.

Batch norm is bound by memory: forward an image is read twice and written once, backward read twice with its gradient
and written once, whatever the number of chips, since with channels last the values of a chip are consecutive rows of
channels. ReLU and the residual sum ride along: their own kernels would read and write everything once more. Backward
the sign that ReLU saw is computed again, or read from the output where a residual went into it. The two gradients that
meet behind a residual sum, from the branch that follows and from past it, are added as they are read (see `fork`).

The kernels are Triton's. Sums are taken in an order that depends on the shape alone, so results are bit-identical from
one call to the next; no atomic operation is used. A group's variance is the mean square of the distance from a sample
of the chip's own values, and never a difference of large squares.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096
"""Values that a program holds at once."""
WIDEST = 128
"""Channels of a tile at most: whole cache lines, and enough rows to be added up in registers."""
WARPS = 4
PROGRAMS = 1024
"""What the rows are split for where chips and channels alone don't make so many; a constant, so that the order of sums
does not depend on the GPU."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    """In float32; an even tile needs no mask, which takes as long as the arithmetic."""
    return (tl.load(pointers) if EVEN else tl.load(pointers, mask, other=0.0)).to(tl.float32)


@triton.jit
def _share(rows, channels, chunk, BC: tl.constexpr):
    """A program's columns and rows of [groups, rows, channels] for sums: column, inside, group, first value, number
    of rows, place in `partial`."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    split, group = tl.program_id(1), tl.program_id(2)
    first = split * chunk
    start = (group.to(tl.int64) * rows + first) * channels + column
    place = ((group * tl.num_programs(1) + split) * 2) * channels + column
    return column, column < channels, group, start, tl.minimum(chunk, rows - first), place


@triton.jit
def _tile(rows, channels, BR: tl.constexpr, BC: tl.constexpr):
    """A program's tile of [groups, rows, channels]: column, inside, group, and its values' places and mask.

    The last tile comes first: it is what the L2 cache still holds of the kernel before, which began with the first.
    """
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BR + tl.arange(0, BR)
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    inside = column < channels
    at = group.to(tl.int64) * rows * channels + (row.to(tl.int64) * channels)[:, None] + column[None, :]
    return column, inside, group, at, (row < rows)[:, None] & inside[None, :]


@triton.jit
def _moments(x, partial, rows, channels, chunk, BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr):
    """x [groups, rows, channels] -> partial [groups, splits, 2, channels]: mean, sum of squared distances from it."""
    column, inside, group, start, number, place = _share(rows, channels, chunk, BC)
    x += start
    sample = tl.load(x, inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BR, BC], tl.float32)
    squares = tl.zeros([BR, BC], tl.float32)
    for begin in range(0, number, BR):
        row = begin + tl.arange(0, BR)
        mask = (row < number)[:, None] & inside[None, :]
        distance = _load(x[None, :] + (row * channels)[:, None], mask, EVEN) - sample[None, :]
        if not EVEN:
            distance = tl.where(mask, distance, 0.0)
        sums += distance
        squares += distance * distance
    total = tl.sum(sums, 0)
    mean = total / number
    tl.store(partial + place, sample + mean, inside)
    tl.store(partial + place + channels, tl.maximum(tl.sum(squares, 0) - total * mean, 0.0), inside)


@triton.jit
def _merged(partial, mean_out, var_out, rstd_out, rows, channels, chunk, splits, eps, BC: tl.constexpr):
    """Means and biased variances of the splits -> those of each group [groups, channels] (Chan et al. 1979)."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    group = tl.program_id(1)
    inside = column < channels
    partial += group * splits * 2 * channels + column
    mean = tl.load(partial, inside, other=0.0)
    squares = tl.load(partial + channels, inside, other=0.0)
    count = tl.minimum(chunk, rows).to(tl.float32)
    for split in range(1, splits):
        partial += 2 * channels
        number = tl.minimum(chunk, rows - split * chunk).to(tl.float32)
        delta = tl.load(partial, inside, other=0.0) - mean
        share = number / (count + number)
        mean += delta * share
        squares += tl.load(partial + channels, inside, other=0.0) + delta * delta * count * share
        count += number
    var = squares / rows
    at = group * channels + column
    tl.store(mean_out + at, mean, inside)
    tl.store(var_out + at, var, inside)
    tl.store(rstd_out + at, 1.0 / tl.sqrt_rn(var + eps), inside)


@triton.jit
def _parameters(mean, rstd, weight, bias, group, column, channels, inside):
    at = group * channels + column
    scale = tl.load(rstd + at, inside, other=0.0) * tl.load(weight + column, inside, other=0.0)
    return tl.load(mean + at, inside, other=0.0)[None, :], scale[None, :], tl.load(bias + column, inside)[None, :]


@triton.jit
def _apply(
    x, residual, y, mean, rstd, weight, bias, rows, channels,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * weight + bias, plus the residual, rectified."""
    column, inside, group, at, mask = _tile(rows, channels, BR, BC)
    m, scale, b = _parameters(mean, rstd, weight, bias, group, column, channels, inside)
    out = (_load(x + at, mask, EVEN) - m) * scale + b
    if RESIDUAL:
        out += _load(residual + at, mask, EVEN)
    if RELU:
        out = tl.where(out < 0, 0.0, out)  # a NaN stays one
    tl.store(y + at, out.to(y.dtype.element_ty), mask)


@triton.jit
def _sums(
    gradient, other, x, y, passed, mean, rstd, weight, bias, partial, rows, channels, chunk,
    OTHER: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """partial [groups, splits, 2, channels]: sums of the gradient behind ReLU, and of it times (x - mean) * rstd.

    The gradient is the sum of two if OTHER. With a residual and ReLU, the gradient that ReLU lets through, which is the
    residual's own, is written to `passed`.
    """
    column, inside, group, start, number, place = _share(rows, channels, chunk, BC)
    m, scale, b = _parameters(mean, rstd, weight, bias, group, column, channels, inside)
    gradient, other, x, y, passed = gradient + start, other + start, x + start, y + start, passed + start
    sums = tl.zeros([BR, BC], tl.float32)
    products = tl.zeros([BR, BC], tl.float32)
    for begin in range(0, number, BR):
        row = begin + tl.arange(0, BR)
        mask = (row < number)[:, None] & inside[None, :]
        at = (row * channels)[:, None]
        g = _load(gradient[None, :] + at, mask, EVEN)
        if OTHER:
            g += _load(other[None, :] + at, mask, EVEN)
        distance = _load(x[None, :] + at, mask, EVEN) - m
        if RELU:
            if RESIDUAL:
                rounded = tl.where(_load(y[None, :] + at, mask, EVEN) > 0, g, 0.0).to(passed.dtype.element_ty)
                tl.store(passed[None, :] + at, rounded, mask)
                g = rounded.to(tl.float32)
            else:
                g = tl.where(distance * scale + b > 0, g, 0.0)
        sums += g
        products += g * distance  # outside, where distance is not 0, g is
    tl.store(partial + place, tl.sum(sums, 0), inside)
    of_weight = tl.sum(products, 0) * tl.load(rstd + group * channels + column, inside)
    tl.store(partial + place + channels, of_weight, inside)


@triton.jit
def _totals(partial, totals, channels, splits, groups, BC: tl.constexpr):
    """The splits added up: totals [2, groups, channels]."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    group = tl.program_id(1)
    inside = column < channels
    partial += group * splits * 2 * channels + column
    sums = tl.zeros([BC], tl.float32)
    products = tl.zeros([BC], tl.float32)
    for _ in range(splits):
        sums += tl.load(partial, inside, other=0.0)
        products += tl.load(partial + channels, inside, other=0.0)
        partial += 2 * channels
    tl.store(totals + group * channels + column, sums, inside)
    tl.store(totals + (groups + group) * channels + column, products, inside)


@triton.jit
def _gradient(
    gradient, x, out, mean, rstd, weight, bias, totals, rows, channels, groups,
    RELU: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out = rstd * weight * (g - mean of g - xhat * mean of g * xhat), xhat = (x - mean) * rstd."""
    column, inside, group, at, mask = _tile(rows, channels, BR, BC)
    m, scale, b = _parameters(mean, rstd, weight, bias, group, column, channels, inside)
    own = group * channels + column
    mean_g = tl.load(totals + own, inside, other=0.0) / rows
    slope = tl.load(totals + groups * channels + own, inside, other=0.0) / rows * tl.load(rstd + own, inside, other=0.0)
    g = _load(gradient + at, mask, EVEN)
    distance = _load(x + at, mask, EVEN) - m
    if RELU:
        g = tl.where(distance * scale + b > 0, g, 0.0)
    result = scale * (g - mean_g[None, :] - distance * slope[None, :])
    tl.store(out + at, result.to(out.dtype.element_ty), mask)


class _Shape:
    """How [groups, rows, channels] are cut into tiles."""

    def __init__(self, images: Tensor, groups: int) -> None:
        number, self.channels, height, width = images.shape
        self.groups, self.rows = groups, number // groups * height * width
        self.columns = min(triton.next_power_of_2(self.channels), WIDEST)
        self.tile_rows = TILE // self.columns
        self.parts = triton.cdiv(self.channels, self.columns)
        tiles = triton.cdiv(self.rows, self.tile_rows)
        splits = min(triton.cdiv(PROGRAMS, groups * self.parts), tiles)
        self.chunk = triton.cdiv(tiles, splits) * self.tile_rows
        self.splits = triton.cdiv(self.rows, self.chunk)
        even = self.rows % self.tile_rows == 0 and self.channels % self.columns == 0
        self.tile = {"BR": self.tile_rows, "BC": self.columns, "EVEN": even, "num_warps": WARPS}

    @property
    def of_sums(self) -> tuple[int, int, int]:
        return self.parts, self.splits, self.groups

    @property
    def of_values(self) -> tuple[int, int, int]:
        return triton.cdiv(self.rows, self.tile_rows), self.parts, self.groups

    @property
    def of_groups(self) -> tuple[int, int]:
        return self.parts, self.groups


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, images: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, groups: int, relu: bool
    ):
        shape = _Shape(images, groups)
        tile = shape.tile
        partial = weight.new_empty(groups, shape.splits, 2, shape.channels)
        mean, var, rstd = (weight.new_empty(groups, shape.channels) for _ in range(3))  # the caller may change var
        _moments[shape.of_sums](images, partial, shape.rows, shape.channels, shape.chunk, **tile)
        _merged[shape.of_groups](
            partial, mean, var, rstd, shape.rows, shape.channels, shape.chunk, shape.splits, eps, BC=shape.columns
        )
        output = torch.empty_like(images)
        _apply[shape.of_values](
            images, images if residual is None else residual, output, mean, rstd, weight, bias,
            shape.rows, shape.channels, RESIDUAL=residual is not None, RELU=relu, **tile,
        )  # fmt: skip
        ctx.groups, ctx.relu, ctx.residual = groups, relu, residual is not None
        ctx.rectified_sum, ctx.other = ctx.relu and ctx.residual, None
        ctx.save_for_backward(images, weight, bias, mean, rstd, output if ctx.rectified_sum else None)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        if gradient is None:
            return (None,) * 7
        images, weight, bias, mean, rstd, output = ctx.saved_tensors
        gradient, other = _as_stored(gradient), ctx.other
        ctx.other = None
        shape = _Shape(images, ctx.groups)
        tile = shape.tile
        moments = mean, rstd, weight, bias
        partial = weight.new_empty(ctx.groups, shape.splits, 2, shape.channels)
        passed = torch.empty_like(gradient) if ctx.rectified_sum else gradient
        _sums[shape.of_sums](
            gradient, gradient if other is None else other, images, images if output is None else output, passed,
            *moments, partial, shape.rows, shape.channels, shape.chunk,
            OTHER=other is not None, RESIDUAL=ctx.residual, RELU=ctx.relu, **tile,
        )  # fmt: skip
        totals = weight.new_empty(2, ctx.groups, shape.channels)
        _totals[shape.of_groups](partial, totals, shape.channels, shape.splits, ctx.groups, BC=shape.columns)
        of_images = torch.empty_like(images)
        _gradient[shape.of_values](
            passed, images, of_images, *moments, totals, shape.rows, shape.channels, ctx.groups,
            RELU=ctx.relu and not ctx.residual, **tile,
        )  # fmt: skip
        of_bias, of_weight = totals.sum(1).unbind()
        return of_images, of_weight, of_bias, passed if ctx.residual else None, None, None, None


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, maker: torch.autograd.graph.Node):
        ctx.maker = maker
        ctx.set_materialize_grads(False)
        return output.view_as(output), output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, into: Tensor | None, past: Tensor | None):
        if into is None or past is None:
            return past if into is None else into, None
        ctx.maker.other = _as_stored(past)
        return into, None


def fork(output: Tensor) -> tuple[Tensor, Tensor]:
    """A rectified residual sum that `normalise` has just made, twice: for the next branch, and for what goes past it.

    Not to be used but through these two. Each has a gradient of its own, which the kernel adds as it reads them, where
    autograd would write their sum to memory and read it again. Any other tensor is returned as it is.
    """
    maker = output.grad_fn
    return _Fork.apply(output, maker) if getattr(maker, "rectified_sum", False) else (output, output)


def _as_stored(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def normalise(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    groups: int,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of `groups` equal groups of images, plus `residual`, rectified; differentiable once.

    images [groups * n, C, H, W] and residual in one of DTYPES, group after group; weight and bias [C] in float32 ->
    output like the images, with channels last; each group's mean and biased variance [groups, C] in float32.
    """
    if residual is not None:
        residual = _as_stored(residual.to(images.dtype))
    return _Normalise.apply(_as_stored(images), weight, bias, residual, eps, groups, relu)
