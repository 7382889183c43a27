"""What samples are measured against: statistics of real images, and the features of some of them.

The file is ADM's: `mu`, `sigma` (2048 pool features), `mu_s`, `sigma_s` (2023 spatial features) and `arr_0`,
images for precision and recall. Files that are written here also hold `points`, the features of those images, and
`note`, of what they were made. ADM's evaluator reads them, and ADM's files are read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfound.metrics.extractor import Extractor
from genfound.metrics.features import Features
from genfound.metrics.frechet import Gaussian
from genfound.metrics.images import ImageSet, NpzImages
from genfound.metrics.npz import Stack, read_member, write_npz

POINTS = 10_000
"""Images for precision and recall, as many as in ADM's files."""

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images.

    Attributes:
        gaussians: of `pool` and, where known, `spatial`.
        points: (M, D) pool features for precision and recall; `None` where the file has no images.
        hash: first 16 digits of the SHA-256 of the file.
        note: what is known of the images: how many, of which size, where from.
    """

    gaussians: Mapping[str, Gaussian]
    points: Tensor | None
    hash: str
    note: Mapping[str, Any]


def read_reference(file: Path, extractor: Extractor) -> Reference:
    """A file that holds all it needs; see `is_complete`.

    Raises:
        ValueError: damaged statistics, or those of another extractor.
    """
    note = reference_note(file) or {}
    made_by = note.get("extractor", {"name": "inception", "hash": None})
    if made_by["name"] != extractor.name or made_by["hash"] not in (None, extractor.hash):
        told = " ".join(filter(None, (made_by["name"], made_by["hash"])))
        raise ValueError(
            f"reference={file} was made with the extractor {told}, and this is {extractor.name} {extractor.hash}; "
            "give a reference of the same extractor"
        )
    gaussians = {}
    for column, names in STATISTICS.items():
        mean, covariance = (read_member(file, name) for name in names)
        if mean is not None and covariance is not None:
            try:
                gaussians[column] = Gaussian(_double(mean), _double(covariance))
            except ValueError as error:
                raise ValueError(f"reference={file}: {', '.join(names)}: {error}") from None
    if "pool" not in gaussians or len(gaussians["pool"].mean) != extractor.width:
        raise ValueError(
            f"reference={file} must have mu and sigma of the {extractor.width:,} features of {extractor.name}"
        )
    points = read_member(file, "points")
    return Reference(gaussians, None if points is None else torch.tensor(points), file_hash(file), note)


def write_reference(
    file: Path,
    features: Features,
    images: ImageSet,
    extractor: Extractor,
    note: Mapping[str, Any],
    given: Mapping[str, Gaussian] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Statistics of features, with images for ADM's evaluator where they are of one size and not in a file already.

    Args:
        file: what to write, ending in .npz.
        features: of the images, complete.
        images: the set.
        extractor: what computed the features.
        note: where the images are from.
        given: statistics of a larger set that the images stand for, as in ADM's files.
        device: where to sum.

    Raises:
        ValueError: fewer images than two, or features that are not finite.
    """
    chosen = features.count if isinstance(images, NpzImages) else min(POINTS, features.count)
    columns = [name for name in STATISTICS if features.has(name)]
    gaussians = given or {name: features.gaussian(name, torch.device(device)) for name in columns}
    arrays: dict[str, np.ndarray | Stack] = {"points": features.column("pool", chosen).numpy()}
    for column, gaussian in gaussians.items():
        arrays |= zip(STATISTICS[column], (gaussian.mean.cpu().numpy(), gaussian.covariance.cpu().numpy()), strict=True)
    size = common_size(images)
    if size is not None and not isinstance(images, NpzImages):
        arrays["arr_0"] = Stack((chosen, *size, 3), (images[number] for number in range(chosen)))
    facts = {
        **note,
        "extractor": {"name": extractor.name, "hash": extractor.hash},
        "images": None if given else features.count,
        "points": chosen,
        "size": list(size) if size else "mixed",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_npz(file, {**arrays, "note": np.array(json.dumps(facts))})


def reference_note(file: Path) -> dict[str, Any] | None:
    """What a reference of ours says of itself; `None` for other files."""
    note = read_member(file, "note")
    return None if note is None else dict(json.loads(str(note)))


def given_statistics(file: Path) -> dict[str, Gaussian] | None:
    """Statistics that ADM's file carries besides its images.

    Raises:
        ValueError: they are damaged.
    """
    found = {}
    for column, names in STATISTICS.items():
        mean, covariance = (read_member(file, name) for name in names)
        if mean is not None and covariance is not None:
            found[column] = Gaussian(_double(mean), _double(covariance))
    return found or None


def choose_reference(folder: Path, size: tuple[int, int]) -> tuple[Path, str]:
    """The file of a folder of references for samples of a size, and by which rule it was chosen.

    The one of images of exactly this size; otherwise the square one whose area is nearest, in ratio, the smaller one
    of two that are equally near.

    Raises:
        FileNotFoundError: the folder holds neither.
    """
    sizes = {file: reference_size(file) for file in sorted(folder.glob("*.npz"))}
    exact = [file for file, found in sizes.items() if found == size]
    if exact:
        return exact[0], "of this size"
    square = {file: found[0] ** 2 for file, found in sizes.items() if found and found[0] == found[1]}
    if not square:
        raise FileNotFoundError(f"reference={folder} holds no .npz of {size[0]}x{size[1]} and none of square images")
    area = size[0] * size[1]
    nearest = min(square, key=lambda file: (round(abs(math.log(square[file] / area)), 9), square[file]))
    return nearest, "square, of the nearest area"


def reference_size(file: Path) -> tuple[int, int] | None:
    """(height, width) of the images of a reference: of its `arr_0`, otherwise 256x128 or 256 in its name."""
    images = read_member(file, "arr_0")
    if images is not None and images.ndim == 4:
        return int(images.shape[1]), int(images.shape[2])
    named = re.search(r"(\d+)x(\d+)", file.stem) or re.search(r"(\d+)()", file.stem)
    return (int(named[1]), int(named[2] or named[1])) if named else None


def file_hash(file: Path) -> str:
    """First 16 digits of the SHA-256 of a file, as sha256sum prints it."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def common_size(images: ImageSet) -> tuple[int, int] | None:
    """The one size of a set, or `None`."""
    sizes = np.unique(images.sizes, axis=0)
    return (int(sizes[0, 0]), int(sizes[0, 1])) if len(sizes) == 1 else None


def _double(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)
