"""Photos as a Dataset: read, cut and scaled as bytes by a pool, then mirrored and normalised where they are needed.

Training: random resized crop and flip; evaluation: shorter side to a size, centre crop (He et al. 2015; torchvision's
references/classification, whose mean and standard deviation these are).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from train.data.augment import normalised
from train.data.cache import PhotoCache
from train.data.folder import UnreadableImage
from train.data.pixels import CROP_TRIES, center_crop, decode, random_crop_box, scaled
from train.data.source import Staged
from train.data.streams import uniform
from train.data.turbojpeg import SHRINKS, TurboJpeg

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
FLIP, LEFT, TOP, FIRST_TRY = range(4)  # random streams; each try of the crop takes two more, its area and its ratio

Part = tuple[np.ndarray, list[tuple[int, str]]]  # labels int64 [n]; files left out, each with its reason


class Store(Protocol):
    """Where the files lie; `labels` int64 [files]. It is sent to other processes."""

    labels: np.ndarray

    def read(self, file: int) -> bytes: ...

    def place(self, file: int) -> str:
        """What names the file in a message."""
        ...


@dataclass(eq=False)
class Cutter:
    """Files to squares of bytes. Nothing here depends on who calls: not on the batch, the process or earlier calls.

    `sizes` are (first epoch, pixels) of training; `resize` is the shorter side before the centre crop of evaluation.
    `library` is TurboJPEG's; None: Pillow decodes and scales, as the reference does. With `skip` the next readable
    file takes an unreadable one's place, keeping the random draws of the sample. With a `cache` photos are always
    decoded whole and unshrunk, whether the cache holds them or has no room.
    """

    store: Store
    sizes: tuple[tuple[int, int], ...]
    resize: int
    augment: bool
    skip: bool
    library: str | None
    cache: PhotoCache | None = None
    unreadable: set[int] = field(default_factory=set)

    @cached_property
    def turbo(self) -> TurboJpeg | None:
        return TurboJpeg(self.library) if self.library else None

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "turbo"}

    def size(self, epoch: int) -> int:
        return next(size for first, size in reversed(self.sizes) if epoch >= first)

    def fill(self, indices: np.ndarray, *, seed: int, epoch: int, out: np.ndarray) -> Part:
        """Write the samples as uint8 [n, size, size, 3] into `out`; sample i is file i % number of files."""
        left_out: list[tuple[int, str]] = []
        if self.augment:
            streams = range(FIRST_TRY + 2 * CROP_TRIES)
            draws = np.stack([uniform(seed, epoch, indices, stream) for stream in streams], axis=1).tolist()
        else:
            draws = [None] * len(indices)
        files = [
            self._fill_one(int(index) % len(self.store.labels), draws[i], out[i], left_out)
            for i, index in enumerate(indices)
        ]
        return self.store.labels[files], left_out

    def _fill_one(self, file: int, draws: list[float] | None, out: np.ndarray, left_out: list) -> int:
        """The number of the file whose photo is in `out`."""
        count = len(self.store.labels)
        for candidate in (number % count for number in range(file, file + count)):
            if candidate in self.unreadable:
                continue
            try:
                self._cut(candidate, draws, out)
                return candidate
            except UnreadableImage as error:
                if not self.skip:
                    raise
                self.unreadable.add(candidate)
                left_out.append((candidate, str(error)))
        raise ValueError(f"data.root: none of the {count} images can be read; the first is {self.store.place(0)}")

    def _cut(self, file: int, draws: list[float] | None, out: np.ndarray) -> None:
        size = len(out)
        if draws is None:
            out[:] = np.asarray(center_crop(self._photo(file), self.resize, size))
        elif self.turbo is None:
            photo = self._photo(file)
            photo = scaled(photo, _box(photo.size, draws), size, size)
            out[:] = np.asarray(photo)
        else:
            square = rescaled(self._crop(file, draws, size), size, size)
            torch.from_numpy(out).permute(2, 0, 1).copy_(square)

    def _photo(self, file: int) -> "Image":
        """The whole photo."""
        from PIL import Image

        pixels = self.cache.get(file) if self.cache else None
        if pixels is not None:
            return Image.fromarray(pixels)
        photo = decode(self.store.read(file), partial(self.store.place, file))
        if self.cache:
            self.cache.put(file, np.asarray(photo))
        return photo

    def _crop(self, file: int, draws: list[float], size: int) -> np.ndarray:
        """The random crop, uint8 [h, w, 3]: a part of the whole photo if that is kept, else the crop alone."""
        if self.cache:
            pixels = self.cache.get(file)
            pixels = np.asarray(self._photo(file)) if pixels is None else pixels
        else:
            data = self.store.read(file)
            crop = self._turbo_crop(data, draws, size)
            if crop is not None:
                return crop
            pixels = np.asarray(decode(data, partial(self.store.place, file)))
        left, top, right, bottom = _box(pixels.shape[1::-1], draws)
        return pixels[top:bottom, left:right].copy()

    def _turbo_crop(self, data: bytes, draws: list[float], size: int) -> np.ndarray | None:
        whole = self.turbo.size(data)
        if whole is None:
            return None
        box = _box(whole, draws)
        smaller = min(box[2] - box[0], box[3] - box[1]) // size
        shrink = next((factor for factor in SHRINKS if smaller >= factor), 1)
        if shrink > 1:  # the box in shrunk pixels; at least `size` of them remain in either direction
            box = (box[0] // shrink, box[1] // shrink, -(-box[2] // shrink), -(-box[3] // shrink))
        return self.turbo.crop(data, box, shrink)


def _box(whole: tuple[int, int], draws: list[float]) -> tuple[int, int, int, int]:
    return random_crop_box(*whole, draws[FIRST_TRY::2], draws[FIRST_TRY + 1 :: 2], draws[LEFT], draws[TOP])


def rescaled(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 [h, w, 3 or 4] as [the same, height, width]: bilinear, antialiased, within one level of Pillow's."""
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(images, (height, width), mode="bilinear", antialias=True)[0]


class Pool(Protocol):
    """Who runs `fill`; see train.data.pool."""

    def start(
        self, cutter: Cutter, indices: np.ndarray, *, seed: int, epoch: int
    ) -> Callable[[], tuple[np.ndarray, Part]]: ...


class Photos(Staged):
    """A Dataset, whose pool has several batches under way."""

    def __init__(self, cutter: Cutter, repeat: int, pool: Pool) -> None:
        self.cutter, self.repeat, self.pool = cutter, repeat, pool
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.cutter.store.labels) * self.repeat

    def start(self, indices: np.ndarray, *, seed: int, epoch: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        """What returns (uint8 [n, size, size, 3], bool [n] of those to be mirrored, labels)."""
        wait = self.pool.start(self.cutter, indices, seed=seed, epoch=epoch)
        mirror = self.cutter.augment & (uniform(seed, epoch, indices, FLIP) < 0.5)

        def finished() -> tuple[torch.Tensor, ...]:
            pixels, (labels, left_out) = wait()
            for file, reason in left_out:
                if file not in self.unreadable:
                    warnings.warn(f"data.on_error=skip: the next image takes the place of {reason}", stacklevel=2)
                self.unreadable.setdefault(file, reason)
            return torch.from_numpy(pixels), torch.from_numpy(mirror), torch.from_numpy(labels)

        return finished

    def finish(self, pixels: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
        """Mirrored and normalised, float32 [n, 3, size, size], channels last, on the pixels' device."""
        return normalised(pixels, MEAN, STD, mirror)
