"""A folder of images: root/<class>/<file>, any sizes, any format that Pillow reads.

Files are judged by content, not by name. All are decoded once when the folder is first seen, so that a file
that cannot be read is reported before training and never met during it; the result is kept beside the
runs, keyed by path, size and time of change, and later starts look only at new files.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from genfound.data.views import center_crop, native_size, resize

Record = dict[str, Any]
"""What is known of a file: size and mtime, then height, width and mode, or why it cannot be read."""

ORIENTATION = 0x0112


class ImageFolder:
    """Real images at their native sizes, or centre-cropped.

    EXIF rotation is applied; palettes, grey, 16-bit and CMYK images are converted to RGB; transparency is
    laid on white; of an animation the first frame is used.

    Args:
        root: folder with one folder per class.
        holdout: of each class every holdout-th image validates; `None` holds none out.
        view: `native` or `square`.
        size: side of the square view in pixels.
        max_tokens: of one pack.
        max_image_tokens: larger images are reduced to it; `None` is `max_tokens`.
        unit: pixels per token side.
        split: `train` or `val`.
        index: folder for what is remembered about the files.

    Raises:
        FileNotFoundError: the root, or class folders in it, or readable images do not exist.
        ValueError: unknown view, or a square that does not divide into tokens.
    """

    def __init__(
        self,
        *,
        root: str,
        holdout: int | None,
        view: str,
        size: int,
        max_tokens: int,
        max_image_tokens: int | None,
        unit: int,
        split: str,
        seed: int,
        index: str,
    ) -> None:
        if view not in ("native", "square"):
            raise ValueError(f"data.view={view} is unknown; choose native or square")
        if view == "square" and size % unit:
            raise ValueError(f"data.size={size} must be a multiple of {unit} pixels (tokenizer stride x patch)")
        self.view, self.size, self.unit = view, size, unit
        self.max_tokens = min(max_image_tokens or max_tokens, max_tokens)
        self.root = Path(root)
        self.class_names = class_folders(self.root)
        self.records = _known(self.root, self.class_names, Path(index))
        good = [file for file, record in self.records.items() if "error" not in record]
        if not good:
            raise FileNotFoundError(f"data.root={root}: none of {len(self.records)} files can be read as an image")
        self.files = [file for file, val in zip(good, held_out(good, holdout), strict=True) if val == (split == "val")]
        self.labels = np.array([self.class_names.index(f.split("/", 1)[0]) for f in self.files], dtype=np.int64)
        planned = [self._planned(self.records[file]) for file in self.files]
        self.sizes = np.array(planned, dtype=np.int64).reshape(-1, 2)
        facts = [(f, r["bytes"], r.get("height"), r.get("width")) for f, r in sorted(self.records.items())]
        self.fingerprint = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()

    def _planned(self, record: Record) -> tuple[int, int]:
        if self.view == "square":
            return self.size, self.size
        return native_size(record["height"], record["width"], self.unit, self.max_tokens)

    def image(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8.

        Raises:
            ValueError: the file has become unreadable since the folder was indexed.
        """
        file = self.root / self.files[index]
        try:
            picture = open_rgb(file)
        except OSError as error:
            raise ValueError(f"{file} could be read when training began and cannot now: {error}") from None
        height, width = (int(side) for side in self.sizes[index])
        if self.view == "square":
            picture = center_crop(picture, self.size)
        else:
            picture = resize(picture, height, width, Image.Resampling.BICUBIC)
        return np.asarray(picture)

    def report(self) -> list[str]:
        """Counts of classes, sizes, and what was skipped, converted, rotated or reduced."""
        good = [r for r in self.records.values() if "error" not in r]
        low, high = self.sizes.min(0), self.sizes.max(0)
        lines = [
            f"{self.root}: {len(good):,} images of {len(self.class_names)} classes, "
            f"{low[0]} x {low[1]} to {high[0]} x {high[1]} pixels after rounding (height x width)"
        ]
        notes: Counter[str] = Counter(note for record in good for note in record["notes"])
        if self.view == "native":
            over = sum((r["height"] // self.unit) * (r["width"] // self.unit) > self.max_tokens for r in good)
            notes[f"reduced to {self.max_tokens:,} tokens"] = over
        lines += [f"  {count:,} {note}" for note, count in notes.items() if count]
        bad = {file: record["error"] for file, record in self.records.items() if "error" in record}
        if bad:
            lines.append(f"  {len(bad):,} skipped, they cannot be read as images:")
            lines += [f"    {self.root / file}: {why}" for file, why in list(bad.items())[:10]]
        if len(bad) > 10:
            lines.append(f"    and {len(bad) - 10:,} more")
        return lines


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders.

    Raises:
        FileNotFoundError: the root is not a folder, or has none inside.
        PermissionError: the root cannot be listed.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"data.root={root} has no class folders; put the images into {root}/<class>/")
    return names


def held_out(files: list[str], every: int | None) -> Iterator[bool]:
    """Whether each of the files (sorted, `class/name`) validates: the last of every `every` of its class."""
    seen: Counter[str] = Counter()
    for file in files:
        name = file.split("/", 1)[0]
        seen[name] += 1
        yield every is not None and seen[name] % every == 0


def open_rgb(file: Path) -> Image.Image:
    """Decode a file by its content, upright, as RGB.

    Raises:
        OSError: it cannot be decoded (truncated, empty, not an image).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file) as picture:
                picture.load()
                return _rgb(ImageOps.exif_transpose(picture))
        except (UnidentifiedImageError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise OSError(str(error)) from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(picture, dtype=np.float64)
        return Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _known(root: Path, class_names: list[str], index: Path) -> dict[str, Record]:
    """Every file with what is known of it, from the index where it is still true."""
    files = sorted(
        str(path.relative_to(root))
        for name in class_names
        for path in (root / name).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    cache = index / f"{hashlib.blake2b(str(root.resolve()).encode(), digest_size=8).hexdigest()}.json"
    remembered: dict[str, Record] = json.loads(cache.read_text()) if cache.is_file() else {}
    stats = {file: (root / file).stat() for file in files}
    current = {
        file: record
        for file, record in remembered.items()
        if file in stats and (record["bytes"], record["mtime"]) == (stats[file].st_size, stats[file].st_mtime_ns)
    }
    new = [file for file in files if file not in current]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        examined = pool.map(lambda file: _examine(root / file), new)
        for file, record in zip(new, examined, strict=True):
            current[file] = record | {"bytes": stats[file].st_size, "mtime": stats[file].st_mtime_ns}
    if new:
        index.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(current))
        temporary.replace(cache)
    return {file: current[file] for file in files}


def _examine(file: Path) -> Record:
    """Decode a file once."""
    if file.stat().st_size == 0:
        return {"error": "the file is empty"}
    try:
        picture = open_rgb(file)
        with Image.open(file) as original:
            notes = _notes(original, file)
    except OSError as error:
        return {"error": str(error).splitlines()[0].replace(str(file), file.name)}
    return {"height": picture.height, "width": picture.width, "notes": notes}


def _notes(original: Image.Image, file: Path) -> list[str]:
    """What is unusual about a file, in the words of the report."""
    notes = []
    if original.mode != "RGB":
        notes.append(f"converted from {original.mode} to RGB")
    if original.getexif().get(ORIENTATION, 1) != 1:
        notes.append("rotated upright by their EXIF tag")
    if getattr(original, "n_frames", 1) > 1:
        notes.append("animated, of which the first frame is used")
    suffix = Image.registered_extensions().get(file.suffix.lower())
    if suffix != original.format and not {suffix, original.format} <= {"JPEG", "MPO"}:
        notes.append(f"of format {original.format} with the suffix {file.suffix}")
    return notes
