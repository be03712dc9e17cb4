"""Checkpoints of a run: one file a step, written aside and renamed, read back without running code (`weights_only`)."""

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from train.checkpoint_files import Fenced, check_fence, checkpoint_path, checksum_path, defect, of_attempt
from train.progress import doing


def save(folder: Path, step: int, state: dict) -> Path:
    """Write `state` (tensors, numbers, strings, lists, dicts) and its checksum as the checkpoint after `step` steps.

    Fenced where `folder`, an attempt's, is there no longer; OSError (disk full ...) leaves no half file behind.
    """
    path = checkpoint_path(folder, step)
    aside, sum_aside = path.with_suffix(".pt.tmp"), path.with_suffix(".sha256.tmp")
    hashed = _Hashed()
    try:
        with aside.open("wb") as hashed.file:
            torch.save(state, hashed)
            _to_disk(hashed.file)
        with sum_aside.open("wb") as file:
            file.write(f"{hashed.digest.hexdigest()}  {path.name}\n".encode())
            _to_disk(file)
        sum_aside.replace(checksum_path(path))
        aside.replace(path)
    except (OSError, RuntimeError) as error:
        check_fence(folder)
        for left in (aside, sum_aside):
            left.unlink(missing_ok=True)
        raise hashed.failure or error from None
    return path


def keep_last(folder: Path, count: int) -> None:
    """Delete all checkpoints of an attempt but the `count` latest."""
    for path in of_attempt(folder)[:-count]:
        path.unlink(missing_ok=True)
        checksum_path(path).unlink(missing_ok=True)


def load(path: Path) -> dict:
    """Read a checkpoint; ValueError names the file when it isn't one, or not as it was written."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such checkpoint")
    if problem := defect(path):
        raise ValueError(f"{path}: not a readable checkpoint ({problem}); resume from an earlier one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); resume from an earlier one") from error


class Writer:
    """Writes checkpoints of one attempt in a thread of its own, one after the other, and keeps the `kept` latest.

    A disk that is full, or another error of the file system, costs that checkpoint and no more: `say` is told, training
    goes on, and the one before stays. At the end (`close`) it is an error.
    """

    def __init__(self, folder: Path, kept: int, say: Callable[[str], None]) -> None:
        self.folder, self._kept, self._say = folder, kept, say
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.failures = 0

    def write(self, step: int, state: dict) -> None:
        """Take over `state` (nobody changes its tensors any more); waits for the one before. Fenced as `save`."""
        self.settle()
        if isinstance(self._failure, Fenced):
            raise self._failure
        self._failure = None
        self._thread = threading.Thread(target=self._save, args=(step, state), name="checkpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Return when all is on disk; the error of the last checkpoint where it isn't."""
        self.settle()
        if self._failure is not None:
            raise self._failure

    def settle(self) -> None:
        """Return when nothing is being written, however that ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save(self, step: int, state: dict) -> None:
        doing("checkpoint")
        try:
            save(self.folder, step, state)
            keep_last(self.folder, self._kept)
        except (OSError, RuntimeError) as error:
            self.failures += 1
            self._failure = error
            if isinstance(error, Fenced):
                return
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._say(f"no checkpoint of step {step}: {self.folder}: {reason}; training goes on with the one before")


class _Hashed:
    """A file that hashes what is written to it. torch.save writes from the beginning to the end."""

    file: IO[bytes]

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None
        """Of the file system; torch makes another, which does not say what it was."""

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def copied(state: object) -> object:
    """A state whose tensors are copies on the CPU; dictionaries, lists and tuples of it are new too."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state


def weights_sha256(model: nn.Module) -> str:
    """The SHA-256 of the names and bytes (in logical order) of all parameters and of evaluation's statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
