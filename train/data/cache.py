"""Decoded photos in memory that all processes of a node share: the first one to decode a photo keeps it for all.

The memory has a promised size, is taken as it fills, and is gone with the last process that uses it. A small file in
the system's folder for temporary files says which process to ask for it. What has no room is decoded anew every time.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from train.data.shared import Place, Shared

ENTRY = np.dtype([("offset", "<u8"), ("height", "<u4"), ("width", "<u4"), ("ready", "<u8")])


class PhotoCache:
    """Of photos 0 to count - 1; `table` has where each lies, after an entry whose offset is the end of what is taken.

    In another process (by pickling) it is the same memory.
    """

    def __init__(self, table: Shared, pixels: Shared) -> None:
        self._shared = table, pixels
        self._table = table.array((table.nbytes // ENTRY.itemsize,), ENTRY)
        self._pixels = pixels.array((pixels.nbytes,))
        self._lock = threading.Lock()

    @classmethod
    def of_node(cls, identity: str, count: int, nbytes: int, folder: Path | None = None) -> "PhotoCache":
        """The one that some process of this node and user has for the same photos; else a new one."""
        name = hashlib.sha256(f"{identity} {count} {nbytes}".encode()).hexdigest()[:16]
        path = (folder or Path(tempfile.gettempdir())) / f"resnet-record-{os.getuid()}-photos-{name}"
        with open(path, "a+", opener=lambda file, flags: os.open(file, flags | os.O_NOFOLLOW, 0o600)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            try:
                return cls.at(*json.loads(file.read()))
            except (ValueError, TypeError, OSError):  # nothing there yet, or its process is gone
                made = cls(Shared.new((1 + count) * ENTRY.itemsize), Shared.new(nbytes))
            file.truncate(0)
            file.write(json.dumps([shared.place for shared in made._shared]))
            return made

    @classmethod
    def at(cls, table: Place, pixels: Place) -> "PhotoCache":
        return cls(Shared.of(table), Shared.of(pixels))

    def __reduce__(self) -> tuple:
        return PhotoCache.at, tuple(shared.place for shared in self._shared)

    def get(self, photo: int) -> np.ndarray | None:
        """uint8 [height, width, 3]."""
        entry = self._table[1 + photo]
        return self._at(entry) if entry["ready"] else None

    def put(self, photo: int, pixels: np.ndarray) -> None:
        entry = self._table[1 + photo : 2 + photo]
        with self._alone():
            start = int(self._table["offset"][0])
            if entry["height"][0] or start + pixels.size > self._pixels.size:
                return  # another process is at it, or there is no room
            self._table["offset"][0] = start + pixels.size
            entry["offset"], entry["height"], entry["width"] = start, *pixels.shape[:2]
        self._at(entry[0])[:] = pixels
        entry["ready"] = 1

    def _at(self, entry: np.void) -> np.ndarray:
        start, height, width = (int(entry[name]) for name in ("offset", "height", "width"))
        return self._pixels[start : start + height * width * 3].reshape(height, width, 3)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread of one process at a time."""
        descriptor = self._shared[0].descriptor
        with self._lock:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)


def check_room(gbytes: float) -> None:
    """ValueError if this machine has not so much memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not 0 < gbytes * 1e9 < total:
        raise ValueError(
            f"data.cache_gbytes={gbytes:g}: must be above 0 and below this machine's {total / 1e9:.0f} GB; 0 for none"
        )
