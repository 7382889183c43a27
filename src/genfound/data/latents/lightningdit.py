"""LightningDiT's published latents, in shards."""

from pathlib import Path

import numpy as np
from torch import Tensor

from genfound.data.images.base import LatentSource, held_out
from genfound.data.images.views import ImageViews
from genfound.data.latents.published import checked_labels, checked_latents, summary
from genfound.data.latents.safetensors_io import Reader, as_tensor, read_header, read_tensors
from genfound.runtime.files import digest, visible
from genfound.tokenizers import LatentSpec


class LightningDiTLatents(LatentSource):
    """LightningDiT's shards `*.safetensors`: unscaled `latents` and `latents_flip` (n, C, h, w), and `labels`."""

    def __init__(
        self, root: str | Path, views: ImageViews, holdout: int | None, split: str, mirrored: bool, spec: LatentSpec
    ) -> None:
        self.root = Path(root)
        self._files = shard_files(self.root)
        headers = [read_header(file) for file in self._files]
        try:
            self._spans = [(header.spans["latents"], header.spans["latents_flip"]) for header in headers]
            shards = zip(self._files, headers, strict=True)
            labels = [read_tensors(file, {"labels": header.spans["labels"]})["labels"] for file, header in shards]
        except KeyError as error:
            missing = error.args[0]
            raise ValueError(f"data.root={root} has a shard without {missing}; it is not LightningDiT's") from None
        self._reader = Reader(self._files)
        self._shape = self._spans[0][0].shape[1:]
        every = self._labels(labels)
        self._rows = np.flatnonzero(held_out(every, holdout) == (split == "val"))
        self._first = np.cumsum([0, *map(len, labels)])
        self.labels = every[self._rows]
        self.class_names = [str(number) for number in range(int(every.max()) + 1)]
        self.sizes = np.full((len(self._rows), 2), views.size, dtype=np.int64)
        self._check(views, spec)
        self.fingerprint = digest(repr(([file.name for file in self._files], self._shape, every.tobytes())))

    def _labels(self, labels: list[np.ndarray]) -> np.ndarray:
        """(n,) int64, of all shards, each of which has as many as latents and mirrored latents."""
        for file, (plain, mirrored), own in zip(self._files, self._spans, labels, strict=True):
            if own.ndim != 1 or [len(own)] * 2 != [*plain.shape[:1], *mirrored.shape[:1]]:
                raise ValueError(
                    f"{file} holds latents {plain.shape}, latents_flip {mirrored.shape} and labels {list(own.shape)}, "
                    f"which do not agree"
                )
        images, pairs = sum(map(len, labels)), zip(self._files, labels, strict=True)
        return np.concatenate([checked_labels(file, own, images) for file, own in pairs])

    def _check(self, views: ImageViews, spec: LatentSpec) -> None:
        root, shape = f"data.root={self.root}", self._shape
        if len(shape) != 3 or any(span.shape[1:] != shape for pair in self._spans for span in pair):
            raise ValueError(f"{root} has latents of several sizes")
        side = shape[1] * spec.stride
        if shape[0] != spec.channels:
            raise ValueError(f"{root} holds {shape[0]} channels, and the tokenizer has {spec.channels}")
        if views.name != "square" or views.size != side:
            raise ValueError(f"{root} holds squares of {side} pixels; choose data.view=square data.size={side}")

    def moments(self, index: int, mirrored: bool) -> Tensor:
        """(C, h, w) float32, as stored."""
        place = int(self._rows[index])
        shard = int(np.searchsorted(self._first, place, side="right")) - 1
        row, span = place - int(self._first[shard]), self._spans[shard][int(mirrored)]
        count = int(np.prod(self._shape)) * span.dtype.itemsize
        data = self._reader.read(shard, span.begin + row * count, count)
        latents = as_tensor(data, span.dtype).view(self._shape).float()
        return checked_latents(self._files[shard], latents, f" in row {row}")

    def report(self) -> list[str]:
        """Counts and sizes."""
        return summary(self.root, "LightningDiT", self.labels, self.class_names, self.sizes)


def shard_files(root: Path) -> list[Path]:
    """LightningDiT's shards, sorted."""
    files = visible(root, "*.safetensors")
    if not files:
        raise FileNotFoundError(f"data.root={root} has no *.safetensors of LightningDiT")
    return files
