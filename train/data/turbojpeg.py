"""The crop of a JPEG, without decoding the rest, and new JPEGs: libjpeg-turbo's TurboJPEG API, version 3, by ctypes.

Rows below the crop are not read, rows above it only as far as the entropy coding needs; outside its columns nothing is
transformed. Without `shrink` the pixels are those of a whole decode to the last bit. https://libjpeg-turbo.org
"""

import ctypes
import ctypes.util
import importlib.util
import threading
from pathlib import Path

import numpy as np

Box = tuple[int, int, int, int]  # left, top, right, bottom

# turbojpeg.h: enum TJINIT, TJPARAM, TJPF and TJSAMP of TurboJPEG 3; the widths of a block of each TJSAMP in pixels
COMPRESS, DECOMPRESS = 0, 1
FORMATS = {3: 0, 4: 2}  # by bytes of a pixel: RGB, and RGBX, whose fourth byte means nothing
STOP_ON_WARNING, NO_REALLOC, QUALITY, SUBSAMPLING, WIDTH, HEIGHT, COLOUR_SPACE, MAX_PIXELS = 0, 2, 3, 4, 5, 6, 8, 24
HALVED_COLOURS = 2  # 4:2:0
RGB_YCBCR_GREY = (0, 1, 2)
BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)
SHRINKS = (8, 4, 2)  # factors of the inverse DCT that are as fast as the whole one
LARGEST = 178_956_970  # pixels; Pillow's own limit
NEIGHBOURS = 2  # pixels beside the crop from which colour is interpolated into it


class Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num", "denom")]


HANDLE, BYTES, INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
ARGUMENTS = {
    "tj3Init": (INT,),
    "tj3Set": (HANDLE, INT, INT),
    "tj3Get": (HANDLE, INT),
    "tj3DecompressHeader": (HANDLE, BYTES, ctypes.c_size_t),
    "tj3SetScalingFactor": (HANDLE, Factor),
    "tj3SetCroppingRegion": (HANDLE, Region),
    "tj3Decompress8": (HANDLE, BYTES, ctypes.c_size_t, ctypes.c_void_p, INT, INT),
    "tj3JPEGBufSize": (INT, INT, INT),
    "tj3Compress8": (HANDLE, ctypes.c_void_p, INT, INT, INT, INT, ctypes.c_void_p, ctypes.c_void_p),
}


def find_library() -> str | None:
    """A TurboJPEG library of version 3: that of the Python package turbojpeg, or the system's."""
    package = importlib.util.find_spec("turbojpeg")
    folder = Path(package.origin).parent / "turbojpeg.libs" if package and package.origin else Path("/nowhere")
    for path in [*map(str, sorted(folder.glob("libturbojpeg*"))), ctypes.util.find_library("turbojpeg")]:
        try:
            if path and hasattr(ctypes.CDLL(path), "tj3SetCroppingRegion"):
                return path
        except OSError:
            continue
    return None


class TurboJpeg:
    """For any number of threads; what it can't decode right (None) is for a decoder of all formats."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        for name, arguments in ARGUMENTS.items():
            getattr(self._library, name).argtypes = arguments
        self._library.tj3Init.restype, self._library.tj3JPEGBufSize.restype = HANDLE, ctypes.c_size_t
        self._own = threading.local()

    def size(self, data: bytes) -> tuple[int, int] | None:
        """(width, height); None if not a whole JPEG, or none with the colours of a photo."""
        if data.rfind(b"\xff\xd9", -64) < 0:  # no end: cut off, perhaps below the crop, or another format
            return None
        library, handle = self._library, self._handle()
        if library.tj3DecompressHeader(handle, data, len(data)):
            return None
        if library.tj3Get(handle, COLOUR_SPACE) not in RGB_YCBCR_GREY or library.tj3Get(handle, SUBSAMPLING) < 0:
            return None
        return library.tj3Get(handle, WIDTH), library.tj3Get(handle, HEIGHT)

    def crop(self, data: bytes, box: Box, shrink: int = 1, channels: int = 3) -> np.ndarray | None:
        """uint8 [height, width, 3] of the box, in pixels of the image shrunk by 1, 2, 4 or 8; after `size` of the data.

        channels=4: with a fourth byte behind each pixel. Valid until the thread's next call.
        """
        library, handle = self._library, self._handle()
        library.tj3SetScalingFactor(handle, Factor(1, shrink))
        width = -(-library.tj3Get(handle, WIDTH) // shrink)
        block = BLOCK_WIDTHS[library.tj3Get(handle, SUBSAMPLING)] // shrink
        left, top, right, bottom = box
        first = max(0, left - NEIGHBOURS) // block * block  # the library cuts at blocks only
        columns, rows = min(width, right + NEIGHBOURS) - first, bottom - top
        if library.tj3SetCroppingRegion(handle, Region(first, top, columns, rows)):
            return None
        pixels = self._room("pixels", rows * columns * channels).reshape(rows, columns, channels)
        if library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, FORMATS[channels]):
            return None
        return pixels[:, left - first : right - first]

    def encoded(self, pixels: np.ndarray, quality: int) -> bytes:
        """A JPEG of uint8 [height, width, 3 or 4], contiguous, with colours at half the resolution, as Pillow's are."""
        library, handle, (height, width, channels) = self._library, self._compressor(), pixels.shape
        library.tj3Set(handle, QUALITY, quality)
        room = self._room("jpeg", library.tj3JPEGBufSize(width, height, HALVED_COLOURS))
        start, size = ctypes.c_void_p(room.ctypes.data), ctypes.c_size_t(room.size)
        written = ctypes.byref(start), ctypes.byref(size)
        if library.tj3Compress8(handle, pixels.ctypes.data, width, 0, height, FORMATS[channels], *written):
            raise RuntimeError(f"libjpeg-turbo can't encode {width} x {height} pixels at quality {quality}")
        return room[: size.value].tobytes()

    def _room(self, name: str, nbytes: int) -> np.ndarray:
        """Memory of the thread's own, used again."""
        room = getattr(self._own, name, None)
        if room is None or room.size < nbytes:
            room = np.empty(nbytes, np.uint8)
            setattr(self._own, name, room)
        return room[:nbytes]

    def _compressor(self) -> int:
        if not hasattr(self._own, "compressor"):
            self._own.compressor = self._library.tj3Init(COMPRESS)
            self._library.tj3Set(self._own.compressor, NO_REALLOC, 1)
            self._library.tj3Set(self._own.compressor, SUBSAMPLING, HALVED_COLOURS)
        return self._own.compressor

    def _handle(self) -> int:
        if not hasattr(self._own, "handle"):
            self._own.handle = self._library.tj3Init(DECOMPRESS)
            self._library.tj3Set(self._own.handle, STOP_ON_WARNING, 1)
            self._library.tj3Set(self._own.handle, MAX_PIXELS, LARGEST)
        return self._own.handle
