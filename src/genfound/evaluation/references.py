"""What samples are measured with and against, made once and kept: probes, and statistics of real images."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genfound.config.checks import one_of
from genfound.data.images.npz import file_hash, read_member
from genfound.data.images.sets import Cropped, FolderImages, ImageSet, NpzImages, Subset, ignored_files
from genfound.data.latents.manifest import MANIFEST
from genfound.evaluation.dataset import RunDataset
from genfound.evaluation.protocol import Size, size_text
from genfound.evaluation.samples import content
from genfound.metrics.compute import check_count
from genfound.metrics.extractor import WEIGHTS, Extractor, Inception
from genfound.metrics.features import FeatureStore
from genfound.metrics.frechet import Gaussian
from genfound.metrics.probe import Probe, is_guessing, probe_key, train_probe
from genfound.metrics.reference_stats import (
    Reference,
    choose_reference,
    given_statistics,
    read_reference,
    reference_note,
    write_reference,
)
from genfound.rng import Rng
from genfound.runtime.files import atomic_write, digest, lock, visible
from genfound.runtime.processes import wait_until
from genfound.runtime.progress import shared_progress

Config = Mapping[str, Any]
GIVEN = "given"
"""A reference that was chosen by name, or its images as a file has them."""

DECODED = " of decoded latents"
"""Behind the name of a view."""

VIEWS = ("crop", "as_is", "same_size")


@dataclass(frozen=True)
class Workspace:
    """Where an evaluation works.

    Attributes:
        out: of results.jsonl.
        work: of samples and features until they are measured.
        references: of statistics and probes, which other evaluations can use too.
        device: of this process.
    """

    out: Path
    work: Path
    references: Path
    device: torch.device


def prepare_extractor(config: Config, dataset: RunDataset | None, workspace: Workspace) -> Extractor:
    """The extractor of a configuration; a probe is trained on the data set unless there is one already."""
    weights = config["extractor_weights"]
    if one_of("extractor", config["extractor"], ("inception", "probe")) == "inception":
        return Inception(weights or WEIGHTS, workspace.device)
    if weights is not None:
        return Probe.load(Path(weights), workspace.device)
    if dataset is None:
        raise ValueError("extractor=probe: images alone tell no data set; give extractor_weights=probe-*.safetensors")
    images = dataset.images("train")
    file = workspace.references / f"probe-{probe_key(images.key, dataset.classes)}.safetensors"
    _make_once(file, lambda: _train_probe(images, dataset, file))
    return Probe.load(file, workspace.device)


def _make_once(file: Path, make: Callable[[], object]) -> None:
    """Make a file, by one process at a time, unless it is there."""
    if not file.is_file():
        with lock(file, wait=True):
            if not file.is_file():
                make()


def _train_probe(images: ImageSet, dataset: RunDataset, file: Path) -> None:
    print("training a probe on the data set", flush=True)
    held_out = dataset.images("val")
    probe = train_probe(images, held_out, dataset.classes)
    probe.save(file)
    share = "" if probe.accuracy is None else f"; it recognises {probe.accuracy:.1%} of held-out images"
    print(f"probe: {file}{share}", flush=True)
    if probe.accuracy is not None and held_out.labels is not None and is_guessing(probe.accuracy, held_out.labels):
        print("warning: the probe has learned next to nothing of this data; its figures say as little", flush=True)


def prepare_reference(
    config: Config,
    size: Size | str,
    dataset: RunDataset | None,
    extractor: Extractor,
    workspace: Workspace,
    rank: int,
    ranks: int,
) -> tuple[Reference, dict[str, Any]]:
    """The reference for samples of a size, and what the protocol says of it.

    Args:
        config: with reference, reference_view and reference_images.
        size: (height, width) of the samples, `data`, or `mixed`.
        dataset: of the run, for `reference=data` or a latent store.
        extractor: computes features.
        workspace: where statistics are kept.
        rank, ranks: which of the processes this is that compute them together.
    """
    name, path, rule = str(config["reference"]), Path(config["reference"]), GIVEN
    ignored: dict[str, str] = {}
    if name.partition(":")[0] == "data" or (path.is_dir() and not visible(path, "*.npz")):
        images, view, ignored = _images_in_view(config, name, size, dataset, workspace)
        reference = read_reference(_statistics(images, view, None, extractor, workspace, rank, ranks), extractor)
    else:
        if path.is_dir():
            if isinstance(size, str):
                raise ValueError(f"reference={name} holds one file for each size, and these samples have several")
            path, rule = choose_reference(path, size)
        name = str(path)
        if reference_note(path) is not None or read_member(path, "arr_0") is None:
            reference = read_reference(path, extractor)
        else:
            hashed = file_hash(path)  # first, because that compares the checksums of the images
            given = given_statistics(path) or None
            file = _statistics(NpzImages(path), GIVEN, given, extractor, workspace, rank, ranks)
            reference = replace(read_reference(file, extractor), hash=hashed)
    note, points = reference.note, 0 if reference.points is None else len(reference.points)
    known = {"view": note.get("view", GIVEN), "size": note.get("size", "unknown"), "images": note.get("images")}
    return reference, {"from": name, "hash": reference.hash, "rule": rule, **known, "points": points, **ignored}


def _images_in_view(
    config: Config, name: str, size: Size | str, dataset: RunDataset | None, workspace: Workspace
) -> tuple[ImageSet, str, dict[str, str]]:
    """Images of a folder, a store or the data set as samples of a size are compared with them; view; ignored files."""
    view, limit = one_of("reference_view", config["reference_view"], VIEWS), config["reference_images"]
    if view != "as_is" and isinstance(size, str):
        raise ValueError(f"reference_view={view} needs samples of one size; these are of several: reference_view=as_is")
    images: ImageSet
    folder = None if name.partition(":")[0] == "data" else Path(name)
    if folder is not None and not (folder / MANIFEST).is_file():
        images = FolderImages(folder, config["max_pixels"])
        ignored, title = ignored_files(images), view
        images = _fitting(Subset(images, _order(images, workspace)), view, size)
        images = images if limit is None else Subset(images, np.arange(len(images))[:limit])
    else:
        data, split = _dataset(name, folder, dataset)
        ignored, title = {}, view + (DECODED if data.stored else "")
        images = _fitting(data.images(split, workspace.device), view, size)
        images = Subset(images, Rng(0, "reference").permutation("order", len(images)).numpy()[:limit])
    if view == "crop":
        images = Cropped(images, (int(size[0]), int(size[1])))
    return images, title, ignored


def _dataset(name: str, store: Path | None, dataset: RunDataset | None) -> tuple[RunDataset, str]:
    """The data set that a reference names, or the one of a store; and its split."""
    split = name.partition(":")[2] or "train" if store is None else "train"
    if split not in ("train", "val"):
        raise ValueError(f"reference={name} is unknown; choose data, data:train or data:val")
    if dataset is None:
        raise ValueError(f"reference={name}: images alone tell no data set and no decoder; give an .npz or a folder")
    return (dataset if store is None else dataset.of_store(store)), split


def _fitting(images: ImageSet, view: str, size: Size | str) -> ImageSet:
    """All images; for `same_size` those that have the size."""
    if view != "same_size":
        return images
    fitting = np.flatnonzero((images.sizes == np.array(size)).all(axis=1))
    if not len(fitting):
        raise ValueError(f"reference_view=same_size: no reference image is {size_text(size)} pixels")
    return Subset(images, fitting)


def _order(images: FolderImages, workspace: Workspace) -> np.ndarray:
    """The order of these images by content, kept because all of them are read for it."""
    file = workspace.references / f"{images.key}.order.npy"

    def make() -> None:
        print(f"reference: reading {len(images):,} files, once, for their order by content", flush=True)
        atomic_write(file, functools.partial(np.save, arr=content(images)[1]))

    _make_once(file, make)
    return np.asarray(np.load(file))


def _statistics(
    images: ImageSet,
    view: str,
    given: Mapping[str, Gaussian] | None,
    extractor: Extractor,
    workspace: Workspace,
    rank: int,
    ranks: int,
) -> Path:
    """The file of statistics of these images, computed by all processes unless it is there."""
    file = workspace.references / f"{digest(images.key, extractor.hash, view)}.npz"
    if file.is_file():
        return file
    if given is None:
        check_count("reference", len(images), extractor)
    features = FeatureStore(file.with_suffix(".parts"), len(images))

    def make() -> None:
        print(f"reference: {len(images):,} images, once; kept in {file}", flush=True)
        features.extract(images, extractor, rank, ranks, shared_progress("features", rank, ranks))
        wait_until(lambda: features.complete)
        write_reference(file, features, images, extractor, {"view": view}, given, workspace.device)
        shutil.rmtree(features.folder)

    def stop_if_there(done: float, total: int) -> None:
        if file.is_file():  # another command has made it meanwhile
            raise FileExistsError(file)

    if rank == 0:
        _make_once(file, make)
    else:
        with contextlib.suppress(FileExistsError):
            features.extract(images, extractor, rank, ranks, stop_if_there)
        wait_until(file.is_file)
    return file
