"""The crop of a JPEG, without decoding the rest; its planes; JPEGs of planes: TurboJPEG's API, version 3, by ctypes.

Rows below the crop are not read, rows above it only as far as the entropy coding needs; outside its columns nothing is
transformed. Without `shrink` the pixels are those of a whole decode to the last bit. https://libjpeg-turbo.org
"""

import ctypes
import ctypes.util
import importlib.util
import threading
from contextlib import suppress
from ctypes import byref, c_int, c_size_t, c_void_p
from pathlib import Path

import numpy as np

from train.data.pixels import Box
from train.data.planes import Planes

# turbojpeg.h: enum TJINIT, TJPARAM, TJPF and TJCS of TurboJPEG 3; by TJSAMP, the pixels that share a sample of colour
COMPRESS, DECOMPRESS = 0, 1
STOP_ON_WARNING, NO_REALLOC, QUALITY, SUBSAMPLING, WIDTH, HEIGHT, COLOUR_SPACE, MAX_PIXELS = 0, 2, 3, 4, 5, 6, 8, 24
RGB, GREY, PLANAR, OF_A_PHOTO = 0, 2, (1, 2), (0, 1, 2)
DOWN, ACROSS, HALVED = (1, 1, 2, 1, 2, 1, 4), (1, 2, 2, 1, 1, 4, 1), 2
SHRINKS = (8, 4, 2)  # factors of the inverse DCT that are as fast as the whole one
LARGEST = 178_956_970  # pixels; Pillow's own limit
NEIGHBOURS = 2  # pixels beside the crop from which colour is interpolated into it


class Region(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("x", "y", "w", "h")]


class Factor(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("num", "denom")]


def find_library() -> str | None:
    """A TurboJPEG library of version 3: that of the Python package turbojpeg, or the system's."""
    package = importlib.util.find_spec("turbojpeg")
    folder = Path(package.origin).parent / "turbojpeg.libs" if package and package.origin else Path("/nowhere")
    for path in [*map(str, sorted(folder.glob("libturbojpeg*"))), ctypes.util.find_library("turbojpeg")]:
        with suppress(OSError):
            if path and hasattr(ctypes.CDLL(path), "tj3SetCroppingRegion"):
                return path
    return None


class TurboJpeg(threading.local):
    """For any number of threads: each has handles of its own, as `__init__` runs again in every one.

    What it can't decode right (None) is for a decoder of all formats. `crop` and `planes` are of the data last given to
    `size`, shrunk by 1, 2, 4 or 8.
    """

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.tj3Init.restype, self._library.tj3JPEGBufSize.restype = c_void_p, c_size_t
        self._decoder, self._encoder = (c_void_p(self._library.tj3Init(kind)) for kind in (DECOMPRESS, COMPRESS))
        for parameter, value in ((STOP_ON_WARNING, 1), (MAX_PIXELS, LARGEST)):
            self._library.tj3Set(self._decoder, parameter, value)
        for parameter, value in ((NO_REALLOC, 1), (SUBSAMPLING, HALVED)):
            self._library.tj3Set(self._encoder, parameter, value)

    def _header(self, *parameters: int) -> list[int]:
        return [self._library.tj3Get(self._decoder, parameter) for parameter in parameters]

    def size(self, data: bytes) -> tuple[int, int] | None:
        """(width, height); None if not a whole JPEG, or none with the colours of a photo."""
        whole = data.rfind(b"\xff\xd9", -64) >= 0  # else cut off, perhaps below the crop, or another format
        if not whole or self._library.tj3DecompressHeader(self._decoder, data, c_size_t(len(data))):
            return None
        width, height, colours, sampling = self._header(WIDTH, HEIGHT, COLOUR_SPACE, SUBSAMPLING)
        return (width, height) if colours in OF_A_PHOTO and sampling in range(len(ACROSS)) else None

    def crop(self, data: bytes, box: Box, shrink: int = 1) -> np.ndarray | None:
        """uint8 [height, width, 3] of the box, in pixels of the shrunk image."""
        width, sampling = self._header(WIDTH, SUBSAMPLING)
        left, top, right, bottom = box
        block = 8 * ACROSS[sampling] // shrink  # the library cuts at blocks only
        first = max(0, left - NEIGHBOURS) // block * block
        pixels = np.empty((bottom - top, min(-(-width // shrink), right + NEIGHBOURS) - first, 3), np.uint8)
        self._library.tj3SetScalingFactor(self._decoder, Factor(1, shrink))
        if self._library.tj3SetCroppingRegion(self._decoder, Region(first, top, pixels.shape[1], pixels.shape[0])):
            return None
        into = c_void_p(pixels.ctypes.data), 0, RGB
        failed = self._library.tj3Decompress8(self._decoder, data, c_size_t(len(data)), *into)
        return None if failed else pixels[:, left - first : right - first]

    def planes(self, data: bytes, shrink: int = 1) -> Planes | None:
        """Of the whole image; None too if it holds red, green and blue."""
        width, height, colours, sampling = self._header(WIDTH, HEIGHT, COLOUR_SPACE, SUBSAMPLING)
        if colours not in PLANAR:
            return None
        planes = Planes.empty(-(-height // shrink), -(-width // shrink), DOWN[sampling], ACROSS[sampling])
        if colours == GREY:
            planes.colours.fill(128)  # no colour
        self._library.tj3SetScalingFactor(self._decoder, Factor(1, shrink))
        into = addresses(planes)
        failed = self._library.tj3DecompressToYUVPlanes8(self._decoder, data, c_size_t(len(data)), *into)
        return None if failed else planes

    def encoded(self, planes: Planes, quality: int) -> bytes:
        """A JPEG of planes at 4:2:0."""
        room = np.empty(self._library.tj3JPEGBufSize(planes.width, planes.height, HALVED), np.uint8)
        start, size, (starts, steps) = c_void_p(room.ctypes.data), c_size_t(room.size), addresses(planes)
        self._library.tj3Set(self._encoder, QUALITY, quality)
        of = self._encoder, starts, planes.width, steps, planes.height
        if self._library.tj3CompressFromYUVPlanes8(*of, byref(start), byref(size)):
            raise RuntimeError(f"libjpeg-turbo can't encode {planes.width} x {planes.height} at quality {quality}")
        return room[: size.value].tobytes()


def addresses(planes: Planes) -> tuple[ctypes.Array, ctypes.Array]:
    """Of the first byte of each plane; and the bytes from row to row."""
    each = planes.luma[:, 0], planes.colours[:, 0], planes.colours[:, 1]
    return (c_void_p * 3)(*(plane.ctypes.data for plane in each)), (c_int * 3)(*(plane.strides[0] for plane in each))
