"""Files of images in class folders: which there are, what is known of each, and the view that is taken of them.

Looking into a file is slow where there are many, so what was found is kept in an index beside the runs, and
later starts look only into files that are new or have changed. One process of a machine looks at a time; the
others wait for its index.
"""

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from genfound.data.images.base import PictureSource, held_out
from genfound.data.images.names import Names, remarks, shown
from genfound.data.images.views import ImageViews
from genfound.runtime.files import atomic_write, digest, hidden, lock

MANY = 20_000
"""So many new files are announced, because looking into them takes a while."""

RULES = 2
"""Counted up when files that were refused become readable, or the other way round."""


class FileInfo(NamedTuple):
    """What was found in a file: its size in pixels, and what is unusual, in the words of the report."""

    height: int
    width: int
    notes: Sequence[str]


Listed = dict[str, tuple[int, int]]
"""Sorted files, each with its size in bytes and its time of change in ns."""

Examine = Callable[[Path], FileInfo]
"""Looks into a file; an OSError says in one line why it cannot be read."""


@dataclass(frozen=True)
class FileIndex:
    """All files of some class folders, in columns; also the contents of an index."""

    names: list[str]  # sorted, `class/file`; or `archive/member`, in their order
    bytes: list[int]
    stamps: list[int]  # times of change, in ns; or places in the archive
    heights: list[int]  # in pixels; 0 where a file cannot be read
    widths: list[int]
    notes: dict[str, list[str]]  # of unusual files
    errors: dict[str, str]  # of files that cannot be read, why not
    ignored: dict[str, int]  # how many files were passed over because of their suffix, by suffix

    @property
    def good(self) -> list[int]:
        """Places of the files that can be read."""
        return [i for i, height in enumerate(self.heights) if height]

    @property
    def fingerprint(self) -> str:
        """Changes with any name, size in bytes, or size in pixels."""
        pixels = ((h or None, w or None) for h, w in zip(self.heights, self.widths, strict=True))
        facts = [(name, size, *pair) for name, size, pair in zip(self.names, self.bytes, pixels, strict=True)]
        return digest(repr(facts))

    def save(self, file: Path) -> None:
        """Write the index, whole or not at all."""
        atomic_write(file, lambda temporary: temporary.write_text(json.dumps(vars(self))))


class ImageFiles(PictureSource, ABC):
    """Image files in the views that are wanted of them: what image sources have in common."""

    def __init__(
        self, root: Path, class_names: list[str], found: FileIndex, views: ImageViews, holdout: int | None, split: str,
        classes: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        if classes is None:  # by their folders
            numbers = {name: number for number, name in enumerate(class_names)}
            classes = np.array([numbers[found.names[i].split("/", 1)[0]] for i in found.good], dtype=np.int64)
        kept = held_out(classes, holdout) == (split == "val")
        places = np.array(found.good)[kept].tolist()
        self.root, self.found, self.class_names = root, found, class_names
        self.views, self.holdout = views, holdout
        self.files = [found.names[i] for i in places]  # of the taken images
        self.stamps, self.bytes = (
            np.array([c[i] for i in places], dtype=np.int64) for c in (found.stamps, found.bytes)
        )
        self.stand_ins: dict[int, int] = {}  # images that this process could not read -> those shown in their place
        self.classes = classes[kept]
        self.entries = views.entries([found.heights[i] for i in places], [found.widths[i] for i in places])
        self.items = views.items(self.entries)  # of a pass; `labels`, `sizes` and `image` go by these
        self.labels = self.classes[self.entries.images[self.items]]
        self.sizes = self.entries.sizes[self.items]
        self.fingerprint = found.fingerprint + ("" if views.decode == "exact" else f"-{views.decode}")

    def __getstate__(self) -> dict[str, Any]:
        """What data workers need: not what was found, and names in one piece of memory."""
        kept = {key: value for key, value in vars(self).items() if key not in ("found", "sizes", "fingerprint")}
        return {**kept, "files": Names(self.files)}

    @abstractmethod
    def picture(self, number: int, least: tuple[int, int] | None) -> Image.Image:
        """One of the taken images, RGB; see `opened` for `least`."""

    def image(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8, an item of the pass."""
        entry = int(self.items[index])
        return self.entry(entry, [self.entries.sizes[entry]])[0]

    def rendered(self, index: int, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """See `Rerendered`; of an item of the pass."""
        return self.entry(int(self.items[index]), [np.array(size) for size in sizes])

    def entry(self, entry: int, sizes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each (height, width, 3) uint8, see `rendered`."""
        number, rule = int(self.entries.images[entry]), int(self.entries.rules[entry])
        picture = self.picture(number, self.views.least(np.max(sizes, axis=0)))
        return [self.views.render(picture, rule, size) for size in sizes]

    def report(self) -> list[str]:
        """Counts of classes and sizes, and what was converted, reduced, left out or skipped."""
        found, views = self.found, self.views
        low, high = self.entries.sizes.min(0), self.entries.sizes.max(0)
        of_what = f"of {len(self.class_names)} classes" if self.class_names else "with captions"
        lines = [
            f"{self.root}: {len(found.good):,} images {of_what}, "
            f"{low[0]} x {low[1]} to {high[0]} x {high[1]} pixels after rounding (height x width)"
        ]
        notes = Counter(note for notes in found.notes.values() for note in notes)
        notes[f"reduced to {views.max_tokens:,} tokens"] = views.reduced(found.heights, found.widths)
        notes["left out, they have too few tokens"] = len(self.files) - len(np.unique(self.entries.images))
        notes[f"shown in a pass, as {' and '.join(views.rules)}"] = len(self.items) if len(views.rules) > 1 else 0
        lines += [f"  {count:,} {note}" for note, count in notes.items() if count] + remarks(self.class_names)
        if self.holdout is not None and len(self.files) == len(found.good):
            lines.append(f"  none held out for validation: no class has data.holdout={self.holdout} images")
        if found.ignored:
            listed = ", ".join(f"{count:,} {suffix or 'without any'}" for suffix, count in found.ignored.items())
            lines.append(f"  {sum(found.ignored.values()):,} ignored because of their suffix: {shown(listed)}")
        bad = list(found.errors.items())
        if bad:
            lines.append(f"  {len(bad):,} skipped, they cannot be read as images:")
            lines += [shown(f"    {self.root / file}: {why}") for file, why in bad[:10]]
        if len(bad) > 10:
            lines.append(f"    and {len(bad) - 10:,} more")
        return lines


def index_file(index: Path, root: Path, purpose: str) -> Path:
    """Where it is remembered what was found below a root for a purpose, by the present rules."""
    return index / f"{digest(os.fsencode(f'{root.resolve()} {purpose} {RULES}'))}.json"


def known(
    root: Path, class_names: list[str], cache: Path, examine: Examine, suffixes: tuple[str, ...] = ()
) -> FileIndex:
    """Every file in the class folders, if any suffixes are given of these, with what is known of it."""
    listed, ignored = _listed(root, class_names, suffixes)
    found = _remembered(cache, listed, ignored)
    if found is None:
        with lock(cache, wait=True):
            found = _remembered(cache, listed, ignored) or _look(root, listed, ignored, _read(cache), examine)
            found.save(cache)
    if not found.good:
        raise FileNotFoundError(f"data.root={root}: none of {len(found.names)} files can be read as an image")
    empty = sorted(set(class_names) - {found.names[i].split("/", 1)[0] for i in found.good})
    if empty:
        more = f" (nor do {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise FileNotFoundError(f"{root / empty[0]} holds no image that can be read{more}; fill or remove the folder")
    return found


def _listed(root: Path, class_names: list[str], suffixes: tuple[str, ...]) -> tuple[Listed, dict[str, int]]:
    """Sorted files with their sizes in bytes and times of change, and how many were passed over, by suffix."""
    stats: Listed = {}
    ignored = Counter[str]()
    for name in class_names:
        folder = str(root / name)
        for entry in _entries(folder):
            leads = _leads_to_file(entry)
            if suffixes and leads and not entry.name.lower().endswith(suffixes):
                ignored[Path(entry.name).suffix.lower()] += 1
                continue
            stat = entry.stat(follow_symlinks=leads)
            stats[name + entry.path[len(folder) :]] = stat.st_size, stat.st_mtime_ns
    return {file: stats[file] for file in sorted(stats)}, dict(sorted(ignored.items()))


def _leads_to_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself, or into a folder that is closed
        return False


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """All that is no folder, in a folder and those in it; what is hidden is left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)
            else:
                yield entry


def _read(cache: Path) -> FileIndex | None:
    try:
        return FileIndex(**json.loads(cache.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none yet, or of another version
        return None


def _remembered(cache: Path, listed: Listed, ignored: dict[str, int]) -> FileIndex | None:
    """The index, if it is true of these very files."""
    found = _read(cache)
    if found is None or found.ignored != ignored or found.names != list(listed):
        return None
    return found if [*zip(found.bytes, found.stamps, strict=True)] == [*listed.values()] else None


def _look(root: Path, listed: Listed, ignored: dict[str, int], old: FileIndex | None, examine: Examine) -> FileIndex:
    found: dict[str, FileInfo | str] = {}
    if old:
        rows = zip(old.names, old.bytes, old.stamps, old.heights, old.widths, strict=True)
        same = ((name, h, w) for name, size, stamp, h, w in rows if listed.get(name) == (size, stamp))
        found = {name: old.errors.get(name) or FileInfo(h, w, old.notes.get(name, ())) for name, h, w in same}
    new = [name for name in listed if name not in found]
    if len(new) > MANY:
        print(f"{root}: looking into {len(new):,} new files; this is done once", flush=True)
    found |= zip(new, _examined(root, new, examine), strict=True)
    good = {name: look for name in listed if isinstance(look := found[name], FileInfo)}
    return FileIndex(
        names=list(listed),
        bytes=[size for size, _ in listed.values()],
        stamps=[stamp for _, stamp in listed.values()],
        heights=[good[name].height if name in good else 0 for name in listed],
        widths=[good[name].width if name in good else 0 for name in listed],
        notes={name: list(look.notes) for name, look in good.items() if look.notes},
        errors={name: look for name in listed if isinstance(look := found[name], str)},
        ignored=ignored,
    )


def _unfit(file: Path) -> str | None:
    """Why it can be no image, if that is plain without opening it."""
    if not file.exists():
        return "a link that leads nowhere"
    if file.is_dir():
        return "a link to a folder, which is not followed; only a class may be one"
    if not file.is_file():
        return "not a regular file"
    return None if file.stat().st_size else "the file is empty"


def _examined(root: Path, names: list[str], examine: Examine) -> Iterator[FileInfo | str]:
    """What was found in each file, or why it cannot be read."""

    def one(name: str) -> FileInfo | str:
        file = root / name
        try:
            return _unfit(file) or examine(file)
        except OSError as error:
            return str(error).splitlines()[0].replace(str(file), file.name)

    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # here too: threads mix up the filters that they set and restore
        for first in range(0, len(names), 1000):
            yield from pool.map(one, names[first : first + 1000])
