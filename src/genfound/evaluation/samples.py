"""The samples of an evaluation: images that are there, or those of a network, in files until they are measured.

Images are files of up to 64 of one size. A file is a function of the request alone and is written whole or not at
all, so the number of processes and an interruption change no pixel.
"""

import functools
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
from genfound.data.images.sets import FolderImages, ImageSet, SizedImages, Subset, ignored_files, open_images
from genfound.evaluation.protocol import EvaluationRequest, SamplingRecord, size_text
from genfound.evaluation.provenance import network_hash, read_provenance, sampling_record
from genfound.evaluation.references import RunDataset
from genfound.metrics.compute import CONTENT, STORED
from genfound.metrics.reference_stats import common_size
from genfound.runtime.files import atomic_write, digest
from genfound.runtime.processes import wait_until
from genfound.runtime.progress import Progress, no_progress, shared_progress
from genfound.runtime.uneven_calls import uneven_calls
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import DATA, SampleRequest, Size, batches, requests_by_rule
from genfound.tokenizers import Tokenizer

PART = 64


@dataclass(frozen=True)
class EvaluationSamples:
    """What is measured."""

    images: ImageSet  # a `SampleStore` of those that a network is still to make
    size: Size | str  # (height, width), `data`, or `mixed`
    record: SamplingRecord  # how they are made
    subject: Mapping[str, Any]  # whose they are
    work: Path  # folder for what takes long
    order: str = STORED  # or `by content`


@dataclass(frozen=True)
class SamplingPlan:
    """What a network is to sample at a size; `config` is the run's, with the sampler and guidance of the pipeline."""

    requests: Sequence[SampleRequest]
    size: Size | str
    pipeline: Pipeline
    seed: int
    record: SamplingRecord
    config: Mapping[str, Any]

    def of(self, net: Backbone, subject: Mapping[str, Any], folder: Path) -> EvaluationSamples:
        """Those of a network, in a folder of their own that follows from all that could change one."""
        weights, config = network_hash(net, self.config), self.config
        facts = [asdict(self.record), weights, size_text(self.size), self.pipeline.micro_batch, config["objective"]]
        prompts = [request.prompt for request in self.requests if request.prompt]
        work = folder / digest(json.dumps([*facts, config["layout"], len(self.requests), *prompts]))
        images = SampleStore(work, self.requests, net, self.pipeline, self.seed)
        return EvaluationSamples(images, self.size, self.record, {**subject, "hash": weights}, work)


def new_samples(
    request: EvaluationRequest, net: Backbone, tokenizer: Tokenizer, size: Size | str, dataset: RunDataset,
    device: torch.device,
) -> SamplingPlan:  # fmt: skip
    """Samples that a network is to make."""
    settings, config = request.config, request.sampling_config(dataset.config, size)
    n, labels, seed = settings["n"], settings["labels"], settings["seed"]
    if settings["clip_weights"] is not None and net.text_width is None:
        raise ValueError("clip_weights: this model knows classes and no text, so that its samples have no prompts")
    if "weights" in config["guidance"]:  # of a run that is still training, the checkpoint of now
        config["guidance"]["weights"] = str(newest_checkpoint(Path(config["guidance"]["weights"])))
    objective = build.objective(config)  # refuses a sampler that does not fit
    pipeline = Pipeline.from_config(config, objective, tokenizer, device, settings["batch"])
    data = dataset.images("train") if DATA in (size, labels) else None
    requests = requests_by_rule(n, labels, size, dataset.classes, seed, data, net.text_width is not None)
    pipeline.check(net, {request.size for request in requests})
    return SamplingPlan(requests, size, pipeline, seed, sampling_record(settings, config, pipeline), config)


def existing_samples(config: Mapping[str, Any], source: Path, folder: Path) -> EvaluationSamples:
    """Samples that are there: an npz file or a folder of images; `folder` is for the work on them."""
    moved = [key for key, value in config["data"].items() if value is not None]
    if moved:
        raise ValueError(f"data.{moved[0]}: images alone have no data set; from=RUN has one")
    if config["clip_weights"] is not None:
        raise ValueError("clip_weights: images alone have no prompts; from=RUN of a model of text has")
    images = open_images(source, config["max_pixels"])
    size = common_size(images)
    if config["sizes"] not in (None, DATA):
        wanted = checks.image_sizes("sizes", config["sizes"])
        if wanted != [size]:
            texts = " and ".join(map(size_text, wanted))
            raise ValueError(f"from={source} holds images of {size_text(size or 'mixed')} pixels, not {texts}")
    if isinstance(images, FolderImages):
        (images_hash, numbers), order = images.content(), CONTENT
    else:
        images_hash, numbers, order = file_hash(source), np.arange(len(images)), STORED
    subject, record, noted = read_provenance(source, images_hash)
    chosen = Subset(images, numbers[: config["n"]])
    told, work = DATA if noted == DATA else size or "mixed", folder / f"{chosen.key}-{len(chosen)}"
    return EvaluationSamples(chosen, told, record, subject | ignored_files(images), work, order)


class SampleStore(SizedImages):
    """The images that a network, in eval mode, makes of requests; an `ImageSet` as far as they are in its folder."""

    def __init__(
        self, folder: Path, requests: Sequence[SampleRequest], net: Backbone, pipeline: Pipeline, seed: int
    ) -> None:
        self.net, self.pipeline, self.seed, self.requests = net, pipeline, seed, requests
        self.sizes = np.array([request.size for request in requests], dtype=np.int64)
        self.labels = np.array([request.label for request in requests], dtype=np.int64)
        self.prompts = [str(request.prompt) for request in requests]
        self.key = digest(str(folder.resolve()), self.sizes.tobytes(), self.labels.tobytes())
        self.failure = folder / "failure"  # the reason why a process cannot make its share
        parts = enumerate(batches(requests, PART))
        self.files = {folder / f"images-{place:06d}.npy": numbers for place, numbers in parts}
        self._rows = {k: (file, row) for file, numbers in self.files.items() for row, k in enumerate(numbers)}
        self._opened = functools.lru_cache(maxsize=PART)(functools.partial(np.load, mmap_mode="r"))

    @property
    def missing(self) -> int:
        """How many images are not there yet."""
        return sum(len(numbers) for file, numbers in self.files.items() if not file.is_file())

    def draw(self, rank: int = 0, ranks: int = 1, progress: Progress = no_progress) -> None:
        """Sample this process's share of the files, as far as they are not there yet."""
        mine = list(self.files.items())[rank::ranks]
        missing = [(file, numbers) for file, numbers in mine if not file.is_file()]
        total, left = (sum(len(numbers) for _, numbers in files) for files in (mine, missing))
        done = total - left

        def within(drawn: float, _: int) -> None:
            progress(done + drawn, total)

        with uneven_calls(self.net):
            for file, numbers in missing:
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
        """Raise the FloatingPointError of a process whose images are not finite."""
        if self.failure.is_file():
            raise FloatingPointError(self.failure.read_text())

    def __getitem__(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        file, row = self._rows[number]
        return np.array(self._opened(file)[row])
