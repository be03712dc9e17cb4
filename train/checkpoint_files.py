"""The files of checkpoints, for those who look for them without loading torch: names, checksums, and the fence.

    checkpoints/attempt_0003/step_00000030.pt        what torch.save wrote
                             step_00000030.sha256    its checksum, as sha256sum writes and checks it

A checkpoint counts once its .pt is there under its name: the checksum is renamed into place before it. Whoever begins
to write takes the folder over by renaming it to the next attempt. A writer that was thought dead works by path, so its
next rename finds no folder: it can't put a file into its successor's run, however long it was stopped in between.
"""

import re
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path

_NAME = re.compile(r"step_\d{8}\.pt")
_ATTEMPT = re.compile(r"attempt_(\d{4,})")


class Fenced(RuntimeError):
    """Another writer has taken the run over; this one must leave it alone."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where an attempt's checkpoint after `step` finished steps lies."""
    return folder / f"step_{step:08d}.pt"


def checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder of them, oldest first."""
    return sorted(path for attempt in attempts(folder) for path in of_attempt(attempt))


def of_attempt(folder: Path) -> list[Path]:
    """The checkpoints of one attempt, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))


def attempts(folder: Path) -> list[Path]:
    """The folders of attempts, oldest first; there is more than one only where somebody copied them there."""
    found = [path for path in folder.glob("attempt_*") if _ATTEMPT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def take_over(folder: Path) -> Path:
    """Become the only one who may write checkpoints: a new attempt's folder, with all that the last one had saved."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = attempts(folder)
    number = int(earlier[-1].name.rpartition("_")[2]) + 1 if earlier else 1
    mine = folder / f"attempt_{number:04d}"
    if not earlier:
        mine.mkdir()
        return mine
    try:
        earlier[-1].rename(mine)
    except FileNotFoundError:
        raise Fenced(f"{folder}: another writer has taken the run over at this moment") from None
    for aside in mine.glob("*.tmp"):
        aside.unlink()  # what the last one was writing
    return mine


def check_fence(attempt: Path) -> None:
    """Fenced where a successor has taken the attempt's folder."""
    if not attempt.is_dir():
        raise Fenced(f"{attempt}: another writer has taken the run over; this one leaves it alone")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def defect(path: Path) -> str | None:
    """Why a checkpoint is not as it was written, in some words; None where it is."""
    try:
        noted, found = checksum_path(path).read_text().split(), sha256(path)
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    if len(noted) != 2 or noted[1] != path.name:
        return f"{checksum_path(path).name} holds no checksum of it"
    return None if noted[0] == found else "its SHA-256 is not the one noted when it was written"


def newest_sound(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written; `say` is told of every newer one that is not."""
    for path in reversed(list_checkpoints(folder)):
        problem = defect(path)
        if problem is None:
            return path
        say(f"{path}: {problem}; left aside for the one before")
    return None
