"""The samples of an evaluation: images that are there, or those of a network, in files until they are measured.

Images are files of up to 64 of one size. A file is a function of the request alone and is written whole or not at
all, so the number of processes and an interruption change no pixel.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genfound import build
from genfound.backbones.base import Backbone
from genfound.checkpoints.load import LoadedModel
from genfound.config import checks
from genfound.data.images.npz import file_hash
from genfound.data.images.sets import FolderImages, ImageSet, Subset, by_content, ignored_files, open_images
from genfound.evaluation.dataset import RunDataset
from genfound.evaluation.protocol import SamplingRecord, Size, size_text
from genfound.evaluation.provenance import network_hash, pin_guide_checkpoint, read_provenance, sampling_record
from genfound.evaluation.request import DATA, LABEL_RULES, EvaluationRequest
from genfound.metrics.compute import CONTENT, STORED
from genfound.metrics.reference_stats import common_size
from genfound.rng import Rng
from genfound.runtime.files import atomic_write, digest
from genfound.runtime.processes import wait_until
from genfound.runtime.progress import Progress, ProgressCounter, no_progress, shared_progress
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest

PART = 64


@dataclass(frozen=True)
class EvaluationSamples:
    """What is measured.

    Attributes:
        images: the set; of a network's, where they are or will be.
        size: (height, width), `data`, or `mixed`.
        record: how they are made.
        subject: whose they are.
        work: folder for what takes long.
        order: `as stored` or `by content`.
        make: makes a process's share of them; see `SampleStore.make`. `None` where they are there.
    """

    images: ImageSet
    size: Size | str
    record: SamplingRecord
    subject: Mapping[str, Any]
    work: Path
    order: str = STORED
    make: Callable[[int, int, str], None] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def of(self, net: Backbone | None, subject: Mapping[str, Any], folder: Path) -> EvaluationSamples:
        """These, which no network is to make."""
        return self


@dataclass(frozen=True)
class SamplingPlan:
    """What a network is to sample at a size.

    Attributes:
        requests: the images.
        size: (height, width), or `data`.
        pipeline: how.
        seed: of the noise.
        record: the same in the words of the protocol.
        config: the run's, with the sampler and guidance of the pipeline.
    """

    requests: Sequence[SampleRequest]
    size: Size | str
    pipeline: Pipeline
    seed: int
    record: SamplingRecord
    config: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.requests)

    def of(self, net: Backbone | None, subject: Mapping[str, Any], folder: Path) -> EvaluationSamples:
        """Those of a network, in a folder of their own that follows from all that could change one."""
        assert net is not None
        weights, config = network_hash(net, self.config), self.config
        facts = [asdict(self.record), weights, size_text(self.size), self.pipeline.micro_batch, config["objective"]]
        images = SampleStore(folder / digest(json.dumps([*facts, config["layout"], len(self)])), self.requests)
        make = functools.partial(images.make, net, self.pipeline, self.seed)
        return EvaluationSamples(images, self.size, self.record, {**subject, "hash": weights}, images.folder, make=make)


def new_samples(
    request: EvaluationRequest, model: LoadedModel, size: Size | str, dataset: RunDataset, device: torch.device
) -> SamplingPlan:
    """Samples that a model is to make.

    Raises:
        ValueError: a sampler, guidance or label rule that does not fit.
    """
    settings = request.config
    config = pin_guide_checkpoint(request.sampling_config(model.config, size))
    objective = build.objective(config)  # refuses a sampler that does not fit
    pipeline = Pipeline.from_config(config, objective, model.tokenizer, device, settings["batch"])
    pipeline.check(model.net)
    data = dataset.images("train") if DATA in (size, settings["labels"]) else None
    requests = requests_by_rule(settings["n"], settings["labels"], size, dataset.classes, settings["seed"], data)
    return SamplingPlan(requests, size, pipeline, settings["seed"], sampling_record(settings, config, pipeline), config)


def existing_samples(request: EvaluationRequest, source: Path, folder: Path) -> EvaluationSamples:
    """Samples that are there: an npz file or a folder of images; `folder` is for the work on them.

    Raises:
        ValueError: images of another size than asked for.
    """
    config = request.config
    moved = [key for key, value in config["data"].items() if value is not None]
    if moved:
        raise ValueError(f"data.{moved[0]}: images alone have no data set; from=RUN has one")
    images = open_images(source, config["max_pixels"])
    size = common_size(images)
    if config["sizes"] not in (None, DATA):
        wanted = checks.image_sizes("sizes", config["sizes"])
        if wanted != [size]:
            texts = " and ".join(map(size_text, wanted))
            raise ValueError(f"from={source} holds images of {size_text(size or 'mixed')} pixels, not {texts}")
    count, order = min(config["n"], len(images)), np.arange(len(images))
    if isinstance(images, FolderImages):
        images_hash, order = content(images)
    else:
        images_hash = file_hash(source)
    subject, record, noted = read_provenance(source, images_hash)
    chosen = Subset(images, order[:count])
    return EvaluationSamples(
        images=chosen,
        size=DATA if noted == DATA else size or "mixed",
        record=record,
        subject=subject | ignored_files(images),
        work=folder / f"{chosen.key}-{count}",
        order=CONTENT if isinstance(images, FolderImages) else STORED,
    )


def content(images: FolderImages) -> tuple[str, np.ndarray]:
    """16 digits of the SHA-256 of a folder's images, and their order by it; neither follows from their names."""
    digests = images.digests(ProgressCounter("files read"))
    order = by_content(digests)
    return hashlib.sha256(digests[order].tobytes()).hexdigest()[:16], order


def requests_by_rule(
    n: int, labels: str, size: Size | str, classes: int, seed: int, data: ImageSet | None
) -> list[SampleRequest]:
    """n images, numbered.

    Args:
        n: how many.
        labels: `random`, uniform and independent, as DiT, SiT and NiT; `balanced`, each class equally often, in random
            order; `data`, those of images of the data set in a fixed random order.
        size: (height, width) in pixels, or `data`, those of the same images.
        classes: number of labels.
        seed: of labels and order.
        data: the data set; needed for `data`.

    Raises:
        ValueError: an unknown rule, no image, or no data set.
    """
    checks.one_of("labels", labels, LABEL_RULES)
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    rng = Rng(seed, "evaluate")
    rows = np.zeros(0, dtype=np.int64)
    if DATA in (labels, size):
        if data is None or data.labels is None:
            raise ValueError("sizes=data and labels=data need the data set of the run")
        order = rng.permutation("data", len(data)).numpy()
        rows = order[np.arange(n) % len(order)]
    if labels == DATA and data is not None and data.labels is not None:
        numbers = data.labels[rows]
    elif labels == "balanced":
        numbers = rng.permutation("labels", n).numpy() % classes
    else:
        numbers = np.array([rng.at(k).integer("label") % classes for k in range(n)])
    sizes = data.sizes[rows] if size == DATA and data is not None else np.tile(np.array(size), (n, 1))
    pairs = zip(numbers, sizes, strict=True)
    return [SampleRequest(int(label), (int(h), int(w)), k) for k, (label, (h, w)) in enumerate(pairs)]


class SampleStore:
    """The images of requests in a folder, as far as they are there; an `ImageSet`.

    Args:
        folder: where they lie.
        requests: numbered from 0.
    """

    def __init__(self, folder: Path, requests: Sequence[SampleRequest]) -> None:
        self.folder = folder
        self.requests = list(requests)
        self.sizes = np.array([request.size for request in requests], dtype=np.int64)
        self.labels = np.array([request.label for request in requests], dtype=np.int64)
        self.key = digest(str(folder.resolve()), self.sizes.tobytes(), self.labels.tobytes())
        self.failure = folder / "failure"
        order = np.lexsort((np.arange(len(requests)), self.sizes[:, 1], self.sizes[:, 0]))
        bounds = np.flatnonzero(np.any(np.diff(self.sizes[order], axis=0) != 0, axis=1)) + 1
        self.parts = [group[i : i + PART] for group in np.split(order, bounds) for i in range(0, len(group), PART)]
        self._place = np.empty((len(requests), 2), dtype=np.int64)
        for part, numbers in enumerate(self.parts):
            self._place[numbers, 0], self._place[numbers, 1] = part, np.arange(len(numbers))
        self._opened = functools.lru_cache(maxsize=PART)(lambda part: np.load(self._file(part), mmap_mode="r"))

    @property
    def missing(self) -> int:
        """How many images are not there yet."""
        return sum(len(numbers) for part, numbers in enumerate(self.parts) if not self._file(part).is_file())

    def draw(
        self,
        net: Backbone,
        pipeline: Pipeline,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        progress: Progress = no_progress,
    ) -> None:
        """Sample the files of this process that are not there yet.

        Args:
            net: backbone in eval mode, on the device of the pipeline.
            pipeline: how to sample.
            seed: of the noise.
            rank, ranks: which share of the files.
            progress: see `runtime.progress`.

        Raises:
            FloatingPointError: an image of this process, or of another one, is not finite.
        """
        mine = list(range(len(self.parts)))[rank::ranks]
        total = sum(len(self.parts[part]) for part in mine)
        missing = [part for part in mine if not self._file(part).is_file()]
        done = total - sum(len(self.parts[part]) for part in missing)

        def within(drawn: float, _: int) -> None:
            progress(done + drawn, total)

        for part in missing:
            self._check()
            try:
                images = pipeline(net, [self.requests[k] for k in self.parts[part]], seed, within)
            except FloatingPointError as error:
                atomic_write(self.failure, functools.partial(Path.write_text, data=str(error)))
                raise
            atomic_write(self._file(part), functools.partial(np.save, arr=np.stack(images)))
            done += len(images)

    def make(self, net: Backbone, pipeline: Pipeline, seed: int, rank: int, ranks: int, title: str = "") -> None:
        """`draw` this process's share, and wait for the others'; with a title, the first one says how far it is.

        Raises:
            FloatingPointError: an image of some process is not finite.
        """
        missing = self.missing
        progress: Progress = no_progress
        if title and rank == 0:
            if missing < len(self):
                print(f"{len(self) - missing:,} of {len(self):,} samples are there already", flush=True)
            if missing:
                print(f"drawing {title}", flush=True)
                progress = shared_progress("samples", rank, ranks)
        self.draw(net, pipeline, seed, rank, ranks, progress)
        wait_until(lambda: self.failure.is_file() or not self.missing)
        self._check()

    def _check(self) -> None:
        """Raise a FloatingPointError if images of some process are not finite, with its reason."""
        if self.failure.is_file():
            raise FloatingPointError(self.failure.read_text())

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        part, row = self._place[number]
        return np.array(self._opened(int(part))[row])

    def _file(self, part: int) -> Path:
        return self.folder / f"images-{part:06d}.npy"
