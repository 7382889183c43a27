"""Reading ahead in worker processes, whose errors arrive in their own words."""

import io
import multiprocessing
import pickle
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from genfound.config.checks import integer

Item = TypeVar("Item")
AHEAD = 4
"""Items that each worker has ready."""


class _Caught(Dataset[Any]):
    """A data set whose errors about files are items, since the loader would wrap them in its own traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            item = self.dataset[key]
            if get_worker_info() is not None:
                _Sharing(io.BytesIO()).dump(item)
        except (ValueError, OSError) as error:
            return error
        return item


class _Sharing(pickle.Pickler):
    """Moves the tensors of an item to shared memory.

    The loader's own thread would do that later; but an error there is lost, with the item, and the other process
    waits for it for ever.
    """

    def reducer_override(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return NotImplemented
        try:
            part.share_memory_()
        except RuntimeError as error:
            raise OSError(
                f"shared memory (/dev/shm) has no room for what the worker processes read: {error}; enlarge it (docker "
                "run --shm-size=8g), or set a smaller data.num_workers, or 0, which needs none"
            ) from None
        return str, ()


def read_ahead(dataset: Dataset[Item], keys: Iterable[Any], workers: int, pin_memory: bool = False) -> Iterator[Item]:
    """The items of a data set, which is sent to the workers once, in the order of keys that are drawn here."""
    integer("data.num_workers", workers, 0)
    loader = DataLoader(
        _Caught(dataset),
        batch_size=None,
        sampler=cast(Any, keys),
        num_workers=workers,
        multiprocessing_context=_start_method() if workers else None,
        pin_memory=pin_memory,
        prefetch_factor=AHEAD if workers else None,
    )
    return _items(iter(loader))


def _start_method() -> str:
    """A forked worker would keep a second copy of every weight that training changes; Windows has one method alone."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _items(loaded: Iterator[Any]) -> Iterator[Any]:
    try:
        for item in loaded:
            if isinstance(item, Exception):
                raise item
            yield item
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ValueError(
            "a process that reads the data was ended from outside, most often because memory was short: "
            "set a smaller data.num_workers, or 0, and give the same command again"
        ) from error
