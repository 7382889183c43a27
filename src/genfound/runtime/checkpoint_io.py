"""Checkpoint files: written whole or not at all, read without running code."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genfound.runtime.files import atomic_write, visible


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; the old file survives any failure."""

    def dump(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a full disk is an OSError only of a file object
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's archive, closing on a disk that has just filled
                raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from None

    atomic_write(path, dump)


def read(path: Path, allowed: Sequence[type] = ()) -> dict[str, Any]:
    """Open a file of torch.save: mapped into memory, or loaded where it is of the format before torch 1.6.

    It may hold tensors, plain values and the allowed classes; no code in it is run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is damaged or is not a checkpoint of tensors: it is empty")
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual versions of pickle
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged or is not a checkpoint of tensors: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged or is not a checkpoint of tensors: it holds a {type(state).__name__}")
    return state


def newest(folder: Path) -> Path | None:
    """The checkpoint with the largest step recorded inside it, or None."""
    try:
        return max(visible(folder, "*.ckpt"), key=lambda file: int(read(file)["global_step"]), default=None)
    except FileNotFoundError:  # the run goes on, and has removed one meanwhile
        return newest(folder)


def load_strict(net: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy tensors into a network."""
    compare_keys(net, tensors, file)
    net.load_state_dict(dict(tensors))


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
