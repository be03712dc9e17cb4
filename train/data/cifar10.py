"""CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009), decoded once into memory.

Augmentation of He et al. 2015, section 4.2: 4 pixels of padding (an eighth of the side), random crop, random flip.
"""

import hashlib
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from train.data.cifar10_files import Images, read_cifar10
from train.data.pixels import Normaliser, channels_last
from train.data.source import Source, at_least
from train.data.streams import uniform

MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images
STD = (0.2470, 0.2435, 0.2616)
FLIP, LEFT, TOP = range(3)  # random streams


class Cifar10(Source):
    """All images in memory, 3 * image_size**2 bytes each (184 MB at 32 pixels); other sizes are resized once when read.

    `repeat` makes the training set so many times as long; each repetition is augmented on its own. An unreadable image
    raises ValueError with its path; with on_error="skip" it is left out, a warning names it, `num_skipped` counts it.
    """

    name = "cifar10"

    def __init__(
        self,
        root: str | None,
        image_size: int = 32,
        augment: bool = True,
        repeat: int = 1,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        at_least(1, image_size=image_size, repeat=repeat)
        self.image_size = image_size
        files = read_cifar10(root, image_size, skip=on_error == "skip")
        self.num_classes, self.notes, self.num_skipped = files.num_classes, files.notes, files.num_skipped
        self.train = SmallPhotos(files.train, augment, repeat)
        self.eval = SmallPhotos(files.eval, augment=False, repeat=1)

    @cached_property
    def fingerprint(self) -> str:
        """Over all pixels and labels, training images first."""
        digest = hashlib.sha256()
        for images in (self.train.images, self.eval.images):
            digest.update(images.pixels)
            digest.update(images.labels)
        return digest.hexdigest()


class SmallPhotos:
    """A Dataset over decoded images; sample i of a repeated set is image i % number of images."""

    def __init__(self, images: Images, augment: bool, repeat: int) -> None:
        self.images, self.augment, self.repeat = images, augment, repeat
        self._normaliser = Normaliser(MEAN, STD, images.pixels.shape[2])

    def __len__(self) -> int:
        return len(self.images.labels) * self.repeat

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = indices % len(self.images.labels)
        pixels = self.images.pixels[images]
        if self.augment:
            pixels = crop_and_flip(pixels, *(uniform(seed, epoch, indices, stream) for stream in (TOP, LEFT, FLIP)))
        out = np.empty(pixels.shape, np.float32)
        self._normaliser.write(pixels, out)
        return channels_last(out), torch.from_numpy(self.images.labels[images])


def crop_and_flip(pixels: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """Images uint8 [n, size, size, 3] moved by up to size // 8 pixels over black, and half of them mirrored."""
    count, size = pixels.shape[:2]
    pad = size // 8
    padded = np.zeros((count, size + 2 * pad, size + 2 * pad, 3), np.uint8)
    padded[:, pad : pad + size, pad : pad + size] = pixels
    cuts = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    rows, columns = ((place * (2 * pad + 1)).astype(np.int64) for place in (top, left))
    # channels behind the pixels before the cuts are chosen: NumPy then copies whole rows of interleaved channels
    moved = cuts.transpose(0, 1, 2, 4, 5, 3)[np.arange(count), rows, columns]
    mirrored = flip < 0.5
    moved[mirrored] = moved[mirrored, :, ::-1]
    return moved
