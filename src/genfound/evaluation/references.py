"""What samples are measured with and against, made once and kept: probes, and statistics of given images or data."""

import contextlib
import functools
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch

from genfound import build
from genfound.config import compose
from genfound.config.checks import one_of
from genfound.data.images import sets
from genfound.data.images.base import LatentSource, PictureSource
from genfound.data.images.npz import file_hash, read_member
from genfound.data.images.pixels import to_uint8
from genfound.data.images.sets import ImageSet
from genfound.data.latents.manifest import MANIFEST, read_manifest
from genfound.data.latents.stored_tokenizer import StoredTokenizer
from genfound.evaluation.protocol import size_text
from genfound.evaluation.provenance import decoder_identity
from genfound.metrics import reference_stats
from genfound.metrics.compute import check_count
from genfound.metrics.extractor import WEIGHTS, Extractor, Inception
from genfound.metrics.features import FeatureStore
from genfound.metrics.frechet import Gaussian
from genfound.metrics.probe import Probe, is_guessing, probe_key, train_probe
from genfound.rng import Rng
from genfound.runtime.devices import float32_products
from genfound.runtime.files import atomic_write, digest, make_once, visible
from genfound.runtime.processes import wait_until
from genfound.runtime.progress import shared_progress
from genfound.sampling.requests import Size
from genfound.tokenizers import LatentSpec

GIVEN = "given"
"""A reference that was chosen by name, or its images as a file has them."""

DECODED = " of decoded latents"
"""Behind the name of a view."""

VIEWS = ("crop", "as_is", "same_size")


@dataclass(frozen=True)
class Workspace:
    """Where an evaluation works, and which of the processes that share the work this is."""

    out: Path  # of results.jsonl
    work: Path  # of samples and features until they are measured
    references: Path  # of statistics and probes, which other evaluations can use too
    device: torch.device
    rank: int = 0
    ranks: int = 1
    barrier: Callable[[], object] = lambda: None  # waits for all processes, which come to it at nearly the same time
    quiet: bool = False  # says nothing on the way


@dataclass(frozen=True)
class RunDataset:
    """The data set of a run: its configuration, the shape of its latents, and the number of its classes."""

    config: Mapping[str, Any]
    spec: LatentSpec
    classes: int

    def images(self, split: str, device: torch.device | str = "cpu") -> ImageSet:
        """Its images; `split` is `train` or `val`, and the device decodes stored latents."""
        source = build.source(self.config, self.spec, split)
        if (found := len(source.class_names)) != self.classes:
            root = self.config["data"].get("root")
            raise ValueError(f"data.root={root} has {found:,} classes, and the run was trained on {self.classes:,}")
        if isinstance(source, LatentSource):
            return DecodedLatents(source, self.config, torch.device(device))
        return sets.Sourced(cast(PictureSource, source))

    def of_store(self, root: Path) -> Self:
        """The latents of a store in the place of its own images."""
        manifest, spec = read_manifest(root), self.spec
        made = manifest["tokenizer"]
        if (made["channels"], made["stride"]) != (spec.channels, spec.stride):
            theirs = f"{made['channels']} channels at stride {made['stride']}"
            both = f"({theirs}, the run's have {spec.channels} at {spec.stride})"
            raise ValueError(f"reference={root} holds latents of another tokenizer {both}; give images")
        option = compose.read_option("data", "latent_store")
        own = {key: value for key, value in self.config["data"].items() if key in option}
        store = {"root": str(root), "holdout": manifest["source"]["holdout"], "flip": False}
        data = {"max_image_tokens": None, **own, compose.TARGET: "genfound.data.latents.store.Store", **store}
        return replace(self, config={**self.config, "data": data}, classes=len(manifest["classes"]))


class DecodedLatents(sets.SizedImages):
    """Stored latents as images: the means, decoded by the tokenizer of a run and made bytes by its rule."""

    def __init__(self, source: LatentSource, config: Mapping[str, Any], device: torch.device) -> None:
        self.source, self.sizes, self.labels, self.device = source, source.sizes, source.labels, device
        self.rule = config["sample"]["uint8"]
        self.stored, self.tokenizer = build.training_tokenizer(config), build.tokenizer(config)
        decoder = json.dumps(decoder_identity(self.tokenizer, config))
        self.key = digest(source.fingerprint, source.sizes.tobytes(), source.labels.tobytes(), self.rule, decoder)
        self._one_at_a_time = threading.Lock()

    def __getitem__(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        moments = self.source.moments(number, mirrored=False)[None].float()
        with self._one_at_a_time, torch.no_grad(), float32_products("32-true", self.device):
            latent = cast(StoredTokenizer, self.stored).normalise(moments).to(self.device)
            return to_uint8(self.tokenizer.decode(latent)[0], self.rule)


def prepare_extractor(config: Mapping[str, Any], dataset: RunDataset | None, workspace: Workspace) -> Extractor:
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
    make_once(file, lambda: _train_probe(images, dataset, file))
    return Probe.load(file, workspace.device)


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
    config: Mapping[str, Any], size: Size | str, dataset: RunDataset | None, extractor: Extractor, workspace: Workspace
) -> tuple[reference_stats.Reference, dict[str, Any]]:
    """The reference for samples of a size, `data` or `mixed`, and what the protocol says of it."""
    name, path, rule = str(config["reference"]), Path(config["reference"]), GIVEN
    ignored: dict[str, str] = {}
    if name.partition(":")[0] == "data" or (path.is_dir() and not visible(path, "*.npz")):
        images, view, ignored = _images_in_view(config, name, size, dataset, workspace)
        reference = reference_stats.read_reference(_statistics(images, view, None, extractor, workspace), extractor)
    else:
        if path.is_dir():
            if isinstance(size, str):
                raise ValueError(f"reference={name} holds one file for each size, and these samples have several")
            path, rule = reference_stats.choose_reference(path, size)
        name = str(path)
        if reference_stats.reference_note(path) is not None or read_member(path, "arr_0") is None:
            reference = reference_stats.read_reference(path, extractor)
        else:
            hashed = file_hash(path)  # first, because that compares the checksums of the images
            given = reference_stats.given_statistics(path) or None
            file = _statistics(sets.NpzImages(path), GIVEN, given, extractor, workspace)
            reference = replace(reference_stats.read_reference(file, extractor), hash=hashed)
    note, points = reference.note, 0 if reference.points is None else len(reference.points)
    known = {"view": note.get("view", GIVEN), "size": note.get("size", "unknown"), "images": note.get("images")}
    return reference, {"from": name, "hash": reference.hash, "rule": rule, **known, "points": points, **ignored}


def _images_in_view(
    config: Mapping[str, Any], name: str, size: Size | str, dataset: RunDataset | None, workspace: Workspace
) -> tuple[ImageSet, str, dict[str, str]]:
    """Images of a folder, a store or the data set as samples of a size are compared with them; view; ignored files."""
    view, limit = one_of("reference_view", config["reference_view"], VIEWS), config["reference_images"]
    if view != "as_is" and isinstance(size, str):
        raise ValueError(f"reference_view={view} needs samples of one size; these are of several: reference_view=as_is")
    images: ImageSet
    folder = None if name.partition(":")[0] == "data" else Path(name)
    if folder is not None and not (folder / MANIFEST).is_file():
        images = sets.FolderImages(folder, config["max_pixels"])
        ignored, title = sets.ignored_files(images), view
        images = _fitting(sets.Subset(images, _order(images, workspace)), view, size)
        images = images if limit is None else sets.Subset(images, np.arange(len(images))[:limit])
    else:
        split = name.partition(":")[2] or "train" if folder is None else "train"
        if split not in ("train", "val"):
            raise ValueError(f"reference={name} is unknown; choose data, data:train or data:val")
        if dataset is None:
            missing = "images alone tell no data set and no decoder"
            raise ValueError(f"reference={name}: {missing}; give an .npz or a folder")
        data = dataset if folder is None else dataset.of_store(folder)
        ignored, title = {}, view + (DECODED if build.reads_latents(data.config) else "")
        images = _fitting(data.images(split, workspace.device), view, size)
        images = sets.Subset(images, Rng(0, "reference").permutation("order", len(images)).numpy()[:limit])
    if view == "crop":
        images = sets.Cropped(images, (int(size[0]), int(size[1])))
    return images, title, ignored


def _fitting(images: ImageSet, view: str, size: Size | str) -> ImageSet:
    """All images; for `same_size` those that have the size."""
    if view != "same_size":
        return images
    fitting = np.flatnonzero((images.sizes == np.array(size)).all(axis=1))
    if not len(fitting):
        raise ValueError(f"reference_view=same_size: no reference image is {size_text(size)} pixels")
    return sets.Subset(images, fitting)


def _order(images: sets.FolderImages, workspace: Workspace) -> np.ndarray:
    """The order of these images by content, kept because all of them are read for it."""
    file = workspace.references / f"{images.key}.order.npy"

    def make() -> None:
        print(f"reference: reading {len(images):,} files, once, for their order by content", flush=True)
        atomic_write(file, functools.partial(np.save, arr=images.content()[1]))

    make_once(file, make)
    return np.asarray(np.load(file))


def _statistics(
    images: ImageSet, view: str, given: Mapping[str, Gaussian] | None, extractor: Extractor, workspace: Workspace
) -> Path:
    """The file of statistics of these images, computed by all processes unless it is there."""
    file = workspace.references / f"{digest(images.key, extractor.hash, view)}.npz"
    if file.is_file():
        return file
    if given is None:
        check_count("reference", len(images), extractor)
    features, place = FeatureStore(file.with_suffix(".parts"), len(images)), (workspace.rank, workspace.ranks)

    def make() -> None:
        print(f"reference: {len(images):,} images, once; kept in {file}", flush=True)
        features.extract(images, extractor, *place, shared_progress("features", *place))
        wait_until(lambda: features.complete)
        reference_stats.write_reference(file, features, images, extractor, {"view": view}, given, workspace.device)
        shutil.rmtree(features.folder)

    def stop_if_there(done: float, total: int) -> None:
        if file.is_file():  # another command has made it meanwhile
            raise FileExistsError(file)

    if workspace.rank == 0:
        make_once(file, make)
    else:
        with contextlib.suppress(FileExistsError):
            features.extract(images, extractor, *place, stop_if_there)
        wait_until(file.is_file)
    return file
