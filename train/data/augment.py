"""What becomes of a batch of decoded images where it is computed with: on a GPU if there is one, else on the CPU.

The same torch operations everywhere, each rounded by itself (copies, one product, one difference): the same bits
everywhere. The random choices come along as tensors, made on the CPU from (seed, epoch, sample).
"""

import torch
from torch import Tensor
from torch.nn import functional

CACHED = 2**17  # values in float32 that stay in the cache of a CPU's core from one operation to the next


def crop_and_flip(pixels: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
    """Images uint8 [n, size, size, 3] over black, cut at (top, left) of size // 8 pixels of padding, some mirrored.

    top, left: int64 [n] from 0 to 2 * (size // 8); mirror: bool [n].
    """
    count, size = pixels.shape[:2]
    pad, columns = size // 8, torch.arange(size, device=pixels.device)
    width = size + 2 * pad
    padded = functional.pad(pixels, (0, 0, pad, pad, pad, pad)).view(count * width * width, 3)
    rows = (torch.arange(count, device=pixels.device) * width + top)[:, None] + columns
    columns = left[:, None] + torch.where(mirror[:, None], size - 1 - columns, columns)
    # whole pixels by one flat index: several times as fast on a CPU as an index for each axis
    places = rows[:, :, None] * width + columns[:, None, :]
    return padded.index_select(0, places.view(-1)).view(count, size, size, 3)


def mirrored(pixels: Tensor, which: Tensor) -> Tensor:
    """Images [n, height, width, 3], those where `which` (bool [n]) says so with left and right exchanged."""
    if pixels.device.type == "cpu":  # there, asking is cheaper than copying; a GPU would have to be waited for
        if not which.any():
            return pixels
        if which.all():
            return pixels.flip(2)
    return torch.where(which[:, None, None, None], pixels.flip(2), pixels)


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], mirror: Tensor | None = None) -> Tensor:
    """(pixels / 255 - mean) / std of uint8 [n, height, width, 3]: float32 [n, 3, height, width], channels last.

    mirror: bool [n], images to be mirrored.
    """
    count, height, width, _ = pixels.shape
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=pixels.device).repeat(width)
    offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=pixels.device).repeat(width)
    # whole rows of interleaved channels: the innermost loop is long
    images = torch.empty(count, height, width * 3, device=pixels.device)
    at_once = max(1, CACHED // (height * width * 3)) if pixels.device.type == "cpu" else count
    for first in range(0, count, max(1, at_once)):
        part = slice(first, first + at_once)
        some = pixels[part] if mirror is None else mirrored(pixels[part], mirror[part])
        images[part].copy_(some.reshape(len(some), height, -1)).mul_(scale).sub_(offset)
    return images.view(count, height, width, 3).permute(0, 3, 1, 2)
