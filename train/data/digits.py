"""Handwritten digits: 1,797 real scans of 8x8 pixels that come inside the scikit-learn package.

Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
The file is read without importing scikit-learn, which takes more than a second.
"""

import gzip
import hashlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from train.data.source import Source, Staged, at_least
from train.data.streams import permutation, uniform

HELD_OUT_PER_CLASS = 36  # 360 images for evaluation, 1,437 for training
SPLIT_SEED = 0  # the split is part of the data set, not of the run
MAX_SHIFT = 1 / 20  # of the image's width
MAX_TURN = math.radians(8)
MAX_ZOOM = 0.05
SHIFT_X, SHIFT_Y, TURN, ZOOM = range(4)  # random streams


class Digits(Source):
    """Digits at image_size x image_size in three equal channels; training shifts, turns and zooms them (no flips)."""

    name = "digits"
    num_classes = 10

    def __init__(self, image_size: int = 32, augment: bool = True) -> None:
        at_least(1, image_size=image_size)
        self.image_size = image_size
        scans, labels = read_digits()
        self.fingerprint = hashlib.sha256(scans.tobytes() + labels.tobytes()).hexdigest()
        held_out = split(labels)
        ink = scans.astype(np.float32) / 16
        mean, std = float(ink[~held_out].mean()), float(ink[~held_out].std())
        self.train = Scans(ink[~held_out], labels[~held_out], image_size, mean, std, augment)
        self.eval = Scans(ink[held_out], labels[held_out], image_size, mean, std, augment=False)


class Scans(Staged):
    """Scans in memory, float32 [n, 8, 8] in 0..1 on an empty background of 0."""

    def __init__(
        self, ink: np.ndarray, labels: np.ndarray, image_size: int, mean: float, std: float, augment: bool
    ) -> None:
        self.ink, self.labels, self.image_size = torch.from_numpy(ink), torch.from_numpy(labels), image_size
        self.mean, self.std, self.augment = mean, std, augment

    def __len__(self) -> int:
        return len(self.ink)

    def start(self, indices: np.ndarray, *, seed: int, epoch: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        """What returns (scans float32 [n, 8, 8], maps float32 [n, 2, 3], labels)."""
        rows = torch.from_numpy(indices)

        def finished() -> tuple[torch.Tensor, ...]:
            maps = random_affine(seed, epoch, indices) if self.augment else np.eye(2, 3)[None].repeat(len(indices), 0)
            return self.ink[rows], torch.from_numpy(maps.astype(np.float32)), self.labels[rows]

        return finished

    def finish(self, ink: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Shifted, turned, zoomed and normalised: float32 [n, 3, image_size, image_size], channels last.

        The sampling alone may round otherwise on a GPU than on a CPU, in its last bits.
        """
        grid = sampling_grid(maps, self.image_size)
        grey = torch.nn.functional.grid_sample(ink[:, None], grid, padding_mode="zeros", align_corners=False)
        grey = grey.sub_(self.mean).div_(self.std)
        return grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def random_affine(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """Maps from output to scan coordinates (both -1..1), float64 [n, 2, 3].

    The turn is drawn as the tangent of half its angle: sine and cosine then need no library function whose last bit
    differs between machines or between the body and the tail of a vector loop.
    """
    shift_x, shift_y, turn, zoom = (2 * uniform(seed, epoch, indices, s) - 1 for s in (SHIFT_X, SHIFT_Y, TURN, ZOOM))
    half_tan = turn * math.tan(MAX_TURN / 2)
    scale = (1 + MAX_ZOOM * zoom) / (1 + half_tan * half_tan)
    cos, sin = scale * (1 - half_tan * half_tan), scale * 2 * half_tan
    matrix = np.array([[cos, -sin, 2 * MAX_SHIFT * shift_x], [sin, cos, 2 * MAX_SHIFT * shift_y]])
    return np.moveaxis(matrix, -1, 0)


def sampling_grid(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Scan coordinates float32 [n, size, size, 2] of every output pixel's centre, for maps float32 [n, 2, 3].

    Written out instead of torch's affine_grid, whose matrix product may round differently in another batch.
    """
    centres = torch.from_numpy(((2 * np.arange(size) + 1) / size - 1).astype(np.float32)).to(maps.device)
    maps = maps[:, :, :, None, None]
    along_x, along_y, shift = maps[:, :, 0] * centres, maps[:, :, 1] * centres[:, None], maps[:, :, 2]
    return (along_x + (along_y + shift)).permute(0, 2, 3, 1).contiguous()


def split(labels: np.ndarray) -> np.ndarray:
    """Which scans are held out, bool [n]: the first HELD_OUT_PER_CLASS of each class in a fixed random order."""
    held_out = np.zeros(len(labels), bool)
    shuffled = permutation(len(labels), SPLIT_SEED, 0)
    for digit in range(10):
        held_out[shuffled[labels[shuffled] == digit][:HELD_OUT_PER_CLASS]] = True
    return held_out


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Scans uint8 [1797, 8, 8] with values 0..16, and labels int64 [1797], from scikit-learn's own file."""
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise ValueError("data=digits needs scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise ValueError(f"data=digits: {path} is missing: reinstall scikit-learn")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
