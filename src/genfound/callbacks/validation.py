"""Validation during training, every so many images."""

import torch
from lightning import Trainer

from genfound.callbacks.ema import the_ema
from genfound.callbacks.every_n_images import EveryNImages
from genfound.loggers.base import log
from genfound.modules.base import GenerativeModule


class Validation(EveryNImages):
    """`val/loss` and `val/velocity_mse` of the live weights, and with the suffix `_ema` of the average.

    They are what `trainer.validate` gives, see `modules.base.validation_sums`.
    """

    def __init__(self, every: int, images: int) -> None:
        super().__init__(every)
        self.images = images

    def setup(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """Say how many images to hold ready."""
        trainer.datamodule.validate_on(self.images)  # type: ignore[attr-defined]

    @torch.no_grad()
    def on_interval(self, trainer: Trainer, module: GenerativeModule) -> None:
        """The figures, reduced over ranks."""
        if not trainer.datamodule.val.micros:  # type: ignore[attr-defined]
            return
        module.eval()
        metrics = module.validate()
        if ema := the_ema(trainer):
            metrics |= ema.validate(module)
        module.train()
        log(trainer, {"images_seen": module.images_seen, **metrics})
