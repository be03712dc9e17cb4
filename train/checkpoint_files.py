"""The names of checkpoint files, for those who look for them without loading torch."""

import re
from pathlib import Path

_NAME = re.compile(r"step_\d{8}\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps lies."""
    return folder / f"step_{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))
