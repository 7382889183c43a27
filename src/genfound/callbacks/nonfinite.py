"""Steps whose gradient is not finite: skipped by the optimizer, counted, written down, and limited."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from genfound.data.packing.batch_plan import MicroBatch
from genfound.data.packing.loader import Item
from genfound.loggers.base import note
from genfound.modules.base import GenerativeModule


class NonFinite(Callback):
    """Looks at the gradient norms of the last `trainer.log_every_n_steps` steps, in one transfer.

    nonfinite.jsonl has one line per skipped step and micro-batch of this rank: images, times, seed. `limit` skipped
    steps in a row stop the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._in_a_row = limit, 0
        self._norms: list[tuple[int, Tensor]] = []
        self._micros: dict[int, list[tuple[MicroBatch, Tensor]]] = {}

    def setup(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """The run directory."""
        self.file = Path(trainer.default_root_dir) / "nonfinite.jsonl"

    def on_train_batch_end(
        self, trainer: Trainer, module: GenerativeModule, outputs: Any, batch: Item, *_: Any
    ) -> None:
        """Remember the micro-batch; look every so many steps."""
        step = batch[1].step
        self._micros.setdefault(step, []).append((batch[1], outputs["losses"].t))
        if trainer.global_step <= step or module.grad_norm is None:
            return
        self._norms.append((step, module.grad_norm.detach()))
        if len(self._norms) >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.look(module.seed, trainer)

    def on_train_end(self, trainer: Trainer, module: GenerativeModule) -> None:
        """The last steps, before they are saved."""
        if self._norms:
            self.look(module.seed, trainer)

    def look(self, seed: int, trainer: Trainer) -> None:
        """Judge the remembered steps."""
        finite = torch.stack([norm for _, norm in self._norms]).isfinite().tolist()
        skipped = [step for (step, _), good in zip(self._norms, finite, strict=True) if not good]
        if skipped:
            steps = f"step{'s' if len(skipped) > 1 else ''} {', '.join(f'{step:,}' for step in skipped)}"
            note(trainer, f"skipped {steps}: the gradient was not finite; images and times are in {self.file}")
        for (step, _), good in zip(self._norms, finite, strict=True):
            self._in_a_row = 0 if good else self._in_a_row + 1
            if not good:
                self._write(step, seed)
            if self._in_a_row >= self.limit:
                raise FloatingPointError(
                    f"{self.limit} steps in a row had a gradient that is not finite (last: step {step}); their images "
                    f"and times are in {self.file}; the last checkpoint is from before them or unharmed by them"
                )
        self._norms.clear()
        self._micros.clear()

    def _write(self, step: int, seed: int) -> None:
        with open(self.file, "a") as out:
            for micro, t in self._micros[step]:
                times = t.tolist()[: len(micro.indices)]
                line = {"step": step, "micro_batch": micro.number, "seed": seed, "images": micro.indices, "t": times}
                out.write(json.dumps(line) + "\n")
