"""Made-up images for timing: a pattern for each class under noise; no files, next to no work."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from train.data.source import Source, Staged, at_least
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


class Pattern(Staged):
    """Samples first <= i < first + num_samples of one endless list."""

    def __init__(self, image_size: int, colours: np.ndarray, strip: np.ndarray, first: int, num_samples: int) -> None:
        self.image_size, self.first, self.num_samples = image_size, first, num_samples
        rows = np.tile(colours, image_size)  # each class's colours along one row of pixels
        self._on_device = {"cpu": (torch.from_numpy(strip), torch.from_numpy(rows))}

    def __len__(self) -> int:
        return self.num_samples

    def start(self, indices: np.ndarray, *, seed: int, epoch: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        """What returns (the noise's places, classes, labels): the images are made where they are computed with."""
        samples = indices + self.first
        places = (uniform(CONTENT_SEED, 0, samples, PLACE) * PLACES).astype(np.int64)
        labels = torch.from_numpy(samples % len(self._on_device["cpu"][1]))
        return lambda: (torch.from_numpy(places), labels, labels)

    def finish(self, places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """float32 [n, 3, image_size, image_size], channels last."""
        device = str(places.device)
        if device not in self._on_device:
            self._on_device[device] = tuple(tensor.to(device) for tensor in self._on_device["cpu"])
        strip, rows = self._on_device[device]
        size, count = self.image_size, len(places)
        if device == "cpu":  # row by row, without threads: the training has the cores
            images = np.empty((count, size, size * 3), np.float32)
            strip, rows = strip.numpy(), rows.numpy()
            for image, place, label in zip(images, places.tolist(), labels.tolist(), strict=True):
                np.add(strip[place : place + image.size].reshape(image.shape), rows[label], out=image)
            return torch.from_numpy(images).view(count, size, size, 3).permute(0, 3, 1, 2)
        windows = strip.unfold(0, size * size * 3, 1).index_select(0, places)
        images = windows.view(count, size, size * 3).add_(rows[labels][:, None])
        return images.view(count, size, size, 3).permute(0, 3, 1, 2)
