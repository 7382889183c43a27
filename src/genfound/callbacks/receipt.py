"""The receipt of a run, by which `genfound.audit` recomputes it; see `runtime.receipts`."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from genfound.callbacks.throughput import paused
from genfound.data.packing.loader import Item
from genfound.modules.base import GenerativeModule
from genfound.runtime import checkpoint_io, receipts, run_directory


class Receipt(Callback):
    """Writes down each global step and each checkpoint; asks the device once in `trainer.log_every_n_steps` steps."""

    _receipt: receipts.Receipt | None
    _saved = -1  # the step of a checkpoint that has no line yet

    def on_train_start(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Go on behind the step that the run continues from."""
        self._folder, self._saved = Path(trainer.default_root_dir), trainer.global_step
        self._steps: list[tuple[int, int]] = []  # number and images seen of each
        self._sums, self._norms = [torch.zeros((), device=module.device)], list[Tensor]()
        self._receipt = None
        if trainer.is_global_zero:
            self._receipt = receipts.Receipt(self._folder / receipts.FILE, trainer.global_step)
            self._note_checkpoint()
            self._receipt.add({"step": trainer.global_step, "ranks": trainer.world_size})

    def on_train_batch_start(self, trainer: Trainer, module: GenerativeModule, *_: Any) -> None:
        """Add a checkpoint that has been written since."""
        if self._saved >= 0 and self._file.exists():
            with paused(trainer, module):
                self._note_checkpoint()

    def on_train_batch_end(
        self, trainer: Trainer, module: GenerativeModule, outputs: Any, batch: Item, *_: Any
    ) -> None:
        """Remember the loss, and with a whole step the norm of its gradient."""
        self._sums[-1] += outputs["loss"].detach().float()
        if trainer.global_step > batch[1].step and module.grad_norm is not None:
            self._steps.append((trainer.global_step, module.images_seen))
            self._norms.append(module.grad_norm.detach().float())
            self._sums.append(torch.zeros_like(self._sums[-1]))
            if len(self._steps) >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
                self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: GenerativeModule, checkpoint: dict[str, Any]) -> None:
        """Write the steps before it, and the one before."""
        if self._saved >= 0:
            self._note_checkpoint()
        self._write(trainer)
        self._saved = trainer.global_step

    def teardown(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """Add the last checkpoint."""
        self._note_checkpoint()

    @property
    def _file(self) -> Path:
        return self._folder / "checkpoints" / f"step-{self._saved:08d}.ckpt"

    def _write(self, trainer: Trainer) -> None:
        if not self._steps:
            return
        total = trainer.strategy.reduce(torch.stack(self._sums[:-1]), reduce_op="sum")
        assert isinstance(total, Tensor)
        if self._receipt:
            exact = [[value.hex() for value in values.tolist()] for values in (total, torch.stack(self._norms))]
            self._receipt.add(
                *(
                    {"step": step, "images_seen": seen, "loss": loss, "grad_norm": norm}
                    for (step, seen), loss, norm in zip(self._steps, *exact, strict=True)
                )
            )
        self._steps, self._sums, self._norms = [], self._sums[-1:], []

    def _note_checkpoint(self) -> None:
        """Add what a checkpoint holds that has no line yet, if it is complete."""
        if self._saved < 0 or not self._file.exists():
            return
        step, file, self._saved = self._saved, self._file, -1
        if self._receipt and step not in self._receipt.checkpoints:
            state = checkpoint_io.read(file, parts=())
            config = receipts.config_hash(run_directory.claimed(self._folder))
            facts = {"images_seen": state["images_seen"], "config": config, "data": state["run"]["fingerprint"]}
            held = receipts.hashes(state, checkpoint_io.values(file))
            self._receipt.add({"step": step, "checkpoint": file.name, **facts, **held})
