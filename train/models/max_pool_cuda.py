"""Max pooling on a GPU, of images with channels last: which value of a window was taken is kept in a byte.

torch's kernel keeps it in eight bytes, four times as many as the value itself, and scatters gradients. Here each pixel
gathers the gradients of the windows that took it, always in the same order. Ties go to a window's first value, and a
NaN is the largest value, as with torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE, WIDEST = 2048, 64
"""Values of a program, and channels of a tile at most."""


@triton.jit
def _pool(
    x, y, taken, pixels, channels, height, width, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x [n, height, width, channels] -> y and taken [n, out_height, out_width, channels]; pixels: of y."""
    pixel, column = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (pixel < pixels)[:, None] & (column < channels)[None, :]
    left, row, image = pixel % out_width, pixel // out_width % out_height, pixel // (out_width * out_height)
    largest = tl.full([BP, BC], float("-inf"), tl.float32)
    place = tl.zeros([BP, BC], tl.int8)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            at_row, at_column = row * STRIDE - PADDING + i, left * STRIDE - PADDING + j
            exists = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            at = ((image.to(tl.int64) * height + at_row) * width + at_column) * channels
            mask = inside & exists[:, None]
            value = tl.load(x + at[:, None] + column[None, :], mask, other=float("-inf")).to(tl.float32)
            better = (value > largest) | (value != value)
            largest = tl.where(better, value, largest)
            place = tl.where(better, i * KERNEL + j, place).to(tl.int8)
    at = (pixel.to(tl.int64) * channels)[:, None] + column[None, :]
    tl.store(y + at, largest.to(y.dtype.element_ty), inside)
    tl.store(taken + at, place, inside)


@triton.jit
def _gradient(
    gradient, taken, of_x, pixels, channels, height, width, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """of_x [n, height, width, channels]: the sum over the windows that took a pixel; pixels: of x."""
    pixel, column = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (pixel < pixels)[:, None] & (column < channels)[None, :]
    left, row, image = pixel % width, pixel // width % height, pixel // (width * height)
    total = tl.zeros([BP, BC], tl.float32)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            from_top, from_left = row + PADDING - i, left + PADDING - j
            window_row, window = from_top // STRIDE, from_left // STRIDE
            exists = (from_top >= 0) & (from_top % STRIDE == 0) & (window_row < out_height)
            exists = exists & (from_left >= 0) & (from_left % STRIDE == 0) & (window < out_width)
            at = ((image.to(tl.int64) * out_height + window_row) * out_width + window) * channels
            mask = inside & exists[:, None]
            place = tl.load(taken + at[:, None] + column[None, :], mask, other=-1)
            value = tl.load(gradient + at[:, None] + column[None, :], mask, other=0.0).to(tl.float32)
            total += tl.where(place == i * KERNEL + j, value, 0.0)
    at = (pixel.to(tl.int64) * channels)[:, None] + column[None, :]
    tl.store(of_x + at, total.to(of_x.dtype.element_ty), inside)


def _launch(kernel, images: Tensor, out: Tensor, *tensors: Tensor, window: tuple[int, int, int], over: Tensor) -> None:
    """`over`: the images of whose pixels each gets a place in a program."""
    number, channels, height, width = over.shape
    pixels, columns = number * height * width, min(triton.next_power_of_2(channels), WIDEST)
    size, stride, padding = window
    grid = triton.cdiv(pixels, TILE // columns), triton.cdiv(channels, columns)
    kernel[grid](
        *tensors, pixels, channels, *images.shape[2:], *out.shape[2:],
        KERNEL=size, STRIDE=stride, PADDING=padding, BP=TILE // columns, BC=columns,
    )  # fmt: skip


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, size: int, stride: int, padding: int) -> Tensor:
        height, width = ((length + 2 * padding - size) // stride + 1 for length in images.shape[2:])
        output = _empty((*images.shape[:2], height, width), images)
        taken = torch.empty_like(output, dtype=torch.int8)
        ctx.window, ctx.shape = (size, stride, padding), images.shape
        _launch(_pool, images, output, images, output, taken, window=ctx.window, over=output)
        ctx.save_for_backward(taken)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (taken,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_images = _empty(ctx.shape, gradient)
        _launch(_gradient, of_images, gradient, gradient, taken, of_images, window=ctx.window, over=of_images)
        return of_images, None, None, None


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def max_pool(images: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """`torch.nn.functional.max_pool2d` of images [n, channels, height, width] with channels last; size at most 11."""
    return _MaxPool.apply(images.contiguous(memory_format=torch.channels_last), size, stride, padding)
