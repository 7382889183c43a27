"""GenerativeDataModule: the batches of training and validation, and the place of a run in its data."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import lightning
import numpy as np
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config import compose
from genfound.data.packing.batch_plan import MicroBatch
from genfound.data.packing.collate import Collate, RawImages
from genfound.data.packing.loader import HeldOut, TrainLoader, ValidationLoader
from genfound.layouts import Dense
from genfound.rng import Rng
from genfound.runtime.devices import Stopwatch
from genfound.tokenizers.autoencoder import Autoencoder

if TYPE_CHECKING:
    from genfound.build import RunComponents


class GenerativeDataModule(lightning.LightningDataModule):
    """Batches of training and held-out images, shared out over the ranks of the trainer.

    A global step is `world_size * accumulate_grad_batches` micro-batches. The position in the data is in every
    checkpoint: a run continues with the images that it has not seen, also on another number of ranks.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(self, parts: "RunComponents") -> None:
        super().__init__()
        self.parts = parts
        self.train, self.collate = parts.loader(0), parts.assembly
        self.val_collate = Collate(parts.tokenizer, parts.layout, Rng(0, "val"))  # the same in every run
        self.val = ValidationLoader(parts.batches(parts.held_out, self.val_collate), [], parts.workers)
        self.encoding, self.teaching = Stopwatch(), Stopwatch()  # of the tokenizer and of teachers, in training
        self._beside: torch.cuda.Stream | None = None  # of the tokenizer
        self._wanted = parts.plan.per_step
        self._encoded: dict[int, Batch] = {}  # held-out images on the host; every validation has the same
        options = parts.config["callbacks"].get("validation") or {"images": len(parts.held_out.labels)}
        self.validate_on(options["images"])

    @staticmethod
    def from_config(overrides: Sequence[str] = ()) -> "GenerativeDataModule":
        """The data of conf/train.yaml with overrides, e.g. `from_config(["model=nit_tiny", "data=shapes"])`.

        Give it the overrides of the module: model, tokenizer and layout decide what a batch is.

        Raises:
            ValueError: the configuration does not fit together.
        """
        from genfound import build  # to the right of data, and needed only here

        return GenerativeDataModule(build.build_run(compose.compose("train", overrides), 1, with_values=False))

    def setup(self, stage: str) -> None:
        """Take ranks and accumulation from the trainer."""
        trainer = self.trainer
        assert trainer is not None
        for loader in (self.train, self.val):
            loader.rank, loader.ranks = trainer.global_rank, trainer.world_size
        self.train.pin_memory = trainer.strategy.root_device.type == "cuda"
        if stage != "fit":
            return
        micro_batches = trainer.world_size * trainer.accumulate_grad_batches
        key = "images" if isinstance(self.parts.layout, Dense) else "packs"
        if self.parts.config["batch"][key] and self._wanted != micro_batches:
            raise ValueError(
                f"batch.{key} asks for {self._wanted} micro-batches in a global step, and this trainer makes "
                f"{micro_batches} (ranks times accumulate_grad_batches); leave batch.{key}=null, or change "
                "accumulate_grad_batches"
            )
        self.train.plan.per_step = micro_batches

    def train_dataloader(self) -> TrainLoader:
        """Items (batch, micro-batch of the plan), without end."""
        return self.train

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """The held-out images; nothing where there are none."""
        return self.val if self.val.micros else []

    def validate_on(self, images: int) -> None:
        """Validate on the first so many held-out images of a fixed order."""
        self.val.micros = self.parts.validation(images)
        self._encoded.clear()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Encode what is not encoded yet; what the plan says of a micro-batch stays on the host."""
        if isinstance(batch, HeldOut):
            return self._held_out(batch, device)
        images, micro = batch
        if isinstance(images, RawImages):
            batch = self._captioned(self._encoded_images(images, micro.positions, device), images)
            return self._taught(batch, images, micro, device), micro
        return images.to(device, non_blocking=True), micro

    def compile_tokenizer(self) -> None:
        """Compile the encoder of training; held-out images are encoded once, and without waiting for a compiler."""
        if isinstance(codec := self.collate.tokenizer, Autoencoder):
            several = len(np.unique(self.parts.images.sizes, axis=0)) > 1
            self.collate = replace(self.collate, tokenizer=codec.compiled(dynamic=several))

    def _encoded_images(self, images: RawImages, positions: Sequence[int], device: torch.device) -> Batch:
        """The batch of these images; on CUDA encoded while the device is still at the step before."""
        assert self.trainer is not None
        counted = self.encoding.running(device) if self.trainer.training else nullcontext()
        if device.type != "cuda":
            with counted:
                return self.collate(images, positions, device)
        main, self._beside = torch.cuda.current_stream(device), self._beside or torch.cuda.Stream(device)
        with torch.cuda.stream(self._beside), counted:
            batch = self.collate(images, positions, device)
        main.wait_stream(self._beside)
        for tensor in (value for value in vars(batch).values() if isinstance(value, torch.Tensor)):
            tensor.record_stream(main)  # its memory is not given away before this stream has read it
        return batch

    def _captioned(self, batch: Batch, images: RawImages) -> Batch:
        """The batch with what a text encoder makes of the captions of its images, if these have any."""
        if images.text is None:
            return batch
        made = [own.to(batch.x.device, non_blocking=True) for own in images.text if isinstance(own, Tensor)]
        made = made or self.parts.text_encoder(cast(list[str], images.text), batch.x.device)
        return batch.with_text(made, self.parts.net.text_tokens)

    def _taught(self, batch: Batch, images: RawImages, micro: MicroBatch, device: torch.device) -> Batch:
        """The batch with what teachers see in its images, if its step is aligned to them."""
        teachers, trainer = self.parts.teachers, self.trainer
        if teachers is None or trainer is None or not (trainer.training and teachers.aligned(micro)):
            return batch
        if images.features is not None:
            return replace(batch, features=teachers.read(images.features, self.parts.layout, device))
        shown, unit = images.images, self.parts.unit
        if images.pictures is not None:
            shown, unit = images.pictures, teachers.pixels or unit
        with self.teaching.running(device), trainer.precision_plugin.forward_context():
            return replace(batch, features=teachers(shown, self.parts.layout, unit, device))

    def _held_out(self, item: HeldOut, device: torch.device) -> HeldOut:
        batch, micro = item.images, item.micro
        if isinstance(batch, RawImages):
            if micro.number not in self._encoded:
                encoded = self._captioned(self.val_collate(batch, micro.positions, device), batch)
                self._encoded[micro.number] = encoded.to("cpu")
            batch = self._encoded[micro.number]
        return replace(item, images=batch.to(device), noise=self._noise(batch, micro.positions).to(device))

    def _noise(self, batch: Batch, positions: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers, laid out as the batch is."""
        layout = self.val_collate.layout
        shapes = [latent.shape for latent in layout.to_latents(batch.x, batch)]
        drawn = [Rng(0, "val", k).normal("noise", shape) for k, shape in zip(positions, shapes, strict=True)]
        return layout.to_batch(drawn, torch.zeros(len(drawn), dtype=torch.long)).x

    def state_dict(self) -> dict[str, Any]:
        """The position after the last global step."""
        assert self.trainer is not None
        return self.train.plan.state(self.trainer.global_step)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue at a recorded position."""
        self.train.plan.restore(state_dict)
