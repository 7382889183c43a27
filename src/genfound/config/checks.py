"""Values that a user has set: each is what it should be, or a ValueError names its key and what it may be."""

import math
from collections.abc import Collection, Sequence
from typing import Any


def one_of(key: str, value: str, names: Collection[str]) -> str:
    """The value, if it is one of the names."""
    if value not in names:
        raise ValueError(f"{key}={value} is unknown; choose one of {', '.join(names)}")
    return value


def integer(key: str, value: Any, least: int, or_null: bool = False) -> None:
    """Nothing, if the value is a whole number of at least `least`, or `None` where that is allowed."""
    if (value is None and or_null) or (type(value) is int and value >= least):
        return
    given, allowed = "null" if value is None else value, ", or null" if or_null else ""
    raise ValueError(f"{key}={given} must be a whole number of at least {least}{allowed}")


def number(key: str, value: Any, low: float = -math.inf, high: float = math.inf, above: bool = False) -> float:
    """The value, if it is a finite number in [low, high], and above `low` where it has to be."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if numeric and math.isfinite(value) and low <= value <= high and not (above and value == low):
        return float(value)
    least = f" above {low:g}" if above else f" of at least {low:g}" if math.isfinite(low) else ""
    most = f"{' and' if least else ''} at most {high:g}" if math.isfinite(high) else ""
    raise ValueError(f"{key}={value} must be a finite number{least}{most}")


def texts(key: str, value: Any, what: str) -> None:
    """Nothing, if the value is a list of texts that are not empty, and there is one."""
    if not (isinstance(value, list) and value and all(isinstance(part, str) and part for part in value)):
        raise ValueError(f"{key}={value} must be a list of {what}")


def interval(key: str, value: Any) -> tuple[float, float]:
    """The value, if it is [low, high] with low <= high."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        low, high = number(key, value[0]), number(key, value[1])
        if low <= high:
            return low, high
    raise ValueError(f"{key}={value} must be [low, high] with low <= high")


def image_sizes(key: str, value: Any) -> list[tuple[int, int]]:
    """[height, width], or a list of such, as pairs of pixels."""
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if not all(isinstance(row, list) and len(row) == 2 and all(type(side) is int for side in row) for row in rows):
        raise ValueError(f"{key}={value} must be [height,width] or a list of such pairs, in pixels")
    return [(row[0], row[1]) for row in rows]


def accelerator(key: str, wanted: str) -> None:
    """`auto`, `cpu`, `cuda` or `mps`."""
    one_of(key, wanted, ("auto", "cpu", "cuda", "mps"))
