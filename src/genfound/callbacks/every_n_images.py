"""A callback that acts every so many images."""

from typing import Any

from lightning import Callback, Trainer

from genfound.callbacks.throughput import paused
from genfound.modules.base import GenerativeModule


class EveryNImages(Callback):
    """Calls `on_interval` after each step with which another `every` images have been seen, and at the budget's end.

    The clock of the training stands meanwhile. A resumed run keeps the rhythm. One that is only cut short is not worth
    a last call. The last call comes after the last checkpoint; a run that ends in it goes on with it.
    """

    def __init__(self, every: int) -> None:
        self.every, self._rounds = every, 0

    def on_interval(self, trainer: Trainer, module: GenerativeModule) -> None:
        """What is done; on every rank."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Continue the rhythm of the images seen."""
        self._rounds = module.images_seen // self.every

    def on_train_batch_end(self, trainer: Trainer, module: GenerativeModule, *_: Any) -> None:
        """Act when a multiple of `every` has been passed; at the end, later."""
        rounds = module.images_seen // self.every
        if rounds > self._rounds and module.images_seen < module.budget:
            self._rounds = rounds
            with paused(trainer, module):
                self.on_interval(trainer, module)

    def on_train_end(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Act once more."""
        if module.images_seen >= module.budget:
            self.on_interval(trainer, module)
