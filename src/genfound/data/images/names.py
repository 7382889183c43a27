"""Names of files, of which there may be millions and which may hold anything but a byte 0."""

import re
from collections.abc import Iterable, Sequence

import numpy as np


class Names:
    """Strings in one piece of memory, which is small and quickly sent to another process."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.table = b"\0".join(encoded)  # as the file system has them
        self._ends = np.cumsum([len(name) + 1 for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        begin, end = (int(self._ends[number - 1]) if number else 0), int(self._ends[number])
        return self.table[begin : end - 1].decode("utf-8", "surrogateescape")


def shown(name: object) -> str:
    """A name in one line that can be printed, whatever it holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def numbered(class_names: Sequence[str]) -> bool:
    """Whether all classes are named by whole numbers, and these are not 0, 1, 2, ... in this order."""
    whole = all(re.fullmatch(r"-?[0-9]+", name) for name in class_names)
    return whole and [int(name) for name in class_names] != list(range(len(class_names)))
