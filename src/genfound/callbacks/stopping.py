"""The end of a run by a signal: all of its processes stop after the same global step."""

from typing import Any

import lightning
from lightning import Trainer
from torch.distributed.distributed_c10d import _get_default_store

from genfound.modules.base import GenerativeModule
from genfound.runtime.stopping import StopRequest

KEY = "genfound/stop"
"""Of the store of the group: the signal, and the step after which all stop."""

MARGIN = 2
"""Steps by which a process may be ahead of the one that names the step, because gradients are shared in each."""


class Stopping(lightning.Callback):
    """Ends the training after the step at which a signal has come; in a group, after one that its process names.

    The processes look into the store of the group after each step, which the devices do not wait for.
    """

    def __init__(self) -> None:
        self.signal = 0  # that has ended the training
        self._request, self._step, self._named = StopRequest(), 0, False

    def on_train_start(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Before there is a step, a signal ends the process at once."""
        self._step = trainer.global_step
        self._request.listen()

    def on_train_batch_end(self, trainer: Trainer, module: GenerativeModule, *_: Any) -> None:
        """Stop, unless the run is at its end."""
        if trainer.global_step == self._step or trainer.should_stop:
            return
        self._step = trainer.global_step
        number = self._request.asked() if trainer.world_size == 1 else self._agreed()
        if number and self._step != trainer.max_steps:
            self.signal, trainer.should_stop = number, True

    def teardown(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """Signals are none of its business any more."""
        self._request.close()

    def on_exception(self, trainer: Trainer, module: GenerativeModule, exception: BaseException) -> None:
        """As after the training."""
        self._request.close()

    def _agreed(self) -> int:
        """The signal, in all processes after the same step; 0 before it."""
        store, number = _get_default_store(), self._request.asked()
        if number and not self._named:
            store.compare_set(KEY, "", f"{number} {self._step + MARGIN}")
            self._named = True
        if not store.check([KEY]):
            return 0
        number, last = map(int, store.get(KEY).split())
        if self._step > last:
            print(f"step {self._step} is after step {last}, where all were to stop: no checkpoint is made", flush=True)
            raise SystemExit(128 + number)
        return number if self._step == last else 0
