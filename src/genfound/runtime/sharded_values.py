"""Tensors in a folder of torch.distributed.checkpoint, of which each process writes its part; no code in it is run.

They have the names of `receipts.leaves`, such as `state_dict.net.blocks.0.attn.qkv.weight`.
"""

import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.utils._pytree import KeyPath, SequenceKey, tree_map_with_path

from genfound.runtime.files import damaged

METADATA = ".metadata"
"""What torch.distributed.checkpoint writes last."""

SAVE = "save"
"""Name of the number of a save, drawn at random, which each process writes beside its part."""

KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.storage": {"WriteResult"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
}  # fmt: skip
"""Module -> what the metadata of tensors may name; not that of pickled objects, which torch would load with code."""

Tree = TypeVar("Tree")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":  # of the folder where they were written
            return PurePosixPath
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def unpickled(file: Path) -> Any:
    """What torch.distributed.checkpoint says of tensors; code in it is an UnpicklingError."""
    with open(file, "rb") as stream:
        return _MetadataUnpickler(stream).load()


class Values(FileSystemReader):
    """The tensors in a folder.

    Raises:
        ValueError: a file of it is absent, cut short or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        ends: dict[str, int] = {}
        try:
            self._metadata: Metadata = unpickled(folder / METADATA)
            for info in self._metadata.storage_data.values():
                name, end = PurePosixPath(info.relative_path).name, info.offset + info.length
                ends[name] = max(end, ends.get(name, 0))
            short = [name for name, end in ends.items() if (folder / name).stat().st_size < end]
        except FileNotFoundError as error:
            raise damaged(folder, f"it has no {Path(str(error.filename)).name}") from None
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise damaged(folder, f"{METADATA}: {error}") from None
        if short:
            raise damaged(folder, f"{short[0]} is cut short")

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Torch's own would run code in the file."""
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        return self._metadata

    def archives(self) -> Iterator[io.BytesIO]:
        """The archive of each part of a tensor, with checksums."""
        for info in self._metadata.storage_data.values():
            with open(self._folder / PurePosixPath(info.relative_path).name, "rb") as file:
                file.seek(info.offset)
                yield io.BytesIO(file.read(info.length))

    def check_save(self, number: int) -> None:
        """Compare the number of the save in each part with that of the rest of the checkpoint.

        Raises:
            ValueError: a part is of another one.
        """
        names = [name for name in self._metadata.state_dict_metadata if name.startswith(f"{SAVE}.")]
        numbers = {name: torch.zeros((), dtype=torch.int64) for name in names}
        self.fill(numbers)
        if {int(own) for own in numbers.values()} != {number}:
            raise damaged(self._folder, "its files are of several checkpoints")

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read values into tensors, of DTensors this process's part."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it does not ask the other processes
                load(dict(tensors), storage_reader=self, no_dist=True)
        except CheckpointException as error:
            raise damaged(self._folder, str(_first(error)).strip().splitlines()[0][:150]) from None

    def filled(self, state: Tree, target: Callable[[str, Tensor], Tensor]) -> Tree:
        """A tree of `without_values` with values in the targets of (name, shape); those on `meta` get none."""
        targets: dict[str, Tensor] = {}

        def chosen(path: KeyPath, value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_meta:
                value = target(_name(path), value)
                targets.update({} if value.is_meta else {_name(path): value})
            return value

        full = tree_map_with_path(chosen, state)
        self.fill(targets)
        return full  # type: ignore[no-any-return]

    def value(self, name: str, leaf: Any) -> Any:
        """A leaf of a tree of `without_values`, with its value, whole and on the host."""
        if isinstance(leaf, Tensor) and leaf.is_meta:
            leaf = torch.empty_like(leaf, device="cpu")
            self.fill({name: leaf})
        return leaf


def without_values(state: Tree) -> tuple[Tree, dict[str, Tensor]]:
    """A tree in which sharded tensors have only shape and dtype, on `meta`; these tensors by name."""
    tensors: dict[str, Tensor] = {}

    def shape(path: KeyPath, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensors[_name(path)] = value.detach()
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return tree_map_with_path(shape, state), tensors


def _first(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def _name(path: KeyPath) -> str:
    keys = (f"[{key.idx}]" if isinstance(key, SequenceKey) else f".{key.key}" for key in path)  # type: ignore[attr-defined]
    return "".join(keys).removeprefix(".")
