"""Checkpoints of a run: one file a step, written aside and renamed, read back without running code (`weights_only`)."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from train.checkpoint_files import checkpoint_path, list_checkpoints


def save(folder: Path, step: int, state: dict) -> Path:
    """Write `state` (tensors, numbers, strings, lists, dicts) as the checkpoint after `step` finished steps."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path


def keep_last(folder: Path, count: int) -> None:
    """Delete all checkpoints but the `count` latest."""
    for path in list_checkpoints(folder)[:-count]:
        path.unlink()


def load(path: Path) -> dict:
    """Read a checkpoint; ValueError names the file when it isn't one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such checkpoint") from None
    except Exception as error:
        reason = type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); resume from an earlier one") from error


def weights_sha256(model: nn.Module) -> str:
    """The SHA-256 of the names and bytes (in logical order) of all parameters and of evaluation's statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
