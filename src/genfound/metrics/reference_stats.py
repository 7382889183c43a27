"""What samples are measured against: statistics of real images, and the features of some of them.

The file is ADM's: `mu`, `sigma` (2048 pool features), `mu_s`, `sigma_s` (2023 spatial features) and `arr_0`,
images for precision and recall. Files that are written here also hold `points`, the features of those images, and
`note`, of what they were made. ADM's evaluator reads them, and ADM's files are read here.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfound.data.images.npz import ImageStack, file_hash, headers, read_member, write_npz
from genfound.data.images.sets import ImageSet, NpzImages
from genfound.metrics.extractor import Extractor
from genfound.metrics.features import FeatureStore
from genfound.metrics.frechet import Gaussian
from genfound.runtime.files import visible

SMALLEST = 32
"""Smaller numbers in the names of files are no sides of images."""

POINTS = 10_000
"""Images for precision and recall, as many as in ADM's files."""

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images."""

    gaussians: Mapping[str, Gaussian]  # of `pool` and, where known, `spatial`
    points: Tensor | None  # (M, D) pool features for precision and recall; `None` where the file has no images
    hash: str  # first 16 digits of the SHA-256 of the file
    note: Mapping[str, Any]  # what is known of the images: how many, of which size, which view


def read_reference(file: Path, extractor: Extractor) -> Reference:
    """Statistics of the features of an extractor, and what else the file holds."""
    note = reference_note(file) or {}
    made_by = note.get("extractor", {"name": "inception", "hash": None})
    if made_by["name"] != extractor.name or made_by["hash"] not in (None, extractor.hash):
        told = " ".join(filter(None, (made_by["name"], made_by["hash"])))
        both = f"the extractor {told}, and this is {extractor.name} {extractor.hash}"
        raise ValueError(f"reference={file} was made with {both}; give a reference of the same extractor")
    gaussians = given_statistics(file)
    if "pool" not in gaussians or len(gaussians["pool"].mean) != extractor.width:
        text = f"must have mu and sigma of the {extractor.width:,} features of {extractor.name}"
        raise ValueError(f"reference={file} {text}")
    points = read_member(file, "points")
    return Reference(gaussians, None if points is None else torch.tensor(points), file_hash(file), note)


def write_reference(
    file: Path, features: FeatureStore, images: ImageSet, extractor: Extractor, note: Mapping[str, Any],
    given: Mapping[str, Gaussian] | None = None, device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """Statistics of features, with images for ADM's evaluator where they are of one size and not in a file already.

    Args:
        file: what to write, ending in .npz.
        features, images, extractor: complete features of the images, computed by the extractor.
        note: how the images were taken; not where they lie, so that the file's hash is that of its content.
        given: statistics of a larger set that the images stand for, as in ADM's files.
        device: where to sum.
    """
    chosen = features.count if isinstance(images, NpzImages) else min(POINTS, features.count)
    columns = [name for name in STATISTICS if features.width(name)]
    gaussians = given or {name: features.gaussian(name, torch.device(device)) for name in columns}
    arrays: dict[str, np.ndarray | ImageStack] = {"points": features.column("pool", chosen).numpy()}
    for column, gaussian in gaussians.items():
        arrays |= zip(STATISTICS[column], (gaussian.mean.cpu().numpy(), gaussian.covariance.cpu().numpy()), strict=True)
    size = common_size(images)
    if size and not isinstance(images, NpzImages):
        arrays["arr_0"] = ImageStack((chosen, *size, 3), (images[number] for number in range(chosen)))
    facts = {
        **note,
        "extractor": {"name": extractor.name, "hash": extractor.hash},
        "images": None if given else features.count,
        "points": chosen,
        "size": list(size) if size else "mixed",
    }
    write_npz(file, {**arrays, "note": np.array(json.dumps(facts))})


def reference_note(file: Path) -> dict[str, Any] | None:
    """What a reference of ours says of itself; `None` for other files, also those with a note of their own."""
    if headers(file).get("note", ((), np.dtype(float)))[1].kind != "U":
        return None
    try:
        note = json.loads(str(read_member(file, "note")))
    except json.JSONDecodeError:
        return None
    made_by = note.get("extractor") if isinstance(note, dict) else None
    return note if isinstance(made_by, dict) and {"name", "hash"} <= made_by.keys() else None


def given_statistics(file: Path) -> dict[str, Gaussian]:
    """Statistics that a file holds, ADM's besides its images."""
    found = {}
    for column, names in STATISTICS.items():
        mean, covariance = (read_member(file, name) for name in names)
        if mean is not None and covariance is not None:
            try:
                found[column] = Gaussian(_double(mean), _double(covariance))
            except ValueError as error:
                raise ValueError(f"reference={file}: {', '.join(names)}: {error}") from None
    return found


def choose_reference(folder: Path, size: tuple[int, int]) -> tuple[Path, str]:
    """The file of a folder of references for samples of a size, and by which rule it was chosen.

    The one of images of exactly this size; otherwise the square one whose area is nearest, in ratio, the smaller one
    of two that are equally near.
    """
    files: dict[tuple[int, int] | None, list[Path]] = defaultdict(list)
    for file in visible(folder, "*.npz"):
        files[reference_size(file)].append(file)
    height, width, rule = *size, "of this size"
    if size not in files:
        sides = [found[0] for found in files if found and found[0] == found[1]]
        if not sides:
            raise FileNotFoundError(f"reference={folder} holds no .npz of {height}x{width} and none of square images")
        side = min(sides, key=lambda side: (round(abs(math.log(side**2 / (height * width))), 9), side))
        height, width, rule = side, side, "square, of the nearest area"
    first, *others = files[height, width]
    if others:
        both = f"{first.name} and {others[0].name}; give the path of one of them"
        raise ValueError(f"reference={folder} holds two files of {height}x{width}, {both}")
    return first, rule


def reference_size(file: Path) -> tuple[int, int] | None:
    """(height, width) of the images of a reference; `None` where they are of several sizes.

    By its note, otherwise by its `arr_0`, otherwise by its name: 256x128, or the last number of at least 32.
    """
    said = (reference_note(file) or {}).get("size")
    if said is not None:
        return (int(said[0]), int(said[1])) if isinstance(said, list) else None
    shape = headers(file).get("arr_0", ((), None))[0]
    if len(shape) == 4:
        return shape[1], shape[2]
    pair = re.search(r"(?<!\d)(\d+)x(\d+)(?!\d)", file.stem)
    if pair:
        return int(pair[1]), int(pair[2])
    sides = [int(number) for number in re.findall(r"\d+", file.stem) if int(number) >= SMALLEST]
    if not sides:
        way = f"rename it to {file.stem}_HEIGHTxWIDTH.npz"
        raise ValueError(f"reference={file} does not tell the size of its images; {way}")
    return sides[-1], sides[-1]


def common_size(images: ImageSet) -> tuple[int, int] | None:
    """The one size of a set, or `None`."""
    sizes = np.unique(images.sizes, axis=0)
    return (int(sizes[0, 0]), int(sizes[0, 1])) if len(sizes) == 1 else None


def _double(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{array.dtype} is no type of real numbers")
    return torch.tensor(np.asarray(array, dtype=np.float64))
