"""What a teacher is, and how its features become the targets of a batch."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from genfound.config.checks import integer, number, one_of
from genfound.data.images.base import ImageSource, Rerendered
from genfound.data.packing.batch_plan import MicroBatch
from genfound.layouts import Layout


class Teacher(ABC):
    """A frozen vision encoder; it is never part of a checkpoint.

    Its constructor takes the options of its yaml, and of `width`, `images` and `runs`, those of the run, what it names.
    """

    width: int  # Z, the channels of its features

    @classmethod
    def fetch(cls, weights: str | None, download: bool = True) -> Path | None:
        """The file or folder of weights, downloaded if it is not at hand; `None` where there is nothing to be had."""
        return None

    @abstractmethod
    def __call__(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """Images (B, 3, height, width) uint8 of one size -> features (B, Z, rows, columns) of a grid of tokens."""


def spatially_normalised(features: Tensor, alpha: float) -> Tensor:
    """(B, Z, rows, columns), each image's channels: (f - alpha * mean) / (std + 1e-6), std unbiased (iREPA).

    The spread of an image of one token is 0.
    """
    several = features[0, 0].numel() > 1
    mean, std = features.mean((2, 3), keepdim=True), features.std((2, 3), correction=int(several), keepdim=True)
    return (features - alpha * mean) / (std + 1e-6)


@dataclass
class TeacherFeatures:
    """The targets of a batch, from teachers that are loaded when they are first asked.

    Args:
        teachers: name -> what loads it.
        normalise: `none`, or `zscore`: over the tokens of an image, see `spatially_normalised`.
        zscore_alpha: share of the mean that is taken away.
        every: global steps; only each so-many-th is aligned.
        until: images; no step is aligned that goes beyond.
        pixels: per token side of the images that teachers see, which are read from the files again; `None`: they see
            the model's own.
        stored: names under which a latent store has what the teachers see, which then need not be loaded.

    Raises:
        ValueError: an option is out of range; the message names its key.
    """

    teachers: Mapping[str, Callable[[], Teacher]]
    normalise: str
    zscore_alpha: float
    every: int
    until: int | None
    pixels: int | None = None
    stored: tuple[str, ...] = ()
    _loaded: dict[str, Teacher] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("alignment.normalise", self.normalise, ("none", "zscore"))
        number("alignment.zscore_alpha", self.zscore_alpha, 0)
        integer("alignment.every", self.every, 1)
        integer("alignment.until", self.until, 1, or_null=True)
        integer("alignment.pixels", self.pixels, 1, or_null=True)

    def check_source(self, images: ImageSource) -> None:
        """Raise a ValueError where teachers are to see other pixels than the model, and the images are drawn once."""
        if self.pixels and not self.stored and not isinstance(images, Rerendered):
            raise ValueError(
                f"alignment.pixels={self.pixels} needs images that can be read at another size, from files; choose "
                "data=image_folder or another one of files, or alignment.pixels=null: teachers see what the model sees"
            )

    def aligned(self, micro: MicroBatch) -> bool:
        """Whether the global step of a micro-batch is aligned."""
        return micro.step % self.every == 0 and (self.until is None or micro.images_seen <= self.until)

    def __call__(self, images: Sequence[Tensor], layout: Layout, unit: int, device: torch.device) -> tuple[Tensor, ...]:
        """Features of each teacher, laid out as the tokens of the images.

        Args:
            images: each (3, height, width) uint8.
            layout: of the batch; decides where tokens are, and how many fill it up.
            unit: pixels of an image per token side.
            device: where teachers compute.

        Returns:
            For each teacher packed (T, Z), otherwise (B, N, Z); zeros where there is no image.
        """
        return self._laid_out(
            [(image,) for image in images],
            lambda group: self.maps(group, group.shape[2] // unit, group.shape[3] // unit),
            layout,
            device,
        )

    def read(self, maps: Sequence[Sequence[Tensor]], layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
        """The same of what a store has of each image: of each teacher (Z, rows, columns)."""
        return self._laid_out(maps, lambda *groups: groups, layout, device)

    def _laid_out(
        self, shown: Sequence[Sequence[Tensor]], see: Callable[..., Sequence[Tensor]], layout: Layout,
        device: torch.device,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What `see` makes of what is shown of each image, those of one size together: of each teacher a map."""
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, own in enumerate(shown):
            by_size[tuple(own[0].shape)].append(place)
        found: list[dict[int, Tensor]] = [{} for _ in self.teachers]
        for places in by_size.values():
            together = zip(*(shown[place] for place in places), strict=True)
            groups = [torch.stack(same).to(device, non_blocking=True) for same in together]
            for of_teacher, features in zip(found, see(*groups), strict=True):
                values = features.float()
                if self.normalise == "zscore":
                    values = spatially_normalised(values, self.zscore_alpha)
                of_teacher.update(zip(places, values, strict=True))
        return tuple(token_features([of_images[place] for place in range(len(shown))], layout) for of_images in found)

    @torch.no_grad()
    def maps(self, images: Tensor, rows: int, columns: int) -> list[Tensor]:
        """What each teacher sees in images of one size, (B, Z, rows, columns) float32."""
        self._loaded = self._loaded or {name: load() for name, load in self.teachers.items()}
        found = []
        for name, teacher in self._loaded.items():
            features = teacher(images, rows, columns).float().contiguous()  # as a store has them, to the last bit
            expected = (len(images), teacher.width, rows, columns)
            if features.shape != expected:
                shape = f"features of shape {tuple(features.shape)} instead of {expected}"
                raise ValueError(f"alignment.teachers.{name}: {shape}, (images, width, rows, columns)")
            found.append(features)
        return found


def token_features(maps: Sequence[Tensor], layout: Layout) -> Tensor:
    """Maps, each (Z, rows, columns), as tokens of a layout: packed (T, Z), otherwise (B, N, Z); zeros elsewhere."""
    by_token = replace(layout, patch_size=1)  # type: ignore[type-var]
    x = by_token.to_batch(maps, torch.zeros(len(maps), dtype=torch.long, device=maps[0].device)).x
    return x.flatten(2).transpose(1, 2) if layout.name == "dense" else x
