"""CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009), decoded once into memory.

Augmentation of He et al. 2015, section 4.2: 4 pixels of padding (an eighth of the side), random crop, random flip.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from train.data.augment import crop_and_flip, normalised
from train.data.cifar10_files import Images, read_cifar10
from train.data.source import Source, Staged, at_least
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


class SmallPhotos(Staged):
    """A Dataset over decoded images; sample i of a repeated set is image i % number of images."""

    def __init__(self, images: Images, augment: bool, repeat: int) -> None:
        self.images, self.augment, self.repeat = images, augment, repeat

    def __len__(self) -> int:
        return len(self.images.labels) * self.repeat

    def start(self, indices: np.ndarray, *, seed: int, epoch: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        """What returns (uint8 [n, size, size, 3], where augmented: top, left and mirror, labels)."""
        images = indices % len(self.images.labels)

        def finished() -> tuple[torch.Tensor, ...]:
            parts = [self.images.pixels[images]]
            if self.augment:
                places = 2 * (self.images.pixels.shape[1] // 8) + 1
                parts += [(uniform(seed, epoch, indices, at) * places).astype(np.int64) for at in (TOP, LEFT)]
                parts.append(uniform(seed, epoch, indices, FLIP) < 0.5)
            return tuple(map(torch.from_numpy, (*parts, self.images.labels[images])))

        return finished

    def finish(self, pixels: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
        """Moved by up to size // 8 pixels, half of them mirrored, and normalised, on the pixels' device."""
        return normalised(crop_and_flip(pixels, *places) if places else pixels, MEAN, STD)
