"""Reading ahead in worker processes, whose errors arrive in their own words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")
AHEAD = 4
"""Items that each worker has ready."""


class _Caught(Dataset[Any]):
    """A data set whose errors about files are items, since the loader would wrap them in its own traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except (ValueError, OSError) as error:
            return error


def read_ahead(dataset: Dataset[Item], keys: Iterable[Any], workers: int, pin_memory: bool = False) -> Iterator[Item]:
    """The items of a data set, in the order of the keys.

    Args:
        dataset: is sent to the workers once.
        keys: are drawn in this process.
        workers: number of processes; 0 reads in this one.
        pin_memory: page-locked host memory, for CUDA.

    Raises:
        ValueError, OSError: as the data set raised it.
    """
    loader = DataLoader(
        _Caught(dataset),
        batch_size=None,
        sampler=cast(Any, keys),
        num_workers=workers,
        # A forked worker would keep a second copy of every weight that training changes.
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin_memory,
        prefetch_factor=AHEAD if workers else None,
    )
    return map(_raised, iter(loader))


def _raised(item: Any) -> Any:
    if isinstance(item, Exception):
        raise item
    return item
