"""A photo as the planes that a JPEG holds, its brightness and two colours, and their scaling to 4:2:0.

Nothing is turned into red, green and blue and back, nor are colours of half the resolution brought to the pixels'. The
kernel is that of train.data.photos.rescaled: a triangle over all samples that a smaller one covers.
"""

from dataclasses import dataclass

import numpy as np
import torch

CHANNELS = 4  # bytes that torch's vectorised scaling takes for one pixel


@dataclass(frozen=True)
class Planes:
    """`luma` uint8 [rows, 1, pitch] and `colours` uint8 [rows, 2, pitch] of an image of height x width pixels.

    A sample of colour stands for `down` x `across` pixels. Where the last ones end beyond the image, `luma` goes on as
    far; bytes of a row behind that mean nothing.
    """

    luma: np.ndarray
    colours: np.ndarray
    height: int
    width: int
    down: int
    across: int

    @property
    def nbytes(self) -> int:
        return self.luma.nbytes + self.colours.nbytes

    @classmethod
    def empty(cls, height: int, width: int, down: int, across: int) -> "Planes":
        rows, columns = -(-height // down), -(-width // across)
        luma = np.empty((rows * down, 1, pitch(columns * across)), np.uint8)
        return cls(luma, np.empty((rows, 2, pitch(columns)), np.uint8), height, width, down, across)

    def scaled(self, height: int, width: int) -> "Planes":
        """To 4:2:0. Colours keep their place in the picture where a side is odd, too: their planes end beyond it."""
        small = Planes.empty(height, width, 2, 2)
        down, across = height / self.height, width / self.width
        small.luma[:height, :, :width] = resampled(self.luma[: self.height], self.width, height, width, down, across)
        if height % 2:
            small.luma[height] = small.luma[height - 1]
        if width % 2:
            small.luma[:, :, width] = small.luma[:, :, width - 1]
        down, across = down * self.down / small.down, across * self.across / small.across
        rows, columns = -(-height // small.down), -(-width // small.across)
        own = -(-self.width // self.across)
        small.colours[:, :, :columns] = resampled(self.colours, own, rows, columns, down, across)
        return small


def pitch(columns: int) -> int:
    """Bytes from row to row: an odd multiple of CHANNELS, as powers of two would meet in few lines of a cache."""
    return columns + (CHANNELS - columns) % (2 * CHANNELS)


def resampled(planes: np.ndarray, own: int, rows: int, columns: int, down: float, across: float) -> np.ndarray:
    """uint8 [h, n, at least `own`] scaled by down x across, as [rows, n, columns].

    Columns first, then rows, which are the columns of the transposed: so torch need not rearrange any bytes.
    """
    narrow = along_columns(planes, rows, down)
    turned = np.empty((own, planes.shape[1], pitch(rows)), np.uint8)
    turned[:, :, :rows] = narrow[:, :, :own].transpose(2, 1, 0)
    return along_columns(turned, columns, across)[:, :, :rows].transpose(2, 1, 0)


def along_columns(planes: np.ndarray, rows: int, factor: float) -> np.ndarray:
    """uint8 [h, n, pitch] as [rows, n, pitch]; neighbouring bytes of a row pass for the channels of one pixel.

    As many rows as there are stay as they are, each at most half a row beside its place.
    """
    height, *row = planes.shape
    image = torch.from_numpy(planes.reshape(1, height, -1, CHANNELS)).permute(0, 3, 1, 2)
    # what interpolate calls, which takes either a size or a factor, and rounds the size of a factor down
    image = torch._C._nn._upsample_bilinear2d_aa(image, [rows, image.shape[3]], False, factor, None)
    return image.permute(0, 2, 3, 1).numpy().reshape(rows, *row)
