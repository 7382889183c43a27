"""A checkpoint between the released format of its family and genfound's."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfound import build
from genfound.checkpoints import formats
from genfound.checkpoints.diffusers import write as diffusers_folder
from genfound.checkpoints.load import Weights, find
from genfound.checkpoints.official import lightningdit
from genfound.checkpoints.official.families import FAMILIES
from genfound.runtime import checkpoint_io
from genfound.runtime.files import check_folder


def to_official(
    config: Mapping[str, Any], state: Mapping[str, Tensor], sizes: list[tuple[int, int]]
) -> dict[str, Tensor]:
    """Our tensors in the shapes and orders of the official code."""
    package, _, family = str(config["model"]["_target_"]).rpartition(".")[0].rpartition(".")
    if package != "genfound.backbones" or family not in FAMILIES:
        raise ValueError(f"{config['model']['_target_']} has no official format")
    unit = build.published_spec(config).stride * config["model"]["patch_size"]
    grid = (sizes[0][0] // unit, sizes[0][1] // unit)
    theirs = FAMILIES[family].theirs(state, config["model"]["patch_size"], grid)
    return theirs | FAMILIES[family].tables(config, grid)


class Conversion(NamedTuple):
    """What `convert` wrote."""

    file: Path
    format: str
    tensors: int
    parameters: int
    remarks: Sequence[str] = ()  # what is to be known about it, in lines for the user


def convert(
    path: Path, to: str, file_format: str | None, weights: str = "ema", trust: Collection[str] = (),
    native: bool | str = "auto", **hints: Any,
) -> Conversion:  # fmt: skip
    """Write weights in the other format; a way there and back gives every tensor bit by bit.

    Args:
        path, weights, trust, hints: see `load`.
        to: a file (.safetensors; the official format also .pt, .pth, .bin), or a folder, ending in /.
        file_format: `official`, `genfound`, or `None` for the other one than it is; or `diffusers`, a folder.
        native: see `diffusers.write`; without effect on other formats.
    """
    if file_format not in (None, "official", "genfound", "diffusers"):
        raise ValueError(f"format={file_format} is unknown; choose official, genfound or diffusers")
    if file_format == "diffusers":
        diffusers_folder.check(Path(to), native)
    check_folder("to", Path(to) if to.endswith("/") else Path(to).parent)
    found = find(path, weights, trust, **hints)
    _compare(found, path)
    if file_format == "diffusers":
        return _to_folder(found, path, Path(to), native)
    chosen = file_format or ("official" if found.official is None else "genfound")
    file = _destination(path, to, chosen)
    ours_again = chosen == "genfound" and found.official is None
    theirs = {} if ours_again else to_official(found.config, found.state, found.sizes)
    kept = found.kept
    if found.official is not None:  # what our network does not give back bit by bit
        kept = {key: value for key, value in found.official.items() if not _same(theirs.get(key), value)}
    if chosen == "official":
        state = theirs | dict(kept)
        formats.write(file, state, content=FAMILIES[build.name_of(found.config["model"])].content)
    else:
        state = {**found.state, **{f"{formats.KEPT}{key}": tensor for key, tensor in kept.items()}}
        config = {key: value for key, value in found.config.items() if key not in ("trust", "format")}
        note = {"format": formats.FORMAT, "config": config, "class_names": found.class_names, "sizes": found.sizes}
        formats.write(file, state, note)
    return Conversion(file, chosen, len(state), sum(tensor.numel() for tensor in state.values()))


def _compare(found: Weights, path: Path) -> None:
    """Raise a ValueError unless weights are those of their configuration."""
    pattern = r"(x_embedder|pos_embed)\.proj1?\.weight|input_blocks\.0\.0\.weight"
    first = next(tensor for name, tensor in found.state.items() if re.fullmatch(pattern, name))
    channels = first.shape[1] // (1 if first.ndim == 4 else found.config["model"]["patch_size"] ** 2)
    spec = build.published_spec(found.config)._replace(channels=channels)  # no tokenizer is built
    with torch.device("meta"):
        net = build.net(found.config, spec, len(found.class_names))
    checkpoint_io.compare_keys(net, found.state, path)


def _to_folder(found: Weights, path: Path, folder: Path, native: bool | str) -> Conversion:
    """Write a folder of diffusers."""
    state = to_official(found.config, found.state, found.sizes)
    state = {name: tensor for name, tensor in state.items() if name not in lightningdit.TABLES}  # computed there
    model = diffusers_folder.Model(found.config, state, found.class_names, found.sizes)
    remarks = diffusers_folder.write(model, folder, native, path)
    return Conversion(folder, "diffusers", len(state), sum(tensor.numel() for tensor in state.values()), remarks)


def _destination(path: Path, to: str, chosen: str) -> Path:
    legal = (".safetensors",) if chosen == "genfound" else (".safetensors", ".pt", ".pth", ".bin")
    file = Path(to) / f"{path.stem}.safetensors" if to.endswith("/") or Path(to).is_dir() else Path(to)
    if file.suffix not in legal:
        raise ValueError(f"to={to} must end in {', '.join(legal)}, or in / for a folder")
    if file.resolve() == path.resolve():
        raise ValueError(f"to={to} is the file itself")
    return file


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and torch.equal(a, b)
