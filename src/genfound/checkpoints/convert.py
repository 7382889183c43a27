"""A checkpoint between the released format of its family and genfound's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfound import build
from genfound.checkpoints import formats
from genfound.checkpoints.load import LoadedModel, Weights, _same, _shape, find
from genfound.checkpoints.official.families import FAMILIES
from genfound.runtime import checkpoint_io
from genfound.runtime.files import check_folder


def to_official(
    config: Mapping[str, Any], state: Mapping[str, Tensor], sizes: list[tuple[int, int]]
) -> dict[str, Tensor]:
    """Our tensors in the shapes and orders of the official code.

    Raises:
        ValueError: a backbone that was never published.
    """
    package, _, family = str(config["model"]["_target_"]).rpartition(".")[0].rpartition(".")
    if package != "genfound.backbones" or family not in FAMILIES:
        raise ValueError(f"{config['model']['_target_']} has no official format")
    unit = build.published_spec(config).stride * config["model"]["patch_size"]
    grid = (sizes[0][0] // unit, sizes[0][1] // unit)
    return FAMILIES[family].theirs(state, config["model"]["patch_size"], grid)


class Conversion(NamedTuple):
    """What `convert` wrote."""

    file: Path
    format: str
    tensors: int
    parameters: int


def convert(
    path: Path, to: str, file_format: str | None, weights: str = "ema", trust: Collection[str] = (), **hints: Any
) -> Conversion:
    """Write weights in the other format; a way there and back gives every tensor bit by bit.

    Args:
        path: what `load` takes.
        to: a file (.safetensors; the official format also .pt, .pth, .bin), or a folder, ending in /.
        file_format: `official`, `genfound`, or `None` for the other one than it is.
        weights, trust, hints: see `load`.

    Raises:
        ValueError: an unknown format, or a model that was never published in it; and what `load` raises.
    """
    if file_format not in (None, "official", "genfound"):
        raise ValueError(f"format={file_format} is unknown; choose official or genfound")
    check_folder("to", Path(to) if to.endswith("/") else Path(to).parent)
    found = find(path, weights, trust, **hints)
    with torch.device("meta"):
        net = build.net(found.config, _shape(found), len(found.class_names))
    checkpoint_io.compare_keys(net, found.state, path)
    chosen = file_format or ("official" if found.official is None else "genfound")
    file = _destination(path, to, chosen)
    ours_again = chosen == "genfound" and found.official is None
    theirs = {} if ours_again else to_official(found.config, found.state, found.sizes)
    kept = found.kept if found.official is None else _differing(found.official, theirs)
    if chosen == "official":
        state = theirs | dict(kept)
        formats.write(file, state)
    else:
        state = {**found.state, **{f"{formats.KEPT}{key}": tensor for key, tensor in kept.items()}}
        formats.write(file, state, _note(found))
    return Conversion(file, chosen, len(state), sum(tensor.numel() for tensor in state.values()))


def save(loaded: LoadedModel, file: Path) -> None:
    """Write a model to a .safetensors that `load` takes, whatever it was loaded from."""
    formats.write(file, loaded.net.state_dict(), _note(loaded))


def _note(model: Weights | LoadedModel) -> dict[str, Any]:
    config = {key: value for key, value in model.config.items() if key not in ("trust", "format")}
    return {"format": formats.FORMAT, "config": config, "class_names": model.class_names, "sizes": model.sizes}


def _destination(path: Path, to: str, chosen: str) -> Path:
    """The file to write."""
    legal = (".safetensors",) if chosen == "genfound" else (".safetensors", ".pt", ".pth", ".bin")
    file = Path(to) / f"{path.stem}.safetensors" if to.endswith("/") or Path(to).is_dir() else Path(to)
    if file.suffix not in legal:
        raise ValueError(f"to={to} must end in {', '.join(legal)}, or in / for a folder")
    if file.resolve() == path.resolve():
        raise ValueError(f"to={to} is the file itself")
    return file


def _differing(state: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an official state dict that our network does not give back bit by bit."""
    return {key: value for key, value in state.items() if key not in again or not _same(again[key], value)}
