"""A latent store: images that were encoded once, in a few large files.

A folder holds `manifest.json` and, for each split, shards `train-00000.safetensors`, .... A shard holds flat tensors:

| tensor | contents |
|---|---|
| values | the moments of all entries one after another; an entry is (mirrored, mean or log-variance, C, h, w) |
| offsets | (n + 1,) where each entry begins in `values` |
| sizes | (n, 2) rows and columns h, w of the latents |
| labels | (n,) |
| images | (n,) number of the image in its split; an image may have several entries |
| rules | (n,) which of the manifest's `views` the entry is |
| checks | (n, 1 or 2) crc32 of the moments of the image and of its mirror image |
| sums | (2, C) sum and sum of squares of the means, not mirrored |
| names | the images' names as the file system has them, one after another, with a byte 0 between two |

Values are unscaled, as the encoder left them. Everything but the values is the index of a shard; the crc32 of the
index is in the manifest, so that no byte can change unnoticed: one of the index is found when the store is opened,
one of the values when they are read. The metadata say which shard of which store it is, and which images are shown by
others because their own files could not be read.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genfound.data.images.base import LatentSource
from genfound.data.images.names import Names, remarks
from genfound.data.images.views import Entries, ImageViews
from genfound.data.latents.manifest import REPAIR, fingerprint, read_manifest, store_digest
from genfound.data.latents.safetensors_io import Reader, Span, as_tensor, read_header, read_tensors, write_tensors

INDEX = ("offsets", "sizes", "labels", "images", "rules", "checks", "sums", "names")
UNREADABLE = "because their own files could not be read when they were encoded"


class ShardIndex(NamedTuple):
    """The index of a shard, what its metadata say, its checksum, and where its values begin."""

    columns: dict[str, np.ndarray]
    note: dict[str, Any]
    crc32: int
    values: Span


class ShardWriter:
    """A shard in memory, of which every entry is put in once; planes are C or, with log-variance, 2 C."""

    def __init__(
        self, columns: Mapping[str, np.ndarray], names: list[str], channels: int, planes: int, variants: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.columns = {name: np.ascontiguousarray(column, dtype=np.int32) for name, column in columns.items()}
        self.names = names
        self.variants, self.planes = variants, planes  # variants: 2 with mirror images, else 1
        lengths = variants * planes * self.columns["sizes"].astype(np.int64).prod(axis=1)
        self.offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        self.values = torch.empty(int(self.offsets[-1]), dtype=dtype)
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.missing = len(lengths)  # entries that are still to be put in
        self.replaced: dict[str, str] = {}  # images that cannot be read -> those that are shown in their place

    def put(self, entries: list[int], moments: Tensor) -> None:
        """Put in entries of one size, by their numbers in the shard: (B, variants, planes, h, w)."""
        for entry, values in zip(entries, moments, strict=True):
            self.values[self.offsets[entry] : self.offsets[entry + 1]] = values.flatten()
        means = moments[:, 0, : self.sums.shape[1]].double()
        self.sums += torch.stack([means.sum((0, 2, 3)), means.square().sum((0, 2, 3))])
        self.missing -= len(entries)

    def first(self) -> Tensor:
        """(1, planes, h, w) float32, the first entry."""
        height, width = self.columns["sizes"][0].tolist()
        return self.values[: self.planes * height * width].float().view(1, self.planes, height, width)

    def write(self, file: Path, note: Mapping[str, Any]) -> None:
        """Write the shard, whole or not at all; the note becomes part of its metadata."""
        names = np.frombuffer(Names(self.names).table, dtype=np.uint8).copy()
        found = checks(self.values, self.offsets, self.variants)
        index = {**self.columns, "offsets": self.offsets, "checks": found, "sums": self.sums.numpy(), "names": names}
        note = {**note, "replaced": self.replaced}
        remark = json.dumps({**note, "crc32": _crc(index, note)}, sort_keys=True)
        write_tensors(file, {"values": self.values, **{key: torch.from_numpy(index[key]) for key in INDEX}}, remark)


def checks(values: Tensor, offsets: np.ndarray, variants: int) -> np.ndarray:
    """(n, variants) int32, the crc32 of each variant of each entry; see `Store.moments`."""
    data = values.view(torch.uint8).numpy().data
    size = values.dtype.itemsize
    found = np.zeros((len(offsets) - 1, variants), dtype=np.uint32)
    for entry, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        step = (end - begin) // variants
        for variant in range(variants):
            first = begin + variant * step
            found[entry, variant] = zlib.crc32(data[first * size : (first + step) * size])
    return found.view(np.int32)


def read_index(file: Path) -> ShardIndex:
    """The index of a shard, checked against its own checksum."""
    try:
        spans, metadata = read_header(file)
    except ValueError as error:
        raise ValueError(f"{error}; {REPAIR}") from None
    try:
        columns = read_tensors(file, {name: spans[name] for name in INDEX})
        note = json.loads(metadata["genfound"])
        crc = note.pop("crc32")
        intact = crc == _crc(columns, note)
        values = spans["values"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged: its index cannot be read; {REPAIR}") from None
    if not intact or columns["offsets"][-1] != values.shape[0]:
        raise ValueError(f"{file} is damaged: its index has not the checksum that was written with it; {REPAIR}")
    return ShardIndex(columns, note, crc, values)


def verify(file: Path) -> ShardIndex:
    """Read a whole shard, a little at a time."""
    index = read_index(file)
    expected = index.columns["checks"].view(np.uint32)
    lengths = np.diff(index.columns["offsets"]) // expected.shape[1] * index.values.dtype.itemsize
    with open(file, "rb", buffering=2**24) as stream:
        stream.seek(index.values.begin)
        for entry, length in enumerate(lengths.tolist()):
            if [zlib.crc32(stream.read(length)) for _ in expected[entry]] != expected[entry].tolist():
                reason = f"entry {entry} has not the checksum that was written with it"
                raise ValueError(f"{file} is damaged: {reason}; {REPAIR}")
    return index


def manifest_line(file: Path, index: ShardIndex) -> dict[str, Any]:
    """What the manifest says of a shard."""
    entries, size, replaced = len(index.columns["labels"]), file.stat().st_size, len(index.note["replaced"])
    return {"file": file.name, "entries": entries, "bytes": size, "crc32": index.crc32, "replaced": replaced}


def _crc(columns: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> int:
    crc = zlib.crc32(json.dumps(note, sort_keys=True).encode())
    for name in INDEX:
        crc = zlib.crc32(np.ascontiguousarray(columns[name]).data, crc)
    return crc


class Store(LatentSource):
    """The latents of one split of a store, as `views` that were encoded; `holdout` is as encoded, or `None`."""

    def __init__(self, root: str | Path, views: ImageViews, holdout: int | None, split: str, mirrored: bool) -> None:
        self.root = root = Path(root)
        self.views = views
        self.manifest = read_manifest(root)
        self._check(holdout, mirrored)
        lines = [line for line in self.manifest["shards"] if line["file"].startswith(f"{split}-")]
        self._replaced = sum(line["replaced"] for line in lines)
        note = {"split": split, "store": store_digest(self.manifest)}
        shards = [self._opened(line, note) for line in lines]
        self._reader = Reader([root / line["file"] for line in lines])
        variants = 2 if self.manifest["mirrored"] else 1
        shapes = {"sizes": (0, 2), "labels": (0,), "images": (0,), "rules": (0,), "checks": (0, variants)}
        columns = {
            name: np.concatenate([np.zeros(shape, np.int32), *(shard.columns[name] for shard in shards)])
            for name, shape in shapes.items()
        }
        stride = self.manifest["tokenizer"]["stride"]
        entries = Entries(columns["images"], columns["rules"], columns["sizes"].astype(np.int64) * stride)
        self._items = views.items(entries, self.manifest["views"])
        self._complete(entries, split)
        self._sizes, self._checks = columns["sizes"], columns["checks"]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(s.columns["labels"]) for s in shards])
        begins = [s.values.begin + s.columns["offsets"][:-1] * s.values.dtype.itemsize for s in shards]
        self._begin = np.concatenate([np.zeros(0, np.int64), *begins])
        self._dtype = shards[0].values.dtype if shards else torch.float32
        self._planes = self.manifest["tokenizer"]["channels"] * len(self.manifest["tokenizer"]["moments"])
        self.class_names: list[str] = self.manifest["classes"]
        self.labels = columns["labels"][self._items].astype(np.int64)
        self.sizes = entries.sizes[self._items]
        self.fingerprint = fingerprint(self.manifest)

    def _check(self, holdout: int | None, mirrored: bool) -> None:
        manifest, root = self.manifest, self.root
        if manifest["shards"] is None:
            raise ValueError(f"data.root={root} is not complete; give the command that encodes it again")
        missing, encoded = sorted(set(self.views.rules) - set(manifest["views"])), manifest["source"]["holdout"]
        if missing:
            held = ", ".join(manifest["views"])
            raise ValueError(
                f"data.root={root} holds {held}, and data.view={self.views.name} needs {' and '.join(missing)}; "
                f"choose the view that was encoded, or encode again"
            )
        if mirrored and not manifest["mirrored"]:
            raise ValueError(
                f"data.root={root} holds no mirrored latents; encode with data.flip=true, or data.flip=false"
            )
        if holdout not in (None, encoded):
            raise ValueError(f"data.root={root} was encoded with data.holdout={encoded}, not {holdout}")

    def _opened(self, line: Mapping[str, Any], note: Mapping[str, str]) -> ShardIndex:
        """The index of a shard, as the manifest has it; its own note says that it belongs there."""
        file = self.root / line["file"]
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {REPAIR}")
        if file.stat().st_size != line["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, not {line['bytes']:,}; {REPAIR}")
        index = read_index(file)
        if manifest_line(file, index) != dict(line) or not note.items() <= index.note.items():
            raise ValueError(f"{file} is not the one that the manifest describes; {REPAIR}")
        del index.columns["names"]  # the longest of them, and of no use for training
        return index

    def _complete(self, entries: Entries, split: str) -> None:
        """Refuse a view that only some images were encoded in, and images that are too large or do not divide."""
        unit, sizes = self.views.unit, entries.sizes[self._items]
        slots, images = len(self.views.slots), self.manifest["splits"][split]["images"]
        if self.views.name != "flexible" and len(self._items) != slots * images:
            raise ValueError(f"data.root={self.root} was encoded for data.view=flexible; not every image has this view")
        if (sizes % unit).any():
            raise ValueError(
                f"data.root={self.root} has sides that do not divide into tokens of {unit} pixels; encode with "
                f"patch_size={unit // self.manifest['tokenizer']['stride']}"
            )
        largest = int((sizes // unit).prod(axis=1).max(initial=0))
        if "native" in self.views.rules and largest > self.views.max_tokens:
            raise ValueError(
                f"data.root={self.root} holds images of {largest:,} tokens; raise data.max_tokens and "
                f"data.max_image_tokens, now {self.views.max_tokens:,}, or encode with the smaller number"
            )

    def moments(self, index: int, mirrored: bool) -> Tensor:
        """(C, h, w), or (2 C, h, w) mean and log-variance, of an image or its mirror image, in the stored dtype."""
        entry = int(self._items[index])
        height, width = self._sizes[entry].tolist()
        count = self._planes * height * width * self._dtype.itemsize
        begin = int(self._begin[entry]) + mirrored * count
        shard = int(self._shard[entry])
        data = self._reader.read(shard, begin, count)
        if zlib.crc32(data) != int(self._checks[entry, int(mirrored)]) & 0xFFFFFFFF:
            file, place = self._reader.files[shard], entry - int(np.searchsorted(self._shard, shard))
            raise ValueError(f"{file} is damaged: entry {place} has not its checksum; {REPAIR}")
        return as_tensor(data, self._dtype).view(self._planes, height, width)

    def report(self) -> list[str]:
        """Counts, views and sizes, and the statistics of the raw latents."""
        codec, low, high = self.manifest["tokenizer"], self.sizes.min(0), self.sizes.max(0)
        mean, std = (float(np.mean(self.manifest["statistics"][key])) for key in ("mean", "std"))
        mirrored = ", also mirrored" if self.manifest["mirrored"] else ""
        return [
            f"{self.root}: {len(self.labels):,} latents of {len(self.class_names)} classes, {low[0]} x {low[1]} to "
            f"{high[0]} x {high[1]} pixels (height x width), as {' and '.join(self.views.rules)}",
            f"  encoded by {codec['name']}, {' and '.join(codec['moments'])} in {self.manifest['dtype']}{mirrored}; "
            f"unscaled mean {mean:.3f}, std {std:.3f}",
            *remarks(self.class_names),
            *([f"  {self._replaced:,} show others of their class, {UNREADABLE}"] if self._replaced else []),
        ]
