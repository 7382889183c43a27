"""The samples of an evaluation: images that are there, or those of a network, in files until they are measured.

Images are files of up to 64 of one size. A file is a function of the request alone and is written whole or not at
all, so the number of processes and an interruption change no pixel.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genfound import build
from genfound.backbones.base import Backbone
from genfound.checkpoints.load import newest_checkpoint
from genfound.config import checks
from genfound.data.images.npz import file_hash
from genfound.data.images.sets import FolderImages, ImageSet, Subset, by_content, ignored_files, open_images
from genfound.evaluation.dataset import RunDataset
from genfound.evaluation.protocol import SamplingRecord, Size, size_text
from genfound.evaluation.provenance import network_hash, read_provenance, sampling_record
from genfound.evaluation.request import DATA, LABEL_RULES, EvaluationRequest
from genfound.metrics.compute import CONTENT, STORED
from genfound.metrics.reference_stats import common_size
from genfound.rng import Rng
from genfound.runtime.files import atomic_write, digest
from genfound.runtime.processes import wait_until
from genfound.runtime.progress import Progress, ProgressCounter, no_progress, shared_progress
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest
from genfound.tokenizers import Tokenizer

PART = 64


@dataclass(frozen=True)
class EvaluationSamples:
    """What is measured.

    Attributes:
        images: the set; a `SampleStore` of those that a network is still to make.
        size: (height, width), `data`, or `mixed`.
        record: how they are made.
        subject: whose they are.
        work: folder for what takes long.
        order: `as stored` or `by content`.
    """

    images: ImageSet
    size: Size | str
    record: SamplingRecord
    subject: Mapping[str, Any]
    work: Path
    order: str = STORED

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class SamplingPlan:
    """What a network is to sample at a size; `config` is the run's, with the sampler and guidance of the pipeline."""

    requests: Sequence[SampleRequest]
    size: Size | str
    pipeline: Pipeline
    seed: int
    record: SamplingRecord
    config: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.requests)

    def of(self, net: Backbone, subject: Mapping[str, Any], folder: Path) -> EvaluationSamples:
        """Those of a network, in a folder of their own that follows from all that could change one."""
        weights, config = network_hash(net, self.config), self.config
        facts = [asdict(self.record), weights, size_text(self.size), self.pipeline.micro_batch, config["objective"]]
        work = folder / digest(json.dumps([*facts, config["layout"], len(self)]))
        images = SampleStore(work, self.requests, net, self.pipeline, self.seed)
        return EvaluationSamples(images, self.size, self.record, {**subject, "hash": weights}, work)


def new_samples(
    request: EvaluationRequest, net: Backbone, tokenizer: Tokenizer, size: Size | str, dataset: RunDataset,
    device: torch.device,
) -> SamplingPlan:  # fmt: skip
    """Samples that a network is to make."""
    settings, config = request.config, request.sampling_config(dataset.config, size)
    if "weights" in config["guidance"]:  # of a run that is still training, the checkpoint of now
        config["guidance"]["weights"] = str(newest_checkpoint(Path(config["guidance"]["weights"])))
    objective = build.objective(config)  # refuses a sampler that does not fit
    pipeline = Pipeline.from_config(config, objective, tokenizer, device, settings["batch"])
    pipeline.check(net)
    data = dataset.images("train") if DATA in (size, settings["labels"]) else None
    requests = requests_by_rule(settings["n"], settings["labels"], size, dataset.classes, settings["seed"], data)
    return SamplingPlan(requests, size, pipeline, settings["seed"], sampling_record(settings, config, pipeline), config)


def existing_samples(config: Mapping[str, Any], source: Path, folder: Path) -> EvaluationSamples:
    """Samples that are there: an npz file or a folder of images; `folder` is for the work on them."""
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
    if isinstance(images, FolderImages):
        (images_hash, numbers), order = content(images), CONTENT
    else:
        images_hash, numbers, order = file_hash(source), np.arange(len(images)), STORED
    subject, record, noted = read_provenance(source, images_hash)
    chosen = Subset(images, numbers[: config["n"]])
    size_or_rule = DATA if noted == DATA else size or "mixed"
    work = folder / f"{chosen.key}-{len(chosen)}"
    return EvaluationSamples(chosen, size_or_rule, record, subject | ignored_files(images), work, order)


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
        data: the data set, which `data` needs.
    """
    checks.one_of("labels", labels, LABEL_RULES)
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    rng = Rng(seed, "evaluate")
    numbers: np.ndarray
    sizes: np.ndarray
    if DATA in (labels, size):
        if data is None or data.labels is None:
            raise ValueError("sizes=data and labels=data need the data set of the run")
        rows = np.resize(rng.permutation("data", len(data)).numpy(), n)
        numbers, sizes = data.labels[rows], data.sizes[rows]
    if labels == "random":
        numbers = np.array([rng.at(k).integer("label") % classes for k in range(n)])
    elif labels == "balanced":
        numbers = rng.permutation("labels", n).numpy() % classes
    if size != DATA:
        sizes = np.tile(np.array(size), (n, 1))
    pairs = zip(numbers, sizes, strict=True)
    return [SampleRequest(int(label), (int(h), int(w)), k) for k, (label, (h, w)) in enumerate(pairs)]


class SampleStore:
    """The images that a network, in eval mode, makes of requests; an `ImageSet` as far as they are in its folder.

    Attributes:
        files: {file: the numbers of its images, which are of one size}.
        failure: holds the reason why a process cannot make its share.
    """

    def __init__(
        self, folder: Path, requests: Sequence[SampleRequest], net: Backbone, pipeline: Pipeline, seed: int
    ) -> None:
        self.net, self.pipeline, self.seed, self.requests = net, pipeline, seed, requests
        self.sizes = np.array([request.size for request in requests], dtype=np.int64)
        self.labels = np.array([request.label for request in requests], dtype=np.int64)
        self.key = digest(str(folder.resolve()), self.sizes.tobytes(), self.labels.tobytes())
        self.failure = folder / "failure"
        by_size = sorted(range(len(requests)), key=lambda k: requests[k].size)
        groups = [list(same) for _, same in itertools.groupby(by_size, key=lambda k: requests[k].size)]
        parts = [group[i : i + PART] for group in groups for i in range(0, len(group), PART)]
        self.files = {folder / f"images-{place:06d}.npy": numbers for place, numbers in enumerate(parts)}
        self._rows = {k: (file, row) for file, numbers in self.files.items() for row, k in enumerate(numbers)}
        self._opened = functools.lru_cache(maxsize=PART)(functools.partial(np.load, mmap_mode="r"))

    @property
    def missing(self) -> int:
        """How many images are not there yet."""
        return sum(len(numbers) for file, numbers in self.files.items() if not file.is_file())

    def draw(self, rank: int = 0, ranks: int = 1, progress: Progress = no_progress) -> None:
        """Sample this process's share of the files, as far as they are not there yet."""
        mine = dict(list(self.files.items())[rank::ranks])
        missing = {file: numbers for file, numbers in mine.items() if not file.is_file()}
        total = sum(map(len, mine.values()))
        done = total - sum(map(len, missing.values()))

        def within(drawn: float, _: int) -> None:
            progress(done + drawn, total)

        for file, numbers in missing.items():
            self._check()
            try:
                images = self.pipeline(self.net, [self.requests[k] for k in numbers], self.seed, within)
            except FloatingPointError as error:
                atomic_write(self.failure, functools.partial(Path.write_text, data=str(error)))
                raise
            atomic_write(file, functools.partial(np.save, arr=np.stack(images)))
            done += len(images)

    def make(self, rank: int, ranks: int, title: str = "") -> None:
        """`draw` this process's share, and wait for the others'; with a title, the first one says how far it is."""
        missing = self.missing
        progress: Progress = no_progress
        if title and rank == 0:
            if missing < len(self):
                print(f"{len(self) - missing:,} of {len(self):,} samples are there already", flush=True)
            if missing:
                print(f"drawing {title}", flush=True)
                progress = shared_progress("samples", rank, ranks)
        self.draw(rank, ranks, progress)
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
        file, row = self._rows[number]
        return np.array(self._opened(file)[row])
