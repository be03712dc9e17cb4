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


def check_whole(owner: str, **numbers: int | None) -> None:
    """ValueError for the first that is no whole number of at least 1 (None is left out)."""
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{owner}: {name}={value!r} must be a whole number of at least 1")


def check_taper(owner: str, taper: float) -> None:
    if isinstance(taper, bool) or not isinstance(taper, (int, float)) or not 0 < taper <= 1:
        raise ValueError(f"{owner}: taper={taper!r} must be above 0 and at most 1 (1 is a non-blocking fabric)")


def check_shape(owner: str, shape: list[int]) -> tuple[int, ...]:
    if not len(shape):
        raise ValueError(f"{owner}: shape={list(shape)} has no dimensions; give at least one size")
    check_whole(owner, **{f"shape[{dim}]": size for dim, size in enumerate(shape)})
    return tuple(shape)
