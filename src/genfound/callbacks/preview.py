"""A labelled grid of samples every so many images, from the averaged weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning

from genfound.callbacks.ema import Ema
from genfound.callbacks.every_n_images import EveryNImages
from genfound.loggers.base import note, picture
from genfound.modules.base import GenerativeModule
from genfound.sampling.grid import save_grid
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest


class Preview(EveryNImages):
    """Writes samples/images-<n>.png; the same noise every time.

    Args:
        folder: the run's samples/.
        every: images between two grids.
        sampling: how to sample.
        requests: what to sample, one row of the grid per size.
        class_names: names of the labels.
        ema: holds the average.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        sampling: Pipeline,
        requests: Sequence[SampleRequest],
        class_names: Sequence[str],
        ema: Ema,
    ) -> None:
        super().__init__(every)
        self.folder = folder
        self.sampling = sampling
        self.requests = requests
        self.class_names = class_names
        self.ema = ema

    def on_interval(self, trainer: lightning.Trainer, module: GenerativeModule) -> None:
        """Draw and write the grid, on rank 0."""
        file = self.folder / f"images-{module.images_seen:09d}.png"
        if not trainer.is_global_zero or file.exists():
            return
        module.eval()
        try:
            with self.ema.ema_weights(module):
                images = self.sampling.draw(module.net, self.requests, seed=0)
        except FloatingPointError as error:
            note(trainer, f"no preview: {error}")
            return
        finally:
            module.train()
        save_grid(file, images, self.requests, self.class_names)
        picture(trainer, "samples", file, module.images_seen)
