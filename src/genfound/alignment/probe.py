"""The probe of a data set as a teacher, for data that are small or unlike those of published encoders."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from genfound.alignment.base import Teacher
from genfound.config.checks import integer
from genfound.data.images.base import PictureSource
from genfound.data.images.sets import Sourced, Subset
from genfound.metrics.probe import WIDTH, Probe, probe_key, train_probe
from genfound.runtime.files import make_once

LAYERS, STRIDE = 3, 4
"""Convolutions whose output is taken, and their stride together."""


class ProbeTeacher(Teacher):
    """Maps of a small classifier that is trained on the images of the run, once for all runs on them.

    Figures of evaluations come from a probe of seed 0; one of the same seed would teach what is measured.

    Args:
        weights: a file `probe-*.safetensors`; `None` trains one.
        seed: of the probe that is trained.
        images: of the run.
        runs: the folder where it is kept.
    """

    width = WIDTH

    def __init__(self, *, weights: str | None, seed: int, images: PictureSource, runs: str) -> None:
        integer("alignment.teachers.probe.seed", seed, 0)
        file = Path(weights or "")
        if weights is None:
            every, classes = Sourced(images), len(images.class_names)
            file = Path(runs) / f"probe-{probe_key(every.key, classes, seed)}.safetensors"
            make_once(file, lambda: train_probe(every, Subset(every, []), classes, seed).save(file))
        self.net = Probe.load(file, torch.device("cpu")).net

    @classmethod
    def fetch(cls, weights: str | None, download: bool = True) -> Path | None:
        """See `Teacher`."""
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"alignment.teachers weights={weights} is no file; null trains a probe")
        return None if weights is None else Path(weights)

    def __call__(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """See `Teacher`."""
        net, size = self.net.to(images.device), (STRIDE * rows, STRIDE * columns)
        x = interpolate(images.float(), size, mode="bilinear", antialias=True)
        return net.maps(x / 127.5 - 1, LAYERS)
