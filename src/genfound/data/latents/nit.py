"""NiT's published latents: a file for each image."""

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genfound.data.images.base import LatentSource, held_out
from genfound.data.images.imagenet import decode
from genfound.data.images.views import Entries, ImageViews
from genfound.data.latents.published import checked_labels, checked_latents, summary
from genfound.runtime.files import digest, visible
from genfound.tokenizers import LatentSpec
from genfound.tokenizers.dc_ae import DCAE

NIT_SCALE = float(DCAE.kind.official["scaling_factor"])
"""NiT stores encode(x) times this (projects/preprocess/image_nr_latent_c2i.py)."""


class NiTLatents(LatentSource):
    """NiT's data set: `data_meta/*_meta.jsonl`, and a folder of latents for each type of image.

    A line of a meta file names `latent_file`, `latent_h`, `latent_w` and `type`: `native-resolution`, or
    `fixed-256x256`. The folder of a type ends in `native-resolution` or `256x256`. A file holds `latent`
    (2, C, h, w), the image and its mirror image, and its `label`. Views of these types:
    native, square, squares or mixed. `image_root` is the folder of the images themselves, `<class>/<name>.JPEG` or
    `train/<class>/<name>.JPEG`, which only teachers of an alignment look at.
    """

    def __init__(
        self, root: str | Path, views: ImageViews, holdout: int | None, split: str, mirrored: bool, spec: LatentSpec,
        image_root: str | None = None,
    ) -> None:  # fmt: skip
        self.root = root = Path(root)
        self.views, self.image_root = views, None if image_root is None else _images(Path(image_root))
        names, types, entries = _meta(root, spec)
        rules = ["native" if kind == "native-resolution" else kind.rpartition("x")[2] for kind in types]
        missing = sorted(set(views.rules) - set(rules))
        if missing or views.name == "flexible":
            raise ValueError(f"data.root={root} holds {', '.join(rules)}, not what data.view={views.name} needs")
        items = views.items(entries, rules)
        images, self._rules, self.sizes = (column[items] for column in entries)
        self._names = rules  # of the views, which `_rules` counts
        self._folders = {rule: _folder(root, types[rule]) for rule in np.unique(self._rules).tolist()}
        self._files = np.array(names)[images]
        self._stride = spec.stride
        self.labels, self.class_names = self._classes()
        classes = np.full(len(names), -1)
        classes[images] = self.labels
        kept = (held_out(classes, holdout) == (split == "val"))[images]
        self._rules, self.sizes = self._rules[kept], self.sizes[kept]
        self._files, self.labels = self._files[kept], self.labels[kept]
        self._check(views, spec)
        self.fingerprint = digest(repr((rules, self.class_names, entries.sizes.tobytes(), names)))

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

    def _check(self, views: ImageViews, spec: LatentSpec) -> None:
        largest = int((self.sizes // views.unit).prod(axis=1).max(initial=0))
        if "native" in views.rules and largest > views.max_tokens:
            raise ValueError(f"data.root={self.root} holds images of {largest:,} tokens; raise data.max_image_tokens")
        held = len(self.moments(0, False)) if len(self._files) else spec.channels
        if held != spec.channels:
            raise ValueError(f"data.root={self.root} holds {held} channels, and the tokenizer has {spec.channels}")

    def moments(self, index: int, mirrored: bool) -> Tensor:
        """(C, h, w) float32, not scaled."""
        latents = self._read(index, "latent", int(mirrored)).float()
        return checked_latents(self._file(index), latents, "") / NIT_SCALE

    def rendered(self, index: int, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """See `Rerendered`."""
        assert self.image_root is not None
        name = Path(str(self._files[index])).with_suffix(".JPEG")
        try:
            picture = decode(self.image_root / name)
        except OSError as error:
            raise ValueError(f"data.image_root: {self.image_root / name} cannot be read: {error}") from None
        rule = self.views.rules[self._names[int(self._rules[index])]]
        return [np.array(rule.render(picture, *size)) for size in sizes]

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
        return summary(self.root, "NiT", self.labels, self.class_names, self.sizes)


def _meta(root: Path, spec: LatentSpec) -> tuple[list[str], list[str], Entries]:
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


def _images(root: Path) -> Path:
    """The folder of class folders."""
    if not root.is_dir():
        raise FileNotFoundError(f"data.image_root={root} is not a folder")
    return root / "train" if (root / "train").is_dir() else root


def _folder(root: Path, kind: str) -> Path:
    ending = kind.removeprefix("fixed-")
    folders = [folder for folder in visible(root, f"*{ending}") if folder.is_dir()]
    if not folders:
        raise FileNotFoundError(f"data.root={root} has no folder *{ending} with latents of type {kind}")
    return folders[0]
