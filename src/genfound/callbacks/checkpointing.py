"""Checkpoints every so many images, and at the end."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from genfound.runtime.sharded_save import ShardedSave


class Checkpointing(EveryNImages):
    """Writes `step-<n>.ckpt`, a file or a folder; older ones are deleted after the new one is complete.

    Args:
        every: images.
        keep: complete checkpoints.
        asynchronous: they are written while the training goes on, see `AsyncCheckpointIO`.
    """

    def __init__(self, every: int, keep: int, asynchronous: bool = False) -> None:
        super().__init__(every)
        self.keep, self.asynchronous, self._saved = keep, asynchronous, -1

    def setup(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """The run directory, the way to it, and what sampling must know of the data."""
        trainer.strategy.checkpoint_io = self._io = AsyncCheckpointIO() if self.asynchronous else AtomicCheckpointIO()
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
        """Save the last step of a run that was cut short, and have all of it on the disk."""
        self._save(trainer)
        self._io.complete()
        self._prune(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        self._io.complete()  # the one before, which then has its line in the receipt
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt")
        self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for old in visible(self.folder, "step-*.ckpt")[: -self.keep]:
                checkpoint_io.remove(old)

    def on_save_checkpoint(self, trainer: Trainer, module: GenerativeModule, checkpoint: dict[str, Any]) -> None:
        """Add what sampling must know of the data."""
        checkpoint["format"] = FORMAT
        checkpoint["run"] = self.facts


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to our checkpoints, files or folders, which are complete when it returns."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See `checkpoint_io.save`."""
        checkpoint_io.remove_left(Path(path).parent)
        checkpoint_io.save(checkpoint, Path(path))

    def save_sharded(self, checkpoint: dict[str, Any], path: Path) -> None:
        """See `sharded_save`; all processes together."""
        from genfound.runtime.sharded_save import ShardedSave

        ShardedSave(checkpoint, path, copy=False).complete()

    def complete(self) -> None:
        """Nothing is left to write."""

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See `checkpoint_io.read`; always on the CPU and never running code."""
        return checkpoint_io.read(Path(path))


class AsyncCheckpointIO(AtomicCheckpointIO):
    """Copies a checkpoint to the host, and writes it in a thread; one after another.

    Lightning's own copies it on the device, and any number of them. What fails is raised by `complete`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._file: Future[None] | None = None
        self._folder: ShardedSave | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Wait for the one before, copy, and begin to write."""
        self.complete()
        self._file = self._thread.submit(super().save_checkpoint, checkpoint_io.copied(checkpoint), path)

    def save_sharded(self, checkpoint: dict[str, Any], path: Path) -> None:
        """As `save_checkpoint` a folder; all processes together."""
        from genfound.runtime.sharded_save import ShardedSave

        self.complete()
        self._folder = ShardedSave(checkpoint, path, copy=True)

    def complete(self) -> None:
        """Wait until it is written, of a folder all processes together; raise what its writing raised, once."""
        file, self._file, folder, self._folder = self._file, None, self._folder, None
        if file is not None:
            file.result()
        if folder is not None:
            folder.complete()

    def teardown(self) -> None:
        """Wait for a file; a folder is written no further where the training has failed before it was complete."""
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.give_up()
        self.complete()
