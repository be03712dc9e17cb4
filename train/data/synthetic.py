"""Made-up images for timing: a pattern for each class under noise; no files, next to no work."""

import hashlib

import numpy as np
import torch

from train.data.pixels import channels_last
from train.data.source import Source, at_least
from train.data.streams import uniform

CONTENT_SEED = 0  # the images are part of the data set, not of the run
COLOUR, NOISE, PLACE = range(3)  # random streams
PLACES = 65_536  # how many noise images the strip holds


class Synthetic(Source):
    """Sample i has class i % num_classes: its three colours plus a window of one noise strip at a hashed place."""

    name = "synthetic"

    def __init__(
        self, image_size: int = 224, num_classes: int = 1000, num_train: int = 1_281_167, num_eval: int = 50_000
    ) -> None:
        at_least(1, image_size=image_size, num_classes=num_classes, num_train=num_train, num_eval=num_eval)
        self.image_size, self.num_classes = image_size, num_classes
        values = image_size * image_size * 3
        strip = (2 * uniform(CONTENT_SEED, 0, np.arange(values + PLACES), NOISE) - 1).astype(np.float32)
        colours = (2 * uniform(CONTENT_SEED, 0, np.arange(num_classes * 3), COLOUR) - 1).astype(np.float32)
        colours = colours.reshape(num_classes, 3)
        self.train = Pattern(image_size, colours, strip, first=0, num_samples=num_train)
        self.eval = Pattern(image_size, colours, strip, first=num_train, num_samples=num_eval)
        sizes = f"{image_size} {num_classes} {num_train} {num_eval}"
        self.fingerprint = hashlib.sha256(sizes.encode() + strip.tobytes() + colours.tobytes()).hexdigest()


class Pattern:
    """Samples first <= i < first + num_samples of one endless list."""

    def __init__(self, image_size: int, colours: np.ndarray, strip: np.ndarray, first: int, num_samples: int) -> None:
        self.image_size, self.strip, self.first, self.num_samples = image_size, strip, first, num_samples
        self.rows = np.tile(colours, image_size)  # each class's colours along one row of pixels

    def __len__(self) -> int:
        return self.num_samples

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = indices + self.first
        labels = samples % len(self.rows)
        places = (uniform(CONTENT_SEED, 0, samples, PLACE) * PLACES).astype(np.int64)
        images = np.empty((len(indices), self.image_size, self.image_size * 3), np.float32)
        for image, label, place in zip(images, labels, places, strict=True):
            np.add(self.strip[place : place + image.size].reshape(image.shape), self.rows[label], out=image)
        return channels_last(images.reshape(len(indices), self.image_size, -1, 3)), torch.from_numpy(labels)
