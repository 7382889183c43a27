"""Names of files, of which there may be millions and which may hold anything but a byte 0, and of classes.

Class folders may look like class folders and be something else: splits, or the parts of a data set.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from genfound.runtime.files import visible

ENDING = r"(set|[-_ ]?(data|images|imgs))?[-_ ]?\d*"
TRAIN = re.compile(rf"train(ing)?{ENDING}", re.IGNORECASE)
OTHER = re.compile(rf"(val(id(ation)?)?|test(ing)?|dev|eval(uation)?){ENDING}", re.IGNORECASE)
"""Usual names of splits: train, Training, valid, test2017, train_images, ..."""

BUCKET = re.compile(r"\d{5,}")
"""What dataset_tool of StyleGAN and EDM cuts a data set into, and FFHQ comes in."""

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""With a column `file_name`, Hugging Face's ImageFolder takes labels from these and not from folders."""

PEEK = 2**16
"""Bytes at the beginning and at the end of a table that are searched for the name of a column."""


class Names:
    """Strings in one piece of memory, which is small and quickly sent to another process."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.table = b"\0".join(encoded)  # as the file system has them
        self._ends = np.cumsum([len(name) + 1 for name in encoded], dtype=np.int64)

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


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders."""
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    seen = visible(root)
    for path in seen:
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path} is a link that leads nowhere, perhaps of a class; mend or remove it")
    names = [path.name for path in seen if path.is_dir()]
    if not names:
        raise FileNotFoundError(f"data.root={root} has no class folders; put the images into {root}/<class>/")
    _refuse_splits(root, names)
    _refuse_labels_in_files(root, names)
    return names


def unique(names: Sequence[str]) -> list[str]:
    """Names of classes; those that several have, with the numbers of the classes."""
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def remarks(class_names: Sequence[str]) -> list[str]:
    """What a user should know about the names of the classes, in lines of the report."""
    lines = []
    if numbered(class_names):
        last = class_names[-1]
        lines.append(f"  classes are named by numbers, and a number is a name: labels=[{last}] is the folder {last}")
    if class_names and all(BUCKET.fullmatch(name) for name in class_names):
        listed = ", ".join(class_names[:3])
        lines.append(f"  warning: folders {listed} may be parts of a data set and no classes; here each is a class")
    return lines


def _refuse_splits(root: Path, names: Sequence[str]) -> None:
    """Raise a ValueError for folders train, val, test, ...: all of them, or of training and another beside others."""
    train, other = ([name for name in names if split.fullmatch(name)] for split in (TRAIN, OTHER))
    splits = train + other
    if len(splits) == len(names) or (train and other):
        raise ValueError(
            f"data.root={root}: {' and '.join(splits[:3])} by name are splits and no classes; "
            f"give data.root={root / splits[0]}, or another name to a class that is called so"
        )


def _refuse_labels_in_files(root: Path, names: Sequence[str]) -> None:
    """Raise a ValueError for labels that lie in a file of dataset_tool or Hugging Face."""
    if (root / "dataset.json").is_file() and all(BUCKET.fullmatch(name) for name in names):
        raise ValueError(
            f"{root / 'dataset.json'} of dataset_tool is not read, and {names[0]} is no class; "
            f"put the images into {root}/<class>/"
        )
    for folder in (root, *(root / name for name in names)):
        for table in TABLES:
            if _has_column(folder / table, b"file_name"):
                raise ValueError(
                    f"{folder / table} of Hugging Face's ImageFolder is not read; put the images into folders by "
                    f"class, or take this file away if the folders in {root} are the classes"
                )


def _has_column(table: Path, column: bytes) -> bool:
    """Whether a column is named at the beginning of a table, or at its end, as in parquet."""
    if not table.is_file():
        return False
    with open(table, "rb") as file:
        begin = file.read(PEEK)
        file.seek(max(table.stat().st_size - PEEK, 0))
        return column in begin or column in file.read()
