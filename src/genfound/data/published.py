"""Latents that others have published: NiT's files, one per image, and LightningDiT's shards.

What they were scaled with when they were stored is divided out, so that a tokenizer normalises them like any others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genfound.data.class_folders import remarks
from genfound.data.shards import Reader, Span, as_tensor, read_header, read_tensors
from genfound.data.views import Entries, Views
from genfound.tokenizers import Spec, Tokenizer
from genfound.tokenizers.dc_ae import DcAe
from genfound.writing import visible, write_whole

NIT_SCALE = float(DcAe.kind.official["scaling_factor"])
"""NiT stores encode(x) times this (projects/preprocess/image_nr_latent_c2i.py)."""

STATISTICS = "latents_stats.pt"

SAMPLED = 10_000
"""LightningDiT's statistics are those of at most so many latents."""


MOST_CLASSES = 1_000
"""Labels are below it, or below the number of images where that is larger."""


def held_out(classes: np.ndarray, holdout: int | None) -> np.ndarray:
    """(n,) bool, True for every holdout-th image of each class, in the order of the images."""
    chosen = np.zeros(len(classes), dtype=bool)
    if holdout is not None:
        for label in np.unique(classes):
            chosen[np.flatnonzero(classes == label)[holdout - 1 :: holdout]] = True
    return chosen


def checked_labels(file: Path, labels: np.ndarray, images: int) -> np.ndarray:
    """The labels of a file as int64.

    Raises:
        ValueError: some are no class numbers.
    """
    most = max(MOST_CLASSES, images)
    legal = np.isfinite(labels) & (labels >= 0) & (labels < most) & (labels == np.floor(labels))
    if not legal.all():
        raise ValueError(f"{file} holds the label {labels[~legal][0]}, which is no number of a class below {most:,}")
    return labels.astype(np.int64)


def checked_latents(file: Path, latents: Tensor, place: str) -> Tensor:
    """Latents as they are.

    Raises:
        ValueError: some are not finite.
    """
    if not latents.isfinite().all():
        raise ValueError(f"{file} holds latents that are not finite{place}; take the file from its source again")
    return latents


class Nit:
    """NiT's data set: `data_meta/*_meta.jsonl`, and a folder of latents for each type of image.

    A line of a meta file names `latent_file`, `latent_h`, `latent_w` and `type`: `native-resolution`, or
    `fixed-256x256`. The folder of a type ends in `native-resolution` or `256x256`. A file holds `latent`
    (2, C, h, w), the image and its mirror image, and its `label`.

    Args:
        root: folder with data_meta/ and the folders of latents.
        views: native, square or mixed, of the types that there are.
        holdout: of each class every holdout-th image validates; `None` holds none out.
        split: `train` or `val`.
        mirrored: mirror images are always there.
        spec: of the tokenizer.

    Raises:
        FileNotFoundError: the root has no meta file, or no folder for a type.
        ValueError: a damaged meta file, or another view or tokenizer.
    """

    def __init__(self, root: Path, views: Views, holdout: int | None, split: str, mirrored: bool, spec: Spec) -> None:
        self.root = root
        names, types, entries = _meta(root, spec)
        rules = ["native" if kind == "native-resolution" else kind.rpartition("x")[2] for kind in types]
        missing = sorted(set(views.rules) - set(rules))
        if missing or views.name == "flexible":
            raise ValueError(f"data.root={root} holds {', '.join(rules)}, not what data.view={views.name} needs")
        items = views.items(entries, rules)
        images, self._rules, self.sizes = (column[items] for column in entries)
        self._folders = {rule: _folder(root, types[rule]) for rule in np.unique(self._rules).tolist()}
        self._files = np.array(names)[images]
        self._stride = spec.stride
        self.labels, self.class_names = self._classes()
        classes = np.full(len(names), -1)
        classes[images] = self.labels
        kept = (held_out(classes, holdout) == (split == "val"))[images]
        self._rules, self.sizes, self._files, self.labels = (
            column[kept] for column in (self._rules, self.sizes, self._files, self.labels)
        )
        self._check(views, spec)
        facts = (rules, self.class_names, entries.sizes.tobytes(), names)
        self.fingerprint = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()

    def _classes(self) -> tuple[np.ndarray, list[str]]:
        """(n,) labels, which the first file of each class folder tells, and the names of all classes."""
        own = np.array([name.split("/", 1)[0] for name in self._files.tolist()])
        folders, first, inverse = np.unique(own, return_index=True, return_inverse=True)
        numbers = [self._label(int(index)) for index in first]
        class_names = [str(number) for number in range(max(numbers) + 1)]
        for number, folder in zip(numbers, folders.tolist(), strict=True):
            class_names[number] = folder
        return np.array(numbers, dtype=np.int64)[inverse], class_names

    def _label(self, index: int) -> int:
        label = self._read(index, "label").float().flatten()
        if len(label) != 1:
            raise ValueError(f"{self._file(index)} holds {len(label)} labels, not one")
        return int(checked_labels(self._file(index), label.numpy(), len(self._files))[0])

    def _check(self, views: Views, spec: Spec) -> None:
        largest = int((self.sizes // views.unit).prod(axis=1).max(initial=0))
        if "native" in views.rules and largest > views.max_tokens:
            raise ValueError(f"data.root={self.root} holds images of {largest:,} tokens; raise data.max_image_tokens")
        held = len(self.moments(0, False)) if len(self._files) else spec.channels
        if held != spec.channels:
            raise ValueError(f"data.root={self.root} holds {held} channels, and the tokenizer has {spec.channels}")

    def moments(self, index: int, mirrored: bool) -> Tensor:
        """(C, h, w) float32, not scaled.

        Raises:
            ValueError: the file is missing or damaged.
        """
        latents = self._read(index, "latent", int(mirrored)).float()
        return checked_latents(self._file(index), latents, "") / NIT_SCALE

    def _file(self, index: int) -> Path:
        return self._folders[int(self._rules[index])] / str(self._files[index])

    def _read(self, index: int, key: str, variant: int | None = None) -> Tensor:
        """A tensor of a file, or the image or the mirror image in it."""
        file = self._file(index)
        try:
            with safe_open(file, "pt") as tensors:
                if variant is None:
                    return tensors.get_tensor(key)
                latent = tensors.get_slice(key)[variant : variant + 1][0]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is missing or damaged: {str(error).splitlines()[0]}") from None
        expected, found = (self.sizes[index] // self._stride).tolist(), list(latent.shape[1:])
        if found != expected:
            raise ValueError(f"{file} holds {found} latents, and its meta file says {expected}")
        return latent

    def report(self) -> list[str]:
        """Counts and sizes."""
        return _summary(self.root, "NiT", self.labels, self.class_names, self.sizes)


def _meta(root: Path, spec: Spec) -> tuple[list[str], list[str], Entries]:
    """Names of images, types, and an entry for each (image, type), from all meta files; each once."""
    files = sorted([*visible(root, "*_meta.jsonl"), *visible(root / "data_meta", "*_meta.jsonl")])
    if not files:
        raise FileNotFoundError(f"data.root={root} has no data_meta/*_meta.jsonl of NiT")
    images: dict[str, int] = {}
    types: dict[str, int] = {}
    numbers = array("q")
    for file in files:
        for name, kind, height, width in _lines(file):
            numbers.extend((images.setdefault(name, len(images)), types.setdefault(kind, len(types)), height, width))
    table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 4)
    _, first = np.unique(table[:, 0] * len(types) + table[:, 1], return_index=True)
    table = table[first]
    return list(images), list(types), Entries(table[:, 0], table[:, 1], table[:, 2:] * spec.stride)


def _lines(file: Path) -> Iterator[tuple[str, str, int, int]]:
    """Latent file, type, and rows and columns of its latents."""
    with open(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                meta: dict[str, Any] = json.loads(line)
                yield meta["latent_file"], meta["type"], int(meta["latent_h"]), int(meta["latent_w"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}: line {number} is not one of NiT's") from None


def _folder(root: Path, kind: str) -> Path:
    """The folder of latents of a type."""
    ending = kind.removeprefix("fixed-")
    folders = [folder for folder in visible(root, f"*{ending}") if folder.is_dir()]
    if not folders:
        raise FileNotFoundError(f"data.root={root} has no folder *{ending} with latents of type {kind}")
    return folders[0]


class LightningDit:
    """LightningDiT's shards: `latents`, `latents_flip` (n, C, h, w) and `labels` in each `*.safetensors`, not scaled.

    Args:
        root: folder of the shards.
        views: the square that was encoded.
        holdout: of each class every holdout-th image validates; `None` holds none out.
        split: `train` or `val`.
        mirrored: mirror images are always there.
        spec: of the tokenizer.

    Raises:
        FileNotFoundError: the folder has no shards.
        ValueError: a damaged shard, or latents of another size.
    """

    def __init__(self, root: Path, views: Views, holdout: int | None, split: str, mirrored: bool, spec: Spec) -> None:
        self.root = root
        self._files = shard_files(root)
        headers = [read_header(file) for file in self._files]
        try:
            self._spans = [(header.spans["latents"], header.spans["latents_flip"]) for header in headers]
            shards = zip(self._files, headers, strict=True)
            labels = [read_tensors(file, {"labels": header.spans["labels"]})["labels"] for file, header in shards]
        except KeyError as error:
            raise ValueError(
                f"data.root={root} has a shard without {error.args[0]}; it is not LightningDiT's"
            ) from None
        self._reader = Reader(self._files)
        self._shape = self._spans[0][0].shape[1:]
        every = self._labels(labels)
        self._rows = np.flatnonzero(held_out(every, holdout) == (split == "val"))
        self._first = np.cumsum([0, *map(len, labels)])
        self.labels = every[self._rows]
        self.class_names = [str(number) for number in range(int(every.max()) + 1)]
        self.sizes = np.full((len(self._rows), 2), views.size, dtype=np.int64)
        self._check(views, spec)
        facts = ([file.name for file in self._files], self._shape, every.tobytes())
        self.fingerprint = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()

    def _labels(self, labels: list[np.ndarray]) -> np.ndarray:
        """(n,) int64, of all shards, each of which has as many as latents and mirrored latents."""
        for file, (plain, mirrored), own in zip(self._files, self._spans, labels, strict=True):
            if own.ndim != 1 or [len(own)] * 2 != [*plain.shape[:1], *mirrored.shape[:1]]:
                raise ValueError(
                    f"{file} holds latents {plain.shape}, latents_flip {mirrored.shape} and labels {list(own.shape)}, "
                    f"which do not agree"
                )
        images = sum(map(len, labels))
        every = [checked_labels(file, own, images) for file, own in zip(self._files, labels, strict=True)]
        return np.concatenate(every)

    def _check(self, views: Views, spec: Spec) -> None:
        if len(self._shape) != 3 or any(span.shape[1:] != self._shape for pair in self._spans for span in pair):
            raise ValueError(f"data.root={self.root} has latents of several sizes")
        side = self._shape[1] * spec.stride
        if self._shape[0] != spec.channels:
            raise ValueError(
                f"data.root={self.root} holds {self._shape[0]} channels, and the tokenizer has {spec.channels}"
            )
        if views.name != "square" or views.size != side:
            raise ValueError(
                f"data.root={self.root} holds squares of {side} pixels; choose data.view=square data.size={side}"
            )

    def moments(self, index: int, mirrored: bool) -> Tensor:
        """(C, h, w) float32, as stored.

        Raises:
            ValueError: they are not finite.
        """
        row = int(self._rows[index])
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        span = self._spans[shard][int(mirrored)]
        count = int(np.prod(self._shape)) * span.dtype.itemsize
        data = self._reader.read(shard, span.begin + (row - int(self._first[shard])) * count, count)
        latents = as_tensor(data, span.dtype).view(self._shape).float()
        return checked_latents(self._files[shard], latents, f" in row {row - int(self._first[shard])}")

    def report(self) -> list[str]:
        """Counts and sizes."""
        return _summary(self.root, "LightningDiT", self.labels, self.class_names, self.sizes)


def shard_files(root: Path) -> list[Path]:
    """LightningDiT's shards, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    files = visible(root, "*.safetensors")
    if not files:
        raise FileNotFoundError(f"data.root={root} has no *.safetensors of LightningDiT")
    return files


def statistics(root: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (1, C, 1, 1), of LightningDiT's latents; see its ImgLatentDataset.

    They lie in `latents_stats.pt`. Where that is absent it is made, of up to 10,000 latents in even steps, not
    mirrored; the deviation is the unbiased one. Where it cannot be written, it is made each time.

    Raises:
        FileNotFoundError: there are neither statistics nor shards.
        ValueError: the statistics, or a shard, are damaged.
    """
    file = root / STATISTICS
    if not file.is_file():
        std, mean = _measured(root)
        with contextlib.suppress(OSError):
            write_whole(file, lambda temporary: torch.save({"mean": mean, "std": std}, temporary))
        return mean, std
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        mean, std = found["mean"], found["std"]
        legal = mean.shape == std.shape == (1, mean.numel(), 1, 1) and bool(mean.isfinite().all() and (std > 0).all())
    except OSError:
        raise
    except Exception:  # pickles raise RuntimeError, EOFError, UnpicklingError and more
        legal = False
    if not legal:
        raise ValueError(f"{file} is damaged; remove it, and it is made anew from the shards beside it")
    return mean, std


def _measured(root: Path) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of a sample of all latents."""
    spans = {shard: _latents(shard) for shard in shard_files(root)}
    every = max(1, -(-sum(span.shape[0] for span in spans.values()) // SAMPLED))
    parts, skip = [], 0
    for shard, span in spans.items():
        chosen = torch.from_numpy(read_tensors(shard, {"latents": span})["latents"])[skip::every].float()
        parts.append(checked_latents(shard, chosen, ""))
        skip = (skip - span.shape[0]) % every
    return torch.std_mean(torch.cat(parts), dim=(0, 2, 3), keepdim=True)


def _latents(shard: Path) -> Span:
    """Where the latents of a shard lie."""
    spans = read_header(shard).spans
    if "latents" not in spans:
        raise ValueError(f"{shard} has no latents; it is not LightningDiT's")
    return spans["latents"]


class VaVae(Tokenizer):
    """LightningDiT's autoencoder as its published latents know it: by their statistics, without its network.

    Latents of each channel are (h - mean) / std * multiplier. They can be trained on and drawn, not decoded.

    Args:
        weights: folder with `latents_stats.pt`, or with the shards that it is made of.
        stride: pixels per latent.
        multiplier: `latent_multiplier` of the official configuration.
    """

    published = Spec(channels=32, stride=16)
    online = False
    stochastic = False

    def __init__(self, *, weights: str, stride: int, multiplier: float) -> None:
        mean, std = statistics(Path(weights))
        self.shift, self.scale = mean[0], multiplier / std[0]
        self.spec = Spec(len(self.shift), stride)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Raise a ValueError: its network is not here."""
        raise ValueError("VA-VAE's network is no part of genfound: images cannot be encoded")

    def decode(self, latents: Tensor) -> Tensor:
        """Raise a ValueError: its network is not here."""
        raise ValueError("VA-VAE's network is no part of genfound: latents cannot be decoded")


def _summary(root: Path, whose: str, labels: np.ndarray, class_names: list[str], sizes: np.ndarray) -> list[str]:
    low, high = sizes.min(0), sizes.max(0)
    counts = f"{root}: {len(labels):,} latents of {whose} in {len(class_names)} classes, "
    return [
        f"{counts}{low[0]} x {low[1]} to {high[0]} x {high[1]} pixels (height x width)",
        *remarks(class_names),
    ]
