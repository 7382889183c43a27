"""Work on many images in several processes: drawing them, and computing their features.

A task is a JSON file, which each process reads for itself. Processes share nothing but the folder of their
results, in which each writes its own files.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch

from genfound import build
from genfound.backbones.base import Backbone
from genfound.checkpoints.load import load
from genfound.config.command_line import explain_oom
from genfound.config.targets import trusted
from genfound.data.images.base import LatentSource, PictureSource
from genfound.data.images.pixels import to_uint8
from genfound.data.images.sets import Cropped, ImageSet, Sourced, Subset, digest, open_images
from genfound.data.packing.collate import Normaliser
from genfound.evaluation.samples import SampleStore
from genfound.metrics.extractor import Extractor, Inception, tensors_hash
from genfound.metrics.features import FeatureStore
from genfound.metrics.probe import Probe
from genfound.rng import Rng
from genfound.runtime import devices, launch, processes
from genfound.runtime.progress import Progress, ProgressCounter, no_progress
from genfound.sampling.pipeline import Pipeline
from genfound.tokenizers import LatentSpec, Tokenizer

NO_CHANGE = ("attention", "activation_checkpointing")
"""Options of a model that say how, not what, it computes."""

NETWORK = "network.safetensors"
"""What draws, in the folder of its images."""

VIEWS = ("crop", "as_is", "same_size")


@dataclass(frozen=True)
class Where:
    """Images that any process can open.

    Attributes:
        kind: `drawn`, `path` or `data`.
        path: of the drawn images, or of an npz file or a folder.
        config: of the run whose data set it is.
        split: `train` or `val`, of the data set.
        spec: channels and stride of the run's latents; stored latents are decoded, their means.
        view: `crop` brings images to `size`, `same_size` takes only those that have it, `as_is` takes all.
        size: (height, width).
        order: a .npy file of the order in which they are taken.
        shuffled: in a fixed random order.
        limit: only the first so many of them.
        max_pixels: of a file in a folder, see `data.opening.opened`.
    """

    kind: str
    path: str | None = None
    config: Mapping[str, Any] | None = None
    split: str = "train"
    spec: tuple[int, int] = (0, 0)
    view: str = "as_is"
    size: tuple[int, int] | None = None
    order: str | None = None
    shuffled: bool = False
    limit: int | None = None
    max_pixels: int | None = None

    def open(self, device: torch.device | str = "cpu") -> ImageSet:
        """The images; a device decodes stored latents.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they are damaged, or none has the size.
        """
        if self.view not in VIEWS:
            raise ValueError(f"reference_view={self.view} is unknown; choose one of {', '.join(VIEWS)}")
        images = self._whole(torch.device(device))
        if self.order is not None:
            images = Subset(images, np.load(self.order))
        if self.view == "same_size":
            fitting = np.flatnonzero((images.sizes == np.array(self.size)).all(axis=1))
            if not len(fitting):
                raise ValueError(f"reference_view=same_size: no reference image is {size_text(self.size)} pixels")
            images = Subset(images, fitting)
        if self.shuffled:
            order = Rng(0, "reference").permutation("order", len(images)).numpy()
            images = Subset(images, order[: self.limit])
        elif self.limit is not None:
            images = Subset(images, np.arange(len(images))[: self.limit])
        if self.view == "crop" and self.size is not None:
            images = Cropped(images, (int(self.size[0]), int(self.size[1])))
        return images

    def _whole(self, device: torch.device) -> ImageSet:
        if self.kind == "data":
            assert self.config is not None
            return data_images(self.config, LatentSpec(*self.spec), self.split, device)
        assert self.path is not None
        path = Path(self.path)
        return SampleStore.open(path) if self.kind == "drawn" else open_images(path, self.max_pixels)


def size_text(size: Any) -> str:
    """[256, 128] -> 256x128; a text as it is."""
    return size if isinstance(size, str) else "x".join(map(str, size))


class Decoded:
    """Stored latents as images: the decoded means.

    Args:
        source: the latents.
        config: of the run, whose tokenizer decodes and whose rule makes bytes.
        device: decodes.

    Raises:
        FileNotFoundError: the tokenizer's weights are not there.
    """

    def __init__(self, source: LatentSource, config: Mapping[str, Any], device: torch.device) -> None:
        self.source = source
        self.sizes, self.labels = source.sizes, source.labels
        self.rule = config["sample"]["uint8"]
        self.stored = build.training_tokenizer(config)
        self.tokenizer = build.tokenizer(config)
        decoder = json.dumps(decoder_identity(self.tokenizer, config))
        self.key = digest(source.fingerprint, source.sizes.tobytes(), source.labels.tobytes(), self.rule, decoder)
        self.device = device
        self._one_at_a_time = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        moments = self.source.moments(number, mirrored=False)[None].float()
        with self._one_at_a_time, torch.no_grad():
            latent = cast(Normaliser, self.stored).normalise(moments).to(self.device)
            return to_uint8(self.tokenizer.decode(latent)[0], self.rule)


def data_images(
    config: Mapping[str, Any], spec: LatentSpec, split: str, device: torch.device | str = "cpu"
) -> Sourced | Decoded:
    """The data set of a run as images; `split` is `train` or `val`."""
    source = build.source(config, spec, split)
    if isinstance(source, LatentSource):
        return Decoded(source, config, torch.device(device))
    return Sourced(cast(PictureSource, source))


def decoder_identity(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """What decodes, in the words of the protocol: its name, its precision, and the hash of its weights."""
    network = getattr(tokenizer, "model", None)
    return {
        "name": type(tokenizer).__name__,
        "precision": config["tokenizer"].get("precision"),
        "hash": None if network is None else tensors_hash(network.state_dict()),
    }


def network_hash(net: Backbone, config: Mapping[str, Any]) -> str:
    """Of the weights of a network, and of the options that make it of them."""
    options = {key: value for key, value in config["model"].items() if key not in NO_CHANGE}
    return digest(tensors_hash(net.state_dict()), json.dumps(options, sort_keys=True))


def guide_hash(sampling: Pipeline) -> str | None:
    """Of the tensors of the weaker network of autoguidance, if there is one."""
    return None if sampling.weak is None else tensors_hash(sampling.weak.state_dict())


@dataclass(frozen=True)
class DrawTask:
    """Drawing the requests of a folder.

    Attributes:
        folder: see `Drawn`; the network lies there too, since a run that goes on removes its checkpoints.
        weak: hash of the tensors of the weaker network of autoguidance, if there is one.
        rope: changes of the network's rotary positions; see `Backbone.reposition`.
        config: with the sampler, guidance, byte rule and precision to use.
        seed: of the noise.
        batch: images per network call.
        accelerator: `auto`, `cpu` or `cuda`.
    """

    folder: str
    weak: str | None
    rope: Mapping[str, Any]
    config: Mapping[str, Any]
    seed: int
    batch: int
    accelerator: str
    makes: ClassVar = "samples"

    def run(self, rank: int, ranks: int, device: torch.device, progress: Progress) -> None:
        """Draw this process's share.

        Raises:
            ValueError: the weaker network is not the one that it was when the task was made.
        """
        loaded = load(Path(self.folder) / NETWORK, trust=trusted(self.config))
        loaded.net.reposition(self.rope)
        objective = build.objective(self.config)
        sampling = Pipeline.of(self.config, objective, loaded.tokenizer, device, self.batch)
        if guide_hash(sampling) != self.weak:
            raise ValueError(f"guidance.weights={sampling.guidance['weights']} has changed; give the command again")
        SampleStore.open(Path(self.folder)).draw(loaded.net.to(device), sampling, self.seed, rank, ranks, progress)


@dataclass(frozen=True)
class ExtractTask:
    """Computing features.

    Attributes:
        folder: of the features.
        images: which.
        count: how many of them, from the first.
        extractor: `inception` or `probe`.
        extractor_weights: its file.
        accelerator: `auto`, `cpu` or `cuda`.
    """

    folder: str
    images: Where
    count: int
    extractor: str
    extractor_weights: str
    accelerator: str
    makes: ClassVar = "features"

    def run(self, rank: int, ranks: int, device: torch.device, progress: Progress) -> None:
        """Compute this process's share."""
        extractor = open_extractor(self.extractor, Path(self.extractor_weights), device)
        FeatureStore(Path(self.folder), self.count).extract(self.images.open(device), extractor, rank, ranks, progress)


Task = DrawTask | ExtractTask
TASKS: dict[str, type[Task]] = {"draw": DrawTask, "extract": ExtractTask}


def open_extractor(name: str, weights: Path, device: torch.device) -> Extractor:
    """An extractor by name.

    Raises:
        FileNotFoundError: its weights are not there.
        ValueError: an unknown name, or damaged weights.
    """
    if name == "inception":
        return Inception(weights, device)
    if name == "probe":
        return Probe.load(weights, device)
    raise ValueError(f"extractor={name} is unknown; choose inception or probe")


def perform(task: Task, count: int, file: Path) -> None:
    """Do a task, in this process or in several, which end with this one.

    Args:
        task: what to do.
        count: number of processes.
        file: where to write the task for them.

    Raises:
        JobError: a process failed, and why.
    """
    if count == 1:
        task.run(0, 1, devices.device(task.accelerator), ProgressCounter(task.makes))
        return
    kind = next(name for name, cls in TASKS.items() if isinstance(task, cls))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"kind": kind, "task": asdict(task)}))
    environment = {}
    if devices.device(task.accelerator).type == "cpu":  # kernels may sum in another order with other numbers of threads
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        launch.launch("genfound.evaluation.extraction", file, count, **environment)
    finally:
        file.unlink(missing_ok=True)


def _worker(file: Path) -> None:
    """One process of a group: `python -m genfound.evaluation.extraction TASK_FILE`."""
    rank, ranks, local = processes.rank_info()
    stored = json.loads(file.read_text())
    options = stored["task"]
    if stored["kind"] == "extract":
        options["images"] = Where(**options["images"])
    task = TASKS[stored["kind"]](**options)
    device = devices.device(task.accelerator, local)
    processes.tune_malloc()
    counter = ProgressCounter(f"{task.makes} on the first of {ranks} processes")
    task.run(rank, ranks, device, counter if rank == 0 else no_progress)


if __name__ == "__main__":
    with launch.reporting(), explain_oom("evaluate"):
        _worker(Path(sys.argv[1]))
