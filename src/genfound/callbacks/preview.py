"""A grid of samples every so many images, of classes or held-out captions, from the averaged weights."""

from pathlib import Path

from lightning import Trainer

from genfound.callbacks.ema import averaged
from genfound.callbacks.every_n_images import EveryNImages
from genfound.evaluation.protocol import size_text
from genfound.loggers.base import note, picture
from genfound.modules.base import GenerativeModule
from genfound.runtime.uneven_calls import uneven_calls
from genfound.sampling.grid import save_grid
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import preview_requests, prompt_requests, some_captions, typical_sizes

SEED = 0
"""Of the noise of every preview."""


class Preview(EveryNImages):
    """Writes samples/images-<n>.png, a row for each of the typical sizes; the same noise every time."""

    def setup(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """The run directory, and a sampling that fits the run."""
        self.folder = Path(trainer.default_root_dir) / "samples"
        parts = trainer.datamodule.parts  # type: ignore[attr-defined]
        self.titles, sizes = parts.images.class_names, typical_sizes(parts.images.sizes)
        if module.net.text_width is None:
            self.requests = preview_requests(self.titles, sizes)
        else:
            self.titles = some_captions(parts.held_out if len(parts.held_out.labels) else parts.images)
            self.requests = prompt_requests(self.titles, sizes, 1)
        batch = parts.config["sample"]["batch"]
        self.sampling = Pipeline.from_config(parts.config, parts.objective, parts.tokenizer, parts.device, batch)
        self.sampling.check(module.net, {request.size for request in self.requests})

    def on_interval(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Draw and write the grid, on rank 0, for which the others keep their parts of the weights."""
        file = self.folder / f"images-{module.images_seen:09d}.png"
        if trainer.strategy.broadcast(file.exists()):
            return
        try:
            with averaged(trainer, module), uneven_calls(module.net):
                images = self.sampling(module.net, self.requests, SEED) if trainer.is_global_zero else []
        except FloatingPointError as error:
            note(trainer, f"no preview: {error}")
            return
        if not trainer.is_global_zero:
            return
        save_grid(file, images, self.requests, self.titles)
        pairs = zip(images, self.requests, strict=True)
        samples = [(image, self.titles[of.label], size_text(of.size), SEED) for image, of in pairs]
        picture(trainer, "samples", file, module.images_seen, samples)
