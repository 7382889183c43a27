"""Checkpoints every so many images, and at the end."""

from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from genfound.callbacks.every_n_images import EveryNImages
from genfound.callbacks.resuming import facts
from genfound.callbacks.throughput import paused
from genfound.modules.base import GenerativeModule
from genfound.runtime import checkpoint_io
from genfound.runtime.files import visible
from genfound.runtime.run_directory import FORMAT
from genfound.sampling.requests import typical_sizes


class Checkpointing(EveryNImages):
    """Writes `step-<n>.ckpt`, a file or a folder; older ones are deleted after the new one is complete."""

    def __init__(self, every: int, keep: int) -> None:
        super().__init__(every)
        self.keep, self._saved = keep, -1

    def setup(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """The run directory, and what sampling must know of the data."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        parts = trainer.datamodule.parts  # type: ignore[attr-defined]
        names, sizes = parts.images.class_names, typical_sizes(parts.images.sizes)
        self.facts = {"class_names": names, "sizes": sizes, **facts(parts)}

    def on_train_start(self, trainer: Trainer, module: GenerativeModule) -> None:
        """What was resumed from is already on disk."""
        super().on_train_start(trainer, module)
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: GenerativeModule, *_: Any) -> None:
        """Save the last step before what else is done at the end."""
        super().on_train_batch_end(trainer, module)
        if module.images_seen >= module.budget:
            with paused(trainer, module):
                self._save(trainer)

    def on_interval(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Save, unless the run ends here."""
        if not trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Save the last step of a run that was cut short."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in visible(self.folder, "step-*.ckpt")[: -self.keep]:
                checkpoint_io.remove(old)

    def on_save_checkpoint(self, trainer: Trainer, module: GenerativeModule, checkpoint: dict[str, Any]) -> None:
        """Add what sampling must know of the data."""
        checkpoint["format"] = FORMAT
        checkpoint["run"] = self.facts


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to our checkpoint files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See `checkpoint_io.save`."""
        checkpoint_io.remove_left(Path(path).parent)
        checkpoint_io.save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See `checkpoint_io.read`; always on the CPU and never running code."""
        return checkpoint_io.read(Path(path))
