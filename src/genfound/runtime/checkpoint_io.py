"""Checkpoints, files or folders: written whole or not at all, read without running code.

A sharded one is a folder: `state.ckpt` is what a file would be, but for the values of sharded tensors, which
`sharded_values` keeps beside it.
"""

import contextlib
import pickle
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError  # torch.load goes by the name of a file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from genfound.runtime.files import atomic_write, damaged, remove_tree, visible

STATE = "state.ckpt"
"""Of a sharded checkpoint."""

PARTIAL = ".partial-"
"""Before the name of a folder that is not written yet, or is being removed."""

ALIGNED = 64
"""Bytes of whose multiples torch's own tensors begin at."""


Tree = TypeVar("Tree")


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; the old one survives any failure."""

    def dump(temporary: Path) -> None:
        with open(temporary, "wb") as file, full_disk():  # which is an OSError only of a file object
            torch.save(state, file)

        if path.is_dir():
            remove(path)

    atomic_write(path, dump)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """What torch's archive raises, closing on a disk that has just filled, as the OSError that it is."""
    try:
        yield
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(None, str(error)) from None


def copied(state: Tree) -> Tree:
    """A tree with copies of its tensors on the host."""
    copy = tree_map_only(
        Tensor, lambda tensor: tensor if tensor.is_meta else tensor.detach().to("cpu", copy=True), state
    )
    return copy  # type: ignore[no-any-return]


def remove_left(folder: Path) -> None:
    """Remove what a killed process has left in a folder of checkpoints, where no other one writes."""
    for left in folder.glob(f"{PARTIAL}*"):
        remove_tree(left)


def remove(path: Path) -> None:
    """Remove a checkpoint, which is none any more from the beginning."""
    if not path.is_dir():
        path.unlink()
        return
    gone = path.with_name(f"{PARTIAL}removed-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(path.rename(gone))


def read(path: Path, allowed: Sequence[Any] = (), parts: Collection[str] | None = None) -> dict[str, Any]:
    """Open a sharded checkpoint, or a file of torch.save; no code in it is run.

    A file is mapped into memory, or loaded where it is of the format before torch 1.6.

    Args:
        path: of a file or a folder.
        allowed: for `torch.serialization.safe_globals`: classes that it may hold beside tensors and plain values.
        parts: beginnings of the names of the sharded tensors to read, see `sharded_values`; `None`: of all. The others
            have shape and dtype, and are on `meta`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is damaged, or holds other things.
    """
    if not path.is_dir():
        return _read_file(path, allowed)
    from genfound.runtime.sharded_values import SAVE, Values

    try:
        if not (path / STATE).is_file():
            raise damaged(path, f"it has no {STATE}")
        state, stored = _read_file(path / STATE, allowed), Values(path)
        if SAVE in state:  # those of before have none
            stored.check_save(state.pop(SAVE))
    except (FileNotFoundError, ValueError):
        if not path.is_dir():  # it was removed meanwhile
            raise FileNotFoundError(f"there is no checkpoint {path}") from None
        raise

    def target(name: str, shape: Tensor) -> Tensor:
        wanted = parts is None or name.startswith(tuple(parts))
        return torch.empty_like(shape, device="cpu") if wanted else shape

    return stored.filled(state, target)


def values(path: Path) -> Callable[[str, Any], Any]:
    """Reads a leaf of `read(path, parts=())`, one after another, so that no more than one need fit into memory."""
    if not path.is_dir():
        return lambda name, leaf: leaf
    from genfound.runtime.sharded_values import Values

    return Values(path).value


def _read_file(path: Path, allowed: Sequence[Any]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not path.stat().st_size:
        raise damaged(path, "it is empty")
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual versions of pickle
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError, LookupError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise damaged(path, reason) from None
    if not isinstance(state, dict):
        raise damaged(path, f"it holds a {type(state).__name__}")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file."""
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def newest(folder: Path) -> Path | None:
    """The checkpoint with the largest step recorded inside it, or None."""
    try:
        return max(visible(folder, "*.ckpt"), key=lambda file: int(read(file, parts=())["global_step"]), default=None)
    except FileNotFoundError:  # the run goes on, and has removed one meanwhile
        return newest(folder)


def set_aside_damaged(folder: Path) -> None:
    """Rename checkpoints to `<name>.damaged` that cannot be read, or whose bytes are not those that were written.

    The bytes are looked at from the last one back to the first that is whole, from which a run then continues.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    wrong: dict[Path, str] = {}
    whole = False
    for path in reversed(visible(folder, "*.ckpt")):
        try:
            read(path, parts=()) if whole else _check_bytes(path)
            whole = True
        except ValueError as error:
            wrong[path] = str(error)
    if wrong and not whole:
        raise ValueError(f"{next(iter(wrong.values()))}; no other checkpoint is whole: remove {folder} to begin anew")
    for path, reason in wrong.items():
        aside = path.rename(path.with_name(f"{path.name}.damaged"))
        print(f"{reason}; it is {aside.name} now", flush=True)


def _check_bytes(path: Path) -> None:
    """Compare the checksums in a checkpoint, then read it: changed bytes are kept from the unpickler.

    Raises:
        ValueError: it is damaged.
    """
    _check_archive(path / STATE if path.is_dir() else path, path)
    read(path, parts=())
    if path.is_dir():
        from genfound.runtime.sharded_values import Values

        for archive in Values(path).archives():
            _check_archive(archive, path)
            archive.seek(0)
            try:
                torch.load(archive, weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise damaged(path, str(error).splitlines()[0][:150]) from None


def _check_archive(file: Path | IO[bytes], path: Path) -> None:
    try:
        if isinstance(file, Path) and not zipfile.is_zipfile(file):
            return  # torch's format before 1.6, or nothing that `read` knows
        with zipfile.ZipFile(file) as archive:
            changed = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError, ValueError) as error:
        raise damaged(path, str(error)) from None
    if changed:
        raise damaged(path, f"{changed} is not what was written")


def load_strict(net: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy tensors into a network; one on `meta` takes them as they are, so that a file that is mapped is read once."""
    compare_keys(net, tensors, file)
    own = net.state_dict()
    assign = any(tensor.is_meta for tensor in own.values())
    given = {key: _usable(tensor, own[key]) for key, tensor in tensors.items()} if assign else dict(tensors)
    net.load_state_dict(given, assign=assign)


def _usable(tensor: Tensor, like: Tensor) -> Tensor:
    """In the dtype of another, and laid out as torch would: products over misaligned rows differ in their last bits."""
    tensor = tensor.to(like.dtype).contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor


def compare_keys(net: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Compare the names and shapes of tensors with those of a network."""
    own = net.state_dict()
    if foreign := sorted(str(key) for key, value in tensors.items() if not isinstance(value, Tensor)):
        raise ValueError(f"{file} holds no state dict: {foreign[0]} is not a tensor")
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape),
    }
    if found := [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in problems.items() if keys]:
        raise ValueError(f"{file} does not fit {type(net).__name__}: {'; '.join(found)}")
