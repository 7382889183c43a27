"""A callback that acts every so many images."""

from __future__ import annotations

from typing import Any

import lightning

from genfound.callbacks.throughput import paused
from genfound.modules.base import GenerativeModule


class EveryNImages(lightning.Callback):
    """Calls `act` after each step with which another `every` images have been seen, and at the end of the budget.

    The clock of the training stands meanwhile. A resumed run keeps the rhythm. One that is only cut short is not worth
    a last call.

    Args:
        every: images between two calls.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._rounds = 0
        self._acted = -1

    def on_interval(self, trainer: lightning.Trainer, module: GenerativeModule) -> None:
        """What is done; on every rank."""
        raise TypeError(f"{type(self).__name__} does not define act")

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Continue the rhythm of the images seen."""
        assert isinstance(module, GenerativeModule)
        self._rounds = module.images_seen // self.every

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act when a multiple of `every` has been passed."""
        assert isinstance(module, GenerativeModule)
        rounds = module.images_seen // self.every
        if rounds > self._rounds:
            self._rounds = rounds
            self._acted = module.images_seen
            with paused(trainer, module):
                self.on_interval(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Act once more, unless that was just done."""
        assert isinstance(module, GenerativeModule)
        if module.images_seen >= module.budget and module.images_seen != self._acted:
            self.on_interval(trainer, module)
