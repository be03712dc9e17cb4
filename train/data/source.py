"""What a node of the group `data` builds: a Source with a training and an evaluation Dataset."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch


class Dataset(Protocol):
    """Images by index. An augmented image depends on (seed, epoch, index) alone, not on its batch or earlier calls."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [n, 3, size, size], normalised, channels_last, and labels int64 [n].

        Evaluation ignores seed and epoch.
        """
        ...


class Staged:
    """A Dataset whose batches are made in two stages, of which the second runs where they are computed with.

    `start` begins a batch and returns what waits for its parts, the labels last: the next ones can be under way
    meanwhile, and what is copied to a GPU are the parts, bytes for the most of it. `finish` makes images of all parts
    but the labels, on the device they lie on.
    """

    def start(self, indices: np.ndarray, *, seed: int, epoch: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        raise NotImplementedError

    def finish(self, *parts: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        *parts, labels = self.start(indices, seed=seed, epoch=epoch)()
        return self.finish(*parts), labels


class Source:
    """The seam: each kind of data sets these attributes; `fingerprint` identifies the content (SHA-256)."""

    name: str
    num_classes: int
    image_size: int
    train: Dataset
    eval: Dataset
    fingerprint: str
    notes: tuple[str, ...] = ()  # what a reader of the results has to know about the data
    num_skipped: int = 0  # unreadable images met so far (data.on_error=skip)

    def describe(self) -> dict:
        """Sizes, classes and fingerprint, as plain data for the run folder."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "num_train": len(self.train),
            "num_eval": len(self.eval),
            "num_skipped": self.num_skipped,
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
        }


def at_least(minimum: int, **values: int) -> None:
    """Refuse values of the data node below `minimum`, by the name of their key."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"data.{name}={value}: must be at least {minimum}")
