"""Memory that processes of one machine share, and that leaves nothing behind however they end."""

import mmap
import os

import numpy as np

Place = tuple[int, int, int, int]  # process, descriptor, bytes, and the memory's own number


class Shared:
    """A file without a name (Linux's memfd), which is gone with the last process that has it open."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.nbytes, self.descriptor = nbytes, descriptor
        self._map = mmap.mmap(descriptor, nbytes)
        self.place: Place = (os.getpid(), descriptor, nbytes, os.fstat(descriptor).st_ino)  # descriptors return

    @classmethod
    def new(cls, nbytes: int) -> "Shared":
        """Zeros, which take memory as they are written."""
        descriptor = os.memfd_create("photos")
        os.truncate(descriptor, nbytes)
        return cls(descriptor, nbytes)

    @classmethod
    def of(cls, place: Place) -> "Shared":
        """The memory that another process of this user has open; FileNotFoundError if it has not any more."""
        owner, descriptor, nbytes, number = place
        found = os.open(f"/proc/{owner}/fd/{descriptor}", os.O_RDWR)
        if os.fstat(found).st_ino != number:
            os.close(found)
            raise FileNotFoundError(f"process {owner} has closed that memory")
        return cls(found, nbytes)

    def array(self, shape: tuple[int, ...], dtype: np.dtype | type = np.uint8) -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype, count).reshape(shape)

    def close(self) -> None:
        """After the last array of it is gone."""
        self._map.close()
        os.close(self.descriptor)
