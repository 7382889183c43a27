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
| values/NAME, offsets/NAME, checks/NAME | likewise of what a teacher sees; an entry is (mirrored, Z, rows, columns) |
| .../text | likewise of what a text encoder makes of the caption; an entry is (n, E), the same for the mirror image |
| .../captions | likewise of the caption; an entry is its bytes in UTF-8 |

Values are unscaled, as the encoder left them. Everything but the values is the index of a shard; the crc32 of the
index is in the manifest, so that no byte can change unnoticed: one of the index is found when the store is opened,
one of the values when they are read. The metadata say which shard of which store it is, and which images are shown by
others because their own files could not be read.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
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
TEXT = ("text", "captions")
"""What there is of captions; no teacher has these names."""

UNREADABLE = "because their own files could not be read when they were encoded"


class ShardIndex(NamedTuple):
    """The index of a shard, what its metadata say, its checksum, and where its values begin, by what they are of."""

    columns: dict[str, np.ndarray]
    note: dict[str, Any]
    crc32: int
    values: dict[str, Span]  # of the moments, "", and of what teachers see, "/NAME"


class ShardWriter:
    """A shard in memory, of which every entry is put in once; planes are C or, with log-variance, 2 C.

    `features`: the width of each teacher's, by name, each on a grid of `patch_size` latents a side. `captions`: of each
    entry what there is in the order of `TEXT`.
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray], names: list[str], channels: int, planes: int, variants: int,
        dtype: torch.dtype, features: Mapping[str, int] | None = None, patch_size: int = 1,
        features_dtype: torch.dtype = torch.float16, captions: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:  # fmt: skip
        self.columns = {name: np.ascontiguousarray(column, dtype=np.int32) for name, column in columns.items()}
        self.names = names
        self.variants, self.planes = variants, planes  # variants: 2 with mirror images, else 1
        sizes = self.columns["sizes"].astype(np.int64)
        self.offsets = {"": _offsets(variants * planes * sizes.prod(axis=1))}
        grid = (sizes // patch_size).prod(axis=1)
        self.offsets |= {f"/{name}": _offsets(variants * width * grid) for name, width in (features or {}).items()}
        self.values = {
            of: torch.empty(int(offsets[-1]), dtype=features_dtype if of else dtype)
            for of, offsets in self.offsets.items()
        }
        for name, own in zip(TEXT, zip(*captions, strict=True), strict=False):
            self.offsets[f"/{name}"] = _offsets(np.array([values.numel() for values in own]))
            self.values[f"/{name}"] = torch.cat([values.flatten() for values in own])
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.missing = len(sizes)  # entries that are still to be put in
        self.replaced: dict[str, str] = {}  # images that cannot be read -> those that are shown in their place

    def put(self, entries: list[int], moments: Tensor, features: Sequence[Tensor] = ()) -> None:
        """Put in entries of one size, by their numbers in the shard.

        Moments (B, variants, planes, h, w); features, of each teacher, (B, variants, Z, rows, columns).
        """
        kept = [(of, values) for of, values in self.values.items() if of[1:] not in TEXT]
        for (of, values), found in zip(kept, (moments, *features), strict=True):
            for entry, own in zip(entries, found, strict=True):
                values[self.offsets[of][entry] : self.offsets[of][entry + 1]] = own.flatten()
        means = moments[:, 0, : self.sums.shape[1]].double()
        self.sums += torch.stack([means.sum((0, 2, 3)), means.square().sum((0, 2, 3))])
        self.missing -= len(entries)

    def first(self) -> Tensor:
        """(1, planes, h, w) float32, the first entry."""
        height, width = self.columns["sizes"][0].tolist()
        return self.values[""][: self.planes * height * width].float().view(1, self.planes, height, width)

    def write(self, file: Path, note: Mapping[str, Any]) -> None:
        """Write the shard, whole or not at all; the note becomes part of its metadata."""
        names = np.frombuffer(Names(self.names).table, dtype=np.uint8).copy()
        index = {**self.columns, "sums": self.sums.numpy(), "names": names}
        index |= {f"offsets{of}": offsets for of, offsets in self.offsets.items()}
        variants = {of: 1 if of[1:] in TEXT else self.variants for of in self.values}
        index |= {f"checks{of}": checks(own, self.offsets[of], variants[of]) for of, own in self.values.items()}
        note = {**note, "replaced": self.replaced}
        remark = json.dumps({**note, "crc32": _crc(index, note)}, sort_keys=True)
        tensors = {f"values{of}": own for of, own in self.values.items()}
        write_tensors(file, tensors | {key: torch.from_numpy(index[key]) for key in _index(self.values)}, remark)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])


def _index(values: Iterable[str]) -> list[str]:
    """The tensors of the index of a shard that holds these values."""
    return [*INDEX, *(f"{name}{of}" for of in values if of for name in ("offsets", "checks"))]


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
        seen = sorted(name for name in spans if name.startswith("values/"))
        values = {name.removeprefix("values"): spans[name] for name in ("values", *seen)}
        columns = read_tensors(file, {name: spans[name] for name in _index(values)})
        note = json.loads(metadata["genfound"])
        crc = note.pop("crc32")
        intact = crc == _crc(columns, note)
        ends = [int(columns[f"offsets{of}"][-1]) == span.shape[0] for of, span in values.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged: its index cannot be read; {REPAIR}") from None
    if not (intact and all(ends)):
        raise ValueError(f"{file} is damaged: its index has not the checksum that was written with it; {REPAIR}")
    return ShardIndex(columns, note, crc, values)


def verify(file: Path) -> ShardIndex:
    """Read a whole shard, a little at a time."""
    index = read_index(file)
    with open(file, "rb", buffering=2**24) as stream:
        for of, span in index.values.items():
            expected = index.columns[f"checks{of}"].view(np.uint32)
            lengths = np.diff(index.columns[f"offsets{of}"]) // expected.shape[1] * span.dtype.itemsize
            stream.seek(span.begin)
            for entry, length in enumerate(lengths.tolist()):
                if [zlib.crc32(stream.read(length)) for _ in expected[entry]] != expected[entry].tolist():
                    raise _damaged(file, entry, of)
    return index


def _damaged(file: Path, entry: int, of: str) -> ValueError:
    """About an entry of a shard, or what a teacher sees in it."""
    which = f"entry {entry}" + (f" of the features of {of[1:]}" if of else "")
    return ValueError(f"{file} is damaged: {which} has not the checksum that was written with it; {REPAIR}")


def manifest_line(file: Path, index: ShardIndex) -> dict[str, Any]:
    """What the manifest says of a shard."""
    entries, size, replaced = len(index.columns["labels"]), file.stat().st_size, len(index.note["replaced"])
    return {"file": file.name, "entries": entries, "bytes": size, "crc32": index.crc32, "replaced": replaced}


def _crc(columns: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> int:
    crc = zlib.crc32(json.dumps(note, sort_keys=True).encode())
    seen = sorted(key.removeprefix("checks") for key in columns if key.startswith("checks/"))
    for name in _index(seen):
        crc = zlib.crc32(np.ascontiguousarray(columns[name]).data, crc)
    return crc


class _Places(NamedTuple):
    """Where values of each entry are: the first byte in its shard, the bytes of a variant, and the crc32 of each."""

    begins: np.ndarray
    lengths: np.ndarray
    checks: np.ndarray
    dtype: torch.dtype

    @classmethod
    def of(cls, shards: Sequence[ShardIndex], of: str) -> "_Places":
        begins, lengths, checked = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
        for shard in shards:
            span, offsets, own = shard.values[of], shard.columns[f"offsets{of}"], shard.columns[f"checks{of}"]
            begins.append(span.begin + offsets[:-1] * span.dtype.itemsize)
            lengths.append(np.diff(offsets) * span.dtype.itemsize // own.shape[1])
            checked.append(own)
        dtype = shards[0].values[of].dtype if shards else torch.float32
        every = np.concatenate(checked) if checked else np.zeros((0, 1), np.int32)
        return cls(np.concatenate(begins), np.concatenate(lengths), every, dtype)


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
        shapes = {"sizes": (0, 2), "labels": (0,), "images": (0,), "rules": (0,)}
        columns = {
            name: np.concatenate([np.zeros(shape, np.int32), *(shard.columns[name] for shard in shards)])
            for name, shape in shapes.items()
        }
        stride = self.manifest["tokenizer"]["stride"]
        entries = Entries(columns["images"], columns["rules"], columns["sizes"].astype(np.int64) * stride)
        self._items = views.items(entries, self.manifest["views"])
        self._complete(entries, split)
        self._sizes = columns["sizes"]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(s.columns["labels"]) for s in shards])
        self._features: dict[str, Any] = self.manifest.get("features", {}).get("teachers", {})
        self.encoder: dict[str, Any] | None = self.manifest.get("text", {}).get("encoder")  # of captions
        held = (*self._features, *(TEXT if self.encoder else ()))
        self._places = {of: _Places.of(shards, of) for of in ("", *(f"/{name}" for name in held))}
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
        return self._values("", entry, mirrored).view(self._planes, *self._sizes[entry].tolist())

    def features(self, index: int, mirrored: bool, names: Sequence[str]) -> list[Tensor]:
        """Each (Z, rows, columns), what teachers see in an image or its mirror image, in the stored dtype."""
        entry, patch = int(self._items[index]), self.manifest["patch_size"]
        grid = (self._sizes[entry] // patch).tolist()
        return [self._values(f"/{name}", entry, mirrored).view(self._features[name]["width"], *grid) for name in names]

    def caption(self, index: int) -> str:
        """In words."""
        return self._values("/captions", int(self._items[index]), False).numpy().tobytes().decode()

    def text(self, index: int) -> Tensor:
        """(n, E), what the text encoder has made of the caption, in the stored dtype."""
        assert self.encoder is not None
        return self._values("/text", int(self._items[index]), False).view(-1, self.encoder["width"])

    def _values(self, of: str, entry: int, mirrored: bool) -> Tensor:
        """Flat, of an entry or its mirror image."""
        shard, places = int(self._shard[entry]), self._places[of]
        count = int(places.lengths[entry])
        data = self._reader.read(shard, int(places.begins[entry]) + mirrored * count, count)
        if zlib.crc32(data) != int(places.checks[entry, int(mirrored)]) & 0xFFFFFFFF:
            raise _damaged(self._reader.files[shard], entry - int(np.searchsorted(self._shard, shard)), of)
        return as_tensor(data, places.dtype)

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
            *(f"  what {name} sees, {own['width']} channels" for name, own in self._features.items()),
            *([f"  captions, {self.encoder['width']} values of each token"] if self.encoder else []),
            *remarks(self.class_names),
            *([f"  {self._replaced:,} show others of their class, {UNREADABLE}"] if self._replaced else []),
        ]
