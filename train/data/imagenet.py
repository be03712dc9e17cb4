"""ImageNet, or any photos in its layout: root/train/<class>/*.JPEG and root/val/<class>/*.JPEG.

Training: random resized crop and flip; evaluation: shorter side to `resize`, centre crop (He et al. 2015; torchvision's
references/classification, whose mean and standard deviation these are).
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from train.data.folder import SAME_PHOTOS, ImageFolder, data_root, fingerprint, list_parts
from train.data.pixels import (
    CROP_TRIES,
    Normaliser,
    UnreadableImage,
    center_crop,
    channels_last,
    decode,
    mirrored,
    random_crop_box,
    scaled,
)
from train.data.source import Source, at_least
from train.data.streams import uniform

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
FLIP, LEFT, TOP, FIRST_TRY = range(4)  # random streams; each try of the crop takes two more, its area and its ratio


class ImageNetFolder(Source):
    """Photos decoded anew for every batch, by `workers` threads (auto: one for each core, at most 16).

    `repeat` makes the training set so many times as long; each repetition is augmented on its own. `resize` is the
    shorter side before the centre crop; null keeps the reference's proportion, image_size * 256 / 224.
    Class folders directly in root: the same photos train and evaluate, and `notes` says so.
    An unreadable image raises ValueError with its path; with on_error="skip" the next readable image of the folder
    takes its place (keeping the random draws of the sample), a warning names it, and `num_skipped` counts it once.
    """

    name = "imagenet"

    def __init__(
        self,
        root: str | None,
        image_size: int = 224,
        augment: bool = True,
        resize: int | None = None,
        repeat: int = 1,
        workers: int | Literal["auto"] = "auto",
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if resize is None:
            resize = round(image_size * 256 / 224)
        if workers == "auto":
            workers = min(os.cpu_count() or 1, 16)
        at_least(1, image_size=image_size, repeat=repeat, workers=workers)
        if resize < image_size:
            raise ValueError(f"data.resize={resize}: must be at least data.image_size={image_size}, or null")
        self.image_size = image_size
        self._root = data_root(root)
        train, evaluation = list_parts(self._root)
        self.num_classes = len(train.classes)
        if evaluation is train:
            self.notes = (SAME_PHOTOS,)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        skip = on_error == "skip"
        self.train = Photos(train, image_size, resize, augment, repeat, skip, pool)
        self.eval = Photos(evaluation, image_size, resize, False, 1, skip, pool)

    @cached_property
    def fingerprint(self) -> str:
        """Over relative paths and sizes: asks the size of every file, a few seconds for all of ImageNet."""
        parts = (self.train.images, self.eval.images)
        return fingerprint(self._root, parts[:1] if parts[0] is parts[1] else parts)

    @property
    def num_skipped(self) -> int:
        """Unreadable images met so far by this process."""
        return len({dataset.images.path(i) for dataset in (self.train, self.eval) for i in dataset.unreadable})


class Photos:
    """A Dataset over an image folder; sample i of a repeated set is file i % number of files."""

    def __init__(
        self,
        images: ImageFolder,
        image_size: int,
        resize: int,
        augment: bool,
        repeat: int,
        skip: bool,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.images, self.image_size, self.resize = images, image_size, resize
        self.augment, self.repeat, self.skip = augment, repeat, skip
        self.unreadable: set[int] = set()
        self._pool = pool
        self._normaliser = Normaliser(MEAN, STD, image_size)

    def __len__(self) -> int:
        return len(self.images.files) * self.repeat

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.float32)
        if self.augment:
            streams = range(FIRST_TRY + 2 * CROP_TRIES)
            draws = np.stack([uniform(seed, epoch, indices, stream) for stream in streams], axis=1).tolist()
        else:
            draws = [None] * len(indices)

        def fill(position: int) -> int:
            file, photo = self.read(int(indices[position]) % len(self.images.files))
            self._normaliser.write(np.asarray(self.cut(photo, draws[position])), images[position])
            return file

        files = list(self._pool.map(fill, range(len(indices))))
        return channels_last(images), torch.from_numpy(self.images.labels[files])

    def cut(self, photo: "Image", draws: list[float] | None) -> "Image":
        if draws is None:
            return center_crop(photo, self.resize, self.image_size)
        area, ratio = draws[FIRST_TRY::2], draws[FIRST_TRY + 1 :: 2]
        box = random_crop_box(*photo.size, area, ratio, draws[LEFT], draws[TOP])
        photo = scaled(photo, box, self.image_size, self.image_size)
        return mirrored(photo) if draws[FLIP] < 0.5 else photo

    def read(self, file: int) -> tuple[int, "Image"]:
        """The photo, or with skip the next readable one, and the number of the file it came from."""
        for offset in range(len(self.images.files)):
            candidate = (file + offset) % len(self.images.files)
            if candidate in self.unreadable:
                continue
            path = self.images.path(candidate)
            try:
                return candidate, decode(path, path)
            except UnreadableImage as error:
                if not self.skip:
                    raise
                self.unreadable.add(candidate)
                warnings.warn(f"data.on_error=skip: the next image takes the place of {error}", stacklevel=2)
        raise ValueError(f"data.root: none of the {len(self.images.files)} images below {self.images.root} can be read")
