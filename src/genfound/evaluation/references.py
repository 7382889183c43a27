"""What samples are measured with and against, made once and kept: probes, and statistics of real images."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genfound import build
from genfound.config.compose import TARGET
from genfound.data.images.npz import file_hash, read_member
from genfound.data.images.sets import FolderImages, ImageSet, by_content, digest, ignored_files
from genfound.data.latents.manifest import MANIFEST, read_manifest
from genfound.evaluation.extraction import ExtractTask, Where, data_images, open_extractor, perform
from genfound.metrics.compute import check_count
from genfound.metrics.extractor import WEIGHTS, Extractor
from genfound.metrics.features import FeatureStore
from genfound.metrics.frechet import Gaussian
from genfound.metrics.probe import is_guessing, probe_key, train_probe
from genfound.metrics.reference_stats import (
    Reference,
    choose_reference,
    given_statistics,
    read_reference,
    reference_note,
    write_reference,
)
from genfound.runtime import devices
from genfound.runtime.files import atomic_write, lock, visible
from genfound.runtime.processes import wait_until
from genfound.runtime.progress import ProgressCounter
from genfound.tokenizers import LatentSpec

Config = Mapping[str, Any]
Size = tuple[int, int]
GIVEN = "given"
"""A reference that was chosen by name, or its images as a file has them."""

STORE = "genfound.data.latents.store.Store"
DECODED = " of decoded latents"
"""Behind the name of a view."""


@dataclass(frozen=True)
class RunDataset:
    """The data set of a run.

    Attributes:
        config: of the run.
        spec: shape of its latents.
        classes: number of labels.
    """

    config: Config
    spec: LatentSpec
    classes: int

    def images(self, split: str) -> ImageSet:
        """Its images; `split` is `train` or `val`.

        Raises:
            ValueError: there are more or fewer classes than the run was trained on.
        """
        images = data_images(self.config, self.spec, split)
        found = len(images.source.class_names)
        if found != self.classes:
            root = self.config["data"].get("root")
            raise ValueError(f"data.root={root} has {found:,} classes, and the run was trained on {self.classes:,}")
        return images

    def of_store(self, root: Path) -> RunDataset:
        """The latents of a store in the place of its own images."""
        manifest, spec = read_manifest(root), self.spec
        made = manifest["tokenizer"]
        if (made["channels"], made["stride"]) != (spec.channels, spec.stride):
            raise ValueError(
                f"reference={root} holds latents of another tokenizer ({made['channels']} channels at stride "
                f"{made['stride']}, the run's have {spec.channels} at {spec.stride}); give images"
            )
        holdout = manifest["source"]["holdout"]
        own = {"max_image_tokens": None, **self.config["data"]}
        data = {**own, TARGET: STORE, "root": str(root), "holdout": holdout, "flip": False}
        return replace(self, config={**self.config, "data": data})


@dataclass(frozen=True)
class Workspace:
    """Where an evaluation works.

    Attributes:
        out: results.jsonl, and a folder of work for each set of samples until it is measured.
        references: statistics and probes that other evaluations can use too.
        devices: number of processes.
        accelerator: `auto`, `cpu` or `cuda`.
        rank, ranks: of the processes that share the work and are there already, as in training.
    """

    out: Path
    references: Path
    devices: int
    accelerator: str
    rank: int = 0
    ranks: int = 1

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return devices.device(self.accelerator)


@dataclass(frozen=True)
class Tool:
    """An extractor, and the file from which other processes can open it."""

    extractor: Extractor
    file: Path

    def extract(self, features: FeatureStore, where: Where, place: Workspace) -> None:
        """Compute what is not there yet; with the other ranks, if there are any, and it waits for them."""
        if place.ranks > 1:
            progress = ProgressCounter(f"features on the first of {place.ranks} processes")
            features.extract(where.open(place.device), self.extractor, place.rank, place.ranks, progress)
            wait_until(lambda: features.complete)
        elif not features.complete:
            folder, file = str(features.folder), str(self.file)
            task = ExtractTask(folder, where, features.count, self.extractor.name, file, place.accelerator)
            perform(task, place.devices, features.folder.with_suffix(".task"))


def prepare_extractor(config: Config, data: RunDataset | None, place: Workspace) -> Tool:
    """The extractor of a configuration; a probe is trained on the data set unless there is one already.

    Raises:
        FileNotFoundError: weights that are not there.
        ValueError: an unknown extractor, or a probe without a data set.
    """
    name, weights = config["extractor"], config["extractor_weights"]
    if name == "probe" and weights is None:
        if data is None:
            raise ValueError(
                "extractor=probe: images alone tell no data set; give extractor_weights=probe-*.safetensors"
            )
        images = data.images("train")
        file = place.references / f"probe-{probe_key(images.key, data.classes)}.safetensors"
        if not file.is_file():
            with lock(file, wait=True):
                if not file.is_file():
                    _train(images, data, file, place)
    else:
        file = Path(weights or WEIGHTS)
    return Tool(open_extractor(name, file, place.device), file)


def _train(images: ImageSet, data: RunDataset, file: Path, place: Workspace) -> None:
    print("training a probe on the data set", flush=True)
    held_out = data.images("val")
    probe = train_probe(images, held_out, data.classes, place.device)
    probe.save(file)
    share = "" if probe.accuracy is None else f"; it recognises {probe.accuracy:.1%} of held-out images"
    print(f"probe: {file}{share}", flush=True)
    if probe.accuracy is not None and held_out.labels is not None and is_guessing(probe.accuracy, held_out.labels):
        print("warning: the probe has learned next to nothing of this data; its figures say as little", flush=True)


def prepare_reference(
    config: Config, size: Size | str, data: RunDataset | None, tool: Tool, place: Workspace
) -> tuple[Reference, dict[str, Any]]:
    """The reference for samples of a size, and what the protocol says of it.

    Args:
        config: with reference, reference_view and reference_images.
        size: (height, width) of the samples, `data`, or `mixed`.
        data: of the run, for `reference=data`.
        tool: the extractor.
        place: where statistics are kept.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it does not fit the samples or the extractor.
    """
    asked = str(config["reference"])
    rule, given, path = GIVEN, None, Path(asked)
    ignored: dict[str, str] = {}
    if asked.partition(":")[0] == "data" or (path.is_dir() and not visible(path, "*.npz")):
        where, ignored = _view(config, asked, size, data, place)
        stored = where.config is not None and build.reads_latents(where.config)
        view = f"{where.view}{DECODED}" if stored else where.view
    else:
        if path.is_dir():
            if isinstance(size, str):
                raise ValueError(f"reference={asked} holds one file for each size, and these samples have several")
            path, rule = choose_reference(path, size)
        if reference_note(path) is not None or read_member(path, "arr_0") is None:
            reference = read_reference(path, tool.extractor)
            return reference, _facts(reference, str(path), rule)
        where, view, given = Where("path", str(path)), GIVEN, given_statistics(path) or None
    # Hashed before its images are used, because that compares their checksums.
    own = file_hash(path) if where.path == str(path) and path.is_file() else None
    reference = read_reference(_kept(where, view, given, tool, place), tool.extractor)
    if own is not None:
        reference = replace(reference, hash=own)
    return reference, {**_facts(reference, asked if rule == GIVEN else str(path), rule), **ignored}


def _view(
    config: Config, asked: str, size: Size | str, data: RunDataset | None, place: Workspace
) -> tuple[Where, dict[str, str]]:
    """Images of a folder or of the data set, as samples of this size are compared with them; see `ignored_files`."""
    view = config["reference_view"]
    fixed = None if isinstance(size, str) else size
    if view != "as_is" and fixed is None:
        raise ValueError(f"reference_view={view} needs samples of one size; these are of several: reference_view=as_is")
    options: dict[str, Any] = {"view": view, "size": fixed, "limit": config["reference_images"]}
    root, named = Path(asked), asked.partition(":")[0] == "data"
    if not named and not (root / MANIFEST).is_file():
        images = FolderImages(root)
        order, ignored = str(_order(images, place)), ignored_files(images)
        return Where("path", asked, order=order, **options, max_pixels=config["max_pixels"]), ignored
    split = asked.partition(":")[2] or "train" if named else "train"
    if split not in ("train", "val"):
        raise ValueError(f"reference={asked} is unknown; choose data, data:train or data:val")
    if data is None:
        raise ValueError(f"reference={asked}: images alone tell no data set and no decoder; give an .npz or a folder")
    data = data if named else data.of_store(root)
    spec = (data.spec.channels, data.spec.stride)
    return Where("data", None, data.config, split, spec, shuffled=True, **options), {}


def content(images: FolderImages) -> tuple[str, np.ndarray]:
    """16 digits of the SHA-256 of a folder's images, and their order by it; neither follows from their names."""
    digests = images.digests(ProgressCounter("files read"))
    order = by_content(digests)
    return hashlib.sha256(digests[order].tobytes()).hexdigest()[:16], order


def write_order(file: Path, order: np.ndarray) -> None:
    """Write an order for `Where`."""
    atomic_write(file, functools.partial(np.save, arr=order))


def _order(images: FolderImages, place: Workspace) -> Path:
    """The file of the order of these images by content, kept because all of them are read for it."""
    file = place.references / f"{images.key}.order.npy"
    if not file.is_file():
        with lock(file, wait=True):
            if not file.is_file():
                print(f"reference: reading {len(images):,} files, once, for their order by content", flush=True)
                write_order(file, content(images)[1])
    return file


def _kept(where: Where, view: str, given: Mapping[str, Gaussian] | None, tool: Tool, place: Workspace) -> Path:
    """The file of statistics of these images, computed unless it is there."""
    images = where.open(place.device)
    file = place.references / f"{digest(images.key, tool.extractor.hash, view)}.npz"
    if not file.is_file():
        if given is None:
            check_count("reference", len(images), tool.extractor)
        features = FeatureStore(file.with_suffix(".parts"), len(images))
        if place.rank != 0:
            _share(file, features, images, tool, place)
            return file
        with lock(file, wait=True):
            if not file.is_file():
                print(f"reference: {len(images):,} images, once; kept in {file}", flush=True)
                tool.extract(features, where, place)
                write_reference(file, features, images, tool.extractor, {"view": view}, given, place.device)
                shutil.rmtree(features.folder)
    return file


def _share(file: Path, features: FeatureStore, images: ImageSet, tool: Tool, place: Workspace) -> None:
    """What a rank other than the first does for a file of statistics: its features, unless the file is there first."""

    def go_on(done: float, total: int) -> None:
        if file.is_file():
            raise FileExistsError(file)

    with contextlib.suppress(FileExistsError):
        features.extract(images, tool.extractor, place.rank, place.ranks, go_on)
    wait_until(file.is_file)


def _facts(reference: Reference, origin: str, rule: str) -> dict[str, Any]:
    """What the protocol says of a reference."""
    points = reference.points
    return {
        "from": origin,
        "hash": reference.hash,
        "rule": rule,
        "view": reference.note.get("view", GIVEN),
        "size": reference.note.get("size", "unknown"),
        "images": reference.note.get("images"),
        "points": 0 if points is None else len(points),
    }
