"""Where a number of the emulated machine comes from: shown by `explain=true`, one line each."""

from typing import NamedTuple


class Origin(NamedTuple):
    """A figure that moves the emulated clock. `origin` is its source; one that begins with "assumed" is nobody's."""

    name: str
    value: float | str
    unit: str
    origin: str


def check_positive(owner: str, **figures: float) -> None:
    """Raises ValueError for the first figure that is not a positive number."""
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{owner}: {name}={value!r} must be a positive number")
