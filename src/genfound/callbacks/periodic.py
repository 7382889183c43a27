"""A callback that acts every so many images."""

from __future__ import annotations

from typing import Any

import lightning

from genfound.module import GenerativeModule


class Periodic(lightning.Callback):
    """Calls `act` after each step with which another `every` images have been seen; a resumed run keeps the rhythm.

    Args:
        every: images between two calls.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._rounds = 0

    def act(self, trainer: lightning.Trainer, module: GenerativeModule) -> None:
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
            self.act(trainer, module)
