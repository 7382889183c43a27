"""Reading ahead in worker processes, whose errors arrive in their own words."""

import io
import multiprocessing
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from genfound.config.checks import integer

Item = TypeVar("Item")
AHEAD = 4
"""Items that each worker has ready."""
ALIGNMENT = 64
"""Bytes; every tensor of a buffer begins at a multiple of them."""


class _Caught(Dataset[Any]):
    """A data set whose items travel as `_OneBuffer`, and whose errors about files are items.

    The loader would wrap errors in its own traceback.
    """

    def __init__(self, dataset: Dataset[Any], pin_memory: bool) -> None:
        self.dataset = dataset
        self.pin_memory = pin_memory

    def __getitem__(self, key: Any) -> Any:
        in_worker = get_worker_info() is not None
        try:
            item = self.dataset[key]
            return _OneBuffer.of(item, in_worker) if in_worker or self.pin_memory else item
        except (ValueError, OSError) as error:
            return error


@dataclass(frozen=True)
class _OneBuffer:
    """An item whose tensors lie in one buffer, which goes to another process, or is pinned, in one piece.

    Of separate tensors each takes an open file in both processes and a connection between them: a few hundred images
    in an item pass the 1,024 files that a process may open by default.
    """

    item: bytes
    buffer: Tensor

    @staticmethod
    def of(item: Any, shared: bool) -> "_OneBuffer":
        """An item, which other processes can read where it is shared."""
        file = io.BytesIO()
        pickler = _TensorsApart(file)
        pickler.dump(item)
        buffer = torch.empty(pickler.bytes, dtype=torch.uint8)
        if shared:
            _share(buffer)
        for part, place in pickler.found:
            place.of(buffer).copy_(part)
        return _OneBuffer(file.getvalue(), buffer)

    def pin_memory(self) -> "_OneBuffer":
        """The same in page-locked host memory (called by the DataLoader)."""
        return _OneBuffer(self.item, self.buffer.pin_memory())

    def unpacked(self) -> Any:
        """The item; its tensors are views of the buffer."""
        return _TensorsBack(io.BytesIO(self.item), self.buffer).load()


class _Place(NamedTuple):
    """Where a tensor lies in a buffer."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, buffer: Tensor) -> Tensor:
        size = prod(self.shape) * self.dtype.itemsize
        return buffer[self.begin : self.begin + size].view(self.dtype).view(self.shape)


class _TensorsApart(pickle.Pickler):
    """Pickles an item but for its tensors, which it lists with a place for each."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.found: list[tuple[Tensor, _Place]] = []
        self.bytes = 0

    def persistent_id(self, part: Any) -> _Place | None:
        if not isinstance(part, Tensor):
            return None
        place = _Place(self.bytes, part.dtype, tuple(part.shape))
        self.found.append((part, place))
        self.bytes += ceil(part.nbytes / ALIGNMENT) * ALIGNMENT
        return place


class _TensorsBack(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffer: Tensor) -> None:
        super().__init__(file)
        self.buffer = buffer

    def persistent_load(self, place: _Place) -> Tensor:
        return place.of(self.buffer)


def _share(buffer: Tensor) -> None:
    """In the loader's own thread an error would be lost, with the item, and the other process would wait for ever."""
    try:
        buffer.share_memory_()
    except RuntimeError as error:
        raise OSError(
            f"shared memory (/dev/shm) has no room for what the worker processes read: {error}; enlarge it (docker "
            "run --shm-size=8g), or set a smaller data.num_workers, or 0, which needs none"
        ) from None


def read_ahead(dataset: Dataset[Item], keys: Iterable[Any], workers: int, pin_memory: bool = False) -> Iterator[Item]:
    """The items of a data set, which is sent to the workers once, in the order of keys that are drawn here."""
    integer("data.num_workers", workers, 0)
    loader = DataLoader(
        _Caught(dataset, pin_memory),
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
            yield item.unpacked() if isinstance(item, _OneBuffer) else item
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ValueError(
            "a process that reads the data was ended from outside, most often because memory was short: "
            "set a smaller data.num_workers, or 0, and give the same command again"
        ) from error
