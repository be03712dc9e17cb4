"""Convolutions, computed as one matrix product where a CPU does that faster, and in blocks of pixels where a GPU does.

oneDNN's convolutions rearrange the weights at every call, which costs more than the products where an image has few
pixels, and are slow at strides and at gradients of weights. With channels last, a 1x1 convolution *is* a matrix product
over every stride-th pixel, and a 3x3 one is a product over gathered taps (im2col; Chellapilla et al. 2006). Measured on
one core, 32 images in bfloat16, forward and backward, milliseconds as convolution and as product: 1024 -> 2048 channels
1x1, stride 2 on 14 pixels 83 and 30; 512 -> 1024 on 28 pixels 48 and 30; 256 -> 128 on 56 pixels 45 and 36; 3x3, 512
channels, stride 2 on 14 pixels 79 and 46; on 7 pixels 46 and 37; 64 images, on 4 pixels 66 and 24, on 1 pixel 33 and
1.4. In float32 products are 0 to 30 % faster.

A GPU's tensor cores take input channels in eights, and an image has three. The 2 x 2 pixels that a stride of 2 steps
over are twelve channels of one pixel ("space to depth", the SpaceToDepthConv of Google's MLPerf submissions): a 7x7
kernel of stride 2 becomes a 4x4 one of stride 1.
"""

from itertools import product

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from train.models.layout import channels_last, is_pixels_first

CHANNELS_PER_PIXEL = 10
"""A 3x3 product gathers 9 taps a pixel and spares the weights' rearranging, which grows with the channels: it is faster
with this many input channels for each pixel of the result (512 of 7 x 7, 256 of 4 x 4, not 128 of 4 x 4)."""
MAX_PIXELS_SCATTERED = 16
"""Up to here the 3x3 product's gradient of the images is a product too, whose taps are added up; then a convolution."""

CHANNELS_OF_BLOCKS = 16
"""Of 2 x 2 pixels of an image, with zeros up to a multiple of eight."""

Order = tuple[int, int, int, int]
"""The dims of [n, channels, height, width] as they lie in memory."""
CHANNELS_LAST, PIXELS_FIRST = (0, 2, 3, 1), (2, 3, 0, 1)
Size = tuple[int, int]
Taps = list[tuple[int, int]]
"""(row, column) in the kernel."""


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` of an odd kernel with "same" padding and no bias; weight and result are those of `nn.Conv2d`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        if self._is_product(images):
            dtype = computed_in(images)
            return _Product.apply(images.to(dtype), self.weight.to(dtype), self.stride[0])
        if self._is_in_blocks(images):
            return convolve_in_blocks(images, self.weight, computed_in(images))
        return super().forward(channels_last(images))

    def _is_in_blocks(self, images: Tensor) -> bool:
        """In float32 the channels that are added for the tensor cores' sake cost more than they save."""
        few = self.stride[0] == 2 and self.in_channels * 4 <= CHANNELS_OF_BLOCKS and self.kernel_size[0] % 4 == 3
        even = images.shape[2] % 2 == images.shape[3] % 2 == 0 and not images.requires_grad
        return few and even and images.is_cuda and computed_in(images).itemsize == 2

    def _is_product(self, images: Tensor) -> bool:
        kernel = self.kernel_size[0]
        if images.device.type != "cpu" or kernel > 3:
            return False
        height, width = _result_size(images, self.stride[0])
        return kernel == 1 or CHANNELS_PER_PIXEL * height * width <= self.in_channels


def computed_in(images: Tensor) -> torch.dtype:
    """The dtype of a convolution of them, as autocast chooses it."""
    kind = images.device.type
    autocast = torch.is_autocast_enabled(kind) and images.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else images.dtype


def convolve_in_blocks(images: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution of stride 2 and "same" padding, of few channels, with channels last; the images get no gradient.

    images [n, inputs, height, width] of even sizes, weight [outputs, inputs, k, k] with k = 4 i + 3 -> [n, outputs,
    height / 2, width / 2] in `dtype`.
    """
    number, inputs, height, width = images.shape
    before = weight.shape[2] // 4 + 1  # blocks above the first whole one that a kernel sees; below the last, one less
    size = height // 2 + 2 * before - 1, width // 2 + 2 * before - 1
    blocks = images.new_zeros(number, *size, CHANNELS_OF_BLOCKS, dtype=dtype)
    whole = blocks[:, before : before + height // 2, before : before + width // 2, : 4 * inputs]
    pixels = images.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [n, inputs, rows, 2, columns, 2]
    whole.unflatten(3, (inputs, 2, 2)).copy_(pixels.permute(0, 2, 4, 1, 3, 5))
    kernel = functional.pixel_unshuffle(functional.pad(weight, (1, 0, 1, 0)), 2)
    kernel = functional.pad(kernel, (0, 0, 0, 0, 0, CHANNELS_OF_BLOCKS - 4 * inputs))
    kernel = kernel.to(dtype, memory_format=torch.channels_last)
    return functional.conv2d(blocks.permute(0, 3, 1, 2), kernel)


class _Product(torch.autograd.Function):
    """images [n, inputs, height, width] and weight [outputs, inputs, k, k] of one dtype -> [n, outputs, ...].

    The result is stored as the images are, pixels first or with channels last.
    """

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, stride: int) -> Tensor:
        taps, size = _useful_taps(images, weight), _result_size(images, stride)
        order = PIXELS_FIRST if is_pixels_first(images) else CHANNELS_LAST
        rows = _gather(images, order, taps, weight.shape[2] // 2, stride, size)
        ctx.save_for_backward(images, rows, weight)
        ctx.taps, ctx.stride, ctx.order = taps, stride, order
        return _images(rows @ _matrix(weight, taps).t(), order, len(images), size)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        images, rows, weight = ctx.saved_tensors
        # flattened first: of four dims, torch may make a batch of products
        outputs = gradient.permute(ctx.order).reshape(-1, len(weight))
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = _gradient_of_images(gradient, outputs, images, weight, ctx.order, ctx.taps, ctx.stride)
        if ctx.needs_input_grad[1]:
            of_weight = _kernel(outputs.t() @ rows, weight, ctx.taps)
        return of_images, of_weight, None


def _gradient_of_images(
    gradient: Tensor, outputs: Tensor, images: Tensor, weight: Tensor, order: Order, taps: Taps, stride: int
) -> Tensor:
    """`outputs` is `gradient` as a matrix [pixels, outputs]."""
    number, inputs, height, width = images.shape
    if len(taps) > 1 and order is CHANNELS_LAST and height * width > MAX_PIXELS_SCATTERED:
        steps, ones = [stride] * 2, [1, 1]
        rest = (steps, ones, ones, False, [0, 0], 1, [True, False, False])
        return torch.ops.aten.convolution_backward(gradient, images, weight, None, *rest)[0]
    under_taps = outputs @ _matrix(weight, taps)
    size = (gradient.shape[2], gradient.shape[3])
    if len(taps) == 1 and stride == 1:
        return _images(under_taps, order, number, size)
    margin = weight.shape[2] // 2
    high, wide = height + 2 * margin, width + 2 * margin
    padded = _images(under_taps.new_zeros(number * high * wide, inputs), order, number, (high, wide))
    parts = _images(under_taps, order, number, size).split(inputs, dim=1)
    for tap, part in zip(taps, parts, strict=True):
        _under(padded, tap, stride, size).add_(part)
    return padded[:, :, margin : margin + height, margin : margin + width]


def _result_size(images: Tensor, stride: int) -> Size:
    return (images.shape[2] - 1) // stride + 1, (images.shape[3] - 1) // stride + 1


def _useful_taps(images: Tensor, weight: Tensor) -> Taps:
    """Those of the kernel that see more than padding: on one pixel only the centre; the others' gradient is zero."""
    kernel = weight.shape[2]
    rows, columns = (range(kernel // 2, kernel // 2 + 1) if size == 1 else range(kernel) for size in images.shape[2:])
    return list(product(rows, columns))


def _under(images: Tensor, tap: tuple[int, int], stride: int, size: Size) -> Tensor:
    """The view of padded images that a tap sees."""
    rows, columns = (slice(start, start + (n - 1) * stride + 1, stride) for start, n in zip(tap, size, strict=True))
    return images[:, :, rows, columns]


def _gather(images: Tensor, order: Order, taps: Taps, margin: int, stride: int, size: Size) -> Tensor:
    """[pixels of the result, taps * inputs]; no copy for a 1x1 kernel of stride 1."""
    if margin:  # a pad of nothing is a copy
        dims = [(margin, margin) if dim > 1 else (0, 0) for dim in reversed(order)]
        images = functional.pad(images.permute(order), [each for dim in dims for each in dim])
        images = images.permute([order.index(dim) for dim in range(4)])
    parts = [_under(images, tap, stride, size).permute(order) for tap in taps]
    gathered = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
    return gathered.reshape(-1, len(taps) * images.shape[1])


def _matrix(weight: Tensor, taps: Taps) -> Tensor:
    """[outputs, inputs, k, k] -> [outputs, taps * inputs]; no copy for all taps and channels last."""
    if len(taps) == weight.shape[2] * weight.shape[3]:
        return weight.permute(0, 2, 3, 1).flatten(1)
    return torch.cat([weight[:, :, row, column] for row, column in taps], dim=1)


def _kernel(matrix: Tensor, weight: Tensor, taps: Taps) -> Tensor:
    """The inverse of `_matrix`, in the shape and strides of `weight`; taps that are left out are zero."""
    outputs, inputs, kernel, _ = weight.shape
    if len(taps) == kernel * kernel:
        return matrix.view(outputs, kernel, kernel, inputs).permute(0, 3, 1, 2)
    result = torch.zeros_like(weight)
    for (row, column), part in zip(taps, matrix.split(inputs, dim=1), strict=True):
        result[:, :, row, column] = part
    return result


def _images(rows: Tensor, order: Order, number: int, size: Size) -> Tensor:
    """[pixels, channels] -> [number, channels, height, width], stored in `order`."""
    lengths = {0: number, 1: rows.shape[1], 2: size[0], 3: size[1]}
    return rows.view([lengths[dim] for dim in order]).permute([order.index(dim) for dim in range(4)])
