"""How a pass's images lie in memory, for batch norms that every chip has for itself.

With channels last, the chips of a pass are images apart. Interleaved (image i of every chip, then image i + 1) and
stored pixel after pixel, [H, W, n, chips, C], the chips lie beside the channels: statistics of every chip are those of
chips x C channels, and a batch norm of all chips is one call on a view. Convolutions that are matrix products take
pixels in any order, and the taps of a 3x3 kernel are then whole slabs of memory; others need their images copied.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def interleaved(images: Tensor, chips: int) -> Tensor:
    """[chips * n, ...], chip after chip -> [n * chips, ...], image after image. The memory format stays."""
    mixed = images.unflatten(0, (chips, -1)).transpose(0, 1).flatten(0, 1)
    return mixed.contiguous(memory_format=memory_format(images))


def chip_after_chip(rows: Tensor, chips: int) -> Tensor:
    """The inverse of `interleaved`, for [n * chips, ...]."""
    return rows.unflatten(0, (-1, chips)).transpose(0, 1).flatten(0, 1)


def pixels_first(images: Tensor) -> Tensor:
    """[N, C, H, W], stored as [H, W, N, C]; the same tensor if it is already."""
    return images.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def is_pixels_first(images: Tensor) -> bool:
    """Whether it is stored so, and not with channels last (images of one pixel are both)."""
    return images.permute(2, 3, 0, 1).is_contiguous() and not images.is_contiguous(memory_format=torch.channels_last)


def channels_last(images: Tensor) -> Tensor:
    """Images that are stored pixels first, with channels last; any others as they are."""
    return _ChannelsLast.apply(images) if is_pixels_first(images) else images


def memory_format(images: Tensor) -> torch.memory_format:
    """Channels last if the images are, else channels first."""
    last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class _ChannelsLast(torch.autograd.Function):
    """The gradient goes back as the images came, so that what made them need not mix two layouts."""

    @staticmethod
    def forward(ctx, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return pixels_first(gradient)
